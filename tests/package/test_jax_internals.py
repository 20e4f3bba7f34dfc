"""JAX still has what `ejk._jax` uses of its internals, and nothing else of `ejk` uses any."""

import ast
import dataclasses
import pathlib
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.experimental.buffer_callback import buffer_callback
from jax.interpreters import mlir, partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ejk
from ejk import _jax

pytestmark = pytest.mark.fast

POOL = np.ones((8, 2, 16, 128), np.float32)
ARGS = (np.ones((2, 4, 128), np.float32), POOL, POOL,
        np.array([20, 1], np.int32), np.array([[3, 5], [1, 0]], np.int32))  # fmt: skip
X = np.arange(8, dtype=np.float32)


def same_type(x, **params):
    return x, frozenset()


def identity(**rules):
    lowerings = rules.pop("lowerings", {None: lambda ctx, x: [x]})
    return _jax.primitive("identity", same_type, lowerings, multiple_results=False, **rules)


def mesh(*kinds):
    shape, names = (2, 1)[: len(kinds)], ("x", "y")[: len(kinds)]
    devices = jax.devices()[:2]
    return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def asked(question, wrap=lambda function: function, place=lambda x: x, lower=None):
    """Ask of the context in which an identity is lowered, that JAX lowers for known devices."""
    answers = []

    def rule(ctx, x):
        answers.append(question(ctx))
        return [x]

    primitive = identity(lowerings={None: rule})
    _jax.require_devices(primitive)
    function = jax.jit(wrap(primitive.bind))
    (lower or (lambda function, x: function.lower(x)))(function, place(X))
    return answers[-1]


def split_by_xla(x):
    return jax.device_put(x, NamedSharding(mesh(AxisType.Auto, AxisType.Auto), PartitionSpec("x")))


def manual(*names):
    """Wrap a function in `shard_map` over some axes of a mesh of two devices."""

    def wrap(function):
        return jax.shard_map(
            function, mesh=mesh(AxisType.Auto, AxisType.Auto), axis_names={*names},
            in_specs=PartitionSpec("x" if "x" in names else None),
            out_specs=PartitionSpec("x" if "x" in names else None),
        )  # fmt: skip

    return wrap


def primitive():
    twice = identity(
        impl=lambda x: 3 * x,
        lowerings={"cpu": lambda ctx, x: _jax.lower(ctx, lambda x: [2 * x], [x])},
        jvp=lambda primals, tangents: (primals[0], linear.bind(tangents[0])),
    )
    linear = identity(transpose=lambda cotangent, x: [5 * cotangent])
    np.testing.assert_array_equal(twice.bind(X), 3 * X)
    np.testing.assert_array_equal(jax.jit(jax.vmap(twice.bind))(X), 2 * X)
    assert jax.jit(jax.grad(twice.bind))(1.0) == 5
    with pytest.raises(NotImplementedError, match="identity"):
        jax.jit(twice.bind).trace(X).lower(lowering_platforms=("tpu",))

    # What has no rule of its own is compiled, which has a parameter and may have several results.
    many = _jax.primitive(
        "many",
        lambda *types, number: ([*types], frozenset()),
        {None: lambda ctx, *xs, number: _jax.lower(ctx, lambda *xs: [x + number for x in xs], xs)},
        batcher=lambda along, xs, axes, number: (many.bind(*xs, number=number + 1), axes),
    )
    with jax.disable_jit():
        assert many.bind(1.0, 2.0, number=3) == [4, 5]
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in many"):
        many.bind(np.nan, 2.0, number=3)
    np.testing.assert_array_equal(jax.vmap(lambda x: many.bind(x, number=3)[0])(X), X + 4)


def batched_along():
    seen = []

    def batcher(along, arrays, axes):
        seen.append(along)
        return arrays[0], axes[0]

    explicit = mesh(AxisType.Explicit)
    batched = identity(batcher=batcher)
    with jax.set_mesh(explicit):
        jax.vmap(batched.bind)(jax.device_put(X, NamedSharding(explicit, PartitionSpec("x"))))
    jax.vmap(batched.bind)(X)
    assert [tuple(along or ()) for along in seen] == [("x",), ()]


def varying():
    seen = []

    def function(x):
        seen.append(_jax.varying(x))
        return x

    jax.jit(manual("x")(function)).lower(X)
    assert seen[-1] == {"x"} and _jax.varying(X) == frozenset()


def varying_as():
    def function(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=_jax.varying_as(x))
        return jax.pure_callback(lambda x: x, shape, x)

    jax.jit(manual("x", "y")(function)).lower(X)


