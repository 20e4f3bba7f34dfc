"""Checks of `flash_attn_with_kvcache`, in the words of FlashAttention."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Num

from ejk._arguments import check_sizes
from ejk._describe import describe
from ejk._indices import as_int32
from ejk._typing import Array, Bounds, ScalarInt, StaticFloat, StaticInt
from ejk.compat._arguments import Lengths, Tables, Window, check_arrays


def check_call(**given: Any) -> None:
    """Check what each argument is, how they fit, and that there is room for what is appended."""
    if isinstance(given["window_size"], list):
        given["window_size"] = tuple(given["window_size"])
    # With bounds rows are packed.
    in_rows, of_new = (
        "batch seqlen" if given[cuts] is None else "total_tokens"
        for cuts in ("cu_seqlens_q", "cu_seqlens_k_new")
    )
    new: Any = Float[Array, f"{of_new} num_kv_heads head_dim"]
    number: Any = ScalarInt
    lengths: Any = Lengths
    tables: Any = Tables
    bounds: Any = Bounds
    size: Any = StaticInt
    cap: Any = StaticFloat
    pool = Num[Array, "num_pages page_size num_kv_heads head_dim"]
    kinds: dict[str, Any] = {
        "q": Float[Array, f"{in_rows} num_heads head_dim"], "k_cache": pool, "v_cache": pool,
        "k": new | None, "v": new | None, "cache_seqlens": number | lengths | None,
        "cache_batch_idx": lengths | None, "cache_leftpad": lengths | None,
        "page_table": tables | None, "cu_seqlens_q": bounds | None,
        "cu_seqlens_k_new": bounds | None, "window_size": Window,
        "attention_chunk": size | None, "softcap": cap | None,
    }  # fmt: skip
    check_arrays(**{name: (x, kinds[name]) for name, x in given.items()})
    _check_numbers(given["window_size"], given["attention_chunk"], given["softcap"])
    _check_appended(given)
    _check_axes(given)
    if given["k"] is not None:
        pages = 1 if given["page_table"] is None else given["page_table"].shape[1]
        _check_room(
            given["k"], given["cache_seqlens"], given["cu_seqlens_k_new"],
            pages * given["k_cache"].shape[1],
        )  # fmt: skip


def _check_numbers(window_size: Any, attention_chunk: Any, softcap: Any) -> None:
    """Check what says which tokens are seen, and how logits are capped."""
    if min(window_size) < -1:
        raise ValueError(f"{window_size=} must be at least -1 on either side: -1 is no end")
    if attention_chunk is not None and attention_chunk < 0:
        raise ValueError(
            f"attention_chunk={describe(attention_chunk)} must be at least 0: 0 is off"
        )
    limits = np.finfo(np.float32)
    if softcap and not float(limits.tiny) <= softcap <= float(limits.max):
        raise ValueError(
            f"softcap={describe(softcap)} must be 0 or, in float32, from {limits.tiny:.2g} to "
            f"{limits.max:.2g}: 0 is off"
        )


def _check_appended(given: dict[str, Any]) -> None:
    """Check that new keys come with all that says where they go, and nothing without them."""
    for name in ("v", "cu_seqlens_k_new"):
        if given["k"] is None and given[name] is not None:
            raise ValueError(f"{name} must be None with k=None: nothing is appended")
    if given["k"] is None:
        return
    if given["v"] is None:
        raise ValueError("v=None must be an array with k: both are appended")
    if given["cache_seqlens"] is None:
        raise ValueError(
            "cache_seqlens=None must be an int or an integer array [batch] with k: pass how many "
            "tokens the cache holds before it"
        )
    if given["v"].shape[:-1] != given["k"].shape[:-1]:
        raise ValueError(
            f"v.shape={given['v'].shape} must be k.shape={given['k'].shape} but for the last axis"
        )
    for name, pool in (("k", given["k_cache"]), ("v", given["v_cache"])):
        if given[name].shape[-2:] != pool.shape[2:]:
            raise ValueError(
                f"{name}.shape[-2:]={given[name].shape[-2:]} must be "
                f"{name}_cache.shape[2:]={pool.shape[2:]}"
            )


def _check_axes(given: dict[str, Any]) -> None:
    """Check that what each sequence has one of is given for each."""
    cuts, new_cuts = given["cu_seqlens_q"], given["cu_seqlens_k_new"]
    batch = given["q"].shape[0] if cuts is None else cuts.shape[0] - 1
    lengths = given["cache_seqlens"]
    of_sequences = {
        "cache_seqlens": lengths if np.ndim(lengths) else None,
        "k": given["k"] if new_cuts is None else None,
        **{name: given[name] for name in ("cache_batch_idx", "cache_leftpad", "page_table")},
    }
    check_sizes(
        **{name: (x, "batch", batch) for name, x in of_sequences.items()},
        cu_seqlens_k_new=(new_cuts, "batch + 1", batch + 1),
    )


def _check_room(k: Array, lengths: int | Array, cuts: Array | None, capacity: int) -> None:
    """Check that the cache has room for what is appended, where lengths and bounds are known.

    Those of a program that is traced are not, nor what other processes hold.
    """
    for x in (lengths, cuts):
        if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
            return
    held, cuts = jax.device_get((lengths, cuts))
    held = np.maximum(as_int32(held, 2**31 - 1), 0).astype(np.int64)
    new = np.int64(k.shape[1]) if cuts is None else np.diff(as_int32(cuts, 2**31 - 1))
    held, new = np.broadcast_arrays(held, new)
    over = (new > 0) & (held + new > capacity)
    if over.any():
        where = tuple(np.argwhere(over)[0])
        name = f"cache_seqlens[{where[0]}]" if np.ndim(lengths) else "cache_seqlens"
        raise ValueError(
            f"{name}={held[where]} must be at most {capacity - new[where]}, for k to append "
            f"{new[where]} to a cache with room for {capacity}: make k_cache and v_cache longer, "
            "or page_table wider"
        )
