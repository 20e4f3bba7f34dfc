"""Which tiles are a program's: an item of the plan and a KV head each."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ejk.backends.mosaic_gpu._arithmetic import divide_up
from ejk.backends.mosaic_gpu.ragged_page_attention.memory import Inputs, Shared
from ejk.backends.mosaic_gpu.ragged_page_attention.sizes import PrefillSizes

# Bytes of keys and values that may be in use at a time, as in FlashAttention-3.
L2_BYTES = 32 * 2**20


class Item(NamedTuple):
    """A row of the plan: see `RaggedPlan`."""

    seq: Any
    first_token: Any  # of the sequence
    q_len: Any
    block: Any
    piece: Any
    pieces: Any
    part: Any
    length: Any


class Tile(NamedTuple):
    """Query rows of a sequence and a KV head, and what is visible to some of them."""

    seq: Any
    kv_head: Any
    token: Any  # of the batch: the first of the tile
    count: Any  # tokens
    position: Any  # of the first token; negative ones see nothing, if causal
    begin: Any  # positions in [begin, end) are visible to some row
    end: Any
    seen_begin: Any  # and those in [seen_begin, seen_end) to some row of the sequence
    seen_end: Any
    whole: Any  # pages of positions before it that are visible all exist
    part: Any  # the first row of the part that is written, or -1: the result itself

    def first_block(self, sizes: PrefillSizes) -> Any:
        return lax.div(self.begin, sizes.block_kv)

    def blocks(self, sizes: PrefillSizes) -> Any:
        """Return how many blocks of keys there are: at least one, which nobody may see."""
        blocks = divide_up(self.end, sizes.block_kv) - self.first_block(sizes)
        return jnp.maximum(blocks, 1)


def counts_of(inputs: Inputs, sizes: PrefillSizes) -> tuple[Any, Any]:
    """Return how many narrow items the plan has, and how many wide ones."""
    narrow, wide = sizes.plan.narrow, sizes.plan.wide
    num_narrow = jnp.clip(inputs.work[0, 0], 0, narrow.max_items)
    if wide is None:
        return num_narrow, jnp.int32(0)
    return num_narrow, jnp.clip(inputs.work[0, 2], 0, wide.max_items)


def my_tiles(inputs: Inputs, sizes: PrefillSizes) -> Any:
    """Return how many tiles this program takes."""
    return sum(_shares(inputs, sizes))


def my_tile(r: Any, inputs: Inputs, sizes: PrefillSizes) -> Tile:
    """Return this program's tile `r`."""
    problem, granule = sizes.problem, sizes.plan.granule
    item, rows, kv_head = _my_item(r, inputs, sizes)
    tokens = lax.div(rows, problem.group)
    item, kv_head = _by_heads(item, kv_head, tokens, sizes)
    first = item.block * tokens
    count = jnp.minimum(tokens, item.q_len - first)
    position = item.length - item.q_len + first
    begin, end = _visible(position, count, item.length, inputs, sizes)
    context = item.length - item.q_len
    seen_begin, seen_end = _visible(context, item.q_len, item.length, inputs, sizes)
    if sizes.has_parts:
        size = divide_up(divide_up(end - begin, granule), item.pieces) * granule
        begin = jnp.minimum(begin + item.piece * size, end)
        end = jnp.minimum(begin + size, end)
        # A piece for which nothing is left is nowhere: from its end on a block may have tokens.
        begin, end, seen_begin, seen_end = (
            jnp.where(begin < end, x, 0) for x in (begin, end, seen_begin, seen_end)
        )
    return Tile(
        seq=item.seq,
        kv_head=kv_head,
        token=item.first_token + first,
        count=count,
        position=position,
        begin=begin,
        end=end,
        seen_begin=seen_begin,
        seen_end=seen_end,
        whole=inputs.whole[item.seq],
        part=jnp.where(item.part < 0, -1, item.part * rows),
    )


