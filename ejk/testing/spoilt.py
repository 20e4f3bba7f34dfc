"""Calls of attention with numbers that are not finite in what some row sees."""

import copy
from typing import Any

import numpy as np

from ejk.testing.configurations import DTYPES


def spoilt(case: Any, seed: int) -> Any:
    """Put NaN in a key, a value or a sink, infinity in a sink, or make a logit infinite.

    Of quantised caches sinks alone. Nothing is promised of a value that is infinite: its weight may
    be too small for the type that weights have.
    """
    rng = np.random.default_rng(seed)
    query, keys = case.query.copy(), case.keys.copy()
    values: Any = copy.copy(case.values)
    options = dict(case.options)
    rows = [(s, seen) for s, seen in map(case.seen, range(len(query))) if len(seen)]
    places: list[str] = ["sink"] if "sinks" in options else []
    if rows and keys.dtype in DTYPES:
        places += ["key"] if case.values is None else ["key", "value"]
        places += [] if "attn_logits_soft_cap" in options else ["logit"]  # a cap is finite
    if not places:
        return case
    place = rng.choice(places)
    if place == "sink":
        sinks = np.array(options["sinks"])
        sinks[rng.integers(len(sinks))] = rng.choice([np.nan, np.inf])
        return case.replace(options=options | {"sinks": sinks})
    s, seen = rows[rng.integers(len(rows))]
    block, slot = divmod(int(rng.choice(seen[:, 0])), case.shape.page_size)
    at = int(case.block_tables[s, block]), slot, int(rng.integers(case.shape.num_kv_heads))
    if place == "value":
        values[*at, rng.integers(case.shape.width)] = np.nan
    elif place == "key":
        keys[*at, rng.integers(case.shape.head_dim)] = np.nan
    else:
        query[..., 0], keys[*at, 0] = 1, np.inf
    return case.replace(query=query, keys=keys, values=values)


def beside_a_nan(case: Any) -> list[int]:
    """List the rows that do not see a NaN and whose sequence has one that does.

    They may be NaN, too: weights of 0 are multiplied by what other rows see.
    """
    is_nan = np.isnan(case.expected()[0]).any((1, 2))
    sequences = {case.seen(row)[0] for row in np.flatnonzero(is_nan).tolist()}
    others = np.flatnonzero(~is_nan & ~case.outside).tolist()
    return [row for row in others if case.seen(row)[0] in sequences]
