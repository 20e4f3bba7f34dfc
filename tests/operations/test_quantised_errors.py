"""Every wrong cache type and scale, of all three operations, and what is said of it."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import test_errors
import test_ragged_errors
import test_write_errors
from test_errors import zeros

import ejk

pytestmark = pytest.mark.fast

SHAPE, OF_TOKENS = (8, 2, 16, 64), (8, 2, 16)
INT8, INT4, E4M3 = np.int8, np.uint8, ml_dtypes.float8_e4m3fn
READS = {
    "page_attention": (ejk.page_attention, test_errors.arguments),
    "ragged_page_attention": (ejk.ragged_page_attention, test_ragged_errors.arguments),
}
OPERATIONS = READS | {"write_kv_cache": (ejk.write_kv_cache, test_write_errors.arguments)}
each_operation = pytest.mark.parametrize("operation", OPERATIONS)


def call(operation, *, cache=np.float32, width=64, of=SHAPE[:-1], ways=None, **changes):
    """Call with pools of another type; `ways` are how the values are held."""
    function, arguments = OPERATIONS[operation]
    ways = dict(ways or {})
    if operation == "write_kv_cache" and ways.pop("value_head_dim", None):
        ways["value"] = None
    pool = zeros(*of, width, dtype=cache)
    return function(**arguments(**{"key_cache": pool, "value_cache": pool} | ways | changes))


LATENT = {"value_cache": None, "value_head_dim": 32}
OF_ANY = {
    "a type that no cache has": (
        dict(cache=np.int16),
        "key_cache.dtype=int16 must be one of float32, bfloat16, float16, int8, float8_e4m3fn, "
        "float8_e5m2, uint8, of which uint8 holds int4",
    ),
    "doubles": (dict(cache=np.float64), "key_cache.dtype=float64 must be one of float32, "),
    "another float8": (
        dict(cache=ml_dtypes.float8_e4m3b11fnuz),
        "key_cache.dtype=float8_e4m3b11fnuz must be one of float32, ",
    ),
    "int4 that is not packed": (
        dict(cache=ml_dtypes.int4),
        "key_cache.dtype=int4 must be one of float32, bfloat16, float16, int8, float8_e4m3fn, "
        "float8_e5m2, uint8, of which uint8 holds int4: int4 has two values a byte",
    ),
    "integers without scales": (
        dict(cache=INT8),
        "key_cache.dtype=int8 must come with key_scale and value_scale: a number, one per KV "
        "head, or one per token and head",
    ),
    "int4 without scales": (
        dict(cache=INT4, width=32),
        "key_cache.dtype=uint8 (int4) must come with key_scale and value_scale: a number, one "
        "per KV head, or one per token and head, which int4 needs",
    ),
    "int4 with one scale": (
        dict(cache=INT4, width=32, key_scale=0.1),
        "key_scale=0.1 must be a scale per token and head, [8, 2, 16], with int4, held as uint8",
    ),
    "int4 of twice the width": (
        dict(cache=INT4, width=64),
        "key_cache.shape[3]=64 must be half of the ",
    ),
    "scales of other heads": (
        dict(cache=INT8, key_scale=zeros(3)),
        "key_scale.shape=(3,) must be (), num_kv_heads=(2,) or, of a scale per token and head, "
        "(8, 2, 16): the cache's but for the last axis",
    ),
    "scales of tokens in another layout": (
        dict(cache=INT8, key_scale=zeros(8, 16, 2), value_scale=zeros(8, 16, 2)),
        "key_scale.shape=(8, 16, 2) must be (), num_kv_heads=(2,) or, of a scale per token and",
    ),
    "scales of the tokens' keys alone": (
        dict(cache=INT8, key_scale=zeros(*OF_TOKENS)),
        "value_scale=None must be a scale per token and head, [8, 2, 16], as that of the keys is",
    ),
    "one scale for the keys of tokens": (
        dict(cache=E4M3, key_scale=0.5, value_scale=zeros(*OF_TOKENS)),
        "key_scale=0.5 must be a scale per token and head, [8, 2, 16], as that of the values is",
    ),
    "scales of doubles": (
        dict(cache=INT8, key_scale=zeros(2, dtype=np.float64)),
        "key_scale.dtype=float64 must be float32, bfloat16 or float16: "
        "pass key_scale.astype(jnp.float32)",
    ),
    "a scale past float32": (
        dict(cache=INT8, key_scale=1e39),
        "key_scale=1e+39 must be a float32, at most 3.4e38",
    ),
    "values of another type": (
        dict(cache=E4M3, value_cache=zeros(*SHAPE, dtype=ml_dtypes.float8_e5m2)),
        "value_cache.dtype=float8_e5m2 must be key_cache.dtype=float8_e4m3fn",
    ),
    "scales of both in fused pools": (
        dict(
            cache=INT8, of=(8, 2, 2, 16), ways={"value_cache": None},
            key_scale=zeros(8, 2, 2, 16), value_scale=zeros(8, 2, 2, 16),
        ),
        "value_scale=float32[8, 2, 2, 16] must be None with scales per token of fused pools: "
        "key_scale holds those of keys and values",
    ),
    "scales of values that are the keys": (
        dict(cache=INT8, ways=LATENT, key_scale=0.5, value_scale=0.5),
        "value_scale=0.5 must be None: the values are those of the keys, which key_scale is for",
    ),
    "latent integers without scales": (
        dict(cache=INT8, ways=LATENT),
        "key_cache.dtype=int8 must come with key_scale: a number",
    ),
}  # fmt: skip


@each_operation
@pytest.mark.parametrize("change, message", OF_ANY.values(), ids=OF_ANY)
def test_wrong_caches_and_scales_are_value_errors(operation, change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(operation, **change)


@each_operation
@pytest.mark.parametrize(
    "scale, said",
    [
        ([1.0, 2.0], "key_scale=[1.0, 2.0] must be a number, or a floating-point array without"),
        (np.ones(2, np.int32), "key_scale=int32[2] must be a number"),
        (True, "key_scale=True must be a number"),
        ("auto", "key_scale='auto' must be a number"),
    ],
)
def test_scales_of_another_kind_are_type_errors(operation, scale, said):
    with pytest.raises(TypeError, match="^" + re.escape(said)):
        call(operation, cache=INT8, key_scale=scale)


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


WRITES = {
    "scales of tokens, of a cache that has none computed": (
        dict(key_scale=zeros(*OF_TOKENS), value_scale=zeros(*OF_TOKENS)),
        "key_scale=float32[8, 2, 16] must be a number or one per KV head with "
        "key_cache.dtype=float32: scales per token are computed for quantised caches",
    ),
    "scales that cannot be written in place": (
        dict(
            cache=E4M3,
            key_scale=zeros(*OF_TOKENS, dtype=np.float16),
            value_scale=zeros(*OF_TOKENS, dtype=np.float16),
        ),
        "key_scale.dtype=float16 must be float32 to be written in place: "
        "pass key_scale.astype(jnp.float32)",
    ),
}


@pytest.mark.parametrize("change, message", WRITES.values(), ids=WRITES)
def test_wrong_scales_of_a_write_are_value_errors(change, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call("write_kv_cache", **change)


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
    function, arguments = OPERATIONS[operation]
    pool = jax.ShapeDtypeStruct(SHAPE, jnp.float16)
    given = arguments(key_cache=pool, value_cache=pool)
    ask = functools.partial(ejk.backend_report, operation=function, platform="cpu")
    assert ask(**given).chosen == "xla"
