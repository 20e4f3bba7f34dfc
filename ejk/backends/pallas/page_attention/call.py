"""The `pallas_call` of the decode kernel: operands, blocks and scratch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ejk.backends.page_attention import PageAttentionOperands
from ejk.backends.pallas._call import Blocked, call, cost_of_attention, pools_in_hbm, scale_pairs
from ejk.backends.pallas._paging import paging_scratch
from ejk.backends.pallas._products import state_scratch
from ejk.backends.pallas.page_attention.kernel import page_attention_kernel
from ejk.backends.pallas.page_attention.sizes import Sizes


def attend(
    sizes: Sizes, operands: PageAttentionOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Launch the kernel once; returns the results of `sizes.problem`."""
    problem, pad = sizes.problem, sizes.num_items - sizes.problem.num_seqs
    shares = sizes.cores if sizes.shared == "kv_head" else 1  # of the heads
    heads = (sizes.num_items, shares, sizes.kv_heads, problem.group)

    def padded(x: Any) -> Any:  # with sequences of length 0
        return jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)) if pad else x

    def per_seq(*shape: int) -> pl.BlockSpec:
        """The block of a step and one share of the heads, of `[seqs, shares, *shape]`."""

        def index(core: Any, step: Any, *_: Any) -> tuple[Any, ...]:
            at = (core * sizes.core_steps + step, 0) if shares == 1 else (step, core)
            return (*at, *(0 for _ in shape))

        return pl.BlockSpec((sizes.step_items, 1, *shape), index)

    def result(dtype: Any, *shape: int) -> Blocked:
        return jax.ShapeDtypeStruct((*heads[:2], *shape), dtype), per_seq(*shape)

    def per_share(x: Any) -> Blocked | None:
        """What heads have, in shares."""
        spec = pl.BlockSpec((1, sizes.rows, 1), lambda core, *_: (core % shares, 0, 0))
        return None if x is None else (x.reshape(shares, sizes.rows, 1), spec)

    query, query_blocks = padded(operands.query), per_seq(*heads[2:], problem.head_dim)
    if (window := operands.sliding_window) is not None:
        window = padded(window) if problem.own_windows else window.reshape(1)
    of_heads, of_tokens = scale_pairs(problem, operands)
    results = call(
        page_attention_kernel,
        scalars=dict(
            context_lens_ref=padded(operands.context_lens),
            block_tables_ref=operands.block_tables.reshape(-1),
            attn_scale_ref=operands.attn_scale.reshape(1),
            sliding_window_ref=window,
        ),
        inputs=dict(
            query_ref=(query.reshape(*heads, problem.head_dim), query_blocks),
            sinks_ref=per_share(operands.sinks),
            alibi_slopes_ref=per_share(operands.alibi_slopes),
            key_scale_ref=per_share(of_heads.key),
            value_scale_ref=per_share(of_heads.value),
            **pools_in_hbm(operands, of_tokens),
        ),
        outputs=dict(
            out_ref=result(problem.out_dtype, *heads[2:], problem.value_head_dim),
            lse_ref=result(jnp.float32, 1, sizes.rows) if problem.return_lse else None,
        ),
        scratch=paging_scratch(sizes) | state_scratch((sizes.rows,), problem.value_head_dim),
        sizes=sizes,
        grid=(sizes.cores, sizes.core_steps),
        dimension_semantics=("parallel", "arbitrary"),
        cost=cost_of_attention(problem, problem.num_seqs, problem.num_heads),
        vmem_limit_bytes=vmem_limit_bytes,
        interpret=interpret,
    )
    return tuple(x[: problem.num_seqs].reshape(of.shape) for x, of in zip(results, problem.results))
