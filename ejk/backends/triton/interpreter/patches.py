"""What is substituted in Triton while it interprets, and put back after.

Triton decides at import, from an environment variable, whether a process compiles or interprets.
Here one process does both: for the length of a launch, and under a lock, Triton is made to
interpret; then all that changed is put back.
"""

import contextlib
import functools
import inspect
import math
import threading
import types
import typing
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from ejk.backends.triton.interpreter.builder import builder, refuse_narrow, semantic

# Held while Triton interprets; whoever compiles a Triton kernel must hold it too.
triton_language_lock = threading.RLock()


@contextlib.contextmanager
def triton_interprets() -> Generator[None]:
    """Make Triton interpret, on this thread, until the context ends."""
    with triton_language_lock:
        substitutions = _substitutions()
        try:
            for owner, name, _, interpreting in substitutions:
                setattr(owner, name, interpreting)
            yield
        finally:
            for owner, name, compiling, _ in substitutions:
                if compiling is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, compiling)
            _functions.clear()


_ABSENT = object()


@functools.cache
def _substitutions() -> tuple[tuple[Any, str, Any, Any], ...]:
    """List what differs in Triton between compiling and interpreting: owner, name, both values.

    Triton patches its language for every launch and for every call of a function by a kernel,
    which costs more than the kernel. Here it does so once, and what it changed is noted.
    """
    own = _own_substitutions()
    modules = [tl, tl.core, tl.math, tl.standard, interpreter]
    classes = {v for m in modules[:3] for v in vars(m).values() if isinstance(v, type)}
    classes |= {owner for owner, _, _ in own if isinstance(owner, type)}
    owners = [*modules, *(c for c in classes if c.__module__.startswith("triton."))]
    before = [dict(vars(owner)) for owner in owners]

    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic = semantic
    interpreter._patch_lang(  # pyright: ignore[reportPrivateUsage]
        types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    )
    for owner, name, interpreting in own:
        setattr(owner, name, interpreting)

    substitutions = []
    for owner, old in zip(owners, before, strict=True):
        for name, interpreting in dict(vars(owner)).items():
            compiling = old.get(name, _ABSENT)
            if interpreting is not compiling:
                substitutions.append((owner, name, compiling, _direct(interpreting)))
    return tuple(substitutions)


@typing.no_type_check
def _direct(interpreting: Any) -> Any:
    """Leave out what Triton puts between a function of its language and a call: two more calls."""
    member = (getattr(interpreting, "__kwdefaults__", None) or {}).get("member")
    function = getattr(member, "__wrapped__", None)
    if function is None:
        return interpreting

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = semantic
        return function(*arguments, **named)

    return call


def _own_substitutions() -> list[tuple[Any, str, Any]]:
    """List what must differ beyond what Triton changes by itself."""
    substitutions = []
    # A function of the language, or of the kernel's module, stays the object that it is, and is
    # interpreted when called: nothing in anybody's globals needs to change.
    for function_type in (JITFunction, interpreter.InterpretedFunction):
        substitutions += [
            (function_type, "__call__", lambda self, *a, **k: interpretable(self.fn)(*a, **k)),
            (function_type, "__get__", _bind_to_tensor),
        ]
    return [
        *substitutions,
        # NumPy no longer converts arrays of one element.
        (tl.tensor, "__index__", lambda self: int(self.handle.data.item())),
        (interpreter.ReduceScanOpInterface, "check_tensor", _check_reduced),
        (interpreter.ReduceOps, "min_max", _quiet_min_max(interpreter.ReduceOps.min_max)),
        # Triton's is a network of a thousand reductions.
        (tl, "sort", _sort),
        # Triton's make the descriptions of tensors' shapes and types over and over.
        (interpreter, "_get_np_dtype", _remembered_dtypes()),
        (tl.tensor, "__init__", initialise_tensor),
        (tl.block_type, "__init__", remembered_block_types(tl.block_type.__init__)),
    ]


def _bind_to_tensor(self: Any, tensor: Any, owner: Any = None) -> Any:
    """Make `x.max()` of a function that Triton hung on its tensor class."""
    return self if tensor is None else types.MethodType(self, tensor)


@typing.no_type_check
def _check_reduced(self: Any, input: Any) -> None:
    """Check the operands of a reduction or scan; the language converts those of `tl.max`."""
    for tensor in input:
        refuse_narrow("a reduction", tensor.dtype)
        self.check_axis(tensor.shape, self.axis)


@typing.no_type_check
def _quiet_min_max(min_max: Callable[..., Any]) -> Callable[..., Any]:
    """Replace reductions that warn of a slice of NaN, and take three passes to find out."""
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def quiet_min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        return min_max(self, input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    return quiet_min_max


@typing.no_type_check
def _sort(x: Any, dim: Any = None, descending: Any = False) -> Any:
    order = slice(None, None, -1) if descending else slice(None)
    handle = interpreter.TensorHandle(np.sort(x.handle.data)[..., order].copy(), x.dtype)
    return tl.tensor(handle, x.type)


@typing.no_type_check
def _remembered_dtypes() -> Callable[..., Any]:
    """Do what `_get_np_dtype` does, which makes a table of all types, once for each type."""
    find = interpreter._get_np_dtype  # pyright: ignore[reportPrivateUsage]
    remembered: dict[str, np.dtype] = {}

    def find_or_remember(kind: Any) -> np.dtype:
        scalar = kind.scalar
        if scalar.name not in remembered:
            remembered[scalar.name] = find(scalar)
        return remembered[scalar.name]

    return find_or_remember


@typing.no_type_check
def initialise_tensor(self: Any, handle: Any, type: Any) -> None:
    """Do what `tl.tensor.__init__` does, with the description of the shape made once."""
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = _shape_and_size(tuple(type.shape) if type.is_block() else ())


@functools.cache
def _shape_and_size(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


@typing.no_type_check
def remembered_block_types(initialise: Callable[..., None]) -> Callable[..., None]:
    """Do what `tl.block_type.__init__` does, once for each type and shape."""
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


# The functions of the launch in progress, each with the globals of this moment.
_functions: dict[Callable[..., Any], Callable[..., Any]] = {}


@typing.no_type_check
def interpretable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a kernel as the interpreter needs it, its module left alone."""
    if function not in _functions:
        code = _rewritten_code(function)
        namespace = {
            **function.__globals__,
            **(inspect.getclosurevars(function).nonlocals if function.__closure__ else {}),
            # Names that the rewritten code refers to.
            "interpreter_semantic": semantic,
            "_InterpreterComparison": getattr(interpreter, "_InterpreterComparison", None),
        }
        copy = types.FunctionType(code, namespace, function.__name__, function.__defaults__)
        copy.__kwdefaults__ = function.__kwdefaults__
        _functions[function] = copy
    return _functions[function]


@functools.cache
def _rewritten_code(function: Callable[..., Any]) -> types.CodeType:
    """Compile a function's source with each assigned value made a tensor, as Triton asks."""
    return _Rewriter(function).rewrite_ast()


class _Rewriter(interpreter.FunctionRewriter):
    """Triton's rewriter, which else writes a hundred names into the kernel's module."""

    def _compile_and_exec(self, transformed_ast: Any) -> types.CodeType:
        module = compile(transformed_ast, self.filename, "exec")
        codes = [c for c in module.co_consts if isinstance(c, types.CodeType)]
        return next(c for c in codes if c.co_name == self.fn.__name__)
