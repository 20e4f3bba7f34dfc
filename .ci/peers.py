"""Run other libraries' own tests of their paged attentions with `ejk.compat` in the place of these.

    python .ci/peers.py FOLDER [FOLDER ...] [options of pytest]

Each FOLDER is a checkout of github.com/jax-ml/jax, github.com/vllm-project/tpu-inference (or its
unpacked wheel, which holds its tests) or github.com/erfanzar/ejkernel. Nothing of a test is changed
but what it imports, and that it takes the machine for a TPU v5p or a GPU; on a CPU all run as XLA
programs. References are the libraries' own. What is left out is named below with its reason. A
table of counts comes last. The tests are Apache-2.0 and no part of this project.
"""

import collections
import functools
import importlib
import os
import pathlib
import sys
import types
import warnings
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src import test_util

from ejk.compat import ejkernel, jax_gpu, jax_tpu, tpu_inference

JAX, TPU_INFERENCE = "tests/pallas/", "tests/kernels/ragged_paged_attention_kernel_"
FILES = {
    "jax": (
        f"{JAX}gpu_paged_attention_test.py",
        f"{JAX}tpu_paged_attention_kernel_test.py",
        f"{JAX}tpu_ragged_paged_attention_test.py",
    ),
    "tpu-inference": (f"{TPU_INFERENCE}v3_test.py", f"{TPU_INFERENCE}v3_hd64_test.py"),
    "ejkernel": (
        "test/test_module_operations.py::TestPageAttention",
        "test/test_module_operations.py::TestRaggedPageAttention",
        "test/kernels/_xla/test_page_attention.py",
        "test/kernels/_triton/test_page_attention.py",
        "test/kernels/_triton/test_ragged_page_attention.py",
        "test/kernels/_pallas/tpu/test_page_attention.py",
        "test/kernels/_pallas/tpu/test_ragged_page_attention.py",
    ),
}
INTERNAL = "tests block sizes of its own kernel, or its reference alone"
LEFT_OUT = {
    "GetDefaultBlockSizesTest": INTERNAL,
    "JaxGroupedQueryAttentionReferenceTest": INTERNAL,
    "::TestRaggedPageAttention::": "leaves out an argument that its own function requires",
    "test_numerical_correctness_vs_xla_mixed": (
        "the reference writes the end of a batch of 200 tokens six rows too early, in blocks of 8: "
        "it is off by 0.2 from the definition there, and the drop-in by 1e-6"
    ),
    "tpu/test_page_attention.py": (
        "pools lie KV heads first, as its TPU kernel alone takes them: the drop-in takes what its "
        "documentation says"
    ),
}


