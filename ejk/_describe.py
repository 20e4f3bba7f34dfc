"""How an argument is described in a message: shortly, and without a copy from the device."""

import numbers
import reprlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class _Short(reprlib.Repr):
    """Python's own representation of numbers, strings and what holds them, cut short."""

    def __init__(self):
        super().__init__(maxlevel=3, maxlist=3, maxtuple=3, maxdict=3, maxstring=80, maxother=80)

    def repr1(self, x: Any, level: int) -> str:
        is_array = isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype")
        if is_array and not isinstance(x, type):
            return _array(x)
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 10_000:  # Python refuses to print it: its highest bit tells the size
            return f"{'-' * (x < 0)}2**{x.bit_length() - 1}"
        return super().repr_int(x, level)

    def repr_instance(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, numbers.Number):
            return super().repr_instance(x, level)
        return f"{x.__qualname__} (call the class)" if isinstance(x, type) else type(x).__name__


describe = _Short().repr
"""Describe a value in a hundred characters or few more."""


def _array(x: Any) -> str:
    try:
        described = f"{np.dtype(x.dtype).name}[{', '.join(map(str, x.shape))}]"
    except TypeError:  # another library's, or a key's
        described = f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    if isinstance(x, Tracer):
        return f"traced {described}"
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return described
    module = type(x).__module__.split(".")[0]
    return f"{module}.{type(x).__name__} {described}"


def mend(name: str, value: Any, *, is_static: bool, ranks: Collection[int]) -> str:
    """Say how to make an argument what it must be, where that can be said.

    Args:
        name: the argument's.
        value: what was given.
        is_static: it must be known when a call is traced.
        ranks: how many axes it may have as an array.
    """
    how = ""
    if is_static:
        how = _static(name, value)
    elif name == "sliding_window" and isinstance(value, list | tuple):
        how = window_mend(value)
    elif name == "sliding_window" and getattr(value, "ndim", 0):
        how = "all sequences of a call have one window"
    elif any(ranks):
        how = _array_mend(name, value, ranks)
    return f"; {how}" if how else ""


def _static(name: str, value: Any) -> str:
    if not isinstance(value, jax.Array | np.ndarray):
        return "0 is automatic" if (name, value) == ("num_splits", None) else ""
    is_hint = name in ("max_context_len", "max_q_len")
    hint = ", or leave it out: it is a hint" if is_hint else ""
    return (
        "it has to be known when the call is traced: pass a Python value, and under jax.jit name "
        f"it in static_argnames{hint}"
    )


def _array_mend(name: str, value: Any, ranks: Collection[int]) -> str:
    if name == "prefix_groups":
        return "pass (groups, num_pages), two integer arrays"
    if name == "context_lens" and (how := whole_cache_mend(value)):
        return how
    if isinstance(value, list | tuple):
        if name.endswith("_cache"):
            return _pools_mend(value)
        if hasattr(value, name):  # of an `ejk.paging.BatchInputs`, say
            return f"pass its fields: {name} is inputs.{name}"
        if len({len(row) for row in value if isinstance(row, list | tuple)}) > 1:
            return f"pad the rows with -1 to one length, and pass jnp.asarray({name})"
        return f"pass {'jnp.stack' if _holds_arrays(value) else 'jnp.asarray'}({name})"
    if isinstance(value, jax.ShapeDtypeStruct):
        return "trace the call with it: jax.eval_shape(function, ...)"
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"pass jnp.from_dlpack({name})" if hasattr(value, "__dlpack__") else ""
    mends = _BY_AXES.get((name, value.ndim), "")
    extra = [axis for axis, size in enumerate(value.shape) if isinstance(size, int) and size == 1]
    if len(extra) == 1 and value.ndim - 1 in ranks:
        # Rows may be of a batch of one, or of one token each: what is said of batches holds.
        if not mends or extra[0] > 1 or name == "context_lens":
            return f"pass {name}.squeeze({extra[0]})"
    if mends:
        return mends
    is_float = jnp.issubdtype(value.dtype, np.floating)  # a mask would be ids 0 and 1
    if name in _INTEGERS and value.ndim in ranks and is_float:
        return f"pass {name}.astype(jnp.int32)"
    return ""


