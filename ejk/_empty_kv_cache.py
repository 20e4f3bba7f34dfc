"""`ejk.empty_kv_cache`: the pools that the operations read and write, and their scales."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ejk._cache_types import CACHE_DTYPES, CacheType, cache_type_of
from ejk._describe import describe
from ejk._indices import exceeds, static_int
from ejk._nearest import did_you_mean
from ejk._pools import check_layout
from ejk._typing import Flag, StaticInt, typed
from ejk.backends.layouts import LAYOUTS, CacheLayout, Layout


class KVCache(NamedTuple):
    """The pools of a cache, in the order in which the operations take and return them.

    Attributes:
        key_cache: of keys; fused with that of values, or latent.
        value_cache: of values; None of fused and latent pools.
        key_scale: float32, one per token and head; None where the cache has none.
        value_scale: the same of the values.
    """

    key_cache: jax.Array
    value_cache: jax.Array | None = None
    key_scale: jax.Array | None = None
    value_scale: jax.Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pools together; also of shapes, as `jax.eval_shape` returns them."""
        return sum(pool.size * pool.dtype.itemsize for pool in self if pool is not None)


@typed
def empty_kv_cache(
    num_pages: StaticInt,
    num_kv_heads: StaticInt,
    page_size: StaticInt,
    head_dim: StaticInt,
    *,
    dtype: Any = "bfloat16",
    num_layers: StaticInt = 1,
    value_head_dim: StaticInt | None = None,
    cache_layout: CacheLayout = "HND",
    fused: Flag = False,
    latent: Flag = False,
    token_scales: Flag | None = None,
) -> KVCache:
    """Return pools of pages, zeroed, for `ejk.write_kv_cache` and both attentions.

    The pools of all layers are one: `num_layers * num_pages` pages, those of layer `i` from
    `i * num_pages` on, which `ejk.layer_block_tables` and `ejk.layer_slot_mapping` name. Their
    dtypes are those that the operations return, so that a step that is handed its own result
    compiles once.

    Args:
        num_pages: of each layer.
        num_kv_heads: of keys and values.
        page_size: slots of a page.
        head_dim: entries of a key.
        dtype: of the cache: `"bfloat16"`, `"float16"`, `"float32"`, `"int8"`, `"float8_e4m3fn"`,
            `"float8_e5m2"`, or `"int4"`, which is held as uint8, two entries a byte.
        num_layers: that share the pools.
        value_head_dim: entries of a value; those of a key if None.
        cache_layout: `"HND"`, `"NHD"`, `"KV_HEADS_FIRST"`, or `"INTERLEAVED"`, without values of
            its own, as of `ejk.page_attention`.
        fused: keys and values in one pool, on an axis of 2.
        latent: there are no values: they are the first entries of the keys.
        token_scales: there is a scale per token and head, which the write computes. If None, it
            is so for `"int8"` and `"int4"`.

    Returns:
        An `ejk.KVCache`: `(key_cache, value_cache, key_scale, value_scale)`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size out of range, an unknown dtype or layout, or options that exclude each
            other.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> cache = ejk.empty_kv_cache(8, 2, 16, 64, dtype="int8", num_layers=4)
        >>> cache.key_cache.shape, cache.key_scale.shape, cache.nbytes
        ((32, 2, 16, 64), (32, 2, 16), 139264)
    """
    cache_type, element = _type_of(dtype)
    check_layout(cache_layout)
    layout = LAYOUTS[cache_layout]
    _check_options(layout, value_head_dim, bool(fused), bool(latent))
    sizes = {"num_layers": num_layers, "num_pages": num_pages, "page_size": page_size}
    layers, pages, slots = (static_int(name, size, at_least=1) for name, size in sizes.items())
    kv_heads = static_int("num_kv_heads", num_kv_heads, at_least=1)
    if exceeds(layers * pages * slots, 2**31 - 1):
        raise ValueError(
            f"num_layers * num_pages * page_size={layers * pages * slots} must be below 2**31: "
            "slots are 32-bit"
        )
    layout = layout.fused if fused else layout
    kv_heads *= layout.heads_of_head
    axes = {layout.pages: layers * pages, layout.kv_heads: kv_heads, layout.slots: slots}
    shape = [2 if axis == layout.halves else axes[axis] for axis in range(layout.num_axes - 1)]

    def pool(name: str, width: StaticInt) -> jax.Array:
        width = static_int(name, width, at_least=1)
        if width % cache_type.per_element:
            raise ValueError(f"{name}={width} must be even with int4: a byte has two values")
        return jnp.zeros((*shape, width // cache_type.per_element), element)

    has_values = not (fused or latent or layout.interleaved)
    values = (
        ("head_dim", head_dim) if value_head_dim is None else ("value_head_dim", value_head_dim)
    )
    key_cache, value_cache = pool("head_dim", head_dim), pool(*values) if has_values else None
    if not _has_token_scales(cache_type, token_scales):
        return KVCache(key_cache, value_cache)
    scales = jnp.zeros(shape, jnp.float32)
    return KVCache(key_cache, value_cache, scales, jnp.zeros_like(scales) if has_values else None)


def _type_of(dtype: Any) -> tuple[CacheType, np.dtype]:
    """Return what a cache of `dtype` holds, and the dtype of its arrays."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found == jnp.int4:
        found = np.dtype(np.uint8)
    if found is None or found.name not in CACHE_DTYPES:
        names = [name for name in CACHE_DTYPES if name != "uint8"] + ["int4"]
        meant = "float8_e4m3fn" if dtype == "fp8" else dtype  # as vLLM has it
        near = did_you_mean(meant, names) if isinstance(meant, str) else ""
        said = dtype.__name__ if isinstance(dtype, type) else describe(dtype)
        raise ValueError(f"dtype={said} must be one of {', '.join(names)}{near}")
    return cache_type_of(found), found


def _check_options(
    layout: Layout, value_head_dim: StaticInt | None, fused: bool, latent: bool
) -> None:
    """Check that no option excludes another."""
    if layout.interleaved and (fused or latent or value_head_dim is not None):
        given = {"fused": fused, "latent": latent, "value_head_dim": value_head_dim}
        name, value = next(pair for pair in given.items() if pair[1] not in (False, None))
        raise ValueError(
            f'{name}={value} must not come with cache_layout="INTERLEAVED", which has a key and a '
            "value of each head side by side: leave one of them out"
        )
    if fused and latent:
        raise ValueError(
            "fused=True must not come with latent=True, whose values are the keys: leave one out"
        )
    if (fused or latent) and value_head_dim is not None:
        raise ValueError(
            f"value_head_dim={value_head_dim} must be None with {'fused' if fused else 'latent'}="
            "True: there is no pool of values alone"
        )


def _has_token_scales(cache_type: CacheType, token_scales: Flag | None) -> bool:
    """Say whether a cache has a scale per token and head, and check that it may."""
    if token_scales and not cache_type.is_quantised:
        raise ValueError(
            f"token_scales=True must come with a quantised dtype, not {cache_type.name}: leave it "
            "out, as the write computes no scales for it"
        )
    if cache_type.per_element == 2 and token_scales is not None and not token_scales:
        raise ValueError("token_scales=False must not come with int4, which has them: leave it out")
    return cache_type.is_integer if token_scales is None else bool(token_scales)
