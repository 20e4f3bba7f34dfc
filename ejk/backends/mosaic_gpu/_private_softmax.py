"""What becomes of logits in registers, by private means and by public ones: see `_private.py`."""

# The types that come with MLIR's bindings are stricter than they are.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf
from jaxlib.mlir.dialects import math as math_dialect

from ejk.backends.mosaic_gpu._arithmetic import LOG2E, spread
from ejk.backends.mosaic_gpu._private import ROW, SCALAR, TILE
from ejk.backends.mosaic_gpu._private_mask import SEEN, Seen, bits_of, row_and_bit
from ejk.backends.mosaic_gpu._registers import (
    accumulated,
    any_in_warp,
    array_of,
    float32,
    int32,
    one_operand,
    scalar_of,
)

# tanh(x) / x in powers of x^2 below an end, to 4.0e-7 and 5.8e-8 of it: of all such polynomials the
# largest error is the least (Remez).
NEAR_END, NEAR = 0.25, (0.999999604, -0.333219082, 0.128416134)
SERIES_END = 0.8
SERIES = (0.999999942, -0.333326749, 0.133210483, -0.0531143154, 0.0190933003, -0.00435529949)


def of_rows(x: Any, rows: int) -> Any:
    """Return a number as an array that has it for each row."""
    return plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), ROW)


def in_log2(x: Any, units: tuple[Any, ...]) -> Any:
    """Return logits in log2 units: an odd polynomial of numbers, whose factors the units are.

    Each has an entry for a row. Most often there is one: what scales all logits.
    """
    if x.ndim > 1:
        units = tuple(spread(unit, x.shape[1]) for unit in units)
    return _odd(x, units, jnp.multiply, lambda a, b, c: a * b + c)


