"""Several processes, as on several hosts, over gloo, or over NCCL where there are GPUs."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parents[1]
TIMEOUT = 120  # seconds
GPU = bool(os.environ.get("EJK_TEST_GPU"))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.gpu)])
def test_processes_equal_one(count):
    if GPU and jax.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # The process of the tests has most of the memory of the first GPU.
    environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if GPU else {"JAX_PLATFORMS": "cpu"}
    devices = 0 if GPU else 4
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "process.py"), *map(str, (number, count, port, devices))],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(count)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, errors) in zip(processes, printed):
        assert process.returncode == 0, out + errors
