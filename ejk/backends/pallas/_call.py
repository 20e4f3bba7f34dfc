"""The `pallas_call` of a kernel, its parameters by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ejk import _jax
from ejk.backends.pallas._sizes import AttentionProblem

Blocked = tuple[Any, pl.BlockSpec]
"""An array, or the type of one, and its blocks."""


def call(
    kernel: Callable[..., None],
    *,
    scalars: Mapping[str, jax.Array | None],
    inputs: Mapping[str, Blocked | None],
    outputs: Mapping[str, Blocked | None],
    scratch: Mapping[str, Any],
    in_place: Mapping[str, jax.Array | None] | None = None,
    sizes: Any,
    grid: tuple[int, ...],
    dimension_semantics: tuple[Literal["parallel", "arbitrary"], ...],
    cost: pl.CostEstimate,
    vmem_limit_bytes: int,
    interpret: Any,
) -> Sequence[jax.Array]:
    """Launch a kernel once; returns its outputs, then what it has changed in place.

    `scalars`, `inputs`, `outputs`, `in_place` and `scratch` name the kernel's parameters. What is
    None is None to the kernel; an array that changes in place is one parameter, an output.
    """
    pools = given({name: in_hbm(pool) for name, pool in (in_place or {}).items()})
    results = given(outputs) | pools
    read = [*given(inputs).values(), *pools.values()]
    operands = [*given(scalars).values(), *(x for x, _ in read)]
    names = [
        *given(scalars), *given(inputs), *(None for _ in pools), *results, *given(scratch),
    ]  # fmt: skip
    groups = (scalars, inputs, outputs, in_place or {}, scratch)
    absent = {name: None for group in groups for name, x in group.items() if x is None}
    # `shard_map` asks over which mesh axes a result varies: as the operands do, all alike.
    varying = _jax.varying_as(read[0][0])

    def by_name(*refs: Any) -> None:
        named = {name: ref for name, ref in zip(names, refs) if name is not None}
        kernel(**named, **absent, sizes=sizes)

    return pl.pallas_call(
        by_name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(given(scalars)),
            grid=grid,
            in_specs=[spec for _, spec in read],
            out_specs=[spec for _, spec in results.values()],
            scratch_shapes=list(given(scratch).values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
            for x, _ in results.values()
        ],
        input_output_aliases={
            len(operands) - i: len(results) - i for i in range(len(pools), 0, -1)
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=dimension_semantics,
            vmem_limit_bytes=vmem_limit_bytes,
            disable_bounds_checks=True,  # table entries and slots are range-checked
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"ejk_{kernel.__name__.removesuffix('_kernel')}",
    )(*operands)


def given[T](group: Mapping[str, T | None]) -> dict[str, T]:
    return {name: x for name, x in group.items() if x is not None}


def in_hbm(x: Any) -> Blocked | None:
    return None if x is None else (x, pl.BlockSpec(memory_space=pltpu.HBM))


class ScalePair(NamedTuple):
    """Scales of one kind, or None."""

    key: Any
    value: Any


def scale_pairs(problem: AttentionProblem, operands: Any) -> tuple[ScalePair, ScalePair]:
    """Return the scales of query heads and those of tokens. Latent attention's values are keys."""
    given, none = (operands.key_scale, operands.value_scale), ScalePair(None, None)
    if problem.scales == "token":
        return none, ScalePair(*given)
    if problem.scales == "none":
        return none, none
    key, value = (jnp.repeat(x, problem.group) for x in (given[0], given[problem.latent - 1]))
    return ScalePair(key, value), none


def pools_in_hbm(operands: Any, of_tokens: ScalePair) -> dict[str, Blocked | None]:
    """Return the pools that kernels fetch pages of, by the names that they have there."""
    return dict(
        key_cache_hbm_ref=in_hbm(operands.key_cache),
        value_cache_hbm_ref=in_hbm(operands.value_cache),
        key_scale_hbm_ref=in_hbm(of_tokens.key),
        value_scale_hbm_ref=in_hbm(of_tokens.value),
    )


def cost_of_attention(problem: AttentionProblem, items: int, rows: int) -> pl.CostEstimate:
    """What a launch would cost if each of `items`, of so many rows, saw all that a call may."""
    keys, values = problem.head_dim, problem.value_head_dim
    tokens = items * problem.visible_bound
    token_elements = problem.num_kv_heads * (keys if problem.latent else keys + values)
    return pl.CostEstimate(
        flops=2 * tokens * rows * (keys + values),
        bytes_accessed=problem.cache_dtype.itemsize * tokens * token_elements
        + problem.query_dtype.itemsize * items * rows * (keys + values),
        transcendentals=tokens * rows,
    )
