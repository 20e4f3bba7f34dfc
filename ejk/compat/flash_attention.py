"""FlashAttention's attention to a cache: `flash_attn_with_kvcache` of FlashAttention 3, on JAX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ejk._errors import UnsupportedError
from ejk._ragged_page_attention import ragged_page_attention
from ejk._slot_mapping import ragged_slot_mapping
from ejk._typing import Array
from ejk._write_kv_cache import write_kv_cache
from ejk.compat._arguments import drop_in, int32, refuse
from ejk.compat._flash_arguments import check_call

# A window so wide that it ends where `positions` say, and not before.
FAR = 2**30
_MENDS = {
    "qv": "latent attention is ejk.ragged_page_attention with value_cache=None",
    "rotary_cos": "rotate q and k before the call",
    "rotary_sin": "rotate q and k before the call",
    "rotary_seqlens": "rotate q and k before the call",
    "q_descale": "queries have 16 or 32 bits",
    "k_descale": "scales that all sequences share are ejk.ragged_page_attention's key_scale",
    "v_descale": "scales that all sequences share are ejk.ragged_page_attention's value_scale",
}


@drop_in
def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    qv: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: int | Array | None = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    page_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k_new: Array | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attend to a cache, appending to it first, as FlashAttention's function of this name does.

    Where `k` and `v` are given, the caches are returned, too, after what FlashAttention returns:
    JAX writes in place where they are donated. `scheduler_metadata`, `num_splits`, `pack_gqa` and
    `sm_margin` have no effect.

    Args:
        q: `[batch, seqlen_q, num_heads, head_dim]`, or `[total_q, ...]` with `cu_seqlens_q`.
        k_cache: `[num_blocks, page_size, num_kv_heads, head_dim]` with a `page_table`, else
            `[batch_cache, seqlen_cache, num_kv_heads, head_dim]`.
        v_cache: the same; its last axis may differ.
        k: new keys, `[batch, seqlen_new, ...]`, or flat with `cu_seqlens_k_new`.
        v: new values.
        qv: refused, and so are the next two.
        rotary_cos: refused.
        rotary_sin: refused.
        cache_seqlens: tokens in the cache **before** `k`, with which they must be given; None: all
            that there is room for. Traced, as under `jit`, they are not checked: of `k`, tokens for
            which there is no room are not written, and the last of `q` is then the cache's last.
        cache_batch_idx: `[batch]`, the rows of the cache, without a `page_table`.
        cache_leftpad: `[batch]`, the first token that is seen of each sequence. Rows of `q` before
            it see nothing: they are 0.
        page_table: `[batch, blocks]`.
        cu_seqlens_q: `[batch + 1]`.
        cu_seqlens_k_new: `[batch + 1]`.
        max_seqlen_q: a hint.
        rotary_seqlens: refused, and so are the next three.
        q_descale: refused.
        k_descale: refused.
        v_descale: refused.
        softmax_scale: `head_dim ** -0.5` if None.
        causal: False: each query sees the whole cache, later tokens too.
        window_size: `(left, right)`, -1 for no end; `right` may be -1 or 0.
        attention_chunk: a token sees its own chunk of so many positions; 0 is off. Causal alone.
        softcap: 0 is off.
        rotary_interleaved: no effect, as nothing is rotated.
        scheduler_metadata: no effect.
        num_splits: no effect.
        pack_gqa: no effect.
        sm_margin: no effect.
        return_softmax_lse: also return the LSE, natural, -inf where nothing is seen.

    Returns:
        The output, as `q`; with `return_softmax_lse` a tuple of it and the LSE, `[batch, num_heads,
        seqlen_q]` or `[num_heads, total_q]`. With `k`, a tuple that ends in both caches.

    Raises:
        TypeError: an argument of the wrong kind, or a keyword that is another function's.
        UnsupportedError: an argument that is refused.
        ValueError: axes that do not fit each other, `k` without `cache_seqlens` or without room for
            it, and what `ejk.ragged_page_attention` and `ejk.write_kv_cache` refuse.

    Examples:
        >>> import jax.numpy as jnp
        >>> from ejk.compat.flash_attention import flash_attn_with_kvcache
        >>> cache, row = jnp.ones((2, 32, 2, 64)), jnp.ones((2, 1, 2, 64))
        >>> q, lens = jnp.ones((2, 1, 4, 64)), jnp.array([20, 3])
        >>> out, *caches = flash_attn_with_kvcache(q, cache, cache, row, row, cache_seqlens=lens)
        >>> out.shape
        (2, 1, 4, 64)

    Source: the signature of FlashAttention 3 (Shah et al., 2024, arXiv:2407.08608).
    """
    refuse(
        "flash_attn_with_kvcache", _MENDS, qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale
    )  # fmt: skip
    check_call(
        q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, page_table=page_table,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, window_size=window_size,
        attention_chunk=attention_chunk, softcap=softcap,
    )  # fmt: skip
    visible = Visible.of(causal, window_size, attention_chunk, cache_leftpad)
    lens, tables = _tables(q, k_cache, cache_seqlens, cache_batch_idx, page_table, cu_seqlens_q)
    lens, caches = _append(k, v, k_cache, v_cache, lens, tables, cu_seqlens_k_new)
    k_cache, v_cache = caches or (k_cache, v_cache)
    rows, bounds = _packed(q, cu_seqlens_q)
    most = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    positions, window = visible.of_rows(lens, bounds, rows.shape[0])
    lens, tables, bounds = visible.apart(lens, tables, bounds)
    out, lse = ragged_page_attention(
        rows, k_cache, v_cache, lens, tables, bounds, softmax_scale,
        max_q_len=most, cache_layout="NHD", causal=visible.causal, positions=positions,
        sliding_window=window, attn_logits_soft_cap=softcap or None, return_lse=True,
    )  # fmt: skip
    out, lse = _unpacked(out, lse, q)
    more = (*((lse,) if return_softmax_lse else ()), *caches)
    return (out, *more) if more else out


