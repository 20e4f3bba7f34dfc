"""Settings that hold for every test. `ejk` is not imported here: the import hook comes later."""

import os
import random
import sys
import zlib

if "--gpu" in sys.argv:
    os.environ["EJK_TEST_GPU"] = "1"  # workers of pytest-xdist inherit it
if not os.environ.get("EJK_TEST_GPU"):
    # A CPU lowers, interprets and compiles for everything; libtpu must not look for a TPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Eight devices on one CPU, for what is split over several.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # in several processes of pytest-xdist

import hypothesis
import jax
import numpy as np
import pytest
import tally

OPTIMISED = "EJK_TEST_GPU", "EJK_TEST_THOROUGH", "JAX_DISABLE_MOST_OPTIMIZATIONS"
if not any(os.environ.get(name) for name in OPTIMISED):
    # Most of the time goes to compiling, of which LLVM's optimisations are a fifth.
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}
# Shrinking a failure would compile a program a step: minutes. `thorough` takes them.
QUICK_PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("quick", phases=QUICK_PHASES, **COMMON)
hypothesis.settings.register_profile("thorough", **COMMON)
hypothesis.settings.load_profile("thorough" if os.environ.get("EJK_TEST_THOROUGH") else "quick")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the real kernels on an NVIDIA GPU")


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU, and most cases of what is `one_in(n)`, unless asked for."""
    by_name = any("::" in argument for argument in config.args)

    def is_run(item):
        if os.environ.get("EJK_TEST_GPU"):
            return not item.get_closest_marker("cpu")
        mark = item.get_closest_marker("one_in")
        every = by_name or mark is None or os.environ.get("EJK_TEST_THOROUGH")
        chosen = every or zlib.crc32(item.nodeid.encode()) % mark.args[0] == 0
        return chosen and not item.get_closest_marker("gpu")

    if left_out := [item for item in items if not is_run(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_run(item)]


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Forget the programs of a file: a process may map only so many, and XLA dies of one more."""
    yield
    jax.clear_caches()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = tally.dump()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tally.add(getattr(node, "workeroutput", {}).get("tally", tally.NOTHING))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    yield
    if lines := tally.lines():
        terminalreporter.section("examples per backend")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def restored_registry():
    """What a test registers is forgotten after it."""
    from ejk import _dispatch  # not earlier: the import hook comes first

    before = list(_dispatch._registered)
    yield
    _dispatch._registered[:] = before


@pytest.fixture
def jax_triton():
    """Skip what lowers Triton kernels where jax-triton is not installed; a broken one fails."""
    from ejk.backends.triton import _launch  # not earlier: the import hook comes first

    reason = _launch.available()
    if reason is not None and reason.endswith("is not installed"):
        pytest.skip(reason)
    assert reason is None


@pytest.fixture
def jax_triton_in_place(jax_triton):
    """The same, also where it is of the line that cannot write in place."""
    from ejk.backends.triton import _launch

    if not _launch.can_run_in_place():
        pytest.skip("jax-triton 0.3 cannot write in place")
