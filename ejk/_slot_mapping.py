"""`ejk.slot_mapping` and `ejk.ragged_slot_mapping`: where new tokens are to be written."""

import jax
import jax.numpy as jnp

from ejk._arguments import check_sizes
from ejk._indices import as_int32, exceeds, static_int, static_size
from ejk._partition import on_each_device
from ejk._typing import Array, Bounds, Lengths, StaticInt, StaticSize, Tables, typed
from ejk.backends.ragged_page_attention import sequences_of_rows


@typed
def slot_mapping(
    block_tables: Tables, positions: Lengths, *, page_size: StaticInt, num_pages: StaticSize
) -> jax.Array:
    """Return the slot of one token a sequence, as `ejk.write_kv_cache` takes it.

        slot[s] = block_tables[s, p // page_size] * page_size + p % page_size,  p = positions[s]

    The slot is -1, which writes nothing, where the position is negative or past the table, and
    where its entry is outside `[0, num_pages)`.

    Args:
        block_tables: the pages of each sequence, as of `ejk.page_attention`. Any integer dtype.
        positions: of the tokens, `context_lens - 1` of those that attention is to see as the last.
            Any integer dtype.
        page_size: slots of a page.
        num_pages: of the pool, or of one layer if the pool holds several: see
            `ejk.layer_slot_mapping`.

    Returns:
        int32 `[num_seqs]`: on a mesh with explicit axes whole on each device, as writes want it.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: axes that do not fit each other, or sizes out of range.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> tables = jnp.array([[3, 5], [1, -1]])
        >>> print(ejk.slot_mapping(tables, jnp.array([17, 17]), page_size=16, num_pages=8))
        [81 -1]

    Source:
        The slot mapping of vLLM (Kwon et al., 2023, arXiv:2309.06180).
    """
    check_sizes(positions=(positions, "num_seqs", block_tables.shape[0]))
    block_tables, positions = on_each_device(block_tables, positions)
    seqs = jnp.arange(block_tables.shape[0], dtype=jnp.int32)
    return _slots(block_tables, seqs, positions, page_size, num_pages)


@typed
def ragged_slot_mapping(
    block_tables: Tables,
    context_lens: Lengths,
    cu_q_lens: Bounds,
    *,
    total_tokens: StaticSize,
    page_size: StaticInt,
    num_pages: StaticSize,
) -> jax.Array:
    """Return the slot of each new token of a ragged batch, as `ejk.write_kv_cache` takes them.

    Token `i` of sequence `s` is at position `p = n - q_len + i`, with `n` the sequence's length and
    `q_len` its new tokens:

        slot = block_tables[s, p // page_size] * page_size + p % page_size

    `ejk.ragged_page_attention` takes its new tokens to be there, but for a length past the table:
    it counts as the table's capacity in attention, which then takes all new tokens for earlier
    ones. `ejk.check_ragged_page_attention_inputs` finds such lengths.

    The slot is -1, which writes nothing, for rows of no sequence, at negative positions, past the
    table, and where the entry is outside `[0, num_pages)`.

    Args:
        block_tables: the pages of each sequence, as of `ejk.ragged_page_attention`. Any integer
            dtype.
        context_lens: tokens of each sequence, the new ones included. Any integer dtype.
        cu_q_lens: where the new tokens of each sequence begin and end. Any integer dtype.
        total_tokens: rows of the batch, those of no sequence included.
        page_size: slots of a page.
        num_pages: of the pool, or of one layer if the pool holds several: see
            `ejk.layer_slot_mapping`.

    Returns:
        int32 `[total_tokens]`: on a mesh with explicit axes whole on each device, as writes want
        it.

    Raises:
        TypeError: an argument of the wrong rank or dtype kind.
        ValueError: axes that do not fit each other, or sizes out of range.

    Examples:
        >>> import jax.numpy as jnp, ejk
        >>> tables, bounds = jnp.array([[3, 5], [1, 0]]), jnp.array([0, 2, 3])
        >>> sizes = dict(total_tokens=4, page_size=16, num_pages=8)
        >>> print(ejk.ragged_slot_mapping(tables, jnp.array([17, 1]), bounds, **sizes))
        [63 80 16 -1]

    Source:
        The slot mapping of vLLM (Kwon et al., 2023, arXiv:2309.06180).
    """
    num_seqs = block_tables.shape[0]
    check_sizes(
        context_lens=(context_lens, "num_seqs", num_seqs),
        cu_q_lens=(cu_q_lens, "num_seqs + 1", num_seqs + 1),
    )
    num_rows = static_size("total_tokens", total_tokens, at_least=0)
    block_tables, context_lens, cu_q_lens = on_each_device(block_tables, context_lens, cu_q_lens)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    if num_seqs == 0:
        return jnp.full_like(rows, -1)
    bounds = jnp.clip(jnp.asarray(as_int32(cu_q_lens, num_rows)), 0, num_rows)
    bounds = jax.lax.cummax(bounds)
    is_new, seqs = sequences_of_rows(num_seqs, num_rows, bounds)
    # Not clipped to the table, as attention does: the last slots would be written once more.
    lens = jnp.maximum(jnp.asarray(as_int32(context_lens, 2**31 - 1)), 0)
    positions = lens[seqs] - (bounds[seqs + 1] - rows)
    return _slots(block_tables, seqs, jnp.where(is_new, positions, -1), page_size, num_pages)


def _slots(
    block_tables: Array,
    seqs: jax.Array,
    positions: Array,
    page_size: StaticInt,
    num_pages: StaticSize,
) -> jax.Array:
    """Return the slots of `positions` of the sequences `seqs`."""
    page_size = static_int("page_size", page_size, at_least=1)
    pool = static_size("num_pages", num_pages, at_least=0)
    if exceeds(pool * page_size, 2**31 - 1):
        raise ValueError(
            f"num_pages * page_size={pool * page_size} must be below 2**31: slots are 32-bit"
        )
    max_blocks = block_tables.shape[1]
    if max_blocks == 0:
        return jnp.full(positions.shape, -1, jnp.int32)
    positions = jnp.asarray(as_int32(positions, 2**31 - 1))
    is_inside = (positions >= 0) & (positions // page_size < max_blocks)
    block = jnp.where(is_inside, positions // page_size, 0)
    page = jnp.asarray(as_int32(block_tables, pool))[seqs, block]
    exists = is_inside & (page >= 0) & (page < pool)
    # What is not there is selected away before it is multiplied: no product leaves 32 bits.
    return jnp.where(exists, jnp.where(exists, page, 0) * page_size + positions % page_size, -1)
