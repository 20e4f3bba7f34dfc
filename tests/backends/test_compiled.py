"""Compiled kernels are kept on disk, so that the next process does not compile them again."""

import functools

import jax
import pytest
import triton
from test_triton_lowering import IDS, X, custom_calls, lower, scale, scale_kernel

from ejk.backends.triton import _packed_pairs

pytestmark = pytest.mark.usefixtures("jax_triton")


class CompiledError(Exception):
    """The compiler ran."""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Keep kernels in an empty folder; what is returned makes the compiler fail from then on."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(scale_kernel, "__module__", "ejk.backends.triton.some_kernel")

    def fail(*_):
        raise CompiledError

    backend = triton.compiler.make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    return functools.partial(monkeypatch.setattr, type(backend), "make_llir", fail)


def in_a_new_process(**constants):
    jax.clear_caches()
    vars(scale_kernel).pop("_jT_kernel_cache", None)
    return lower(functools.partial(scale, **constants), X, IDS)


def test_a_kernel_is_compiled_once_and_the_module_is_the_same(compiler):
    first = in_a_new_process(by=17)
    compiler()
    assert in_a_new_process(by=17) == first
    assert len(custom_calls(first)) == 1


@pytest.mark.parametrize("what", ["constant", "environment", "always", "mends"])
def test_another_program_or_compiler_is_compiled(what, compiler, monkeypatch):
    in_a_new_process(by=17)
    compiler()
    if what == "environment":
        monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    if what == "always":
        monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    if what == "mends":
        monkeypatch.setattr(_packed_pairs, "VERSION", _packed_pairs.VERSION + 1)
    with pytest.raises(CompiledError):
        in_a_new_process(by=18 if what == "constant" else 17)


@pytest.mark.parametrize("text", ["", "{}", '{"binary": 1', "[]", "null"])
def test_a_broken_file_is_compiled_anew(text, compiler, tmp_path):
    first = in_a_new_process(by=17)
    [path] = tmp_path.glob("*/ejk.json")
    path.write_text(text)
    assert in_a_new_process(by=17) == first
    compiler()
    assert in_a_new_process(by=17) == first


def test_without_a_folder_to_write_to_nothing_is_kept(compiler, monkeypatch, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/dev/null/folder")
    with caplog.at_level("DEBUG", logger="ejk"):
        assert len(custom_calls(in_a_new_process(by=17))) == 1
    assert "Triton's cache on disk cannot be used" in caplog.text
    compiler()
    with pytest.raises(CompiledError):
        in_a_new_process(by=17)
