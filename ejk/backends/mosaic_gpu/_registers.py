"""A thread's registers and its warp, for what `_private.py` writes in instructions."""

# The types that come with MLIR's bindings are stricter than they are.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm


def run(text: str, constraints: str, *operands: Any) -> None:
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), text, constraints, has_side_effects=True)


def any_in_warp(condition: Any) -> Any:
    everyone = arith.constant(ir.IntegerType.get_signless(32), -1)
    return nvvm.vote_sync(everyone, condition, "any")


def lane() -> Any:
    return llvm.inline_asm(ir.IntegerType.get_signless(32), [], "mov.u32 $0, %laneid;", "=r")


def one_operand(instruction: str, x: Any, has_side_effects: bool = False) -> Any:
    return llvm.inline_asm(
        ir.F32Type.get(), [x], f"{instruction} $0, $1;", "=f,f", has_side_effects=has_side_effects
    )


def accumulated(registers: list[Any], shape: tuple[int, ...]) -> Any:
    """Return a thread's float32 registers, as a product leaves them, as an array."""
    layout = fa.WGMMA_LAYOUT_ACC_32BIT
    array = array_of(registers, layout.registers_shape(shape), layout)
    return array.to_layout(fa.WGMMA_LAYOUT)


def array_of(registers: list[Any], shape: tuple[int, ...], layout: Any) -> Any:
    array = np.empty(len(registers), object)
    array[:] = [_vector(x) for x in registers]
    return fa.FragmentedArray(_registers=array.reshape(shape), _layout=layout, _is_signed=None)


def scalar_of(register: Any) -> Any:
    first = arith.constant(ir.IntegerType.get_signless(32), 0)
    is_vector = isinstance(register.type, ir.VectorType)
    return llvm.extractelement(register, first) if is_vector else register


def _vector(register: Any) -> Any:
    if isinstance(register.type, ir.VectorType):
        return register
    empty = llvm.mlir_undef(ir.VectorType.get((1,), register.type))
    return llvm.insertelement(empty, register, arith.constant(ir.IntegerType.get_signless(32), 0))


def float32(value: float) -> Any:
    return arith.constant(ir.F32Type.get(), value)


def int32(value: int) -> Any:
    """Return a constant, its bits as an unsigned number may give them."""
    signed = (value + 2**31) % 2**32 - 2**31
    return arith.constant(ir.IntegerType.get_signless(32), signed)
