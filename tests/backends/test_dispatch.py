"""Which backend runs a call: by the platform that it is lowered for, or the one asked for."""

import dataclasses
import functools
import inspect
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ejk
from ejk import _backend, _page_attention

pytestmark = pytest.mark.fast

POOL = np.ones((8, 2, 16, 128), np.float32)
ARGS = (np.ones((2, 4, 128), np.float32), POOL, POOL,
        np.array([20, 1], np.int32), np.array([[3, 5], [1, 0]], np.int32))  # fmt: skip

KERNEL = {
    "cuda": r"triton_kernel_call",
    "tpu": r"tpu_custom_call",
}
"""The custom call of each platform's own kernel, as a module spells it."""


def traced(**keywords):
    return jax.jit(lambda *args: ejk.page_attention(*args, **keywords)).trace(*ARGS)


def lowered(platform: str, **keywords) -> str:
    return traced(**keywords).lower(lowering_platforms=(platform,)).as_text()


def kernels(module: str) -> set[str]:
    return {platform for platform, target in KERNEL.items() if re.search(target, module)}


@pytest.fixture
def cuda_without_a_device(restored_registry):
    ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))


def test_on_a_cpu_xla_is_chosen():
    assert kernels(lowered("cpu")) == set()
    assert ejk.backend_report(*ARGS, platform="cpu").chosen == "xla"


def test_for_a_tpu_pallas_is_chosen_with_no_tpu_here():
    assert kernels(lowered("tpu")) == {"tpu"}
    assert ejk.backend_report(*ARGS, platform="tpu").chosen == "pallas"


def test_for_cuda_triton_is_chosen_with_no_gpu_here(cuda_without_a_device):
    assert kernels(lowered("cuda")) == {"cuda"}
    assert ejk.backend_report(*ARGS, platform="cuda").chosen == "triton"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU says its own capability")
def test_for_cuda_xla_is_chosen_where_triton_lacks_a_device():
    assert kernels(lowered("cuda")) == set()
    report = ejk.backend_report(*ARGS, platform="cuda")
    assert report.chosen == "xla"
    assert "compute_capability" in report.refusals["triton"][0]


def test_rocm_is_chosen_by_nobody_but_a_caller():
    report = ejk.backend_report(*ARGS, platform="rocm")
    assert report.chosen == "xla" and report.refusals["triton"]


@pytest.mark.parametrize("platforms", [("cpu", "tpu"), ("cpu", "cuda", "tpu")])
def test_one_export_holds_the_kernel_of_each_platform(platforms, cuda_without_a_device):
    function = jax.jit(lambda *args: ejk.page_attention(*args, return_lse=True))
    exported = jax.export.export(
        function, platforms=platforms, disabled_checks=ejk.export_disabled_checks()
    )(*ARGS)
    assert kernels(exported.mlir_module()) == {*platforms} - {"cpu"}
    again = jax.export.deserialize(exported.serialize())
    if jax.default_backend() == "cpu":
        for a, b in zip(again.call(*ARGS), function(*ARGS)):
            np.testing.assert_array_equal(a, b)


def test_asked_for_by_name_is_never_replaced(cuda_without_a_device):
    assert kernels(lowered("cuda", backend="xla")) == set()
    assert kernels(lowered("tpu", backend="xla")) == set()
    with pytest.raises(ejk.UnsupportedError, match=r"pallas: runs on tpu, not on cuda"):
        lowered("cuda", backend="pallas")
    with pytest.raises(ejk.UnsupportedError, match=r"triton: runs on cuda and rocm, not on tpu"):
        lowered("tpu", backend="triton")


def test_an_object_is_asked_for_with_its_fields(cuda_without_a_device):
    small = ejk.TritonPageAttention(compute_capability=90, num_sms=132, block_kv=16)
    assert kernels(lowered("cuda", backend=small)) == {"cuda"}
    assert lowered("cuda", backend=small) != lowered("cuda")


def test_interpretation_runs_in_place_of_the_device():
    for backend in (
        ejk.TritonPageAttention(interpret=True),
        ejk.PallasPageAttention(interpret=True),
    ):
        assert kernels(lowered("cpu", backend=backend)) == set()
        with pytest.raises(ejk.UnsupportedError, match=r"not on cuda: call it under jax.default"):
            lowered("cuda", backend=backend)


