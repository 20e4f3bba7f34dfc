"""Compiles a Pallas Mosaic GPU kernel for Hopper without a GPU, and reads what came of it.

`ejk.cli._mosaic` compiles, as `ejk compile` does; the disassembler is the one that Triton brings.
Nothing here is public: what is missing skips the test.

`make test` installs what has Mosaic's entry point in a folder of its own. In the environment itself
JAX would take it for a platform in every test.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from ejk.cli import _mosaic

PJRT = pathlib.Path(sys.prefix) / "jax-cuda13-pjrt"
PLUGINS = [str(PJRT / "jax_plugins")]


@dataclasses.dataclass(frozen=True)
class Program(_mosaic.Assembled):
    """What ptxas made of a kernel.

    Attributes:
        sass: the program as the GPU runs it, an instruction a line.
    """

    sass: str

    @property
    def traded(self) -> tuple[int, int]:
        """Registers of a thread of the warpgroups that ask for more, and of the others.

        A request for more than the others have left is waited for, without an end.
        """
        kinds = (rf"setmaxnreg.{kind}\S* (\d+);" for kind in ("inc", "dec"))
        (more,), (fewer,) = ({*re.findall(kind, self.ptx)} for kind in kinds)
        return int(more), int(fewer)

    @functools.cached_property
    def loops(self) -> list[list[str]]:
        """The innermost loops with products of the tensor cores: the operations of each."""
        at: dict[str, int] = {}
        operations: list[str] = []
        for line in self.sass.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                at[label[1]] = len(operations)
            elif operation := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                operations.append(operation[1])
        jumps = [re.search(r"\bBRA\b.*`\((\S+)\)", x) for x in operations]
        back = {(at[x[1]], i) for i, x in enumerate(jumps) if x and at[x[1]] <= i}
        inner = [x for x in back if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in back)]
        bodies = (operations[begin : end + 1] for begin, end in sorted(inner))
        return [body for body in bodies if any("HGMMA" in x for x in body)]


def missing() -> str | None:
    """Say what is not here to compile with."""
    return _mosaic.missing(PLUGINS)


def compile_call(function: str, *arguments: Any, **options: Any) -> Program:
    """Compile a call of `ejk` with arguments of such shapes, and disassemble it."""
    found = _mosaic.compile_call(function, *arguments, folders=PLUGINS, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(found.cubin)
        disassembler = _mosaic.tools() / "bin" / "nvdisasm"
        sass = subprocess.run(
            [disassembler, "-c", file.name], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    return Program(**vars(found), sass=sass)
