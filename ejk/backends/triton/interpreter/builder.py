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

from ejk.backends.triton.interpreter.grids import Grid, Position
from ejk.backends.triton.interpreter.memory import Memory, Synchronisation, poisoned

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

_ATOMICS = {
    triton_ir.ATOMIC_OP.ADD: np.add,
    triton_ir.ATOMIC_OP.FADD: np.add,
    triton_ir.ATOMIC_OP.MIN: np.minimum,
    triton_ir.ATOMIC_OP.UMIN: np.minimum,
    triton_ir.ATOMIC_OP.MAX: np.maximum,
    triton_ir.ATOMIC_OP.UMAX: np.maximum,
    triton_ir.ATOMIC_OP.AND: np.bitwise_and,
    triton_ir.ATOMIC_OP.OR: np.bitwise_or,
    triton_ir.ATOMIC_OP.XOR: np.bitwise_xor,
    triton_ir.ATOMIC_OP.XCHG: lambda _, new: new,
}


def pointer(address: int, dtype: np.dtype | None) -> tl.tensor:
    """Return a kernel's argument that points to items of a type, or to nothing known."""
    kind = tl.pointer_type(tl.int8 if dtype is None else TRITON_TYPES[dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([address], np.uint64), kind), kind)


def number(value: int | float | np.generic) -> tl.tensor:
    """Return a kernel's argument that is a number, of the type that Triton gives it."""
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, bool):
        kind = tl.int1
    elif isinstance(plain, float):
        kind = tl.float32
    elif not -(2**63) <= plain < 2**64:
        raise ValueError(f"{plain} fits no integer of 64 bits")
    else:
        kind = tl.int32 if -(2**31) <= plain < 2**31 else tl.int64
        kind = tl.uint64 if plain >= 2**63 else kind
    held = interpreter._get_np_dtype(kind)  # pyright: ignore[reportPrivateUsage]
    return tl.tensor(interpreter.TensorHandle(np.array([plain], held), kind), kind)


# Not type-checked, here and below: it runs for every operation of a kernel, and a check of its
# arguments, as the tests make of the whole package, takes longer than the operation.
@typing.no_type_check
class _Builder(interpreter.InterpreterBuilder):
    """What Triton's language calls for each operation of a kernel."""

    def __init__(self):
        super().__init__()
        # Three more operations for each addition, whose result nobody looks at without `debug`.
        self.options = dataclasses.replace(self.options, sanitize_overflow=False)
        self.has_other = False  # of the load that is under way

    @contextlib.contextmanager
    def launch(self, memory: Memory, grid: Grid) -> Generator[None]:
        self.memory = memory
        self.set_grid_dim(*grid)
        try:
            yield
        finally:
            del self.memory  # It may not outlive the launch: JAX owns the arrays.

    def begin_program(self, index: int, position: Position) -> None:
        self.grid_idx = position
        self.memory.begin(index)

    # Memory.

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, *hints: Any, **named: Any
    ) -> Any:
        kind = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)  # pyright: ignore[reportPrivateUsage]
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        if active.all():
            return interpreter.TensorHandle(self.memory.load(ptrs.data, dtype), kind)
        if other is None and self.has_other:
            result = np.zeros(ptrs.data.shape, dtype)
        elif other is None:
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

    def create_barrier(self) -> None:
        self.memory.barrier()

    # Atomics. Lanes take their turns, and programs run one after the other.

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any):
        operation = _ATOMICS[rmwOp]
        values = np.broadcast_to(_numbers(val), ptr.data.shape)[self._active(ptr, mask)]
        return self._atomic(ptr, mask, sem, scope, lambda old, i: operation(old, values[i]))

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any):
        bits = np.dtype(f"u{val.data.itemsize}")  # a NaN equals itself
        expected, values = (
            np.broadcast_to(x.data.view(bits), ptr.data.shape).ravel() for x in (cmp, val)
        )

        def swap(old: Any, i: int) -> Any:
            return values[i] if old == expected[i] else old

        return self._atomic(ptr, None, sem, scope, swap, meant=bits)

    def create_atomic_load(self, ptr: Any, mask: Any, sem: Any, scope: Any):
        return self._atomic(ptr, mask, sem, scope, lambda old, i: old, ("load",))

    def create_atomic_store(self, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any):
        values = np.broadcast_to(_numbers(val), ptr.data.shape)[self._active(ptr, mask)]
        self._atomic(ptr, mask, sem, scope, lambda old, i: values[i], ("store",))

    def create_atomic_poll(self, ptr: Any, expected: Any, timeout_ns: Any, sem: Any, scope: Any):
        while True:
            found = self.create_atomic_load(ptr, None, sem, scope).data
            if timeout_ns is not None or (found == expected.data).all():
                return interpreter.TensorHandle(found == expected.data, tl.int1)

    def _active(self, ptr: Any, mask: Any) -> np.ndarray:
        return np.broadcast_to(True if mask is None else mask.data, ptr.data.shape)

    def _atomic(
        self, ptr: Any, mask: Any, sem: Any, scope: Any, change: Any,
        kinds: Any = ("load", "store"), meant: Any = None,
    ) -> Any:  # fmt: skip
        kind = ptr.get_element_ty()
        held = interpreter._get_np_dtype(kind)  # pyright: ignore[reportPrivateUsage]
        meant = meant or _HELD_AS_BITS.get(kind, held)
        semantics = triton_ir.MEM_SEMANTIC
        promised = Synchronisation(
            atomic=scope != triton_ir.MEM_SYNC_SCOPE.CTA,  # else its own program alone sees it
            acquires=sem in (semantics.ACQUIRE, semantics.ACQUIRE_RELEASE),
            releases=sem in (semantics.RELEASE, semantics.ACQUIRE_RELEASE),
        )
        active = self._active(ptr, mask)
        result = poisoned(ptr.data.shape, meant)
        result[active] = self.memory.update(ptr.data[active], meant, change, kinds, promised)
        return interpreter.TensorHandle(result.view(held), kind)

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

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        if arg.data.size != 1:
            return super().create_splat(ret_ty, arg)
        repeated = np.full(tuple(ret_ty.shape), arg.data, arg.data.dtype)
        return interpreter.TensorHandle(repeated, arg.dtype.scalar)

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


@typing.no_type_check
class _Semantic(TritonSemantic[Any]):
    """What operands need before an operation, with the common case of nothing known at once.

    `patches` gives tensors of one shape the same object for it.
    """

    def load(self, ptr: Any, mask: Any, other: Any, *options: Any, **named: Any) -> Any:
        # Triton asks whether a tensor is true, which here one of a single zero is not.
        self.builder.has_other = other is not None
        return super().load(ptr, mask, other, *options, **named)

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            same = lhs.dtype is rhs.dtype and lhs.shape is rhs.shape
            if same and lhs.dtype in _NEVER_CONVERTED:
                return lhs, rhs
        return super().binary_op_type_checking_impl(lhs, rhs, *options, **named)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        return super().broadcast_impl_value(lhs, rhs)


_NEVER_CONVERTED = (tl.int32, tl.float32, tl.int64)  # for a partner of the same type

# One for the process: Triton's language is patched to refer to it.
builder = _Builder()
semantic = _Semantic(builder)
