"""Bugs put into the command line: the tests of what it prints and returns catch each."""

import importlib

import mutants
import pytest
import test_cli
import test_doctor

from ejk.cli._trial import Trial
from ejk.cli.app import app

two_plugins = "jax-cuda12-plugin and jax-cuda13-plugin are both installed"
told = test_doctor.test_a_fault_is_told_with_what_mends_it_and_not_once_it_is_mended
exit_code = test_doctor.test_the_exit_code_is_what_is_said
extends, explains = test_cli.test_two_searches_extend_one_file, test_cli.test_explain_of_an_h100
unwritable = test_cli.test_tune_says_what_cannot_be_written_before_it_searches
BUGS = {
    "doctor: its exit code is swallowed": (
        "doctor", "raise typer.Exit(1 if faults else 0)", "raise typer.Exit(0)", exit_code,
        (test_doctor.H100, Trial("page_attention", "triton", False, "no: pip", "pip"), 1),
    ),
    "doctor: a backend that fails is no fault": (
        "doctor", "if trial.failed:", "if False:", exit_code,
        (test_doctor.CPU, Trial("page_attention", "xla", False, "is wrong", failed=True), 1),
    ),
    "doctor: two plugins are not noticed": (
        "_diagnoses", "if len(plugins) > 1:", "if len(plugins) > 2:", told, (two_plugins,),
    ),
    "explain: a floor in milliseconds": (
        "explain", "batch.moved_bytes / device.gb_per_s / 1e3,",
        "batch.moved_bytes / device.gb_per_s / 1e6,", explains, (),
    ),
    "tune: what another search wrote is lost": (
        "tune", "for found in read_entries(path) if", "for found in [] if", extends, (),
    ),
    "tune: an unwritable file is found at the end": (
        "tune", '_options.check_writable("OUTPUT", output)', "pass", unwritable, (),
    ),
}  # fmt: skip


@pytest.mark.fault("command line", "shared")
@pytest.mark.fast(3)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug, monkeypatch, tmp_path):
    name, old, new, holds, case = BUGS[bug]
    faulty = mutants.load(importlib.import_module(f"ejk.cli.{name}"), old, new, tmp_path)
    for module in (test_cli, test_doctor):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, faulty)
    if name == "_diagnoses":
        monkeypatch.setattr(test_doctor, "diagnose", faulty.diagnose)
    for command in app.registered_commands:
        if command.callback.__name__ == name:
            monkeypatch.setattr(command, "callback", getattr(faulty, name))
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    wanted = holds.__code__.co_varnames[: holds.__code__.co_argcount]
    with pytest.raises((AssertionError, ValueError)):
        holds(*case, **{x: given[x] for x in wanted if x in given})