@pytest.mark.parametrize("name", ["triton", "pallas"])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is more than a CPU")
def test_who_has_a_cpu_alone_is_told_how_to_interpret(name, staged):
    call = functools.partial(ejk.page_attention, backend=name)
    kind = {"triton": "TritonPageAttention", "pallas": "PallasPageAttention"}[name]
    how = rf"{name}: on a CPU its kernel is interpreted with backend={kind}\(interpret=True\)"
    with pytest.raises(ejk.UnsupportedError, match=how):
        (jax.jit(call) if staged else call)(*ARGS)


@pytest.mark.parametrize("fields", [dict(block_kv=24), dict(num_warps=3), dict(num_sms=0)])
def test_wrong_fields_of_a_backend_are_value_errors(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=rf"{name}={value} must be"):
        ejk.TritonPageAttention(**fields)


@dataclasses.dataclass(frozen=True)
class Sevens(ejk.PageAttentionBackend):
    """A third party's: everything is 7."""

    seven: float = 7.0

    name = "sevens"
    features = frozenset({'cache_layout="HND"', "return_lse"})
    platforms = ("cpu", "cuda", "tpu")
    seen: ClassVar[list] = []

    def limits(self, problem, platform):
        return () if problem.head_dim == 128 else (f"head_dim={problem.head_dim} must be 128",)

    def run(self, problem, operands, platform):
        self.seen.append((problem, platform))
        return [jnp.full(x.shape, self.seven, x.dtype) for x in problem.results]


def test_a_third_party_is_accepted_as_an_object():
    eager = ejk.page_attention(*ARGS, backend=Sevens())
    compiled = jax.jit(lambda *args: ejk.page_attention(*args, backend=Sevens(8.0)))(*ARGS)
    np.testing.assert_array_equal(eager, np.full((2, 4, 128), 7))
    np.testing.assert_array_equal(compiled, np.full((2, 4, 128), 8))


def test_a_third_party_is_told_the_problem_and_the_platform():
    Sevens.seen.clear()
    lowered("tpu", backend=Sevens(), return_lse=True)
    ((problem, platform),) = Sevens.seen
    assert platform == "tpu"
    assert isinstance(problem, ejk.PageAttentionProblem)
    assert (problem.num_seqs, problem.num_heads, problem.page_size) == (2, 4, 16)
    assert problem.features == {'cache_layout="HND"', "return_lse"}


def test_a_registered_third_party_is_the_first_choice(restored_registry):
    with pytest.raises(
        ValueError, match="backend='sevens' must be one of 'mosaic_gpu', 'triton', 'pallas', 'xla'"
    ):
        ejk.page_attention(*ARGS, backend="sevens")
    ejk.register_backend(Sevens())
    assert (np.asarray(ejk.page_attention(*ARGS)) == 7).all()
    assert (np.asarray(ejk.page_attention(*ARGS, backend="sevens")) == 7).all()
    assert (np.asarray(ejk.page_attention(*ARGS, backend="xla")) == 1).all()
    ejk.register_backend(Sevens(9.0))  # in place of the one before
    assert (np.asarray(ejk.page_attention(*ARGS)) == 9).all()


def test_what_a_registered_third_party_refuses_falls_to_the_next(restored_registry):
    ejk.register_backend(Sevens())
    assert (np.asarray(ejk.page_attention(*ARGS, sliding_window=3)) == 1).all()
    report = ejk.backend_report(*ARGS, sliding_window=3, platform="cpu")
    assert report.chosen == "xla"
    assert report.refusals["sevens"] == ("does not support sliding_window",)
    assert report.refusals["xla"] == ()
    with pytest.raises(ejk.UnsupportedError, match="sevens: does not support sliding_window"):
        ejk.page_attention(*ARGS, sliding_window=3, backend="sevens")


def test_gradients_of_a_third_party_are_those_of_its_results():
    """The backward pass recomputes; it needs of a backend its output and its LSE."""
    grad = jax.grad(lambda query: ejk.page_attention(query, *ARGS[1:], backend=Sevens()).sum())
    assert np.isfinite(grad(jnp.asarray(ARGS[0]))).all()


def test_the_report_takes_shapes_for_arrays_and_raises_as_the_call_does():
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ARGS]
    report = ejk.backend_report(*shapes, platform="cpu")
    assert report.chosen == "xla" and set(report.refusals) == {
        backend.name for backend in _page_attention.BACKENDS
    }
    assert "xla" in str(report) and "triton: runs on cuda and rocm, not on cpu" in str(report)
    with pytest.raises(ValueError, match="num_splits=-1 must be at least 0"):
        ejk.backend_report(*shapes, num_splits=-1)
    with pytest.raises(ValueError, match="platform='metal' must be one of"):
        ejk.backend_report(*shapes, platform="metal")


