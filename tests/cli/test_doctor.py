"""Each fault of a machine: what doctor prints before it is mended, and after."""

import dataclasses
import json
import os

import pytest
from command import run

from ejk.cli import _machine, doctor
from ejk.cli._diagnoses import diagnose
from ejk.cli._machine import Machine, this_machine
from ejk.cli._trial import Trial

pytestmark = pytest.mark.fast

PACKAGES = {
    "ejk": "0.1.0", "jax": "0.12.0.1", "jaxlib": "0.12.0.1", "numpy": "2.5.5", "triton": "3.9.0",
    "jax-triton": "0.4.1", "jax-cuda13-plugin": "0.12.0.1",
}  # fmt: skip
H100 = Machine(
    packages=PACKAGES,
    nvidia_gpus=("NVIDIA H100 80GB HBM3",),
    driver="580.159.03",
    platform="cuda",
    devices=("NVIDIA H100 80GB HBM3",),
    capability=90,
    cuda=13000,
    ptxas={"triton": "/venv/triton/backends/nvidia/bin/ptxas", "path": None},
)
CPU = Machine(packages={n: x for n, x in PACKAGES.items() if n in ("jax", "jaxlib", "numpy")})
HIDDEN = dataclasses.replace(H100, platform="cpu", devices=("cpu",), capability=None)


def without(*names, of=H100, **changed):
    left = {name: x for name, x in of.packages.items() if name not in names}
    return dataclasses.replace(of, packages=left, **changed)


def with_packages(of=H100, **versions):
    given = {name.replace("_", "-"): x for name, x in versions.items()}
    return dataclasses.replace(of, packages=of.packages | given)


def with_environment(of=H100, **variables):
    return dataclasses.replace(of, environment=variables)


