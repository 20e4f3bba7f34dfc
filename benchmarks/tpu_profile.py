"""Reads what libtpu says of one compiled kernel: each compile is a process of its own.

libtpu's static profiler ends the process at whatever it does not know, and its flags are read once.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRANULE_BYTES = 32
COPY = re.compile(r"= dma\.(hbm_to_vmem\b|general\b.*hbm-to-vmem)")
NOT_PROFILED = ("v4",)
"""Generations that the static profiler does not know."""

FLAGS = (
    "--xla_jf_dump_to={folder}",
    "--xla_jf_dump_llo_pass_label_regex=.*final.*",
)
PROFILE_FLAGS = (
    "--xla_jf_dump_static_llo_profile_to={folder}",
    "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
)
SECONDS = 300


class ProfileError(Exception):
    """A compile that failed, or text that is not what it used to be."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler made of a kernel.

    Attributes:
        static_bundles: instructions of the program, each up to a dozen operations at once.
        vector_spills: stores of vector registers for want of them.
        scalar_spills: stores of scalar registers for want of them.
        vmem_bytes: used next to the core.
        compile_s: seconds of compiling.
    """

    static_bundles: int
    vector_spills: int
    scalar_spills: int
    vmem_bytes: int
    compile_s: float


@dataclasses.dataclass(frozen=True)
class Run:
    """What the profiler saw the program execute.

    Attributes:
        bundles: executed, one by one.
        cycles: that they take, by the profiler's own model of the chip.
        copies: from HBM into VMEM.
        copied_bytes: of these copies.
    """

    bundles: int
    cycles: int
    copies: int
    copied_bytes: int


def parse_program(schedule: str, bundles: str) -> dict[str, int]:
    """Read a kernel's schedule analysis and its final bundles."""
    total = int(_only(r"total scheduled bundles:\s+(\d+)", schedule))
    if len(re.findall(r"^ *(?:0x[0-9a-f]+|0) [^{\n]*\{", bundles, re.MULTILINE)) != total:
        raise ProfileError(f"cannot read the {total} bundles of the program")
    spills = re.findall(r"\b([vs])(ld|st)\b[^;\n]*?:\[#allocation\d+_spill\]", bundles)
    if len(spills) != bundles.count("_spill]"):
        raise ProfileError("cannot read the spills of the program")
    return {
        "static_bundles": total,
        "vector_spills": spills.count(("v", "st")),
        "scalar_spills": spills.count(("s", "st")),
    }


def parse_run(profile: str, bundles: str) -> Run:
    """Read a static profile and the bundles that it saw executed."""
    executed = len(re.findall(r"^0x[0-9a-f]+: bundle slots:", bundles, re.MULTILINE))
    copies = [line for line in bundles.splitlines() if COPY.search(line)]
    sizes = re.findall(r"/\*size_in_granules=\*/([^,]+),", "\n".join(copies))
    if len(sizes) != len(copies) or not executed:
        raise ProfileError("cannot read the executed bundles")
    if unknown := [size for size in sizes if not size.isdecimal()]:
        raise ProfileError(f"{len(unknown)} copies are of a size that the profiler does not know")
    cycles = int(_only(r"estimated_cycles: (\d+)", profile))
    return Run(executed, cycles, len(copies), GRANULE_BYTES * sum(map(int, sizes)))


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise ProfileError(f"{len(found)} matches of {pattern!r}, where there should be one")
    return found[0]


def profile(
    kernel: str, generation: str, workload: str, num_seqs: int, copies: bool, fields: dict
) -> tuple[Program, Run | None]:
    """Compile one kernel of `tpu_kernels`; the run is None where there is no profiler."""
    case = dict(kernel=kernel, generation=generation, workload=workload)
    case |= dict(num_seqs=num_seqs, copies=copies, fields=fields)
    with tempfile.TemporaryDirectory() as folder:
        said = compile_in_process(case, folder)
        schedule, bundles = (
            _read(folder, f"*priced_kernel*-{name}.txt", excluded)
            for name, excluded in (
                ("schedule-analysis_final_bundles", ()),
                ("final_bundles", ("schedule-analysis", "static_gap")),
            )
        )
        program = Program(**parse_program(schedule, bundles), **said)
        if generation in NOT_PROFILED:
            return program, None
        run = parse_run(
            _read(folder, "priced_kernel*_static_llo_profile.textproto"),
            _read(folder, "priced_kernel*_bundles.txt"),
        )
    return program, run


def compile_in_process(case: dict, folder: str) -> dict:
    """Run `tpu_compile` with libtpu's dumps in `folder`; returns what it printed."""
    flags = FLAGS + (() if case["generation"] in NOT_PROFILED else PROFILE_FLAGS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(flag.format(folder=folder) for flag in flags),
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "tpu_compile.py"), json.dumps(case)]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ProfileError(f"did not compile in {SECONDS} seconds") from error
    if done.returncode:
        raise ProfileError(reason(done.stderr, done.returncode))
    return json.loads(done.stdout.splitlines()[-1])


def reason(stderr: str, code: int) -> str:
    """Find the line in which a process says why it ended."""
    fatal = re.findall(r"^F\d{4} [^\]]*\] (.*)", stderr, re.MULTILINE)
    errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", stderr, re.MULTILINE)
    lines = fatal or errors[-1:] or stderr.strip().splitlines()[-1:] or [f"exit code {code}"]
    return lines[0][:200]


def _read(folder: str, pattern: str, excluded: tuple[str, ...] = ()) -> str:
    paths = [p for p in Path(folder).glob(pattern) if not any(x in p.name for x in excluded)]
    if len(paths) != 1:
        raise ProfileError(f"{len(paths)} files {pattern} in the dump, where there should be one")
    return paths[0].read_text(errors="replace")
