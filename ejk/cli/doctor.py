"""`ejk doctor`: what runs on this machine, what does not, why, and the command that mends it."""

import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer

from ejk.cli._diagnoses import Diagnosis, diagnose
from ejk.cli._machine import Machine, this_machine
from ejk.cli._output import Table, show
from ejk.cli._trial import Trial, trials

ISSUE = """\
## What happened

<!-- The call, with shapes and dtypes, and what it raised or returned. -->

## What was expected

## Machine

```
{said}
```
"""

REPORT = "ejk doctor --issue, and report it"


def doctor(
    run: Annotated[
        bool, typer.Option("--run/--no-run", help="Run each backend's smallest call.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    issue: Annotated[bool, typer.Option("--issue", help="Print a form for an issue.")] = False,
) -> None:
    """Say what runs on this machine, what does not, why, and the command that mends it.

    The exit code is 0 where nothing is to be mended, 1 where something is: a fault of the machine,
    or a backend that fails. A backend that refuses is neither.

    Example: ejk doctor --no-run
    """
    if as_json and issue:
        raise typer.BadParameter(
            "it is one form or the other: leave out --json", param_hint="'--issue'"
        )
    machine = this_machine()
    found = [] if machine.platform is None else list(trials(run))
    faults = [*diagnose(machine)]
    faults += failures(machine, found, {fault.mend for fault in faults})
    if as_json:
        print(json.dumps(as_object(machine, found, faults), indent=2))
    elif issue:
        print(ISSUE.format(said=report(machine, found, faults)))
    else:
        print(report(machine, found, faults))
    raise typer.Exit(1 if faults else 0)


def failures(machine: Machine, found: Sequence[Trial], known: Collection[str]) -> list[Diagnosis]:
    """Return what trials add to the mends that are known.

    On a CPU kernels are interpreted to be looked at: what is not installed for that is no fault.
    """
    added: dict[str, Diagnosis] = {}
    for trial in found:
        name = f"{trial.operation} {trial.backend}"
        fault = f"{trial.operation} on {trial.backend}: {trial.how.removesuffix(f': {trial.mend}')}"
        if trial.failed:
            added[name] = Diagnosis(name, fault, REPORT)
        elif trial.mend and trial.mend not in known and machine.platform != "cpu":
            added.setdefault(trial.mend, Diagnosis(name, fault, trial.mend))
    return list(added.values())


def as_object(
    machine: Machine, found: Sequence[Trial], faults: Sequence[Diagnosis]
) -> dict[str, Any]:
    return {
        "machine": dataclasses.asdict(machine),
        "backends": [trial._asdict() for trial in found],
        "faults": [fault._asdict() for fault in faults],
    }


def report(machine: Machine, found: Sequence[Trial], faults: Sequence[Diagnosis]) -> str:
    """Return what the command prints."""
    parts = ["\n".join(facts(machine))]
    if found:
        rows = [(t.operation, t.backend, "yes" if t.runs else "no", t.how) for t in found]
        parts.append(show(Table(("operation", "backend", "runs", "how, or why not"), rows)))
    told = [f"{fault.fault}\n  mend: {fault.mend}" for fault in faults]
    parts.append("\n".join(told) if told else "Nothing is to be mended.")
    return "\n\n".join(parts)


def facts(machine: Machine) -> list[str]:
    """Return a line for each fact of a machine."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    cuda = machine.cuda and f"{machine.cuda // 1000}.{machine.cuda % 1000 // 10}"
    said = {
        "system": f"{machine.system}, Python {'.'.join(map(str, machine.python))}",
        "versions": versions,
        "JAX computes on": machine.platform and f"{machine.platform}: {_counted(machine.devices)}",
        "NVIDIA GPUs": _counted(machine.nvidia_gpus),
        "NVIDIA driver": machine.driver,
        "CUDA of the plugin": cuda,
        "AMD GPUs": machine.amd_gpus or None,
        "ptxas": ", ".join(f"{x} ({name})" for name, x in machine.ptxas.items() if x),
        "environment": ", ".join(f"{name}={x}" for name, x in machine.environment.items()),
    }
    return [f"{name}: {value}" for name, value in said.items() if value]


def _counted(names: Sequence[str]) -> str:
    each = dict.fromkeys(names)
    return ", ".join(f"{names.count(name)} x {name}" for name in each)