class Visible(NamedTuple):
    """What new tokens see, of what comes before the end of the cache."""

    causal: bool
    window: int | None
    chunk: int
    first: Array | None  # token of each sequence

    @classmethod
    def of(
        cls, causal: bool, window_size: tuple[int, int], chunk: int, first: Array | None
    ) -> "Visible":
        left, right = window_size
        causal = causal or right == 0
        if right > 0 and not causal:
            raise UnsupportedError(
                f"window_size={window_size}: a window ends with the token itself, (left, 0), or "
                "not at all, (left, -1)"
            )
        window = left + 1 if left >= 0 else None
        if (chunk or first is not None) and (window is not None or not causal):
            name = f"attention_chunk={chunk}" if chunk else "cache_leftpad"
            raise UnsupportedError(f"{name} must come with causal=True and without a left window")
        if chunk and first is not None:
            raise UnsupportedError("cache_leftpad must come without attention_chunk")
        return cls(causal, window, chunk, first)

    def of_rows(
        self, lens: jax.Array, bounds: jax.Array, total: int
    ) -> tuple[jax.Array | None, int | None]:
        """Return positions of new tokens and a window, which together show what is to be seen."""
        if not self.chunk and self.first is None:
            return None, self.window
        row = jnp.arange(total, dtype=jnp.int32)
        seq = jnp.clip(jnp.searchsorted(bounds, row, side="right") - 1, 0, lens.shape[0] - 1)
        if self.chunk:
            position = lens[seq] - bounds[seq + 1] + row
            return position // self.chunk * self.chunk + self.chunk - 1, self.chunk
        return self._first()[seq] + FAR - 1, FAR

    def apart(
        self, lens: jax.Array, tables: Array, bounds: jax.Array
    ) -> tuple[jax.Array, Array, jax.Array]:
        """Make the new tokens that lie in padding sequences of their own, which hold nothing.

        Where they shared a sequence with others, each block of rows would read what they see.
        """
        if self.first is None:
            return lens, tables, bounds
        begins, new = bounds[:-1], jnp.maximum(jnp.diff(bounds), 0)
        padding = jnp.clip(self._first() - (lens - new), 0, new)
        cuts = jnp.stack([begins, begins + padding], 1).reshape(-1)
        lens = jnp.stack([jnp.zeros_like(lens), lens], 1).reshape(-1)
        return lens, jnp.repeat(tables, 2, axis=0), jnp.append(cuts, bounds[-1])

    def _first(self) -> jax.Array:
        assert self.first is not None
        return jnp.clip(int32(self.first), 0, FAR)


def _tables(
    q: Array,
    k_cache: Array,
    cache_seqlens: int | Array | None,
    cache_batch_idx: Array | None,
    page_table: Array | None,
    cu_seqlens_q: Array | None,
) -> tuple[jax.Array, Array]:
    """Return the lengths, and a table: without pages, each row of the cache is a page."""
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if page_table is not None and cache_batch_idx is not None:
        raise UnsupportedError(
            "cache_batch_idx must come without page_table: take page_table[cache_batch_idx]"
        )
    if page_table is None and cache_batch_idx is None and batch > k_cache.shape[0]:
        raise ValueError(
            f"k_cache.shape[0]={k_cache.shape[0]} must be at least the batch={batch}, a row each: "
            "name rows by cache_batch_idx, or pages by page_table"
        )
    if page_table is None:
        rows = jnp.arange(batch, dtype=jnp.int32) if cache_batch_idx is None else cache_batch_idx
        page_table = int32(rows)[:, None]
    capacity = page_table.shape[1] * k_cache.shape[1]
    lens = int32(capacity if cache_seqlens is None else cache_seqlens)
    return jnp.broadcast_to(jnp.clip(lens, 0, capacity), (batch,)), page_table


def _packed(x: Array, bounds: Array | None) -> tuple[Array, jax.Array]:
    """Return rows one sequence after the other, and where each begins."""
    if bounds is not None:
        return x, int32(bounds)
    batch, each = x.shape[:2]
    return x.reshape(-1, *x.shape[2:]), each * jnp.arange(batch + 1, dtype=jnp.int32)


def _unpacked(out: jax.Array, lse: jax.Array, q: Array) -> tuple[jax.Array, jax.Array]:
    """Return rows and LSE as `q` was given, by sequence or packed; in the LSE heads come first."""
    if q.ndim == 3:
        return out, lse.T
    return out.reshape(*q.shape[:-1], -1), jnp.swapaxes(lse.reshape(q.shape[:-1]), 1, 2)


def _append(
    k: Array | None,
    v: Array | None,
    k_cache: Array,
    v_cache: Array,
    lens: jax.Array,
    tables: Array,
    bounds: Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Write new tokens, if any, behind those in the cache; return lengths, and written caches."""
    if k is None or v is None:
        return lens, ()
    (keys, cu), (values, _) = _packed(k, bounds), _packed(v, bounds)
    lens = lens + cu[1:] - cu[:-1]
    num_pages, page_size = k_cache.shape[:2]
    slots = ragged_slot_mapping(
        tables, lens, cu, total_tokens=keys.shape[0], page_size=page_size, num_pages=num_pages
    )
    keys, values = write_kv_cache(keys, values, k_cache, v_cache, slots, cache_layout="NHD")
    assert values is not None
    return lens, (keys, values)
