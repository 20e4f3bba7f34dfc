"""The launch of the latent kernel: operands, results and shared memory by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ejk.backends.mosaic_gpu._call import Memory, launch
from ejk.backends.mosaic_gpu.page_attention.kernel import latent_attention_kernel
from ejk.backends.mosaic_gpu.page_attention.memory import Inputs, Outputs, shared_types
from ejk.backends.mosaic_gpu.page_attention.sizes import LatentSizes
from ejk.backends.mosaic_gpu.page_attention.tokens import Tokens
from ejk.backends.page_attention import PageAttentionOperands

WARPGROUPS = 3


def attend(
    sizes: LatentSizes, operands: PageAttentionOperands, tokens: Tokens, work: Any
) -> Outputs:
    """Launch the kernel once; returns what it wrote, for `sizes.problem`'s heads."""
    problem = sizes.problem
    query, window = operands.query, operands.sliding_window
    pad = sizes.heads - query.shape[1]
    query = jnp.pad(query, ((0, 0), (0, pad), (0, 0))) if pad else query
    inputs = Inputs(
        query=query.reshape(-1, problem.head_dim),
        tables=tokens.tables,
        spans=tokens.spans,
        # With one KV head all layouts are the same.
        pool=operands.key_cache.reshape(problem.num_pages, problem.page_size, problem.head_dim),
        context_lens=operands.context_lens,
        block_tables=operands.block_tables,
        attn_scale=operands.attn_scale.reshape(1),
        sliding_window=None if window is None else window.reshape(-1),
        work=work,
    )
    parts = sizes.cut.part_types(problem)
    outputs = Outputs(
        part_out=parts["part_out_ptr"],
        part_lse=parts["part_lse_ptr"],
        out=jax.ShapeDtypeStruct((*query.shape[:2], problem.value_head_dim), problem.out_dtype),
        lse=jax.ShapeDtypeStruct((problem.num_seqs, problem.num_heads), jnp.float32),
    )
    return launch(
        functools.partial(latent_attention_kernel, sizes=sizes),
        Memory(inputs, outputs, shared_types(sizes, query.dtype)),
        name="ejk_latent_attention",
        grid=sizes.grid,
        warpgroups=WARPGROUPS,
        interpret=sizes.interpret,
    )
