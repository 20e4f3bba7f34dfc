"""Settings that hold for every test. `ejk` is not imported here: the import hook comes later."""

import gc
import os
import pathlib
import random
import sys

import gpus

if "--gpu" in sys.argv:
    os.environ["EJK_TEST_GPU"] = "1"  # workers of pytest-xdist inherit it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share the GPUs
if os.environ.get("EJK_TEST_GPU") and "PYTEST_XDIST_WORKER" in os.environ:
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ.update(gpus.environment(number, gpus.visible()))
if not os.environ.get("EJK_TEST_GPU"):
    # A CPU lowers, interprets and compiles for everything; libtpu must not look for a TPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Eight devices on one CPU, for what is split over several.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # in several processes of pytest-xdist

import faults
import hypothesis
import jax
import numpy as np
import pytest
import tally
import tiers

OPTIMISED = "EJK_TEST_GPU", "EJK_TEST_THOROUGH", "JAX_DISABLE_MOST_OPTIMIZATIONS"
if not any(os.environ.get(name) for name in OPTIMISED):
    # Most of the time goes to compiling, of which LLVM's optimisations are a fifth.
    jax.config.update("jax_disable_most_optimizations", True)
    # What one run has compiled no other compiles again. JAX's keys hold the program, the flags, the
    # versions and the features of the CPU; workers of pytest-xdist share the folder.
    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
gc.set_threshold(10_000)  # tracing makes objects by the thousand, and hardly any garbage
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
    parser.addoption(
        "--tier", choices=("fast", "rest", "all"), default="all",
        help="run a fixed choice of a few minutes, what it leaves out, or all",
    )  # fmt: skip


def pytest_configure(config):
    config.pluginmanager.register(faults)  # its hooks keep the score of the seeded bugs


def pytest_ignore_collect(collection_path):
    """Leave out the files that have nothing for a GPU; those that are named are kept."""
    if os.environ.get("EJK_TEST_GPU") and collection_path.name.startswith("test_"):
        return collection_path.stem.removeprefix("test_") not in tiers.ON_A_GPU or None
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU, cases that are `one_in(n)`, and another tier, unless named."""
    if os.environ.get("EJK_TEST_GPU"):
        return keep(config, items, {x for x in items if not x.get_closest_marker("cpu")})
    keep(config, items, {x for x in items if not x.get_closest_marker("gpu")})
    if os.environ.get("EJK_TEST_THOROUGH") or any("::" in name for name in config.args):
        return
    keep(config, items, {*tiers.thinned(items)}, "EJK_TEST_THOROUGH=1 make test-all")
    tier = config.getoption("tier")
    whole = config.args == config.getini("testpaths") and not config.getoption("keyword")
    if tier != "all" and whole:
        fast = tiers.fast(items)
        if tier == "fast":
            keep(config, items, fast, "make test-all")
        else:
            keep(config, items, {*items} - fast, "make test")


def keep(config, items, kept, command=None):
    """Deselect all others; the summary says how many, and the command that runs them."""
    if left_out := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=left_out)
        if command:
            tally.left_out[command] = len(left_out)
    items[:] = [item for item in items if item in kept]


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
    for title, lines in tally.sections().items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def restored_registry():
    """What a test registers, or loads of tuning, is forgotten after it."""
    from ejk import _registry, _tuning  # not earlier: the import hook comes first

    before, tables = list(_registry._registered), _tuning.of_process()
    yield
    _registry._registered[:] = before
    if _tuning.of_process() != tables:
        _tuning.set_process(tables)


@pytest.fixture
def jax_triton():
    """Skip what lowers Triton kernels without jax-triton. A broken one, or no plugin, fails."""
    from ejk.backends.triton import _launch  # not earlier: the import hook comes first

    reason = _launch.available()
    if reason is not None and "triton is not installed" in reason:
        pytest.skip(reason)
    assert reason is None