def result_type():
    on = NamedSharding(mesh(AxisType.Explicit).abstract_mesh, PartitionSpec("x"))
    found = _jax.result_type(jax.ShapeDtypeStruct((8,), np.float32), on, like=jax.typeof(X))
    assert (found.shape, found.dtype, found.sharding.spec) == ((8,), np.float32, on.spec)
    assert found.manual_axis_type == _jax.varying_as(X)


def require_devices():
    assert asked(_jax.is_partitioned, place=split_by_xla)


def operand_types():
    [found] = asked(_jax.operand_types)
    assert (found.shape, found.dtype) == ((8,), np.float32)


def lower():
    halves = [jax.typeof(X[:4])] * 2
    both = _jax.primitive(
        "both",
        lambda *types: ([jax.typeof(X)], frozenset()),
        {
            None: lambda ctx, *xs: _jax.lower(
                ctx, lambda x, y: [jnp.concatenate([x, y])], xs, halves
            )
        },
    )
    np.testing.assert_array_equal(both.bind(X[:4], X[4:])[0], X)


def is_partitioned():
    assert asked(_jax.is_partitioned, place=split_by_xla)
    assert not asked(_jax.is_partitioned)
    assert not asked(_jax.is_partitioned, wrap=manual("x", "y"))


def axes_left_to_xla():
    assert asked(_jax.axes_left_to_xla, wrap=manual("y"), place=split_by_xla) == ["x"]
    assert asked(_jax.axes_left_to_xla, wrap=manual("x", "y")) == []
    assert asked(_jax.axes_left_to_xla, place=split_by_xla) == []


def is_exported():
    assert not asked(_jax.is_exported)
    assert asked(_jax.is_exported, lower=lambda function, x: jax.export.export(function)(x))


def called_back(x, at_most):
    """Triple an array in Python, where a program has callbacks that stand in for its own."""

    def triple(ctx, out, x):
        np.asarray(out)[...] = 3 * np.asarray(x)

    def rule(ctx, x):
        return _jax.HostCallbacks(ctx, at_most).lower(ctx, call_back, [x])

    def call_back(x):
        return [buffer_callback(triple, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)]

    return jax.jit(identity(lowerings={None: rule}).bind)(x)


def host_callbacks():
    np.testing.assert_array_equal(called_back(X, at_most=2), 3 * X)


def drop_dead_code_rule():
    theirs = identity()
    kept = partial_eval.dce_jaxpr_closed_call_rule
    partial_eval.dce_rules[theirs] = kept
    _jax.drop_dead_code_rule(theirs)
    assert partial_eval.dce_rules.pop(theirs) is kept
    partial_eval.dce_rules[theirs] = lambda used, equation, more, still_more: None
    _jax.drop_dead_code_rule(theirs)
    assert theirs not in partial_eval.dce_rules
    _jax.drop_dead_code_rule(theirs)


def callback_effects():
    calls_back = jax.make_jaxpr(lambda x: io_callback(np.sin, x, x, ordered=True))(X)
    assert calls_back.effects < _jax.callback_effects()


def cuda_version():
    assert _jax.cuda_version() is None or 12000 <= _jax.cuda_version() < 20000


def cuda_version_without_cuda():
    def not_there():
        raise RuntimeError("Error loading CUDA libraries")

    if _jax.cuda_versions is not None:
        with mock.patch.object(_jax.cuda_versions, "cuda_runtime_get_version", not_there):
            assert 12000 <= _jax.cuda_version() < 20000


USES = {
    "primitive": (primitive, batched_along),
    "varying": (varying,),
    "varying_as": (varying_as,),
    "result_type": (result_type,),
    "require_devices": (require_devices,),
    "operand_types": (operand_types,),
    "lower": (lower,),
    "is_partitioned": (is_partitioned,),
    "axes_left_to_xla": (axes_left_to_xla,),
    "is_exported": (is_exported,),
    "HostCallbacks": (host_callbacks,),
    "drop_dead_code_rule": (drop_dead_code_rule,),
    "callback_effects": (callback_effects,),
    "cuda_version": (cuda_version, cuda_version_without_cuda),
}


def check(name):
    for use in USES[name]:
        try:
            use()
        except Exception as error:
            error.add_note(f"jax {jax.__version__} has moved what ejk._jax.{name} uses")
            raise


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize("name", USES)
def test_jax_has_what_is_used(name):
    check(name)


def test_every_function_is_asked():
    defined = {
        name
        for name, found in vars(_jax).items()
        if getattr(found, "__module__", None) == _jax.__name__ and not name.startswith("_")
    }
    assert defined == USES.keys()


def test_what_has_moved_is_told_with_the_version(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda x: types.SimpleNamespace(vma=frozenset()))
    with pytest.raises(AttributeError) as raised:
        check("varying")
    assert raised.value.__notes__[-1:] == [
        f"jax {jax.__version__} has moved what ejk._jax.varying uses"
    ]


