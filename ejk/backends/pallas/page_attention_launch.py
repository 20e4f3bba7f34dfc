"""The `pallas_call` of the decode kernel: operands, blocks, scratch and options."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk.backends.page_attention import PageAttentionOperands
from ejk.backends.pallas.page_attention_kernel import page_attention_kernel
from ejk.backends.pallas.page_attention_work import LANES, Work


def launch(
    work: Work, operands: PageAttentionOperands, vmem_limit_bytes: int, interpret: Any
) -> tuple[jax.Array, ...]:
    """Launch the kernel once; returns the results of `work.problem`."""
    problem = work.problem
    shares = work.cores if work.shared == "kv_head" else 1  # of the heads
    heads = (work.num_seqs, shares, work.kv_heads, problem.group)
    pad = work.num_seqs - problem.num_seqs  # with sequences of length 0
    query = jnp.pad(operands.query, ((0, pad), (0, 0), (0, 0))) if pad else operands.query
    lengths = jnp.pad(operands.context_lens, (0, pad)) if pad else operands.context_lens
    window = operands.sliding_window
    if pad and problem.own_windows:
        window = jnp.pad(window, (0, pad))

    def per_seq(*shape):
        """The block of a step and one share of the heads, of `[seqs, shares, *shape]`."""

        def index(core, step, *_):
            at = (core * work.core_steps + step, 0) if shares == 1 else (step, core)
            return (*at, *(0 for _ in shape))

        return pl.BlockSpec((work.step_seqs, 1, *shape), index)

    per_share = pl.BlockSpec((1, work.rows, 1), lambda core, *_: (core % shares, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    # `shard_map` asks over which mesh axes a result varies: as the operands do, all alike.
    varying = jax.typeof(operands.query).mat
    out_shape, lse_shape = (*heads, problem.value_head_dim), (work.num_seqs, shares, 1, work.rows)
    out = jax.ShapeDtypeStruct(out_shape, problem.out_dtype, manual_axis_type=varying)
    lse = jax.ShapeDtypeStruct(lse_shape, jnp.float32, manual_axis_type=varying)

    scalars = _given(
        lengths_ref=lengths,
        tables_ref=operands.block_tables.reshape(-1),
        scale_ref=operands.attn_scale.reshape(1),
        window_ref=_reshape(window, -1),
    )
    inputs = _given(
        q_ref=query.reshape(*heads, problem.head_dim),
        sinks_ref=_reshape(operands.sinks, shares, work.rows, 1),
        slopes_ref=_reshape(operands.alibi_slopes, shares, work.rows, 1),
        k_hbm_ref=operands.key_cache,
        v_hbm_ref=operands.value_cache,
    )
    in_specs = dict(
        q_ref=per_seq(*heads[2:], problem.head_dim),
        sinks_ref=per_share,
        slopes_ref=per_share,
        k_hbm_ref=in_hbm,
        v_hbm_ref=in_hbm,
    )
    outputs = _given(out_ref=out, lse_ref=lse if problem.return_lse else None)
    out_specs = dict(out_ref=per_seq(*out.shape[2:]), lse_ref=per_seq(*lse.shape[2:]))
    scratch = _given(**_scratch(work))
    names = [*scalars, *inputs, *outputs, *scratch]
    absent = dict.fromkeys(OPTIONAL - set(names))

    def kernel(*refs):
        page_attention_kernel(**dict(zip(names, refs)), **absent, work=work)

    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(work.cores, work.core_steps),
            in_specs=[in_specs[name] for name in inputs],
            out_specs=[out_specs[name] for name in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # table entries are range-checked in the kernel
        ),
        cost_estimate=_cost(work),
        interpret=interpret,
        name="ejk_page_attention",
    )(*scalars.values(), *inputs.values())
    shapes = [result.shape for result in problem.results]
    return tuple(x[: problem.num_seqs].reshape(s) for x, s in zip(results, shapes))


OPTIONAL = {"window_ref", "sinks_ref", "slopes_ref", "v_hbm_ref", "lse_ref", "v_buf"}
"""The kernel's parameters that a call may lack."""


def _given(**refs):
    return {name: ref for name, ref in refs.items() if ref is not None}


def _reshape(x, *shape):
    return None if x is None else x.reshape(shape)


def _scratch(work: Work) -> dict[str, Any]:
    problem = work.problem

    def pages(head_dim):
        blocks = (2, work.round_blocks, work.block_pages)
        return pltpu.VMEM((*blocks, *work.page_shape(head_dim)), problem.cache_dtype)

    return dict(
        k_buf=pages(problem.head_dim),
        v_buf=pages(problem.value_head_dim) if work.has_two_pools else None,
        sem=pltpu.SemaphoreType.DMA((2,)),
        chain_ref=pltpu.SMEM((4,), jnp.int32),
        blocks_ref=pltpu.SMEM((2 * work.round_blocks * 4,), jnp.int32),
        m_ref=pltpu.VMEM((work.rows, LANES), jnp.float32),
        l_ref=pltpu.VMEM((work.rows, LANES), jnp.float32),
        acc_ref=pltpu.VMEM((work.rows, problem.value_head_dim), jnp.float32),
    )


def _cost(work: Work) -> pl.CostEstimate:
    """What the launch would cost if every sequence saw all that the call allows for."""
    problem = work.problem
    tokens = problem.num_seqs * problem.visible_bound
    keys, values = problem.head_dim, problem.value_head_dim
    token_elements = problem.num_kv_heads * (keys if problem.latent else keys + values)
    row_elements = problem.num_seqs * problem.num_heads * (keys + values)
    return pl.CostEstimate(
        flops=2 * tokens * problem.num_heads * (keys + values),
        bytes_accessed=tokens * token_elements * problem.cache_dtype.itemsize
        + row_elements * problem.query_dtype.itemsize,
        transcendentals=tokens * problem.num_heads,
    )