def _my_item(r: Any, inputs: Inputs, sizes: PrefillSizes) -> tuple[Item, Any, Any]:
    """Return the item of this program's tile `r`, rows of a block of its kind, and a KV head.

    The largest items come first, and the programs share out each kind there and back. Narrow tiles
    wait for memory, wide ones for the tensor cores. So a program takes its narrow tiles evenly
    between its wide ones, and its neighbour does so out of step, that both kinds run side by side.
    If there are too many for that, see `PrefillSizes.alternates`, the narrow ones come first.
    """
    problem, plan = sizes.problem, sizes.plan
    is_wide, nth = jnp.bool(False), r
    first, first_wide, *_ = plan.first_rows
    if plan.wide is not None:
        narrow, wide = _shares(inputs, sizes)
        skipped, before, after = jnp.int32(0), jnp.minimum(r, narrow), jnp.minimum(r + 1, narrow)
        if sizes.alternates:
            program = lax.axis_index("program")
            skipped, before, after = (
                lax.div(i * narrow, jnp.maximum(narrow + wide, 1))
                for i in (program, program + r, program + r + 1)
            )
        is_wide = before == after
        nth = jnp.where(is_wide, r - (before - skipped), before - skipped)
    index = nth * sizes.num_programs + _place(nth + is_wide.astype(jnp.int32), sizes)
    index, kv_head = lax.div(index, problem.num_kv_heads), lax.rem(index, problem.num_kv_heads)
    row, rows = first + index, jnp.int32(plan.narrow.rows)
    if plan.wide is not None:
        row = jnp.where(is_wide, first_wide + index, row)
        rows = jnp.where(is_wide, plan.wide.rows, rows)
    item = Item(*(inputs.work[row, i] for i in range(len(Item._fields))))
    seq = jnp.clip(item.seq, 0, problem.num_seqs - 1)
    return item._replace(seq=seq, pieces=jnp.maximum(item.pieces, 1)), rows, kv_head


def _by_heads(item: Item, kv_head: Any, tokens: Any, sizes: PrefillSizes) -> tuple[Item, Any]:
    """Reorder the tiles of a long sequence: few KV heads at a time, all of their items.

    Their keys and values then stay in the L2 cache while others of them are attended to.
    """
    problem = sizes.problem
    blocks = divide_up(item.q_len, tokens)
    nth = (blocks - 1 - item.block) * item.pieces + item.piece  # in the order of the plan
    first_part = item.part - nth
    most = L2_BYTES // (2 * problem.head_dim * problem.query_dtype.itemsize)
    at_once = jnp.int32(1)
    for heads in range(2, problem.num_kv_heads + 1):
        if problem.num_kv_heads % heads == 0:
            at_once = jnp.where(item.length <= most // heads, heads, at_once)
    tile, tiles = nth * problem.num_kv_heads + kv_head, blocks * item.pieces * at_once
    before, tile = lax.div(tile, tiles), lax.rem(tile, tiles)
    nth, kv_head = lax.div(tile, at_once), before * at_once + lax.rem(tile, at_once)
    # Sizes fall and rise in turn, and fall at last: after a large tile a program takes a small one.
    groups = lax.div(jnp.int32(problem.num_kv_heads), at_once)
    later = (problem.num_seqs - 1 - item.seq) * groups + (groups - 1 - before)
    nth = jnp.where(lax.rem(later, 2) == 0, nth, blocks * item.pieces - 1 - nth)
    block, piece = blocks - 1 - lax.div(nth, item.pieces), lax.rem(nth, item.pieces)
    part = jnp.where(item.part < 0, -1, first_part + nth)
    return item._replace(block=block, piece=piece, part=part), kv_head


def tile_in(shared: Shared, slot: Any) -> Tile:
    """Read the tile whose queries are in a slot."""
    return Tile(*(shared.tile[slot, i] for i in range(len(Tile._fields))))


def window_of(inputs: Inputs) -> Any:
    """Return how many positions a row sees at most."""
    return jnp.maximum(inputs.sliding_window[0], 0)


def _shares(inputs: Inputs, sizes: PrefillSizes) -> list[Any]:
    """Return how many tiles of each kind this program takes."""
    shares: list[Any] = []
    for kind, items in enumerate(counts_of(inputs, sizes)):
        total = items * sizes.problem.num_kv_heads
        rounds, rest = lax.div(total, sizes.num_programs), lax.rem(total, sizes.num_programs)
        shares.append(rounds + (_place(rounds + kind, sizes) < rest).astype(jnp.int32))
    return shares


def _place(r: Any, sizes: PrefillSizes) -> Any:
    """Return which tile of round `r` is this program's."""
    program = lax.axis_index("program")
    return jnp.where(lax.rem(r, 2) == 0, program, sizes.num_programs - 1 - program)


def _visible(
    position: Any, count: Any, length: Any, inputs: Inputs, sizes: PrefillSizes
) -> tuple[Any, Any]:
    """Return which positions some of `count` rows from `position` on see."""
    end = jnp.maximum(position + count, 0) if sizes.problem.causal else length
    begin = jnp.int32(0)
    if inputs.sliding_window is not None:
        window = window_of(inputs)
        begin = jnp.minimum(jnp.maximum(jnp.maximum(position, 0) - (window - 1), 0), end)
        end = jnp.where(window > 0, end, begin)
    return begin, end
