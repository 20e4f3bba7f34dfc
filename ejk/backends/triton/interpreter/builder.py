"""Triton's interpreter with checked memory and the arithmetic of narrow floats done right.

Triton's own adds the bits of two bfloat16 numbers as integers, truncates where hardware rounds to
nearest, and multiplies matrices of such bits (https://github.com/triton-lang/triton/issues/11584).
"""

# The arguments of Triton's builder differ between 3.6 and 3.9.
# pyright: reportIncompatibleMethodOverride=false

import contextlib
import dataclasses
import typing
from collections.abc import Callable, Generator
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir as triton_ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from ejk.backends.triton.interpreter.memory import Memory, poisoned

TRITON_TYPES = {
    "bool": tl.int1,
    "int8": tl.int8,
    "int16": tl.int16,
    "int32": tl.int32,
    "int64": tl.int64,
    "uint8": tl.uint8,
    "uint16": tl.uint16,
    "uint32": tl.uint32,
    "uint64": tl.uint64,
    "float16": tl.float16,
    "float32": tl.float32,
    "float64": tl.float64,
    "bfloat16": tl.bfloat16,
    "float8_e4m3fn": tl.float8e4nv,
    "float8_e5m2": tl.float8e5,
}

# Types that the interpreter holds as unsigned integers of the same bits, with the type that means.
_HELD_AS_BITS = {
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}


def pointer(address: int, dtype: np.dtype | None) -> tl.tensor:
    """Return a kernel's argument that points to items of a type, or to nothing known."""
    kind = tl.pointer_type(tl.int8 if dtype is None else TRITON_TYPES[dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([address], np.uint64), kind), kind)


# Not type-checked, here and below: it runs for every operation of a kernel, and a check of its
# arguments, as the tests make of the whole package, takes longer than the operation.
@typing.no_type_check
class _Builder(interpreter.InterpreterBuilder):
    """What Triton's language calls for each operation of a kernel."""

    def __init__(self):
        super().__init__()
        # Three more operations for each addition, whose result nobody looks at without `debug`.
        self.options = dataclasses.replace(self.options, sanitize_overflow=False)

    @contextlib.contextmanager
    def launch(self, memory: Memory, grid: int) -> Generator[None]:
        self.memory = memory
        self.set_grid_dim(grid, 1, 1)
        try:
            yield
        finally:
            del self.memory  # It may not outlive the launch: JAX owns the arrays.

    def begin_program(self, index: int) -> None:
        self.grid_idx = (index, 0, 0)
        self.memory.program = index

    # Memory.

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, *hints: Any, **named: Any
    ) -> Any:
        kind = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)  # pyright: ignore[reportPrivateUsage]
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        if active.all():
            return interpreter.TensorHandle(self.memory.load(ptrs.data, dtype), kind)
        if other is None:
            meant = _HELD_AS_BITS.get(kind, dtype)
            result = poisoned(ptrs.data.shape, meant).view(dtype)
        else:
            result = np.array(np.broadcast_to(other.data, ptrs.data.shape), dtype)
        result[active] = self.memory.load(ptrs.data[active], dtype)
        return interpreter.TensorHandle(result, kind)

    def create_masked_store(
        self, ptrs: Any, value: Any, mask: Any, *hints: Any, **named: Any
    ) -> None:
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        items = np.broadcast_to(value.data, ptrs.data.shape)[active]
        self.memory.store(ptrs.data[active], items)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any):
        raise NotImplementedError("atomics have no order, so results would differ between runs")

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any):
        self.create_atomic_rmw(None, ptr, val, None, sem, scope)

    # Numbers.

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return _handle(_numbers(src), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode not in (None, triton_ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"{rounding_mode} is not interpreted")
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        kind = lhs.dtype.scalar
        if kind not in _HELD_AS_BITS or lhs.data.dtype == np.bool_:
            return super().binary_op(lhs, rhs, op)
        result = op(_numbers(lhs).astype(np.float32), _numbers(rhs).astype(np.float32))
        return _handle(result, tl.int1 if result.dtype == np.bool_ else kind)

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        kind = arg.dtype.scalar
        if kind not in _HELD_AS_BITS:
            return super().unary_op(arg, op)
        return _handle(op(_numbers(arg).astype(np.float32)), kind)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        refuse_narrow("tl.fma", x.dtype)
        return super().create_fma(x, y, z)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        refuse_narrow("tl.clamp", arg.dtype)
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_dot(self, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if not a.dtype.is_floating() or a.data.dtype == np.float64:
            return super().create_dot(a, b, d, *precision)
        # In float32 a CPU's library may add up the rows of a block in different orders.
        product = np.matmul(_numbers(a).astype(np.float64), _numbers(b).astype(np.float64))
        return _handle(product.astype(np.float32) + _numbers(d), d.dtype.scalar)


@typing.no_type_check
def refuse_narrow(operation: str, kind: Any) -> None:
    """Raise where Triton's interpreter would compute with the bits of a number."""
    if kind.scalar in _HELD_AS_BITS:
        raise NotImplementedError(f"{operation} of {kind.scalar}: convert to float32 first")


@typing.no_type_check
def _numbers(handle: Any) -> np.ndarray:
    """Return the values of a handle in a type that NumPy computes with."""
    meant = _HELD_AS_BITS.get(handle.dtype.scalar)
    if meant is None or handle.data.dtype == np.bool_:
        return handle.data
    return handle.data.view(meant)


@typing.no_type_check
def _handle(values: np.ndarray, kind: Any) -> Any:
    """Return a handle of values, rounded to nearest if they do not fit the type."""
    held = interpreter._get_np_dtype(kind)
    meant = _HELD_AS_BITS.get(kind)
    if meant is None:
        return interpreter.TensorHandle(values.astype(held, copy=False), kind)
    if meant.itemsize == 1:  # Hardware saturates here where ml_dtypes gives NaN or infinity.
        largest = float(ml_dtypes.finfo(meant).max)
        values = np.clip(values.astype(np.float32), -largest, largest)
    return interpreter.TensorHandle(values.astype(meant, copy=False).view(held), kind)


# One for the process: Triton's language is patched to refer to it.
builder = _Builder()
semantic = TritonSemantic(builder)
