"""The launch of the latent kernel: operands, results and shared memory by name."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ejk.backends.mosaic_gpu.page_attention.kernel import latent_attention_kernel
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Outputs, shared_types
from ejk.backends.mosaic_gpu.page_attention.sizes import LatentSizes
from ejk.backends.page_attention import PageAttentionOperands

WARPGROUPS = 3


def attend(sizes: LatentSizes, operands: PageAttentionOperands, work: Any) -> Outputs:
    """Launch the kernel once; returns what it wrote, for `sizes.problem`'s heads."""
    problem = sizes.problem
    query, window = operands.query, operands.sliding_window
    pad = problem.num_heads - query.shape[1]
    inputs = Inputs(
        query=jnp.pad(query, ((0, 0), (0, pad), (0, 0))) if pad else query,
        # With one KV head all layouts are the same.
        pool=operands.key_cache.reshape(problem.num_pages, problem.page_size, problem.head_dim),
        context_lens=operands.context_lens,
        block_tables=operands.block_tables,
        attn_scale=operands.attn_scale.reshape(1),
        sliding_window=None if window is None else window.reshape(-1),
        work=work,
    )
    parts = sizes.cut.part_types(problem)
    rows = (problem.num_seqs, problem.num_heads)
    outputs = Outputs(
        part_out=parts["part_out_ptr"],
        part_lse=parts["part_lse_ptr"],
        out=jax.ShapeDtypeStruct((*rows, problem.value_head_dim), problem.out_dtype),
        lse=jax.ShapeDtypeStruct(rows, jnp.float32),
    )
    shared = shared_types(sizes, query.dtype)
    named = (inputs, outputs, shared)
    by_name = jax.tree.structure(named)  # in which what is None is absent
    arrays, results, scratch = map(jax.tree.leaves, named)

    def ejk_latent_attention(*refs: Any) -> None:
        latent_attention_kernel(*jax.tree.unflatten(by_name, refs), sizes=sizes)

    launch = plgpu.kernel(
        ejk_latent_attention,
        out_type=results,
        scratch_types=scratch,
        grid=(sizes.grid,),
        grid_names=("program",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpreter(sizes.interpret),
    )
    return jax.tree.unflatten(jax.tree.structure(outputs), launch(*arrays))


def interpreter(interpret: bool) -> Any:
    """Return what `plgpu.kernel` takes for `interpret`."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else False
