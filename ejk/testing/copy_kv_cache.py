"""Hypothesis strategies that draw a whole copy of slots or pages, of random bits."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ejk.testing import oracle
from ejk.testing.bits import bits_equal
from ejk.testing.case import Case, given_scales
from ejk.testing.configurations import (
    ALL,
    BF16,
    E4M3,
    F16,
    F32,
    INT4,
    INT8,
    INTEGERS,
    LAYOUTS,
    Few,
)
from ejk.testing.oracle import Array, DType
from ejk.testing.write_kv_cache import WriteShape, hostile_slots
from ejk.testing.write_kv_cache import build as build_write

SHAPES = (
    WriteShape("llama-3-8b, a quarter", 7, 2, 128, 128, page_size=16),
    WriteShape("fused", 9, 2, 64, None, page_size=8, num_pages=7),
    WriteShape("deepseek-v3", 5, 1, 576, 0, page_size=16),
    WriteShape("odd everything", 12, 3, 34, 18, page_size=3),
    WriteShape("one of everything", 2, 1, 1, 1, page_size=1, num_pages=1),
    WriteShape("fused, single slots", 30, 3, 8, None, page_size=1, num_pages=30),
)
"""`num_tokens` is the number of copies."""

UNIT_OF = {"copy_kv_slots": "slot", "copy_kv_pages": "page"}
UNITS = tuple(UNIT_OF.values())


class CopyConfiguration(NamedTuple):
    """What a program is compiled for."""

    shape: WriteShape
    unit: str
    dtype: DType  # of the pools
    cache_layout: str
    scales: str = "none"  # or "head" or "token"

    @property
    def is_quantised(self) -> bool:
        return self.dtype in (INT8, INT4, E4M3)


TYPES = (
    (F32, "none"), (INT8, "token"), (BF16, "none"), (E4M3, "token"), (F16, "none"),
    (INT8, "head"), (INT4, "token"), (BF16, "token"), (E4M3, "none"),
)  # fmt: skip

_DEALT = zip(
    itertools.cycle(SHAPES[:4] + SHAPES[5:]),
    itertools.cycle(UNITS),
    itertools.cycle(TYPES),
    itertools.cycle((*LAYOUTS, *LAYOUTS[1:], LAYOUTS[0], LAYOUTS[2])),
)
# Every type and layout, dealt out over the shapes.
CONFIGURATIONS = (
    *(
        CopyConfiguration(shape, unit, dtype, layout, scales)
        for shape, unit, (dtype, scales), layout in itertools.islice(_DEALT, 40)
    ),
    CopyConfiguration(SHAPES[4], "slot", F32, "HND"),
)


@dataclasses.dataclass(frozen=True, repr=False)
class CopyKVCacheCase(Case):
    """One call of `ejk.copy_kv_slots` or `ejk.copy_kv_pages`."""

    unit: str
    key_cache: Array
    value_cache: Array | None
    sources: Array
    targets: Array
    cache_layout: str
    scales: tuple[Any, Any] = (None, None)
    as_jax: bool = True

    @property
    def operation(self) -> str:
        return f"copy_kv_{self.unit}s"

    def expected(self) -> tuple[Array, ...]:
        """What the oracle says of the pools that there are."""
        pools = oracle.copy_kv_cache(self.unit, *self.operands(), **self.semantics())
        return tuple(pool for pool in pools if pool is not None)

    def check(self, results: Iterable[Any]) -> None:
        """Raise an `AssertionError` where a bit is another than the oracle's."""
        bits_equal(results, self.expected())

    def operands(self) -> tuple[Any, ...]:
        return self.key_cache, self.value_cache, self.sources, self.targets

    def semantics(self) -> dict[str, Any]:
        return {"cache_layout": self.cache_layout, **given_scales(self.scales)}


def build(
    config: CopyConfiguration,
    sources: Array,
    targets: Array,
    *,
    seed: int = 0,
    as_jax: bool = True,
) -> CopyKVCacheCase:
    """Make a call on pools of random bits, NaN of every payload among them."""
    shape, unit, dtype, layout, scales = config
    is_float = dtype in (F32, BF16, F16)
    pools = build_write(
        shape, dtype if is_float else F32, layout, np.zeros(0, np.int32), seed=seed,
        cache_dtype=None if is_float else dtype, scales=scales,
    )  # fmt: skip
    return CopyKVCacheCase(
        unit, pools.key_cache, pools.value_cache, sources, targets, layout, pools.scales, as_jax
    )


def num_units(config: CopyConfiguration) -> int:
    shape = config.shape
    return shape.num_slots if config.unit == "slot" else shape.num_pages


@st.composite
def copies(
    draw: Any, configurations: Sequence[Any] = CONFIGURATIONS, few: Few = ALL
) -> CopyKVCacheCase:
    """Draw a call: anywhere, or among a few, so that they meet; permuted; some outside."""
    config = draw(few.of(configurations))
    count, units = config.shape.num_tokens, num_units(config)
    kind = draw(st.sampled_from(INTEGERS))
    top = min(units - 1, np.iinfo(kind).max)
    near, outside = st.integers(max(0, top - 4), top), hostile_slots(kind, units)
    anywhere = draw(st.sampled_from((st.integers(0, top), near, near | st.sampled_from(outside))))
    sources, targets = (
        draw(arrays(kind, count, elements=anywhere, fill=st.nothing())) for _ in range(2)
    )
    if draw(st.booleans()):  # nothing but cycles
        targets = np.array(draw(st.permutations(sources.tolist())), kind)
    seed = draw(st.integers(0, 2**32 - 1))
    return build(config, sources, targets, seed=seed, as_jax=draw(st.booleans()))