SAYS_VERSION = f"^jax {re.escape(jax.__version__)} has "


@dataclasses.dataclass
class Renamed:
    """An axis context whose attributes have other names."""

    assignment: tuple = (0, 1)
    manual: frozenset = frozenset({"x"})


def renamed(ctx):
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=Renamed()))


@pytest.mark.parametrize("name", ["is_partitioned", "axes_left_to_xla"])
def test_an_unknown_axis_context_is_no_answer(name):
    with pytest.raises(RuntimeError, match=SAYS_VERSION + "an axis context Renamed"):
        asked(lambda ctx: getattr(_jax, name)(renamed(ctx)))


@pytest.mark.parametrize(
    "name, kind, lacks",
    [
        ("is_partitioned", "ShardingContext", "device_assignment"),
        ("axes_left_to_xla", "SPMDAxisContext", "manual_axes"),
    ],
)
def test_a_renamed_attribute_is_no_answer(name, kind, lacks, monkeypatch):
    monkeypatch.setattr(mlir, kind, Renamed)
    with pytest.raises(RuntimeError, match=SAYS_VERSION + f"no Renamed.{lacks}"):
        asked(lambda ctx: getattr(_jax, name)(renamed(ctx)))


def test_devices_that_JAX_no_longer_tells_are_missed(monkeypatch):  # noqa: N802
    monkeypatch.delattr(_jax.dispatch, "prim_requires_devices_during_lowering")
    with pytest.raises(RuntimeError, match=SAYS_VERSION + r"no jax\._src\.dispatch\.prim_req"):
        _jax.require_devices(identity())


def test_a_callback_that_none_stands_in_for():
    with pytest.raises(NotImplementedError, match=r"0 times at most, not 1: use jax"):
        called_back(X, at_most=0)


def test_a_call_raises_where_its_devices_are_unknown(monkeypatch):
    def lower():
        jax.jit(lambda *args: ejk.page_attention(*args)).lower(*ARGS)

    lower()
    monkeypatch.setattr(mlir, "ShardingContext", Renamed)
    with pytest.raises(RuntimeError, match=SAYS_VERSION + "an axis context ShardingContext"):
        lower()


def imported(module: str) -> set[str]:
    """Name the modules of `ejk` that a file imports, and those that they import."""
    source = pathlib.Path(ejk.__path__[0], *module.split(".")[1:]).with_suffix(".py").read_text()
    names = set(re.findall(r"^from (ejk\.[\w.]+) import", source, re.MULTILINE))
    for package, found in re.findall(r"^from (ejk[\w.]*) import ([\w, ]+)$", source, re.MULTILINE):
        names |= {f"{package}.{name}" for name in found.split(", ")} & MODULES
    return names.union(*map(imported, names))


MODULES = {f"ejk.{path.stem}" for path in pathlib.Path(ejk.__path__[0]).glob("*.py")}


def test_the_contract_needs_no_internals_of_jax():
    """Who writes a backend reads it, and what it imports."""
    assert "ejk._errors" in imported("ejk._backend") and "ejk._jax" in imported("ejk._dispatch")
    assert "ejk._jax" not in imported("ejk._backend")


ROOT = pathlib.Path(ejk.__path__[0])
INTERNALS = re.compile(r"jax\._src|jax\.interpreters")
ATTRIBUTES = {"_src", "interpreters", "mat", "manual_axis_type", "module_context", "avals_in"}


def internals(source: str) -> list[str]:
    """Name the uses of JAX's internals in a file: what it imports, reads or names in a string."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if INTERNALS.match(alias.name)]
            case ast.ImportFrom(module=str(module), names=names):
                full = [f"{module}.{alias.name}" for alias in names]
                found += [name for name in full if INTERNALS.match(name)]
            case ast.Attribute(attr=attribute) if attribute in ATTRIBUTES:
                found.append(attribute)
            case ast.Constant(value=str(text)) if INTERNALS.fullmatch(text.rsplit(".", 1)[0]):
                found.append(text)
    return found


def test_nothing_else_uses_internals():
    files = [path for path in ROOT.rglob("*.py") if path.name != "_jax.py"]
    used = {str(path.relative_to(ROOT)): internals(path.read_text()) for path in files}
    assert {path: uses for path, uses in used.items() if uses} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import jax._src.core",
        "from jax._src import core",
        "from jax import interpreters",
        "from jax.interpreters import mlir as m",
        "jax.interpreters.ad",
        "jax.typeof(x).mat",
        "ctx.module_context.axis_context",
        'importlib.import_module("jax.interpreters.partial_eval")',
    ],
)
def test_a_use_is_found(line):
    assert internals(line)
