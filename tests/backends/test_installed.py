"""What is said where a piece of the installation is missing: the words of `docs/install.md`.

Each runs in a process of its own, from which installed packages are hidden.
"""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("jax_triton")

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "install.md"
# The jaxlib of the words in the page.
JAXLIB = "0.12.0.1"

PLUGINS = {"jax-cuda12-plugin", "jax-cuda13-plugin"}
NO_PLUGIN = (
    "jax-cuda13-plugin is not installed: "
    f'pip install --no-deps "jax-cuda13-plugin=={JAXLIB}"'
)  # fmt: skip
# By what is missing: packages that are hidden, versions that others pretend to have, what is said.
MISSING = {
    "core alone": (
        {"triton", "jax-triton", *PLUGINS},
        {},
        'triton is not installed: pip install "ejk[cuda13]"',
    ),
    "no triton": ({"triton"}, {}, 'triton is not installed: pip install "ejk[triton]"'),
    "no jax-triton": ({"jax-triton"}, {}, 'jax-triton is not installed: pip install "ejk[triton]"'),
    "jax-triton 0.3": (
        set(),
        {"jax-triton": "0.3.1"},
        'jax-triton 0.3.1 does not fit: pip install "jax-triton>=0.4,<0.5"',
    ),
    "no plugin": (PLUGINS, {}, NO_PLUGIN),
    "no plugin, CUDA 12": (
        PLUGINS,
        {"jax-cuda12-pjrt": JAXLIB},
        NO_PLUGIN.replace("cuda13", "cuda12"),
    ),
    "another plugin": (
        PLUGINS,
        {"jax-cuda13-plugin": "0.11.2"},
        f"jax-cuda13-plugin 0.11.2 does not fit jaxlib {JAXLIB}: "
        f'pip install --no-deps "jax-cuda13-plugin=={JAXLIB}"',
    ),
}

HIDE = """
import importlib.metadata, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        is_hidden = name.split(".")[0].replace("_", "-") in HIDDEN
        return None if is_hidden else self.finder.find_spec(name, *where)

def version(name, real=importlib.metadata.version):
    if name in HIDDEN and name not in VERSIONS:
        raise importlib.metadata.PackageNotFoundError(name)
    return VERSIONS.get(name) or real(name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
importlib.metadata.version = version
"""

CALL = """
import jax, ejk, jax.numpy as jnp
H100 = ejk.TritonPageAttention(compute_capability=90, num_sms=132)
pool, ints = jax.ShapeDtypeStruct((64, 8, 16, 128), jnp.bfloat16), jnp.int32
arguments = (
    jax.ShapeDtypeStruct((4, 32, 128), jnp.bfloat16), pool, pool,
    jax.ShapeDtypeStruct((4,), ints), jax.ShapeDtypeStruct((4, 16), ints),
)
def export(**keywords):
    attend = jax.jit(lambda *x: ejk.page_attention(*x, **keywords))
    checks = ejk.export_disabled_checks()
    exported = jax.export.export(attend, platforms=["cuda"], disabled_checks=checks)(*arguments)
    return exported.mlir_module()
"""


def run(name, program):
    """Run a program where the pieces of this name are missing; return what it prints."""
    hidden, versions, _ = MISSING[name]
    code = f"HIDDEN, VERSIONS = {hidden!r}, {versions!r}\n{HIDE}{CALL}{program}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(importlib.metadata.version("jaxlib"), JAXLIB)


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named_with_the_command_that_installs_it(name):
    program = """
print(ejk.backend_report(*arguments, platform="cuda", backend=H100).refusals["triton"][0])
try:
    export(backend=H100)
except ejk.UnsupportedError as error:
    print(str(error).splitlines()[1])
print("stablehlo.while" in export(backend="xla"))
"""
    words = MISSING[name][-1]
    assert run(name, program).splitlines() == [words, f"  triton: {words}", "True"]


def test_without_a_target_the_page_says_how_to_name_one(monkeypatch):
    monkeypatch.setitem(MISSING, "nothing", (set(), {}, ""))
    program = 'print(ejk.backend_report(*arguments, platform="cuda").refusals["triton"][0])'
    assert f"    {run('nothing', program)}" in PAGE.read_text()


@pytest.mark.parametrize("name", MISSING)
def test_the_page_has_the_words(name):
    assert f"    {MISSING[name][-1]}\n" in PAGE.read_text()


def test_a_newer_line_of_jax_triton_is_not_patched(monkeypatch):
    """What is mended in it is of the 0.4 line."""
    monkeypatch.setitem(MISSING, "jax-triton 0.5", (set(), {"jax-triton": "0.5.0"}, ""))
    program = 'print(ejk.backend_report(*arguments, platform="cuda").refusals["triton"][0])'
    [words] = run("jax-triton 0.5", program).splitlines()
    assert words == MISSING["jax-triton 0.3"][-1].replace("0.3.1", "0.5.0")


def test_nothing_that_was_asked_for_is_replaced_without_the_plugin():
    """Neither by name nor as a target that was registered."""
    program = """
ejk.register_backend(H100)
for keywords in {"backend": "triton"}, {}:
    try:
        export(**keywords)
    except ejk.UnsupportedError as error:
        print(str(error).splitlines()[1])
"""
    assert run("no plugin", program).splitlines() == [f"  triton: {NO_PLUGIN}"] * 2


def test_going_to_xla_for_want_of_the_plugin_warns_with_its_command():
    program = "import logging; logging.basicConfig(stream=sys.stdout); export()"
    [line] = [line for line in run("no plugin", program).splitlines() if "plugin" in line]
    assert line == f"WARNING:ejk:page_attention on cuda runs on xla and not on triton: {NO_PLUGIN}"
    assert f"    {line}\n" in PAGE.read_text()


def test_triton_may_be_of_a_distribution_with_another_name(monkeypatch):
    """As PyTorch's are."""
    monkeypatch.setitem(MISSING, "nothing", (set(), {}, ""))
    program = """
def version(name, real=importlib.metadata.version):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

importlib.metadata.version = version
report = ejk.backend_report(*arguments, platform="cuda", backend=H100)
print(report.refusals["triton"])
"""
    assert run("nothing", program).splitlines() == ["()"]


def test_with_all_pieces_the_module_holds_the_kernel(monkeypatch):
    monkeypatch.setitem(MISSING, "nothing", (set(), {}, ""))
    program = """
ejk.register_backend(H100)
print("triton_kernel_call_ffi" in export())
"""
    assert run("nothing", program).splitlines() == ["True"]
