"""What several libraries' arguments mean here."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer, Num

from ejk._describe import describe
from ejk._errors import UnsupportedError
from ejk._indices import as_int32
from ejk._typing import Array, check, unknown_keywords

# A masked logit of so much has weight 0 beside any of -9,000 or more, as one that is selected away.
MASKS = -1e4

Rows = Float[Array, "batch num_heads head_dim"]
Lengths = Integer[Array, " batch"]
Tables = Integer[Array, "batch pages_per_seq"]
Pool = Num[Array, "num_kv_heads num_pages page_size head_dim"]
Interleaved = Annotated[
    Num[Array, "_ _ _ _"], "a numeric array [num_pages, page_size, 2 * num_kv_heads, head_dim]"
]
FlatTables = Annotated[Integer[Array, " _"], "an integer array [max_num_seqs * pages_per_seq]"]
Packed = Annotated[
    Num[Array, "_ _ _ _ _"],
    "a numeric array [num_pages, page_size, 2 * num_kv_heads / packing, packing, head_dim]",
]
Count = Annotated[
    int | np.integer | Integer[Array, ""] | Integer[Array, "1"], "an int or an integer array [1]"
]

Window = Annotated[
    tuple[int | np.integer, int | np.integer], "a pair of ints, (left, right): -1 is no end"
]
Scale = Annotated[
    int | float | np.integer | np.floating | Float[Array, "..."] | None,
    "a number, a floating-point array of one or [num_kv_heads], or None",
]

F = TypeVar("F", bound=Callable[..., Any])


def drop_in(function: F) -> F:
    """Answer keywords that the function does not take, as those of `ejk` do.

    Raises:
        TypeError: naming each, and what it is called there, or here.
    """
    arguments = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        if said := unknown_keywords(function.__name__, arguments, kwargs):
            raise TypeError(said)
        return function(*args, **kwargs)

    return named  # type: ignore[return-value]


def check_mask_value(mask_value: Any) -> None:
    """Refuse a mask that would leave weight to what is masked: here it has none.

    Raises:
        ValueError: it is above -1e4.
    """
    if mask_value is not None and not mask_value <= MASKS:
        raise ValueError(
            f"mask_value={describe(mask_value)} must be None or at most {MASKS:g}: what is not "
            "visible has no weight"
        )


def check_limits(sliding_window: Any, soft_cap: Any) -> None:
    """Refuse windows and caps in the words of JAX's and tpu-inference's ragged attentions.

    Raises:
        ValueError: a window of less than 1, or a cap of 0.
    """
    if isinstance(sliding_window, int | np.integer) and sliding_window < 1:
        raise ValueError(f"{sliding_window=} must be positive: None is no window")
    if isinstance(soft_cap, float | int | np.number) and soft_cap == 0:
        raise ValueError(f"{soft_cap=} must not be 0.0: None caps nothing")


def check_arrays(**given: tuple[Any, Any]) -> None:
    """Check rank and dtype kind of arguments, each with its type.

    Raises:
        TypeError: naming the argument as its caller does.
    """
    for name, (x, hint) in given.items():
        check(name, x, hint, {})


def refuse(function: str, mends: dict[str, str], **given: Any) -> None:
    """Refuse arguments that would change the answer and are not honoured: those that are not None.

    Raises:
        UnsupportedError: naming each of them, and what to do instead, as `mends` has it.
    """
    reasons = [
        f"  {name}={describe(value)}: {mends[name]}"
        for name, value in given.items()
        if value is not None
    ]
    if reasons:
        raise UnsupportedError("\n".join([f"ejk.compat: {function} does not honour", *reasons]))


def first_sequences(cu_q_lens: Any, num_seqs: Any) -> jax.Array:
    """Return bounds that give sequences from `num_seqs` on no tokens, whatever they held there."""
    bounds, most = int32(cu_q_lens), cu_q_lens.shape[0] - 1
    last = jnp.clip(int32(num_seqs).reshape(()), 0, most)
    return jnp.where(jnp.arange(most + 1, dtype=jnp.int32) <= last, bounds, bounds[last])


def int32(x: Any) -> jax.Array:
    """Return integers as int32; wider ones that it cannot hold become its largest, or -1."""
    return jnp.asarray(as_int32(x, 2**31 - 1))