def _pools_mend(value: Any) -> str:
    """Say how several pools are passed: never stacked, as that would copy all of them."""
    if hasattr(value, "key_cache"):  # an `ejk.KVCache`
        return "pass its fields: cache.key_cache, cache.value_cache"
    if len(value) == 2:
        return "pass the two pools as key_cache and value_cache"
    return "of a list of layers pass one layer's pools"


def window_mend(window: Any) -> str:
    """Say which `sliding_window` is meant by another library's: (left, right), or -1 for none."""
    left = window[0] if isinstance(window, list | tuple) and window else window
    if not isinstance(left, int | np.integer):
        return ""
    if left < 0:
        return "None is no window"
    return f"sliding_window={left + 1} sees {left} tokens to the left: it counts the token itself"


def _holds_arrays(values: Any) -> bool:
    return any(isinstance(value, jax.Array | np.ndarray) for value in values)


def whole_cache_mend(after_pools: Any) -> str:
    """Say what to pass of a KVCache if, behind the pools, stand its scales: of tokens, or None."""
    if after_pools is None or getattr(after_pools, "ndim", 0) > 2:
        return "of an ejk.KVCache pass its first two fields, *cache[:2], and scales by keyword"
    return ""


_INTEGERS = ("context_lens", "block_tables", "cu_q_lens", "slot_mapping", "positions")
ALL_LAYERS = (
    "of a pool of all layers pass one layer's, {0}[layer], or the pool reshaped to [layers * "
    "num_pages, ...] and ejk.layer_block_tables(block_tables, layer, num_pages=num_pages)"
)
_BATCHED = (
    "of [batch, tokens, heads, dim] pass {0}.reshape(-1, *{0}.shape[2:]); the new tokens come "
    "before the pools"
)
_FLAT = "for one token pass {0}[None]; of [tokens, heads * dim], {0}.reshape(len({0}), heads, -1)"
_ONE_HEAD = "of [num_pages, page_size, head_dim] pass {0}[:, None], as cache_layout='HND' has it"
_ONE_PART = "of one part alone there is nothing to merge: jnp.stack the parts"
_BY_AXES = {
    ("query", 2): _FLAT.format("query"),
    ("query", 4): "of [batch, 1, heads, dim] ejk.page_attention takes query[:, 0]; several "
    "tokens a sequence go to ejk.ragged_page_attention, as query.reshape(-1, *query.shape[2:]) "
    "with cu_q_lens",
    ("context_lens", 0): "for one sequence pass context_lens[None]",
    ("context_lens", 2): "the lengths come before the tables",
    ("block_tables", 1): "for one sequence pass block_tables[None]; of a flat table, "
    "block_tables.reshape(num_seqs, -1)",
    ("key_cache", 6): ALL_LAYERS.format("key_cache"),
    ("value_cache", 6): ALL_LAYERS.format("value_cache"),
    ("value_cache", 1): "value_cache comes before the lengths; it is None for fused pools and "
    "latent attention",
    ("key_cache", 3): _ONE_HEAD.format("key_cache"),
    ("value_cache", 3): _ONE_HEAD.format("value_cache"),
    ("key", 2): _FLAT.format("key"),
    ("value", 2): _FLAT.format("value"),
    ("key", 4): _BATCHED.format("key"),
    ("value", 4): _BATCHED.format("value"),
    ("slot_mapping", 2): "pass slot_mapping.reshape(-1)",
    ("positions", 2): "pass positions.reshape(-1)",
    ("outs", 3): _ONE_PART,
    ("lses", 2): _ONE_PART,
}
