"""Runs Triton kernels on the CPU, inside `jax.jit`, with Triton's own interpreter.

Triton decides at import, from an environment variable, whether a process compiles or interprets.
Here one process does both: for the length of a launch, and under a lock, Triton is made to
interpret; then all that changed is put back.

Memory is not the process's own. Each pointer parameter owns a region of an imaginary address space,
far from the others, so an access outside its array is an error that names the array, never a crash
or a wrong number. Whatever a kernel must not rely on is poison: outputs before they are written,
and lanes of a load that are masked off without `other=`.
"""

import abc
import contextlib
import dataclasses
import functools
import inspect
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NoReturn

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton._C.libtriton import ir as triton_ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

# Held while Triton interprets; whoever compiles a Triton kernel must hold it too.
triton_language_lock = threading.RLock()

_TRITON_TYPES = {
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

# A pointer parameter's region spans 2**44 bytes and its array starts in the middle, so neither a
# negative nor a large offset reaches the neighbour.
_REGION_BITS = 44
_REGION_MIDDLE = 1 << (_REGION_BITS - 1)


class MemoryAccessError(RuntimeError):
    """An interpreted kernel touched memory that is not its own."""


@dataclasses.dataclass(frozen=True)
class Access:
    """One load or store of one program, before it happens.

    Attributes:
      kind: whether the program reads or writes.
      buffer: name of the kernel's pointer parameter.
      offsets: bytes from the start of the buffer, for each lane that is not masked off.
      itemsize: bytes a lane reads or writes.
      program: index of the program.
    """

    kind: Literal["load", "store"]
    buffer: str
    offsets: np.ndarray
    itemsize: int
    program: int


class Observer(abc.ABC):
    """Sees what interpreted kernels do to memory. What it raises, the launch raises."""

    @abc.abstractmethod
    def launched(self, kernel: str, buffers: Mapping[str, np.ndarray]) -> None:
        """Is told of a launch, with the array behind each pointer parameter."""

    @abc.abstractmethod
    def accessed(self, access: Access) -> None:
        """Is told of an access inside its buffer."""


_observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Shows an observer every launch that runs while the context is open, on any thread.

    JAX may return before a kernel has run: wait for the result inside the context.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def call(
    kernel: Any,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    constants: Mapping[str, int | float | bool | str | None],
    *,
    grid: int,
) -> tuple[jax.Array, ...]:
    """Interprets a kernel as a JAX operation; `_launch.call` describes the arguments."""
    launch = _Launch(
        kernel.fn,
        tuple((name, value is not None) for name, value in inputs.items()),
        tuple((name, tuple(out.shape), np.dtype(out.dtype)) for name, out in outputs.items()),
        tuple((name, type(value), value) for name, value in constants.items()),
        grid,
    )
    present = [value for value in inputs.values() if value is not None]
    return tuple(jax.pure_callback(launch, tuple(outputs.values()), *present))


@dataclasses.dataclass(frozen=True)
class _Launch:
    """The callback of a launch. JAX compares it by value, so equal launches compile once."""

    function: Callable[..., None]
    inputs: tuple[tuple[str, bool], ...]
    outputs: tuple[tuple[str, tuple[int, ...], np.dtype], ...]
    constants: tuple[tuple[str, type, Any], ...]  # With the type, for 1 == 1.0 == True.
    grid: int

    def __call__(self, *arrays: Any) -> tuple[np.ndarray, ...]:
        present = iter(arrays)
        return run(
            self.function,
            {name: np.asarray(next(present)) if given else None for name, given in self.inputs},
            {name: poisoned(shape, dtype) for name, shape, dtype in self.outputs},
            {name: value for name, _, value in self.constants},
            grid=self.grid,
        )


def run(
    function: Callable[..., None],
    inputs: Mapping[str, np.ndarray | None],
    outputs: Mapping[str, np.ndarray],
    constants: Mapping[str, Any],
    *,
    grid: int,
) -> tuple[np.ndarray, ...]:
    """Interprets a kernel on NumPy arrays.

    Args:
      function: the Python function that `triton.jit` decorates.
      inputs: its leading parameters; an access to one that is None is an error. Never written.
      outputs: the parameters that follow, C-contiguous; written in place.
      constants: its compile-time constants.
      grid: number of programs; they run one after another.

    Returns:
      The outputs.

    Raises:
      MemoryAccessError: if the kernel reads or writes outside its arrays, or writes to an input.
    """
    buffers = [_Buffer(name, array, writable=False) for name, array in inputs.items()]
    buffers += [_Buffer(name, array, writable=True) for name, array in outputs.items()]
    with _triton_interprets(), np.errstate(all="ignore"):  # A GPU raises no floating-point traps.
        for observer in _observers:
            arrays = {buffer.name: buffer.array for buffer in buffers if buffer.array is not None}
            observer.launched(function.__name__, arrays)
        _builder.begin_launch(function.__name__, buffers, grid)
        pointers = {b.name: b.pointer(number) for number, b in enumerate(buffers, start=1)}
        program = _interpretable(function)
        for index in range(grid):
            _builder.grid_idx = (index, 0, 0)
            program(**pointers, **constants)
    return tuple(outputs.values())


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array of values that give away whoever uses them: NaN or an extreme integer."""
    return np.full(shape, _poison(dtype), dtype)


@functools.cache
def _poison(dtype: np.dtype) -> Any:
    if dtype == np.bool_:
        return True
    if dtype.kind == "i":
        return np.iinfo(dtype).min
    if dtype.kind == "u":
        return np.iinfo(dtype).max
    return np.nan


class _Buffer:
    """The memory behind one pointer parameter: the array of the caller, never a copy."""

    def __init__(self, name: str, array: np.ndarray | None, *, writable: bool):
        self.name = name
        self.array = None if array is None else np.asarray(array, order="C")
        self.writable = writable
        self.bytes = np.empty(0, np.uint8)
        if self.array is not None:
            self.bytes = self.array.reshape(-1).view(np.uint8)
        self._views: dict[np.dtype, np.ndarray] = {}

    def pointer(self, region: int) -> tl.tensor:
        """Returns the kernel's argument for this buffer, which owns the numbered region."""
        self.start = (region << _REGION_BITS) + _REGION_MIDDLE
        element = tl.int8 if self.array is None else _TRITON_TYPES[self.array.dtype.name]
        kind = tl.pointer_type(element)
        return tl.tensor(interpreter.TensorHandle(np.array([self.start], np.uint64), kind), kind)

    def as_type(self, dtype: np.dtype) -> np.ndarray:
        """Returns the buffer as a flat array of whole items of another type."""
        view = self._views.get(dtype)
        if view is None:
            whole = self.bytes.size // dtype.itemsize * dtype.itemsize
            view = self._views[dtype] = self.bytes[:whole].view(dtype)
        return view


class _Builder(interpreter.InterpreterBuilder):
    """Triton's interpreter with checked memory and the arithmetic of narrow floats done right.

    Triton's own adds the bits of two bfloat16 numbers as integers, truncates where hardware rounds
    to nearest, and multiplies matrices of such bits (https://github.com/triton-lang/triton/issues/11584).
    """

    def __init__(self):
        super().__init__()
        # Three more operations for each addition, whose result nobody looks at without `debug`.
        self.options = dataclasses.replace(self.options, sanitize_overflow=False)

    def begin_launch(self, kernel: str, buffers: list[_Buffer], grid: int) -> None:
        self.kernel = kernel
        self.buffers = buffers
        self.set_grid_dim(grid, 1, 1)

    # Memory.

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Any:
        kind = ptrs.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        if active.all():
            return interpreter.TensorHandle(self._load(ptrs.data, dtype), kind)
        if other is None:
            meant = _HELD_AS_BITS.get(kind, dtype)
            result = poisoned(ptrs.data.shape, meant).view(dtype)
        else:
            result = np.array(np.broadcast_to(other.data, ptrs.data.shape), dtype)
        result[active] = self._load(ptrs.data[active], dtype)
        return interpreter.TensorHandle(result, kind)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any) -> None:
        active = np.broadcast_to(mask.data, ptrs.data.shape)
        values = np.broadcast_to(value.data, ptrs.data.shape)[active]
        for buffer, offsets, lanes in self._resolve("store", ptrs.data[active], values.itemsize):
            buffer.as_type(values.dtype)[offsets // values.itemsize] = values[lanes]

    def create_atomic_rmw(self, *arguments: Any) -> NoReturn:
        raise NotImplementedError("atomics have no order, so results would differ between runs")

    create_atomic_cas = create_atomic_rmw

    def _load(self, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
        parts = self._resolve("load", addresses.reshape(-1), dtype.itemsize)
        if len(parts) == 1:
            buffer, offsets, _ = parts[0]
            values = buffer.as_type(dtype).take(offsets // dtype.itemsize)
            return values.reshape(addresses.shape)
        values = np.empty(addresses.size, dtype)
        for buffer, offsets, lanes in parts:
            values[lanes] = buffer.as_type(dtype).take(offsets // dtype.itemsize)
        return values.reshape(addresses.shape)

    def _resolve(
        self, kind: Literal["load", "store"], addresses: np.ndarray, itemsize: int
    ) -> list[tuple[_Buffer, np.ndarray, Any]]:
        """Splits addresses by buffer: the buffer, offsets in it and lanes; refuses bad ones."""
        if not addresses.size:
            return []
        regions = addresses >> _REGION_BITS
        first = int(regions[0])
        if int(regions.min()) == int(regions.max()):
            split = [(first, slice(None))]
        else:
            split = [(int(region), regions == region) for region in np.unique(regions)]
        parts = []
        for region, lanes in split:
            if not 1 <= region <= len(self.buffers):
                raise MemoryAccessError(f"{self._who()}: {kind} through a pointer to nothing")
            buffer = self.buffers[region - 1]
            offsets = (addresses[lanes] - buffer.start).view(np.int64)
            self._check(kind, buffer, offsets, itemsize)
            parts.append((buffer, offsets, lanes))
            for observer in _observers:
                program = self.grid_idx[0]
                observer.accessed(Access(kind, buffer.name, offsets, itemsize, program))
        return parts

    def _check(self, kind: str, buffer: _Buffer, offsets: np.ndarray, itemsize: int) -> None:
        if buffer.array is None:
            raise MemoryAccessError(f"{self._who()}: {kind} of {buffer.name!r}, which is absent")
        if kind == "store" and not buffer.writable:
            raise MemoryAccessError(f"{self._who()}: store to {buffer.name!r}, which is an input")
        if offsets.min() < 0 or offsets.max() > buffer.bytes.size - itemsize:
            outside = offsets[(offsets < 0) | (offsets > buffer.bytes.size - itemsize)]
            first = int(outside[0])
            where = (
                f"{-first} bytes before its start"
                if first < 0
                else f"{first + itemsize - buffer.bytes.size} bytes past its end"
            )
            raise MemoryAccessError(
                f"{self._who()}: {kind} outside {buffer.name!r} ({buffer.bytes.size} bytes), "
                f"{outside.size} of {offsets.size} lanes, the first {where}"
            )
        if itemsize != buffer.array.itemsize and (offsets % itemsize).any():
            raise MemoryAccessError(f"{self._who()}: misaligned {kind} in {buffer.name!r}")

    def _who(self) -> str:
        return f"{self.kernel}, program {self.grid_idx[0]}"

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

    def create_dot(self, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if not a.dtype.is_floating() or a.data.dtype == np.float64:
            return super().create_dot(a, b, d, *precision)
        product = np.matmul(_numbers(a).astype(np.float32), _numbers(b).astype(np.float32))
        return _handle(product + _numbers(d), d.dtype.scalar)


def _numbers(handle: Any) -> np.ndarray:
    """Returns the values of a handle in a type that NumPy computes with."""
    meant = _HELD_AS_BITS.get(handle.dtype.scalar)
    if meant is None or handle.data.dtype == np.bool_:
        return handle.data
    return handle.data.view(meant)


def _handle(values: np.ndarray, kind: Any) -> Any:
    """Returns a handle of values, rounded to nearest if they do not fit the type."""
    held = interpreter._get_np_dtype(kind)
    meant = _HELD_AS_BITS.get(kind)
    if meant is None:
        return interpreter.TensorHandle(values.astype(held, copy=False), kind)
    if meant.itemsize == 1:  # Hardware saturates here where ml_dtypes gives NaN or infinity.
        largest = float(ml_dtypes.finfo(meant).max)
        values = np.clip(values.astype(np.float32), -largest, largest)
    return interpreter.TensorHandle(values.astype(meant, copy=False).view(held), kind)


_builder = _Builder()
_semantic = TritonSemantic(_builder)


@contextlib.contextmanager
def _triton_interprets() -> Iterator[None]:
    """Makes Triton interpret, on this thread, until the context ends."""
    with triton_language_lock:
        substitutions = _substitutions()
        try:
            for owner, name, _, interpreting in substitutions:
                _assign(owner, name, interpreting)
            yield
        finally:
            for owner, name, compiling, _ in substitutions:
                _assign(owner, name, compiling)
            _functions.clear()


_ABSENT = object()


def _assign(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@functools.cache
def _substitutions() -> tuple[tuple[Any, str, Any, Any], ...]:
    """Lists what differs in Triton between compiling and interpreting: owner, name, both values.

    Triton patches its language for every launch and for every call of a function by a kernel,
    which costs more than the kernel. Here it does so once, and what it changed is noted.
    """
    modules = [tl, tl.core, tl.math, tl.standard, interpreter]
    classes = {v for m in modules[:3] for v in vars(m).values() if isinstance(v, type)}
    classes |= {JITFunction, interpreter.InterpretedFunction, interpreter.ReduceOps}
    owners = [*modules, *(c for c in classes if c.__module__.startswith("triton."))]
    before = [dict(vars(owner)) for owner in owners]

    interpreter.interpreter_builder = _builder
    interpreter.interpreter_semantic = _semantic
    interpreter._patch_lang(
        types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    )
    # A function of the language, or of the kernel's module, stays the object that it is, and is
    # interpreted when called: nothing in anybody's globals needs to change.
    for function_type in (JITFunction, interpreter.InterpretedFunction):
        _assign(
            function_type,
            "__call__",
            lambda self, *args, **kwargs: _interpretable(self.fn)(*args, **kwargs),
        )
        _assign(
            function_type,
            "__get__",
            lambda self, tensor, owner=None: (
                self if tensor is None else types.MethodType(self, tensor)
            ),
        )
    _assign(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    _assign(interpreter.ReduceOps, "min_max", _quiet_min_max(interpreter.ReduceOps.min_max))
    # Half of a launch's time goes into describing the shapes of its tensors, over and over.
    _assign(tl.tensor, "__init__", _initialise_tensor)
    _assign(tl.block_type, "__init__", _remembered_block_types(tl.block_type.__init__))
    _assign(interpreter, "_get_np_dtype", _remembered_dtypes(interpreter._get_np_dtype))

    substitutions = []
    for owner, old in zip(owners, before, strict=True):
        for name, interpreting in dict(vars(owner)).items():
            compiling = old.get(name, _ABSENT)
            if interpreting is not compiling:
                substitutions.append((owner, name, compiling, interpreting))
    return tuple(substitutions)


def _quiet_min_max(min_max: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces reductions that warn of a slice of NaN, and take three passes to find out."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def quiet_min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        return min_max(self, input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    return quiet_min_max


def _initialise_tensor(self: Any, handle: Any, type: Any) -> None:
    """Does what `tl.tensor.__init__` does, with the description of the shape made once."""
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_and_size(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _remembered_block_types(initialise: Callable[..., None]) -> Callable[..., None]:
    remembered: dict[Any, dict[str, Any]] = {}

    def initialise_or_remember(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(s if isinstance(s, int) else s.value for s in shape))
        attributes = remembered.get(key)
        if attributes is None:
            initialise(self, element_ty, shape)
            remembered[key] = dict(vars(self))
        else:
            vars(self).update(attributes)

    return initialise_or_remember


def _remembered_dtypes(np_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    remembered: dict[str, np.dtype] = {}

    def remember(kind: Any) -> np.dtype:
        dtype = remembered.get(kind.name)
        if dtype is None:
            dtype = remembered[kind.name] = np_dtype(kind)
        return dtype

    return remember


# The functions of the launch in progress, each with the globals of this moment.
_functions: dict[Callable[..., Any], Callable[..., Any]] = {}


def _interpretable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of a kernel as the interpreter needs it, its module left alone."""
    if function not in _functions:
        code = _rewritten_code(function)
        namespace = {
            **function.__globals__,
            **(inspect.getclosurevars(function).nonlocals if function.__closure__ else {}),
            # Names that the rewritten code refers to.
            "interpreter_semantic": _semantic,
            "_InterpreterComparison": getattr(interpreter, "_InterpreterComparison", None),
        }
        copy = types.FunctionType(code, namespace, function.__name__, function.__defaults__)
        copy.__kwdefaults__ = function.__kwdefaults__
        _functions[function] = copy
    return _functions[function]


@functools.cache
def _rewritten_code(function: Callable[..., Any]) -> types.CodeType:
    """Compiles a function's source with each assigned value made a tensor, as Triton asks."""
    return _Rewriter(function).rewrite_ast()


class _Rewriter(interpreter.FunctionRewriter):
    """Triton's rewriter, which else writes a hundred names into the kernel's module."""

    def _compile_and_exec(self, transformed_ast: Any) -> types.CodeType:
        module = compile(transformed_ast, self.filename, "exec")
        codes = [c for c in module.co_consts if isinstance(c, types.CodeType)]
        return next(c for c in codes if c.co_name == self.fn.__name__)
