"""What is said of a choice: in the log `ejk`, in errors, in a report."""

import dataclasses
import logging
import pickle

import jax
import numpy as np
import pytest

import ejk
from ejk import _dispatch
from ejk._errors import Mendable

POOL = np.ones((8, 2, 16, 128), np.float32)
ARGS = (np.ones((2, 4, 128), np.float32), POOL, POOL,
        np.array([20, 1], np.int32), np.array([[3, 5], [1, 0]], np.int32))  # fmt: skip
MISSING = Mendable("jax-triton is not installed", 'pip install "ejk[cuda13]"')


def lower(platform, **options):
    function = jax.jit(lambda *args: ejk.page_attention(*args, **options))
    return function.trace(*ARGS).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())
    caplog.set_level(logging.DEBUG, logger="ejk")
    return caplog


@pytest.fixture
def without_jax_triton(monkeypatch):
    monkeypatch.setattr(ejk.TritonPageAttention, "limits", lambda *_: (MISSING,))


def test_every_choice_is_a_line(log):
    lower("cpu")
    [line] = [record for record in log.records if record.name == "ejk"]
    assert line.levelno == logging.DEBUG
    assert line.getMessage().startswith("page_attention on cpu: xla; not mosaic_gpu: runs on cuda")
    assert "not triton: runs on cuda" in line.getMessage()
    assert "not pallas: runs on tpu" in line.getMessage()


def test_what_can_be_mended_is_a_warning_once(log, without_jax_triton):
    for _ in range(2):
        lower("cuda")
    [line] = [record for record in log.records if record.levelno == logging.WARNING]
    assert line.getMessage() == (
        "page_attention on cuda runs on xla and not on triton: jax-triton is not installed: "
        'pip install "ejk[cuda13]"'
    )


def test_a_feature_that_is_lacking_is_no_warning(log, monkeypatch):
    monkeypatch.setattr(ejk.PallasPageAttention, "limits", lambda *_: ("takes no such size",))
    lower("tpu")
    assert [record.levelno for record in log.records if record.name == "ejk"] == [logging.DEBUG]


def test_the_library_installs_no_handler():
    assert not logging.getLogger("ejk").handlers


def test_a_registered_target_is_not_passed_over(without_jax_triton, restored_registry):
    ejk.register_backend(ejk.TritonPageAttention(compute_capability=90, num_sms=132))
    with pytest.raises(ejk.UnsupportedError, match=r"triton: jax-triton is not installed: pip"):
        lower("cuda")
    assert ejk.backend_report(*ARGS, platform="cuda").chosen is None
    assert lower("cpu")


def test_names_of_a_platform_and_of_no_backend():
    assert ejk.backend_report(*ARGS, platform="gpu").platform in ("cuda", "rocm")
    assert ejk.backend_report(*ARGS, platform="cpu", backend="auto").chosen == "xla"
    np.testing.assert_array_equal(
        ejk.page_attention(*ARGS, backend="auto"), ejk.page_attention(*ARGS)
    )


@pytest.mark.parametrize("wrong, right", [("tritn", "triton"), ("Pallas", "pallas")])
def test_a_wrong_name_is_told_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=rf"backend='{wrong}' must be .*did you mean '{right}'\?"):
        ejk.page_attention(*ARGS, backend=wrong)
    with pytest.raises(ValueError, match=r"must be .*did you mean 'cuda'\?"):
        ejk.backend_report(*ARGS, platform="cuda12")


def test_a_report_may_be_copied_and_saved(without_jax_triton):
    report = ejk.backend_report(*ARGS, platform="cuda")
    assert dataclasses.asdict(report) == vars(report)
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_report_on_arguments_of_another_operation_says_of_which_it_was_asked():
    pool = np.zeros((4, 1, 16, 16), np.float32)
    with pytest.raises(TypeError, match=r"^attn_scale=") as info:
        ejk.backend_report(
            np.zeros((2, 1, 16), np.float32), pool, pool, np.array([1, 2]),
            np.zeros((2, 1), np.int32), np.array([0, 1, 2]),
        )  # fmt: skip
    assert info.value.__notes__[-1] == "Asked about page_attention: operation= names another."


def test_fields_of_other_peoples_backends_are_what_they_can_be_made_with():
    @dataclasses.dataclass(frozen=True)
    class Derived(ejk.XlaPageAttention):
        pages: dataclasses.InitVar[int] = 1
        tokens: int = dataclasses.field(default=0, init=False)

        def __post_init__(self, pages):
            object.__setattr__(self, "tokens", 16 * pages)

    class Free(ejk.XlaPageAttention):
        def __init__(self, **fields):
            super().__init__(block_kv=fields["tokens"])

    assert Derived(pages=2).tokens == Free(tokens=32).block_kv == 32
    with pytest.raises(TypeError, match=r"no field 'tokens'; its fields are block_kv, pages$"):
        Derived(tokens=32)


def test_a_wrong_field_is_told_the_nearest():
    with pytest.raises(TypeError, match=r"no field 'numwarps': did you mean 'num_warps'\?"):
        ejk.TritonPageAttention(numwarps=8)
    with pytest.raises(TypeError, match=r"no field 'pages'.*; its fields are"):
        ejk.PallasPageAttention(pages=8)
