"""Several processes, as on several hosts: two of them, four simulated devices each, over gloo."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("EJK_TEST_GPU")), reason="its devices are simulated ones"
)

TESTS = pathlib.Path(__file__).parent
TIMEOUT = 120  # seconds


def test_two_processes_equal_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "process.py"), str(number), "2", str(port), "4"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    names = ["decode, heads", "decode, sequences", "decode, context", "write, heads"]
    for process, (out, errors) in zip(processes, printed):
        assert process.returncode == 0, errors
        assert [line for line in out.splitlines() if not line.startswith("[Gloo]")] == names