# What is wrong, with what; the command that mends it. Mended, each is the healthy machine.
FAULTS = {
    "Python 3.11.9 is too old: ejk needs 3.12": (
        dataclasses.replace(H100, python=(3, 11, 9)), "python3.12 -m venv .venv"),
    "jax 0.13.0 does not fit: ejk needs 0.10.2 or later, below 0.13": (
        with_packages(jax="0.13.0"), 'pip install "jax>=0.10.2,<0.13"'),
    "JAX has no devices: RuntimeError: no CUDA": (
        dataclasses.replace(H100, platform=None, jax_error="RuntimeError: no CUDA"),
        'pip install "ejk[cuda13]"'),
    "JAX has no devices with JAX_PLATFORMS=tpu: RuntimeError: no TPU": (
        dataclasses.replace(H100, platform=None, jax_error="RuntimeError: no TPU",
                            environment={"JAX_PLATFORMS": "tpu"}), "unset JAX_PLATFORMS"),
    "JAX_PLATFORMS=cpu hides the accelerator": (
        dataclasses.replace(HIDDEN, environment={"JAX_PLATFORMS": "cpu"}), "unset JAX_PLATFORMS"),
    "CUDA_VISIBLE_DEVICES='-1' hides 1 GPU": (
        dataclasses.replace(HIDDEN, environment={"CUDA_VISIBLE_DEVICES": "-1"}),
        "unset CUDA_VISIBLE_DEVICES"),
    "JAX does not see 1 NVIDIA GPU, and its plugin is installed: RuntimeError: no libcudart": (
        dataclasses.replace(HIDDEN, cuda_error="RuntimeError: no libcudart"),
        'pip install --force-reinstall "ejk[cuda13]"'),
    "JAX does not see 1 NVIDIA GPU: its CUDA plugin is not installed": (
        without("jax-cuda13-plugin", "jax-triton", of=HIDDEN), 'pip install "ejk[cuda13]"'),
    "jax-cuda13-plugin 0.11.2 does not fit jaxlib 0.12.0.1: JAX does not load it": (
        with_packages(HIDDEN, jax_cuda13_plugin="0.11.2"),
        'pip install --no-deps "jax-cuda13-plugin==0.12.0.1"'),
    "jax-cuda12-plugin and jax-cuda13-plugin are both installed": (
        with_packages(jax_cuda12_plugin="0.12.0.1"), "pip uninstall jax-cuda12-plugin"),
    "the NVIDIA driver 550.54.15 is too old for jax-cuda13-plugin: it needs 580": (
        dataclasses.replace(H100, driver="550.54.15"),
        'pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install "ejk[cuda12]"'),
    "CUDA 12.9.0 compiles causal Mosaic GPU kernels wrongly": (
        dataclasses.replace(H100, cuda=12090),
        'pip install --upgrade --upgrade-strategy eager "ejk[cuda12]"'),
    "compute capability 75 is below 80": (
        dataclasses.replace(H100, capability=75), "use a GPU of the Ampere generation or later"),
    "jax 0.11.0 is too old for the kernels of Hopper in mosaic_gpu": (
        with_packages(jax="0.11.0"), 'pip install --upgrade "ejk[cuda13]"'),
    "triton is not installed: calls run on XLA": (
        without("triton"), 'pip install "ejk[triton]"'),
    "jax-triton is not installed: calls run on XLA": (
        without("jax-triton"), 'pip install "ejk[triton]"'),
    "triton 3.4.0 is too old: ejk needs 3.6 or later": (
        with_packages(triton="3.4.0"), 'pip install --upgrade "ejk[triton]"'),
    "jax-triton 0.3.1 does not fit: ejk calls version 0.4": (
        with_packages(jax_triton="0.3.1"), 'pip install "jax-triton>=0.4,<0.5"'),
    "jax-triton is installed without JAX's plugin for GPUs": (
        with_packages(CPU, triton="3.9.0", jax_triton="0.4.1"),
        'pip install --no-deps "jax-cuda13-plugin==0.12.0.1"'),
    "triton 3.6.0 does not interpret with numpy 2.5.5": (
        with_packages(triton="3.6.0"), 'pip install "numpy<2.4"'),
    "triton has no ptxas: no kernel can be assembled": (
        dataclasses.replace(H100, ptxas={"triton": None, "path": "/usr/bin/ptxas"}),
        'pip install --force-reinstall "ejk[triton]"'),
    "the cache /cache/of/triton cannot be written": (
        dataclasses.replace(H100, unwritable={"TRITON_CACHE_DIR": "/cache/of/triton"}),
        "export TRITON_CACHE_DIR=$HOME/.cache/ejk"),
    "JAX_DISABLE_JIT=1: every operation is dispatched alone": (
        with_environment(JAX_DISABLE_JIT="1"), "unset JAX_DISABLE_JIT"),
    "TRITON_INTERPRET=1: Triton interprets every kernel on the CPU": (
        with_environment(TRITON_INTERPRET="1"), "unset TRITON_INTERPRET"),
    "XLA_FLAGS has --xla_gpu_enable_command_buffer=: no CUDA graphs": (
        with_environment(XLA_FLAGS="--xla_a=1 --xla_gpu_enable_command_buffer="),
        "unset XLA_FLAGS"),
    "JAX does not see the AMD GPU: its ROCm plugin is not installed": (
        dataclasses.replace(CPU, amd_gpus=1), 'pip install "ejk[rocm]"'),
    "JAX does not see the TPU: libtpu is not installed": (
        dataclasses.replace(CPU, has_tpu=True), 'pip install "ejk[tpu]"'),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_what_mends_it_and_not_once_it_is_mended(fault):
    machine, mend = FAULTS[fault]
    [found] = diagnose(machine)
    before = doctor.report(machine, [], [found])
    assert f"\n{fault}" in before and f"  mend: {found.mend}" in before and mend in found.mend
    healthy = CPU if machine.platform == "cpu" and not machine.nvidia_gpus else H100
    after = doctor.report(healthy, [], diagnose(healthy))
    assert fault not in after and after.endswith("Nothing is to be mended.")


def test_what_the_environment_hides_is_found_on_a_real_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(_machine, "_nvidia", lambda: (("NVIDIA H100",), "580.1"))
    names = {found.name for found in diagnose(this_machine())}
    assert {"JAX_PLATFORMS", "TRITON_CACHE_DIR"} <= names
    monkeypatch.setattr(_machine, "_nvidia", lambda: ((), None))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = {found.name for found in diagnose(this_machine())}
    assert not {"JAX_PLATFORMS", "TRITON_CACHE_DIR"} & names


def test_the_output_of_nvidia_smi_is_read(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.86.15'; echo 'NVIDIA H200, 570.86.15'")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert _machine._nvidia() == (("NVIDIA H200",) * 2, "570.86.15")


def test_amd_gpus_are_the_nodes_with_vector_units(tmp_path):
    for node, simds in enumerate((0, 1216, 1216)):
        path = tmp_path / str(node) / "properties"
        path.parent.mkdir()
        path.write_text(f"cpu_cores_count 0\nsimd_count {simds}\n")
    assert _machine._amd_gpus(str(tmp_path)) == 2


def test_a_jax_that_cannot_start_is_a_fault_and_no_traceback(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("no\nCUDA")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    said = run("doctor", code=1)
    assert "JAX has no devices: RuntimeError: no CUDA" in said and "page_attention" not in said


def test_the_command_prints_a_table_json_and_a_form(monkeypatch):
    trials = [Trial("page_attention", "triton", False, "[x] is missing: pip", "pip")]
    monkeypatch.setattr(doctor, "trials", lambda run: trials)
    monkeypatch.setattr(doctor, "this_machine", lambda: H100)
    said = run("doctor", code=1)
    assert "JAX computes on: cuda: 1 x NVIDIA H100 80GB HBM3" in said
    assert "page_attention  triton   no    [x] is missing: pip" in said
    found = json.loads(run("doctor --json", code=1))
    assert found["machine"]["capability"] == 90
    assert [fault["mend"] for fault in found["faults"]] == ["pip"]
    assert found["backends"][0]["mend"] == "pip"
    form = run("doctor --issue", code=1)
    assert "## What happened" in form and "jax 0.12.0.1" in form


@pytest.mark.parametrize(
    ("machine", "trial", "code"),
    [
        (CPU, Trial("page_attention", "triton", False, "is missing: pip", "pip"), 0),
        (H100, Trial("page_attention", "triton", False, "is missing: pip", "pip"), 1),
        (H100, Trial("page_attention", "pallas", False, "runs on tpu, not on cuda"), 0),
        (CPU, Trial("page_attention", "xla", False, "is wrong: off by 1", failed=True), 1),
    ],
)
def test_the_exit_code_is_what_is_said(machine, trial, code, monkeypatch):
    """On a CPU an interpreter that is not installed is no fault; what fails is one anywhere."""
    monkeypatch.setattr(doctor, "trials", lambda run: [trial] * 2)
    monkeypatch.setattr(doctor, "this_machine", lambda: machine)
    said = run("doctor", code=code)
    assert said.endswith("Nothing is to be mended.\n") is (code == 0)
    assert said.count("  mend: ") == code
    assert len(json.loads(run("doctor --json", code=code))["faults"]) == code
