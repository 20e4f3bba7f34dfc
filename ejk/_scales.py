"""The checks of `key_scale` and `value_scale`, and how backends see them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._cache_types import CacheType, Scales, cache_type_of
from ejk._describe import describe
from ejk._dtypes import as_float32, check_floats, held_in_float32
from ejk._typing import Array, ScaleArgument


class GivenScales(NamedTuple):
    """What the caller gave, and the pools that it is of."""

    key_scale: ScaleArgument | None
    value_scale: ScaleArgument | None
    key_cache: Array
    latent: bool
    """There are no values but the keys."""
    fused: bool
    """The pool holds keys and values, and so do scales of tokens."""

    def kind(self, num_kv_heads: int) -> Scales:
        """Check the scales and say what has one of its own."""
        kinds: dict[str, Scales] = {
            name: self._kind(name, getattr(self, name), num_kv_heads)
            for name in ("key_scale", "value_scale")
        }
        if self.latent and self.value_scale is not None:
            raise ValueError(
                f"value_scale={describe(self.value_scale)} must be None: the values are those of "
                "the keys, which key_scale is for"
            )
        kind: Scales = "none"
        if "token" in kinds.values():
            self._check_per_token(kinds)
            kind = "token"
        elif "head" in kinds.values():
            kind = "head"
        self._check_enough(cache_type_of(self.key_cache.dtype), kind)
        return kind

    def check_in_place(self) -> None:
        """Check that scales of tokens can be changed where they lie."""
        for name, pool in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if isinstance(pool, Array) and pool.dtype != jnp.float32:
                raise ValueError(
                    f"{name}.dtype={pool.dtype} must be float32 to be written in place: "
                    f"pass {name}.astype(jnp.float32)"
                )

    def operands(self, kind: Scales, num_kv_heads: int) -> dict[str, Any]:
        """Return both as backends see them: None, float32 `[num_kv_heads]`, or those of tokens."""
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        if kind == "token":
            return {name: as_float32(scale) for name, scale in scales.items()}
        if kind == "none":
            return dict.fromkeys(scales)
        of_heads = {name: _of_heads(scale, num_kv_heads) for name, scale in scales.items()}
        return of_heads | ({"value_scale": None} if self.latent else {})

    def _kind(self, name: str, scale: ScaleArgument | None, num_kv_heads: int) -> Scales:
        if scale is None:
            return "none"
        if not isinstance(scale, jax.Array | np.ndarray):
            held_in_float32(name, scale)
            return "head"
        check_floats(**{name: scale})
        if scale.ndim == 0 or scale.shape == (num_kv_heads,):
            return "head"
        of_tokens = self.key_cache.shape[:-1]
        if scale.shape != of_tokens:
            raise ValueError(
                f"{name}.shape={scale.shape} must be (), num_kv_heads={(num_kv_heads,)} or, of a "
                f"scale per token and head, {of_tokens}: the cache's but for the last axis"
            )
        return "token"

    def _check_per_token(self, kinds: dict[str, Scales]) -> None:
        """Check that keys and values both have scales per token, in as many arrays as pools."""
        if self.fused and self.value_scale is not None:
            raise ValueError(
                f"value_scale={describe(self.value_scale)} must be None with scales per token of "
                "fused pools: key_scale holds those of keys and values"
            )
        needed = ("key_scale",) if self.fused or self.latent else tuple(kinds)
        for name in needed:
            if kinds[name] != "token":
                raise ValueError(
                    f"{name}={describe(getattr(self, name))} must be a scale per token and head, "
                    f"{list(self.key_cache.shape[:-1])}, as that of the "
                    f"{'values' if name == 'key_scale' else 'keys'} is"
                )

    def _check_enough(self, cache_type: CacheType, kind: Scales) -> None:
        """Check that integers come with scales, and int4 with one per token and head."""
        if cache_type.is_integer and kind == "none":
            which = "key_scale" if self.latent else "key_scale and value_scale"
            raise ValueError(
                f"key_cache.dtype={cache_type.name} must come with {which}: a number, one per KV "
                "head, or one per token and head"
                + ", which int4 needs"
                * (cache_type.per_element == 2)
            )
        if cache_type.per_element == 2 and kind != "token":
            raise ValueError(
                f"key_scale={describe(self.key_scale)} must be a scale per token and head, "
                f"{list(self.key_cache.shape[:-1])}, with int4, held as uint8"
            )


def _of_heads(scale: ScaleArgument | None, num_kv_heads: int) -> Array:
    """Return a scale of each KV head. What NumPy holds stays there."""
    if isinstance(scale, jax.Array):
        return jnp.broadcast_to(scale.astype(jnp.float32), (num_kv_heads,))
    return np.full(num_kv_heads, 1.0 if scale is None else scale, np.float32)
