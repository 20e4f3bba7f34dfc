"""Every wrong call is refused alike on every backend, by argument, value, rule and mend."""

import functools
import inspect
import re

import jax
import numpy as np
import pytest
import wrong_drop_ins
from jax.sharding import AxisType
from wrong_calls import RIGHT, SPLIT_WRONG, WRONG, placed

import ejk

pytestmark = pytest.mark.fast

MESSAGE = re.compile(r"(?P<argument>.+?)=(?P<value>.+?) must (?P<rule>.+?)(?:[:;] (?P<mend>.+))?")
SIZES = {
    "num_heads", "num_kv_heads", "head_dim", "page_size", "max_blocks", "num_layers", "num_pages",
}  # fmt: skip
"""What a message may name that no argument is called."""

MEND = re.compile(
    r"(pass|leave|pad|keep|make|trace|of|for|-?[01] is|None (is|caps)|did you mean|"
    r"it (is|has to be|moves)|"
    r"sliding_window=\d+ sees|the (lengths|new tokens) come|value_cache comes|"
    r"num_kv_heads would be|a number, one per KV head|int4(, held as uint8,)? has two values|"
    r"a byte has two values|latent attention reads|the values are|key_scale holds|"
    r"scales per token are|(slots|positions|ids) .*are 32-bit|the cache's but for|"
    r"the group of each)\b"
)
"""How what is to be done begins."""

NUMBER = r"[\w.\[\]:]+=\S+"
EXACT = re.compile(
    rf"come with \w+=\w+|name one axis or several, each once|"
    rf"be (None or at most -\d+|at least \d+|at most ({NUMBER}|3\.4e38)|"
    rf"a finite float32, at most 3\.4e38|below 2\*\*31|"
    rf"half of .+|one of (.+, )+.+|None (with|where) .+|a multiple of {NUMBER}|"
    rf"(the (query|key|value)s?'s? )?{NUMBER}.*|num_seqs \+ 1(=\d+)?(, at least 1)?|"
    r"an? (int|bool|number|str)( or .+)?|(str|Backend) or .+|an? [\w -]*array .+|"
    r"a scale per token and head, \[.+|(the name|a pair|a number), .+|"
    r"the name of a mesh axis, or a tuple of names or None|"
    r"of the jax.shard_map around the call, whose axes are .+)( \(.+\))?"
)
"""Rules that are a mend themselves: they say exactly what to write."""


def said_of(operation, given):
    with pytest.raises((TypeError, ValueError)) as info:
        getattr(ejk, operation)(**given)
    return type(info.value), str(info.value)


def under_jit(operation, given):
    """Return what is said where every array that can be is traced."""
    traced = {
        name: x
        for name, x in given.items()
        if isinstance(x, np.ndarray) and x.nbytes < 2**24 and x.dtype.itemsize * 8 <= 32
        and x.dtype.name != "complex64" and x.dtype.isnative
    }  # fmt: skip

    def call(traced):
        return getattr(ejk, operation)(**given | traced)

    with pytest.raises((TypeError, ValueError)) as info:
        jax.eval_shape(call, traced)
    return type(info.value), str(info.value).replace("traced ", "")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused_alike_on_every_backend(name):
    operation, changes, error, begins = WRONG[name]
    given = RIGHT[operation](**changes)
    parameters = inspect.signature(getattr(ejk, operation)).parameters
    kind, text = said_of(operation, given)
    assert kind is error and text.startswith(begins)

    found = MESSAGE.fullmatch(text)
    assert found, f"a message is `argument=value must rule: mend`: {text}"
    named = (
        set(re.findall(r"[a-z_]\w*", found["argument"])) - {"shape"} - ({"dtype"} - {*parameters})
    )
    assert named and named <= {*parameters} | SIZES, text
    assert (found["mend"] and MEND.match(found["mend"])) or EXACT.fullmatch(found["rule"]), text
    if found["argument"] in given:  # the value is the one that was given
        value = given[found["argument"]]
        shape = re.sub(r".*\[(.*)\]", r"\1", found["value"])
        is_array = isinstance(value, np.ndarray | jax.Array)
        assert [*map(int, filter(None, shape.split(", ")))] == [*value.shape] if is_array else True

    if operation != "empty_kv_cache":
        assert under_jit(operation, given) == (kind, text)
    if "backend" in parameters and "backend" not in changes:
        for backend in ("xla", "triton", "pallas"):
            assert said_of(operation, given | {"backend": backend}) == (kind, text)
        own = {"plan_page_attention": "page_attention", "copy_kv_slots": "copy_kv_cache"}
        own = own.get(operation, operation.replace("copy_kv_pages", "copy_kv_cache"))
        ending = "".join(part.capitalize() for part in own.split("_")).replace("Kv", "KV")
        for backend in (f"Xla{ending}", f"Triton{ending}", f"Pallas{ending}"):
            assert said_of(operation, given | {"backend": getattr(ejk, backend)()}) == (kind, text)


def has_a_form(text, names):
    """Say whether a message is `argument=value must rule: mend`, of one of these arguments."""
    found = MESSAGE.fullmatch(text)
    named = set(re.findall(r"[a-z_]\w*", found["argument"] if found else ""))
    named -= {"shape", "sharding", "spec"}
    is_exact = found and (MEND.match(found["mend"] or "") or EXACT.fullmatch(found["rule"]))
    return bool(named and named <= {*names} | SIZES and is_exact)


