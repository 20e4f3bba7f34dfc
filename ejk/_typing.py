"""Array types for annotations, and the decorator that checks them."""

import functools
import inspect
import itertools
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from ejk._describe import describe, mend, whole_cache_mend
from ejk._foreign_names import unexpected_keyword

Array = jax.Array | np.ndarray

Query = Float[Array, "num_seqs num_heads head_dim"]
Cache = Annotated[
    Num[Array, "_ _ _ _"] | Num[Array, "_ _ _ _ _"],
    "a numeric array of four axes, or five of fused pools, as cache_layout says",
]
Lengths = Integer[Array, " num_seqs"]
TokenRows = Float[Array, "num_tokens num_kv_heads head_dim"]
Slots = Integer[Array, " num_tokens"]
Copies = Integer[Array, " num_copies"]
Paths = Integer[Array, "num_seqs depth"]
Tables = Integer[Array, "num_seqs max_blocks"]
Tokens = Float[Array, "total_tokens num_heads head_dim"]
Bounds = Annotated[Integer[Array, " _"], "an integer array [num_seqs + 1]"]
PerToken = Integer[Array, " total_tokens"]
Indices = Integer[Array, " num_indices"]
TreeMask = Annotated[
    Bool[Array, "total_tokens max_q_len"], "a boolean array [total_tokens, max_q_len]"
]
PerHead = Float[Array, " num_heads"]
PrefixGroups = Annotated[
    tuple[Integer[Array, " num_seqs"], Integer[Array, " num_groups"]],
    "a pair of integer arrays, groups [num_seqs] and num_pages [num_groups]",
]
Scalar = Annotated[
    float | int | np.floating | np.integer | Float[Array, ""] | Integer[Array, ""],
    "a number or a 0-d array",
]
Flag = Annotated[bool | np.bool_, "a bool"]
StaticInt = Annotated[int | np.integer, "an int"]
if typing.TYPE_CHECKING:
    StaticSize = StaticInt
else:  # or a symbolic dimension of `jax.export`
    StaticSize = Annotated[int | np.integer | type(jax.export.symbolic_shape("n")[0]), "an int"]
StaticFloat = Annotated[float | int | np.floating | np.integer, "a number"]
ScaleArgument = Annotated[
    float | int | np.floating | np.integer | Float[Array, "..."],
    "a number, or a floating-point array without axes, [num_kv_heads], or of the cache's axes but "
    "the last",
]
ScalarInt = Annotated[int | np.integer | Integer[Array, ""], "an int or a 0-d integer array"]
AxisName = Annotated[str | tuple[str, ...], "the name of a mesh axis, or a tuple of names"]

F = TypeVar("F", bound=Callable[..., Any])


_arguments: dict[str, frozenset[str]] = {}  # of every function that is checked


def typed(function: F) -> F:
    """Check rank and dtype kind of every argument against the function's annotations.

    How axes of several arguments fit each other is left to the function, which says so in a
    `ValueError`: the names of axes in annotations are documentation here.

    Raises:
        TypeError: naming the argument, what it is, what it must be and how to make it so. Of a
            keyword that is not the function's, what it is called here.
    """
    parameters = inspect.signature(function).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = {n for n, p in parameters.items() if p.default is p.empty}
    hints = {
        name: hint
        for name, hint in typing.get_type_hints(function, include_extras=True).items()
        if name in parameters and typing.get_origin(hint) is not Literal  # a ValueError's
    }
    own_name = function.__name__
    _arguments[own_name] = frozenset(parameters)
    known: dict[str, dict[Any, bool]] = {name: {} for name in hints}
    # jaxtyping's import hook would bind the names of axes across arguments.
    function.__no_type_check__ = True  # type: ignore[attr-defined]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(positional, args)) | kwargs
        if len(given) < len(args) + len(kwargs) or not given.keys() <= parameters.keys():
            raise TypeError(_misplaced(own_name, positional, list(parameters), args, kwargs))
        for name, value in given.items():
            if name in hints:
                check(name, value, hints[name], known[name])
        if not required <= given.keys():
            missing = [repr(name) for name in parameters if name in required - given.keys()]
            raise TypeError(f"{own_name}() is missing {', '.join(missing)}")
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check(name: str, value: Any, hint: Any, known: dict[Any, bool]) -> None:
    """Check rank and dtype kind of one argument; what fits is kept in `known`."""
    if not _fits(value, hint, known):
        _check_byte_order(name, value)
        how = mend(name, value, is_static=_is_static(hint), ranks=_ranks(hint))
        raise TypeError(f"{name}={describe(value)} must be {_spell(hint)}{how}")


def _fits(value: Any, hint: Any, known: dict[Any, bool]) -> bool:
    """Say whether a value is of a type, which is `known` of those that are like it."""
    kind = (type(value), getattr(value, "dtype", None), getattr(value, "ndim", None))
    fits = known.get(kind)
    if fits is None:
        from beartype.door import is_bearable  # a quarter of what importing ejk would cost

        is_flag = isinstance(value, bool) and Flag not in (hint, *typing.get_args(hint))
        fits = is_bearable(value, hint) and not is_flag and not [*_swapped("", value)]
        if not isinstance(value, tuple):  # what one holds matters
            known[kind] = fits
    return fits


def _swapped(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Find arrays whose bytes lie in another order than this machine's, which JAX cannot take."""
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        yield name, value
    for i, x in enumerate(value if isinstance(value, tuple) else ()):
        yield from _swapped(f"{name}[{i}]", x)


def _check_byte_order(name: str, value: Any) -> None:
    for which, x in _swapped(name, value):
        raise TypeError(
            f"{which}.dtype={x.dtype.str!r} must be of this machine's byte order: pass "
            f"{which}.astype({which}.dtype.newbyteorder('='))"
        )


def unknown_keywords(function: str, arguments: list[str], given: Collection[str]) -> str:
    """Say of each keyword that is not among the arguments what to write instead."""
    unknown = [name for name in given if name not in arguments]
    said = [unexpected_keyword(name, function, arguments, _arguments) for name in unknown]
    lengths = itertools.accumulate(len(line) + 1 for line in said)
    fit = sum(length < 1800 for length in lengths)
    more = [f"and {len(said) - fit} more"] if fit < len(said) else []
    return "\n".join(said[:fit] + more)


def _misplaced(
    function: str,
    positional: list[str],
    arguments: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str:
    """Say which arguments are unknown, given twice or too many."""
    if said := unknown_keywords(function, arguments, kwargs):
        return said
    if len(args) > len(positional):
        said = [f"takes {', '.join(positional)} by position, not {len(args)} arguments"]
        if "value_cache" in positional:
            said.append(whole_cache_mend(args[positional.index("value_cache") + 1]))
        if rest := ", ".join(name for name in arguments if name not in positional):
            said.append(f"by keyword: {rest}")
        return f"{function}() {'; '.join(filter(None, said))}"
    twice = [name for name in positional[: len(args)] if name in kwargs]
    return f"{function}() was given {', '.join(twice)} twice, by position and by keyword"


def _is_static(hint: Any) -> bool:
    """Say whether a number or a truth is asked for that cannot be an array."""
    parts = list(_parts(hint))
    return (int in parts or bool in parts) and not any(hasattr(part, "dims") for part in parts)


def _ranks(hint: Any) -> set[int]:
    """Return how many axes an array may have."""
    return {len(part.dims) for part in _parts(hint) if hasattr(part, "dims")}


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


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