def raised(plain: bool, m: Any, s: Any, units: tuple[Any, ...], slack: float) -> tuple[Any, Any]:
    """Raise those maxima `m` that logits exceed by more than `slack`, see `in_log2`.

    Also returns the factors of the sums up to now, 1 for rows whose maximum stays. A warp all of
    whose maxima stay neither exchanges what its threads have found nor computes factors, which
    saves 0.7 %. ptxas moves nothing over that branch, so keys are released before the softmax.
    """
    if plain:
        top = in_log2(s.max(axis=1), units)
        new = jnp.where(top > m + slack, top, m)
        return new, jnp.where(top > m + slack, jnp.exp2(m - new), 1.0)
    row = plgpu.ShapeDtypeStruct(m.shape, jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(ROW, TILE, *[ROW] * len(units)), return_type=(row, row))
    def raise_maxima(ctx: Any, m: Any, s: Any, *units: Any) -> Any:
        del ctx
        f32 = ir.F32Type.get()
        old, *factors = ([scalar_of(x) for x in y.registers.flat] for y in (m, *units))
        own = [scalar_of(x) for x in s.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        tops, limits, exceeded = [], [], None
        for row, maximum in enumerate(old):  # in registers, two of each row take turns
            in_row = [x for i, x in enumerate(own) if i // 2 % 2 == row]
            while len(in_row) > 1:
                in_row = [arith.maximumf(*in_row[i : i + 2]) for i in range(0, len(in_row), 2)]
            own_factors = [x[row] for x in factors]
            tops.append(_odd(in_row[0], own_factors, arith.mulf, math_dialect.fma))
            limits.append(arith.addf(maximum, arith.constant(f32, slack)))
            this = arith.cmpf(arith.CmpFPredicate.OGT, tops[-1], limits[-1])
            exceeded = this if exceeded is None else arith.ori(exceeded, this)
        one = arith.constant(f32, 1.0)
        branch = scf.IfOp(any_in_warp(exceeded), [f32] * 4, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new, alpha = [], []
            for maximum, top, limit in zip(old, tops, limits):
                for distance in (1, 2):  # four threads share a row
                    top = arith.maximumf(top, mgpu_utils.shfl_bfly(top, distance))
                is_above = arith.cmpf(arith.CmpFPredicate.OGT, top, limit)
                new.append(arith.select(is_above, top, maximum))
                power = one_operand("ex2.approx.ftz.f32", arith.subf(maximum, new[-1]))
                alpha.append(arith.select(is_above, power, one))
            scf.yield_([*new, *alpha])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_([*old, one, one])
        results = list(branch.results)
        pairs = results[:2], results[2:]
        return tuple(array_of(pair, m.registers.shape, m.layout) for pair in pairs)

    return raise_maxima(m, s, *units)


def rescaled(plain: bool, acc: Any, alpha: Any) -> Any:
    """Multiply rows by `alpha`. A warp skips it if it is 1 for all its rows, which saves 1.7 %."""
    if plain:
        return acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
    result = plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE, ROW), return_type=result)
    def rescale(ctx: Any, acc: Any, alpha: Any) -> Any:
        del ctx
        one, changed = arith.constant(ir.F32Type.get(), 1.0), None
        for register in alpha.registers.flat:
            this = arith.cmpf(arith.CmpFPredicate.UNE, scalar_of(register), one)
            changed = this if changed is None else arith.ori(changed, this)
        types = [x.type for x in acc.registers.flat]
        branch = scf.IfOp(any_in_warp(changed), types, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = acc * alpha.broadcast_minor(acc.shape[1])
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(acc.registers.flat))
        return array_of(list(branch.results), acc.registers.shape, acc.layout)

    return rescale(acc, alpha)


def capped(
    plain: bool, s: Any, scale: Any, cap: float, seen: Seen | None
) -> tuple[Any, tuple[Any, ...]]:
    """Return numbers and units that give `cap * tanh(s * scale / cap)`: see `in_log2`.

    A warp chooses by its largest logit. If all are below 1/4 of the cap, there are three units, and
    their polynomial is computed under the exponentials of the weights. Else the numbers are
    hyperbolic tangents: by a longer polynomial below 0.8, and by exponentials beyond, on the unit
    whose rate limits the softmax.

    The ways differ in last bits, so logits of tokens that are not `seen` have no say. None: all
    tokens are seen. Rows that see nothing must have queries of zeros.
    """
    unit, largest = scale / cap, cap * LOG2E
    if plain:
        x = s * unit
        far = 1 - 2 / (jnp.exp2(x * (2 * LOG2E)) + 1)
        series = _odd(x, SERIES, jnp.multiply, lambda a, b, c: a * b + c)
        return jnp.where(jnp.abs(x) < SERIES_END, series, far), (of_rows(largest, s.shape[0]),)
    # Factors and the end for logits as they are. Where float32 does not hold these, none is near.
    square = unit * unit
    end = NEAR_END**2 / square
    end = jnp.where((end > 1e-17) & (end < 1e17), end, 0.0)
    c0, c1, c2 = (unit * (c * largest) for c in NEAR)
    scalars = end, c0, c1 * square, c2 * square * square
    tile = plgpu.ShapeDtypeStruct(s.shape, jnp.float32, layout=TILE)
    row = plgpu.ShapeDtypeStruct(s.shape[:1], jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(
        arg_types=(TILE, *[SCALAR] * len(scalars), *([] if seen is None else SEEN)),
        return_type=(tile, row, row, row),
    )
    def cap_logits(ctx: Any, s: Any, *given: Any) -> Any:
        del ctx
        hidden = None
        if seen is not None:
            bits = bits_of(Seen(*given[len(scalars) :], seen.pages), s.shape[1])
            hidden = [arith.xori(x, int32(-1)) for x in bits]
        end, *near = (x.registers.item() for x in given[: len(scalars)])
        own = [scalar_of(x) for x in s.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]

        def far(own: list[Any]) -> list[Any]:
            # Unknown to the compiler, or it would keep the unit in a register that there is not.
            c0 = one_operand("mov.b32", near[0], has_side_effects=True)
            unit = arith.mulf(c0, float32(1 / (NEAR[0] * largest)))
            own = _tangents([arith.mulf(x, unit) for x in own], hidden)
            return [*own, float32(largest), float32(0.0), float32(0.0)]

        found = _by_size(own, end, hidden, lambda own: [*own, *near], far, len(near))
        own, units = found[: len(own)], found[len(own) :]
        layout = fa.WGMMA_ROW_LAYOUT
        shape = layout.registers_shape(s.shape[:1])
        return accumulated(own, s.shape), *(array_of([x, x], shape, layout) for x in units)

    s, *units = cap_logits(s, *scalars, *(() if seen is None else seen[:-1]))
    return s, tuple(units)


def _tangents(own: list[Any], hidden: list[Any] | None) -> list[Any]:
    def inside(x: Any) -> Any:
        return _odd(x, [float32(c) for c in SERIES], arith.mulf, math_dialect.fma)

    def beyond(x: Any) -> Any:
        power = one_operand("ex2.approx.ftz.f32", arith.mulf(x, float32(2 * LOG2E)))
        inverse = one_operand("rcp.approx.ftz.f32", arith.addf(power, float32(1.0)))
        outside = math_dialect.fma(inverse, float32(-2.0), float32(1.0))
        size = math_dialect.absf(x)
        is_inside = arith.cmpf(arith.CmpFPredicate.OLT, size, float32(SERIES_END))
        return arith.select(is_inside, inside(x), outside)

    return _by_size(
        own, float32(SERIES_END**2), hidden, lambda own: [inside(x) for x in own],
        lambda own: [beyond(x) for x in own],
    )  # fmt: skip


def _by_size(
    own: list[Any],
    end: Any,
    hidden: list[Any] | None,
    inside: Callable[[list[Any]], list[Any]],
    outside: Callable[[list[Any]], list[Any]],
    more: int = 0,
) -> list[Any]:
    """Map a thread's numbers by `inside`, or by `outside` if its warp has a square past `end`.

    Signs of differences tell: of what is past it, NaN included, they are not negative. `hidden` has
    a bit for each number, for each of the thread's rows, that is not asked.
    """
    i32 = ir.IntegerType.get_signless(32)
    end = arith.negf(end)
    signs = [arith.bitcast(i32, math_dialect.fma(x, x, end)) for x in own]
    if hidden is not None:
        signs = [
            arith.ori(x, arith.shli(hidden[row], int32(31 - bit)))
            for x, (row, bit) in zip(signs, map(row_and_bit, range(len(signs))))
        ]
    signs = functools.reduce(arith.andi, signs)
    is_beyond = arith.cmpi(arith.CmpIPredicate.sge, signs, int32(0))
    f32 = ir.F32Type.get()
    branch = scf.IfOp(any_in_warp(is_beyond), [f32] * (len(own) + more), has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_(outside(own))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(inside(own))
    return list(branch.results)


def _odd(
    x: Any,
    coefficients: Sequence[Any],
    multiply: Callable[[Any, Any], Any],
    fma: Callable[[Any, Any, Any], Any],
) -> Any:
    """Return a polynomial of `x` whose powers are odd."""
    if len(coefficients) == 1:
        return multiply(x, coefficients[0])
    square = multiply(x, x)
    even = functools.reduce(lambda found, c: fma(found, square, c), reversed(coefficients))
    return multiply(x, even)
