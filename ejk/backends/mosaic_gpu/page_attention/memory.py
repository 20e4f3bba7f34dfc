"""What a program reads, writes and shares: by names, with its types."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu._shared_memory import swizzled
from ejk.backends.mosaic_gpu._tensor_cores import ROWS
from ejk.backends.mosaic_gpu.page_attention.sizes import BLOCK_KV, LatentSizes


class Inputs(NamedTuple):
    """Arrays in global memory."""

    query: Any  # [rows, head_dim]: heads of sequence after sequence, or token after token
    tables: Any  # int32 [num_seqs]: the table of each; None: its own
    spans: Any  # int32 [num_seqs, 2]: which tokens are a sequence's; None: it has one
    pool: Any  # [num_pages, page_size, head_dim]
    context_lens: Any  # int32 [num_seqs]
    block_tables: Any  # int32 [tables, max_blocks]
    attn_scale: Any  # float32 [1]
    sliding_window: Any  # int32 [1] or [num_seqs], or None
    work: Any  # int32 [1 + pieces + splits, 4], or None: see `PlanProblem`


class Outputs(NamedTuple):
    """Arrays in global memory: a piece that is all of its sequence writes the last two.

    `heads` are those of all tokens of a sequence, but of the output those of one.
    """

    part_out: Any  # float32 [parts, heads, value_head_dim], or None
    part_lse: Any  # float32, log2 [parts, heads], or None
    out: Any  # [tokens, heads, value_head_dim]
    lse: Any  # float32 [num_seqs, heads]


class Shared(NamedTuple):
    """What the warpgroups of a program share. A first axis of 2 is of even and odd blocks."""

    query: Any  # [2, ROWS, half]: halves of what multiplies the entries that are values, too
    query_rest: Any  # [ROWS, rest]
    keys_or_parts: Any  # see the properties
    rest: Any  # [2, BLOCK_KV, rest]; then the block's weights, [2, ROWS, BLOCK_KV]
    exist: Any  # int32 [2]: a bit for each page of a block that there is
    maxima: Any  # float32 [2, ROWS], log2: up to a block
    rescale: Any  # float32 [2, ROWS]: of what came before a block
    sums: Any  # float32 [2, ROWS]: of each warpgroup, at the end
    query_there: Any  # barriers
    third_there: Any  # [6]: three a slot
    half_free: Any  # [4]: two a slot
    weights_there: Any  # [2]
    sums_there: Any

    @property
    def keys(self) -> Any:
        """`[2, 2, BLOCK_KV, half]`: the entries that are values, too."""
        keys, _ = self.keys_or_parts
        return keys

    @property
    def parts(self) -> Any:
        """float32 `[2, ROWS, half]`: both halves of a part, where the keys were."""
        _, parts = self.keys_or_parts
        return parts


def shared_types(sizes: LatentSizes, dtype: Any) -> Shared:
    """Return how much of what is shared."""

    def barriers(*number: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)

    rows = plgpu.SMEM((2, ROWS), jnp.float32)
    return Shared(
        query=swizzled((2, ROWS, sizes.half), dtype),
        query_rest=swizzled((ROWS, sizes.rest), dtype),
        keys_or_parts=plgpu.RefUnion(
            swizzled((2, 2, BLOCK_KV, sizes.half), dtype),
            swizzled((2, ROWS, sizes.half), jnp.float32),
        ),
        rest=swizzled((2, BLOCK_KV, sizes.rest), dtype),
        exist=plgpu.SMEM((2,), jnp.int32),
        maxima=rows,
        rescale=rows,
        sums=rows,
        query_there=barriers(arrivals=3 * len(sizes.query_copies)),
        third_there=barriers(6, arrivals=sizes.copies),
        half_free=barriers(4),
        weights_there=barriers(2),
        sums_there=barriers(arrivals=2),
    )