def test_the_report_of_a_call_that_needs_no_backend():
    empty = (*ARGS[:3], ARGS[3], np.zeros((2, 0), np.int32))
    report = ejk.backend_report(*empty, platform="cpu")
    assert report.chosen is None and report.refusals == {}
    assert "without a backend" in str(report)


def test_the_report_minds_what_it_is_asked_about():
    report = inspect.unwrap(ejk.backend_report)  # past the import hook of the tests
    said = "operation='ragged_page_attention' must be a function, as ejk.page_attention"
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        report(*ARGS, operation="ragged_page_attention")
    said = "backend=XlaPageAttention (call the class) must be str or Backend or None"
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        report(*ARGS, backend=ejk.XlaPageAttention)


WRONG_RESULTS = {
    "result 0 of page_attention must be float32[2, 4, 128], as problem.results says, not traced "
    "bfloat16[2, 4, 128]": lambda out, lse: (out.astype(jnp.bfloat16), lse),
    "result 1 of page_attention must be float32[2, 4], as problem.results says, not traced "
    "float32[2, 4, 1]": lambda out, lse: (out, lse[..., None]),
    "result 1 of page_attention must be float32[2, 4], as problem.results says, not None":
        lambda out, lse: (out, None),
    "run must return 2 results of page_attention, not 1: one for each of problem.results":
        lambda out, lse: [out],
    "run must return 2 results of page_attention, not traced float32[2, 4, 128]":
        lambda out, lse: out,
}  # fmt: skip


@pytest.mark.parametrize("said", WRONG_RESULTS)
@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "grad"])
def test_a_third_party_is_told_which_result_is_wrong(way, said):
    def run(self, problem, operands, platform):
        return WRONG_RESULTS[said](*(jnp.zeros(x.shape, x.dtype) for x in problem.results))

    wrong = type("Wrong", (ejk.PageAttentionBackend,), MEMBERS | {"name": "wrong", "run": run})()

    def call(query):
        return ejk.page_attention(query, *ARGS[1:], return_lse=True, backend=wrong)

    ways = {
        "eager": lambda: call(ARGS[0]),
        "jit": lambda: jax.jit(call)(ARGS[0]),
        "vmap": lambda: jax.vmap(call)(ARGS[0][None]),
        "grad": lambda: jax.grad(lambda query: call(query)[0].sum())(ARGS[0]),
    }
    with pytest.raises(TypeError, match=f"^wrong: {re.escape(said)}"):
        ways[way]()


MEMBERS = {n: getattr(Sevens, n) for n in ("name", "features", "platforms", "limits", "run")}


@pytest.mark.parametrize("attribute", ["name", "features"])
def test_a_third_party_is_told_what_its_class_lacks(attribute):
    rest = {n: member for n, member in MEMBERS.items() if n != attribute}
    incomplete = type("Incomplete", (ejk.PageAttentionBackend,), rest)
    with pytest.raises(TypeError, match=f"^Incomplete must have a class attribute {attribute}$"):
        incomplete()


def test_a_third_party_is_told_to_freeze_its_dataclass():
    thawed = dataclasses.dataclass(type("Thawed", (ejk.PageAttentionBackend,), {**MEMBERS}))
    with pytest.raises(TypeError, match=r"^Thawed must be hashable: @dataclasses.dataclass\("):
        thawed()


def test_a_third_party_is_told_of_a_feature_that_there_is_not():
    said = (
        "Wrong declares 'sliding_windows', which is no feature of page_attention: did you mean "
        "'sliding_window'?"
    )
    wrong = {**MEMBERS, "features": frozenset({"return_lse", "sliding_windows"})}
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        type("Wrong", (ejk.PageAttentionBackend,), wrong)


@pytest.mark.parametrize("features", ["return_lse", ["return_lse"], ("return_lse",)])
def test_a_third_party_is_told_that_features_are_a_set(features):
    with pytest.raises(TypeError, match=r"^Wrong\.features=.* must be a frozenset of names$"):
        type("Wrong", (ejk.PageAttentionBackend,), MEMBERS | {"features": features})


def test_features_may_differ_from_object_to_object():
    kinds = type("Kinds", (ejk.PageAttentionBackend,), MEMBERS | {"features": property(len)})
    assert isinstance(kinds.features, property)


def test_an_operation_has_to_name_its_features():
    facts = {"operation": "nothing", "features": frozenset(), "results": (), "fold": None}
    problem = type("NothingProblem", (_backend.Problem,), facts)
    with pytest.raises(TypeError, match=r"^NothingProblem must have a class attribute feature_n"):
        type("Nothing", (ejk.Backend,), {**MEMBERS, "problem_type": problem})
