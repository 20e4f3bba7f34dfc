"""What `wrong_calls` does not hold of cache types and scales: odd widths, refusals, right calls."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import E4M3, INT4, INT8, LATENT, OF_TOKENS, RIGHT, SHAPE, with_cache, zeros

import ejk

pytestmark = pytest.mark.fast

READS = ("page_attention", "ragged_page_attention")
OPERATIONS = (*READS, "write_kv_cache")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def call(operation, backend=None, **changes):
    given = RIGHT[operation](**with_cache(operation, **changes))
    return getattr(ejk, operation)(**given, backend=backend)


@pytest.mark.parametrize("operation", READS)
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(query=zeros(2, 4, 33), width=16),
            "head_dim=33 must be even with int4, held as uint8: a byte has two values",
        ),
        (
            dict(query=zeros(2, 4, 64), ways={"value_cache": None, "value_head_dim": 33}),
            "value_head_dim=33 must be even with int4, held as uint8: a byte has two values",
        ),
    ],
)
def test_odd_widths_of_int4_are_value_errors(operation, change, message):
    change = {"width": 32, "key_scale": zeros(*OF_TOKENS)} | change
    if "ways" not in change:
        change["value_scale"] = change["key_scale"]
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(operation, cache=INT4, **change)


@pytest.mark.parametrize("operation", READS)
def test_the_right_calls_are_right(operation):
    """Or the tables above would prove nothing."""
    scales = {"key_scale": zeros(*OF_TOKENS), "value_scale": zeros(*OF_TOKENS)}
    call(operation, cache=INT4, width=32, **scales)
    call(operation, cache=INT8, key_scale=np.float32(0.5), value_scale=zeros(2))
    call(operation, cache=INT8, value_scale=2)
    call(operation, cache=INT8, ways=LATENT, key_scale=jnp.bfloat16(3))
    call(operation, cache=E4M3)
    call(operation, cache=np.float16)


def test_what_a_write_returns_are_its_pools():
    scales = {"key_scale": zeros(*OF_TOKENS), "value_scale": zeros(*OF_TOKENS)}
    found: tuple = call("write_kv_cache", cache=INT8, **scales)
    assert [(x.dtype.name, x.shape) for x in found] == [
        ("int8", SHAPE), ("int8", SHAPE), ("float32", OF_TOKENS), ("float32", OF_TOKENS)
    ]  # fmt: skip
    found = call("write_kv_cache", cache=INT8, ways=LATENT, key_scale=scales["key_scale"])
    assert found[1] is found[3] is None and found[2].shape == OF_TOKENS
    assert len(call("write_kv_cache", cache=INT8, key_scale=0.5)) == 2


REFUSED = {
    "int8": (dict(cache=INT8, key_scale=1.0), ["key_cache.dtype=int8", "key_scale, value_scale"]),
    "int4": (
        dict(
            cache=INT4, width=32, key_scale=zeros(*OF_TOKENS), value_scale=zeros(*OF_TOKENS)
        ),
        ["key_cache.dtype=uint8 (int4)", "key_scale, value_scale per token"],
    ),
    "float8": (dict(cache=E4M3), ["key_cache.dtype=float8_e4m3fn"]),
}  # fmt: skip


@each_operation
@pytest.mark.parametrize("change, features", REFUSED.values(), ids=REFUSED)
def test_a_third_party_that_declares_none_is_refused_by_name(operation, change, features):
    kinds = {
        "page_attention": ejk.PageAttentionBackend,
        "ragged_page_attention": ejk.RaggedPageAttentionBackend,
        "write_kv_cache": ejk.WriteKVCacheBackend,
    }

    class Plain(kinds[operation]):
        name = "plain"
        features = frozenset({'cache_layout="HND"'})
        platforms = ("cpu",)

        def limits(self, problem, platform):
            return ()

        def run(self, problem, operands, platform):
            raise AssertionError("it is refused")

    with pytest.raises(ejk.UnsupportedError) as info:
        call(operation, **change, backend=Plain())
    assert str(info.value).splitlines()[1:] == [f"  plain: does not support {x}" for x in features]


@each_operation
def test_a_cache_of_another_float_type_is_a_feature(operation):
    function = getattr(ejk, operation)
    pool = jax.ShapeDtypeStruct(SHAPE, jnp.float16)
    given = RIGHT[operation](key_cache=pool, value_cache=pool)
    ask = functools.partial(ejk.backend_report, operation=function, platform="cpu")
    assert ask(**given).chosen == "xla"
