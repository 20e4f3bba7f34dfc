"""Array types for annotations, and the decorator that checks them."""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Num

Array = jax.Array | np.ndarray

Query = Float[Array, "num_seqs num_heads head_dim"]
Cache = Annotated[
    Num[Array, "_ _ _ _"] | Num[Array, "_ _ _ _ _"],
    "a numeric array of four axes, or five of fused pools, as cache_layout says",
]
Lengths = Integer[Array, " num_seqs"]
TokenRows = Float[Array, "num_tokens num_kv_heads head_dim"]
Slots = Integer[Array, " num_tokens"]
Tables = Integer[Array, "num_seqs max_blocks"]
Tokens = Float[Array, "total_tokens num_heads head_dim"]
Bounds = Annotated[Integer[Array, " _"], "an integer array [num_seqs + 1]"]
PerToken = Integer[Array, " total_tokens"]
TreeMask = Annotated[
    Bool[Array, "total_tokens max_q_len"], "a boolean array [total_tokens, max_q_len]"
]
PerHead = Float[Array, " num_heads"]
Scalar = Annotated[
    float | int | np.floating | np.integer | Float[Array, ""] | Integer[Array, ""],
    "a number or a 0-d array",
]
Flag = Annotated[bool | np.bool_, "a bool"]
StaticInt = Annotated[int | np.integer, "an int"]
StaticFloat = Annotated[float | int | np.floating | np.integer, "a number"]
ScalarInt = Annotated[int | np.integer | Integer[Array, ""], "an int or a 0-d integer array"]

F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """Check rank and dtype kind of every argument against the function's annotations.

    How axes of several arguments fit each other is left to the function, which says so in a
    `ValueError`: the names of axes in annotations are documentation here.

    Raises:
        TypeError: naming the argument, what it is and what it must be.
    """
    signature = inspect.signature(function)
    hints = {
        name: hint
        for name, hint in typing.get_type_hints(function, include_extras=True).items()
        if typing.get_origin(hint) is not Literal  # a wrong choice is a ValueError
    }
    # jaxtyping's import hook would bind the names of axes across arguments.
    function.__no_type_check__ = True  # type: ignore[attr-defined]

    @functools.wraps(function)
    def checked(*args, **kwargs):
        from beartype.door import is_bearable  # a quarter of what importing ejk would cost

        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in arguments.items():
            hint = hints.get(name, Any)
            is_flag = isinstance(value, bool) and hint not in (bool, Any)
            if is_flag or not is_bearable(value, hint):
                raise TypeError(f"{name}={_describe(value)} must be {_spell(hints[name])}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _describe(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{np.dtype(value.dtype).name}[{', '.join(map(str, value.shape))}]"
    return f"{value!r} (call the class)" if isinstance(value, type) else repr(value)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    alternatives = typing.get_args(hint)
    if alternatives and not hasattr(hint, "dims"):
        return " or ".join(dict.fromkeys(map(_spell, alternatives)))
    if hint is type(None):
        return "None"
    if hasattr(hint, "dim_str"):
        kind = {"Float": "a floating-point", "Integer": "an integer"}.get(
            hint.__name__.split("[")[0]
        )
        axes = ", ".join(hint.dim_str.split()) or "no axes"
        return f"{kind or 'a numeric'} array [{axes}]"
    return getattr(hint, "__name__", str(hint))
