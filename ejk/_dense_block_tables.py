"""`ejk.dense_block_tables`: tables of rows of one width from lists of pages end to end."""

import jax
import jax.numpy as jnp

from ejk._indices import as_int32, static_int
from ejk._typing import Bounds, Indices, StaticInt, typed


@typed
def dense_block_tables(indptr: Bounds, indices: Indices, *, max_blocks: StaticInt) -> jax.Array:
    """Return the table of sequences whose pages are given end to end, as FlashInfer holds them.

        block_tables[s, i] = indices[indptr[s] + i]   for i < indptr[s + 1] - indptr[s], else -1

    Pages from `max_blocks` on are left out; what `indptr` names outside of `indices` is -1.

    Args:
        indptr: where the pages of each sequence begin in `indices`, and where the last one's end.
            Any integer dtype.
        indices: page ids. Any integer dtype.
        max_blocks: entries of a row.

    Returns:
        int32 `[num_seqs, max_blocks]`.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: `indptr` is empty, or `max_blocks` negative.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> print(ejk.dense_block_tables(jnp.array([0, 2, 3]), jnp.array([3, 5, 1]), max_blocks=3))
        [[ 3  5 -1]
         [ 1 -1 -1]]

    Source:
        The page tables of FlashInfer (Ye et al., 2025, arXiv:2501.01005).
    """
    max_blocks = static_int("max_blocks", max_blocks, at_least=0)
    if indptr.shape[0] == 0:
        raise ValueError("indptr.shape[0]=0 must be num_seqs + 1, at least 1")
    size = indices.shape[0]
    if size == 0:
        return jnp.full((indptr.shape[0] - 1, max_blocks), -1, jnp.int32)
    ends = jnp.asarray(as_int32(indptr, size + 1))
    first, end = ends[:-1, None], ends[1:, None]
    at = first + jnp.minimum(jnp.arange(max_blocks, dtype=jnp.int32), size)[None]
    is_there = (first >= 0) & (first <= size) & (at < end) & (at < size)
    ids = jnp.asarray(as_int32(indices, 2**31 - 1))
    return jnp.where(is_there, ids[jnp.where(is_there, at, 0)], -1)