class Peers:
    """A plugin of pytest: says that there are accelerators, and what became of each file."""

    def __init__(self) -> None:
        # ejkernel's files ask when they are imported, and no other does.
        found = lambda platform="gpu": [mock.Mock(platform=platform)]  # noqa: E731
        self.accelerators = mock.patch("jax.devices", found)
        self.accelerators.start()
        self.outcomes = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
        self.reasons: collections.Counter[str] = collections.Counter()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = []
        for item in items:
            reason = next((why for name, why in LEFT_OUT.items() if name in item.nodeid), "")
            if reason:
                self.outcomes[_name(item.nodeid)]["left out"] += 1
                self.reasons[f"left out: {reason}"] += 1
            else:
                kept.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collection_finish(self) -> None:
        self.accelerators.stop()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.skipped or report.failed:
            self.outcomes[_name(report.nodeid)][report.outcome] += 1
        if report.skipped:
            self.reasons[f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        columns = ("passed", "failed", "skipped", "left out")
        rows = [f"| tests | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for name, found in self.outcomes.items():
            rows.append(f"| {name} | {' | '.join(str(found[column]) for column in columns)} |")
        rows += ["", *(f"{count} {reason}" for reason, count in self.reasons.most_common())]
        terminalreporter.write_line("\n".join(rows))


def _name(nodeid: str) -> str:
    return "/".join(pathlib.PurePath(nodeid.partition("::")[0]).parts[-3:])


def module(name: str, folder: pathlib.Path | None = None, **attributes: Any) -> types.ModuleType:
    """Make a module of these names alone; with a folder, a package whose parts can be imported.

    So a library's kernels come without what its own `__init__.py` takes.
    """
    made = sys.modules[name] = types.ModuleType(name)
    if folder is not None:
        made.__path__ = [str(folder.joinpath(*name.split(".")))]
    vars(made).update(attributes)
    return made


def replace_jax(folder: pathlib.Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        for name, own in ("tpu", jax_tpu), ("gpu", jax_gpu):
            peer = importlib.import_module(f"jax.experimental.pallas.ops.{name}.paged_attention")
            vars(peer)["paged_attention"] = own.paged_attention
        peer = importlib.import_module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    vars(peer)["ragged_paged_attention"] = jax_tpu.ragged_paged_attention


def replace_tpu_inference(folder: pathlib.Path) -> None:
    module("tpu_inference", folder)
    module("tpu_inference.logger", init_logger=mock.Mock())  # of vLLM
    module("tpu_inference.utils", get_device_name=mock.Mock())
    kernels = "tpu_inference.kernels.ragged_paged_attention.v3"
    for file, name in (
        ("kernel", "ragged_paged_attention"),
        ("kernel_hd64", "ragged_paged_attention_hd64"),
    ):
        vars(importlib.import_module(f"{kernels}.{file}"))[name] = getattr(tpu_inference, name)


def replace_ejkernel(folder: pathlib.Path) -> None:
    decode, ragged = ejkernel.page_attention, ejkernel.ragged_page_attention_v2
    v2 = {"ragged_page_attention": ragged}  # its name of then
    for name in ("", ".kernels", ".kernels._xla", ".kernels._pallas", ".kernels._pallas.tpu"):
        module(f"ejkernel{name}", folder)
    module("ejkernel.callib", ejit=jax.jit)
    # The reference, which rounds sums to bfloat16 unless told not to: tests hold both to 0.01.
    reference = importlib.import_module("ejkernel.kernels._xla.ragged_page_attention")
    exact = functools.partial(reference.ragged_page_attention, compute_dtype=jnp.float32)
    vars(reference)["ragged_page_attention"] = exact
    importlib.import_module("ejkernel.kernels._xla.page_attention")
    vars(sys.modules["ejkernel.kernels._xla"])["page_attention"] = decode
    module("ejkernel.kernels._triton", folder, page_attention=decode)
    module("ejkernel.kernels._triton.ragged_page_attention")
    module("ejkernel.kernels._triton.ragged_page_attention._interface", **v2)
    module("ejkernel.kernels._pallas.tpu.page_attention", page_attention=decode)
    module("ejkernel.kernels._pallas.tpu.ragged_page_attention", **v2)
    modules = module("ejkernel.modules", page_attention=decode, **v2)
    vars(modules)["__getattr__"] = lambda name: mock.Mock()  # of other operations


REPLACE = {
    "jax": replace_jax,
    "tpu-inference": replace_tpu_inference,
    "ejkernel": replace_ejkernel,
}


def main(*given: str) -> int:
    folders = [pathlib.Path(x) for x in given if os.path.isdir(x)]
    options = [x for x in given if not os.path.isdir(x)]
    tests: list[str] = []
    for folder in folders:
        library = next(
            (x for x, of in FILES.items() if (folder / of[0].partition("::")[0]).is_file()), None
        )
        if library is None:
            print(f"{folder} is no checkout of {', '.join(FILES)}", file=sys.stderr)
            return 2
        REPLACE[library](folder)
        tests += [str(folder / file) for file in FILES[library]]
    if not tests:
        print(__doc__)
        return 2
    # A test of JAX fails that is the first to use a persistent cache of programs.
    jax.config.update("jax_enable_compilation_cache", False)
    test_util.is_device_tpu_at_least = lambda version: version <= 5
    test_util.is_device_tpu = lambda version=None, variant=None: (
        version in (None, 5) and variant in (None, "p")
    )
    test_util.is_cuda_compute_capability_at_least = lambda capability: True
    own = ("-p", "no:cacheprovider", "-c", "/dev/null", "--noconftest", "--import-mode=importlib")
    return pytest.main([*tests, *own, *options], plugins=[Peers()])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
