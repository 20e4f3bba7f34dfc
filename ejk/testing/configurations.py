"""The short list of what programs are compiled for, dealt out over shapes; and few of them."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from ejk.testing.oracle import DType
from ejk.testing.shapes import SHAPES, Shape

DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))
LAYOUTS = ("HND", "NHD", "KV_HEADS_FIRST")  # of two pools, or of a fused one
FEATURES = ("sliding_window", "attn_logits_soft_cap", "sinks", "alibi_slopes", "attn_scale")
INTEGERS = tuple(np.dtype(f"{kind}int{bits}") for kind in ("", "u") for bits in (8, 16, 32, 64))
INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a program of attention is compiled for.

    Attributes:
        shape: the sizes.
        dtype: NumPy's, of queries and results.
        cache_layout: "HND", "NHD", "KV_HEADS_FIRST" or "INTERLEAVED".
        features: the optional arguments that are given: of "sliding_window",
            "attn_logits_soft_cap", "sinks", "alibi_slopes" and "attn_scale", and for ragged batches
            of "positions", "tree_mask" and "causal=False".
        num_splits: of `ejk.page_attention`.
        fused: one pool of five axes holds keys and values.
        cache_dtype: of the pools if it is another; uint8 is int4, two values a byte.
        scales: what has one: "none", "scalar", "head" or "token".
    """

    shape: Shape
    dtype: DType
    cache_layout: str
    features: frozenset[str] = frozenset()
    num_splits: int = 0
    fused: bool = False
    cache_dtype: DType | None = None
    scales: str = "none"

    @property
    def holds(self) -> DType:
        """The type of the pools: uint8 for int4, two values a byte."""
        return self.dtype if self.cache_dtype is None else self.cache_dtype

    @property
    def is_quantised(self) -> bool:
        """The cache is of another type than the query, or has scales."""
        return self.holds != self.dtype or self.scales != "none"


INT8, INT4 = np.dtype(np.int8), np.dtype(np.uint8)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
F32, BF16, F16 = DTYPES
CACHES = (
    (BF16, INT8, "token"), (BF16, E4M3, "head"), (BF16, INT4, "token"), (F32, BF16, "none"),
    (F16, E4M3, "token"), (BF16, E5M2, "none"), (F32, INT8, "head"), (BF16, F16, "head"),
    (F32, INT4, "token"), (BF16, INT8, "scalar"), (F16, E5M2, "head"), (F16, BF16, "token"),
    (F32, E4M3, "none"), (F16, INT8, "token"), (BF16, F32, "none"), (F16, INT4, "token"),
    (F32, E5M2, "token"), (BF16, BF16, "token"), (BF16, E4M3, "token"), (F16, INT8, "head"),
    (F32, INT8, "token"), (F32, F16, "scalar"), (BF16, E5M2, "token"),
)  # fmt: skip
"""Types of queries and caches, and what has a scale."""


def quantised_configurations() -> list[Configuration]:
    """Deal out the types of `CACHES` over the shapes."""
    rng = random.Random(21)
    made, caches = [], itertools.cycle(CACHES)
    for shape in SHAPES:
        dtype, cache, scales = next(caches)
        while cache == INT4 and (shape.head_dim % 2 or shape.width % 2):
            dtype, cache, scales = next(caches)
        features = frozenset(feature for feature in FEATURES if rng.random() < 0.3)
        options = rng.choice((0, 1, 3)), rng.random() < 0.4 and shape.fusible, cache, scales
        made.append(Configuration(shape, dtype, rng.choice(LAYOUTS), features, *options))
    return made


def configurations(per_shape: int) -> list[Configuration]:
    """Deal out all that a call may have over the shapes, the same every time."""
    rng = random.Random(20)
    dtypes, layouts = itertools.cycle(DTYPES), itertools.cycle(LAYOUTS)
    plain = [Configuration(shape, next(dtypes), next(layouts)) for shape in SHAPES]
    rich = [
        Configuration(
            shape,
            rng.choice(DTYPES),
            rng.choice(LAYOUTS),
            frozenset(feature for feature in FEATURES if rng.random() < 0.5),
            rng.choice((0, 1, 2, 3, 7)),
            rng.random() < 0.5 and shape.fusible,
        )
        for _ in range(per_shape - 1)
        for shape in SHAPES
    ]
    made = plain + rich + quantised_configurations()
    fused = [c for c in made if c.fused][::2]  # one in two is interleaved instead
    return [
        dataclasses.replace(c, fused=False, cache_layout="INTERLEAVED") if c in fused else c
        for c in made
    ]


CONFIGURATIONS, MANY_CONFIGURATIONS = configurations(2), configurations(12)
"""Two of each shape, or twelve, and one that is quantised."""


@dataclasses.dataclass(frozen=True)
class Few:
    """Chooses few configurations, of which all calls of a test are: each is a program or two.

    Attributes:
        seed: which they are.
        count: how many, or None for all. One of a quantised cache is among them, or comes on top.
        suits: says of a configuration whether it may be chosen; if it lets none be, all may.
    """

    seed: int = 0
    count: int | None = None
    suits: Callable[[Any], bool] | None = None

    def of(self, configurations: Sequence[Any]) -> st.SearchStrategy[Any]:
        """Draw one of those of `configurations` that are chosen."""
        if self.suits is not None:
            configurations = [c for c in configurations if self.suits(c)] or configurations
        if self.count is None:
            return st.sampled_from(configurations)
        rng = random.Random(self.seed)
        # Pallas refuses float16: one of another type is always among them, and one quantised cache.
        plain = [c for c in configurations if not c.is_quantised] or configurations
        first = rng.choice([c for c in plain if c.dtype != np.float16] or plain)
        others = [c for c in plain if c != first]
        few = [first, *rng.sample(others, min(self.count - 1, len(others)))]
        quantised = [c for c in configurations if c.is_quantised and c not in few]
        return st.sampled_from([*few, *rng.sample(quantised, min(1, len(quantised)))])

    def fixed(self, options: Sequence[Any], number: int) -> st.SearchStrategy[Any]:
        """Draw one of what a program depends on; if there are few, number `number` has its own."""
        if self.count is None:
            return st.sampled_from(options)
        return st.just(random.Random(self.seed + number).choice(options))


ALL = Few()