OWN = {
    name for operation in RIGHT for name in inspect.signature(getattr(ejk, operation)).parameters
}
DROP_INS = [
    (name, *wrong) for name, all_wrong in wrong_drop_ins.WRONG.items() for wrong in all_wrong
]


@pytest.mark.parametrize("name, argument, value, error, begins", DROP_INS)
def test_a_wrong_call_of_a_drop_in_is_refused_alike_on_every_backend(
    name, argument, value, error, begins, restored_registry
):
    """It asks for none: on a CPU each in turn is made the first choice."""
    function, right = wrong_drop_ins.DROP_INS[name]
    given = right | {argument: value}
    told = ""
    kernels = ("PageAttention", "RaggedPageAttention", "WriteKVCache")
    for first in (None, "Triton", "Pallas"):
        for kernel in kernels if first else ():
            ejk.register_backend(getattr(ejk, first + kernel)(interpret=True))
        with pytest.raises(error) as info:
            function(**given)
        text = str(info.value)
        assert text.startswith(begins) and has_a_form(text, {*given} | OWN), text
        told = told or text
        assert text == told
        with pytest.raises(error) as info:
            jax.eval_shape(lambda x: function(**given | x), first_array(given, argument))
        assert str(info.value).replace("traced ", "") == told


def first_array(given, argument):
    """The first array of a call that is not the wrong one."""
    arrays = ((n, x) for n, x in given.items() if isinstance(x, np.ndarray) and n != argument)
    return dict([next(arrays)])


@pytest.mark.parametrize("name", wrong_drop_ins.DROP_INS)
def test_the_right_calls_of_drop_ins_are_right(name):
    function, right = wrong_drop_ins.DROP_INS[name]
    assert wrong_drop_ins.WRONG[name]
    jax.eval_shape(lambda: function(**right))


@pytest.mark.parametrize("operation", ["page_attention", "ragged_page_attention"])
@pytest.mark.parametrize("name", wrong_drop_ins.SPLIT)
def test_a_wrong_call_on_split_pages_is_refused_alike_on_every_backend(name, operation):
    changes, error, begins = wrong_drop_ins.SPLIT[name]
    if operation == "ragged_page_attention" and "query" in changes:
        changes = {"query": changes["query"].repeat(3, 0)[:5]}
    given = RIGHT[operation](**changes)
    ending = "".join(part.capitalize() for part in operation.split("_"))
    objects = [getattr(ejk, kind + ending)() for kind in ("Xla", "Triton", "Pallas")]
    told = set()
    for backend in (None, "xla", "triton", "pallas", *objects):
        with pytest.raises(error) as info:
            wrong_drop_ins.split(operation, given, backend)
        told.add(str(info.value))
    [text] = told
    assert text.startswith(begins) and has_a_form(text, given | {"axis_name": 0, "page_offset": 0})


SPLIT_BY_XLA = [name for name, right in RIGHT.items() if "key_cache" in right()]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("operation", SPLIT_BY_XLA)
@pytest.mark.parametrize("name", SPLIT_WRONG)
def test_pools_that_are_split_wrongly_are_refused_alike(name, operation):
    """In eager calls and on explicit axes by ejk; of axes that XLA manages XLA alone knows."""
    specs, begins = SPLIT_WRONG[name]
    told = set()
    for kind in (AxisType.Auto, AxisType.Explicit):
        given = placed(kind, **specs)(operation)
        call = functools.partial(getattr(ejk, operation), backend="xla")
        in_xla = jax.errors.JaxRuntimeError if kind == AxisType.Auto else ValueError
        for function, error in ((call, ValueError), (jax.jit(call), in_xla)):
            with pytest.raises(error) as info:
                function(**given)
            told.add(re.search(r"\w+\.sharding.*", str(info.value))[0])
    [text] = told
    assert text.startswith(begins) and has_a_form(text, RIGHT[operation]()), text


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("operation", SPLIT_BY_XLA)
def test_pools_that_are_split_rightly_are_right(operation):
    for kind in (AxisType.Auto, AxisType.Explicit):
        split = (None, "model")
        given = placed(kind, key_cache=split, value_cache=split)(operation)
        jax.jit(getattr(ejk, operation)).lower(**given)


@pytest.mark.parametrize("operation", ["page_attention", "ragged_page_attention"])
def test_the_right_calls_on_split_pages_are_right(operation):
    wrong_drop_ins.split(operation, RIGHT[operation]())


@pytest.mark.parametrize("operation", RIGHT)
def test_the_right_calls_are_right(operation, restored_registry):
    """Or the table would prove nothing."""
    getattr(ejk, operation)(**RIGHT[operation]())


def test_there_are_many_wrong_calls_of_every_operation():
    assert {wrong.operation for wrong in WRONG.values()} == set(RIGHT)
    assert len({(wrong.operation, wrong.begins) for wrong in WRONG.values()}) >= 120


@pytest.mark.parametrize(
    "vague",
    [
        "query is wrong",
        "query=float32[4, 64] must be valid",
        "num_splits=-1 must be sensible: check the arguments",
        "block_tables.shape[0]=3 must fit the query",
    ],
)
def test_a_vague_message_would_be_found(vague):
    found = MESSAGE.fullmatch(vague)
    assert not (found and (MEND.match(found["mend"] or "") or EXACT.fullmatch(found["rule"])))
