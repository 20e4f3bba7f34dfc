"""What importing `ejk` does: next to nothing."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast


def python(code: str) -> str:
    """Run code in a fresh interpreter without this one's import hook."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ).stdout.strip()  # fmt: skip


@pytest.mark.smoke
def test_loads_neither_triton_nor_pallas_nor_the_command_line():
    code = "import sys, jax; was = {*sys.modules}; import ejk; print(*{*sys.modules} - was)"
    loaded = set(python(code).split())
    assert "ejk" in loaded
    heavy = ("triton", "jax_triton", "jax.experimental.pallas", "ejk.cli", "typer", "rich")
    assert not [name for name in loaded if name.startswith(heavy)]


def test_running_on_xla_loads_neither():
    code = """
import sys, numpy as np, ejk
pool, one = np.ones((2, 1, 4, 8), np.float32), np.ones(1, int)
ejk.page_attention(np.ones((1, 1, 8), np.float32), pool, pool, one, one[None])
print(*sys.modules)
"""
    loaded = set(python(code).split())
    assert not loaded & {"triton", "jax_triton", "jax.experimental.pallas"}


def test_changes_no_setting_of_jax():
    code = "import jax; was = dict(jax.config.values); import ejk; print(was == jax.config.values)"
    assert python(code) == "True"


def test_starts_no_backend_of_jax():
    """Importing must leave the choice of devices, and `jax.distributed`, to the program."""
    code = "import ejk; from jax._src import xla_bridge as x; print(x.backends_are_initialized())"
    assert python(code) == "False"


def test_costs_a_third_of_a_second_at_most():
    """The best of several runs, beyond `import jax`, in time of a core: others are busy."""
    code = "import time, jax; t = time.process_time(); import ejk; print(time.process_time() - t)"
    seconds = min(float(python(code)) for _ in range(5))
    assert seconds <= 0.3, f"importing ejk takes {seconds:.2f} s"


def test_makes_no_context_of_jax_before_tuning_is_asked_for():
    code = "import ejk; from ejk import _tuning; print(_tuning._context.cache_info().currsize)"
    assert python(code) == "0"
