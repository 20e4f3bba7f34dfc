"""`ejk tune`: search the fields of a backend that run a batch fastest, for `ejk.load_tuning`."""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import Progress

from ejk._load_tuning import VERSION, tuning
from ejk._tuning import fact
from ejk.cli import _options, _pieces, _runs
from ejk.cli._batch import Batch
from ejk.cli._trial import relative_error

# What an entry does not name: how large the pool is, and what follows from other facts.
OPEN_FACTS = ("num_pages", "plan")
SWEEPS = 2
TOLERANCE = 0.02  # of the largest value, between the default's result and a trial's
PAYS = 1.02  # what the default must lose by to be overruled
ROUNDS = 5  # in which the default and the best take turns at the end

Fields = dict[str, Any]


def tune(
    output: Annotated[pathlib.Path, typer.Argument(help="The JSON file to write or to extend.")],
    shape: Annotated[
        list[str] | None, typer.Option(help=f"{_options.SHAPE_HELP} May be repeated.")
    ] = None,
    operation: _options.Operation = "decode",
    num_seqs: _options.NumSeqs = 8,
    context: _options.Context = 4096,
    new_tokens: _options.NewTokens = None,
    page_size: _options.PageSize = 16,
    dtype: _options.Dtype = "bfloat16",
    cache: _options.CacheDtype = None,
    backend: Annotated[
        str | None, typer.Option(help="Its fields are searched; the one that runs, if not given.")
    ] = None,
) -> None:
    """Search the fields of a backend for batches on this device; write those that pay.

    Fields are searched one after another, twice. Every trial leaves a line in OUTPUT.trials: a
    search that was stopped goes on from there. `ejk.load_tuning(OUTPUT)` uses the result.

    Example: ejk tune tuning.json --shape 4/2/64 --batch 2 --context 64
    """
    _options.check_writable("OUTPUT", output)
    log = output.with_name(output.name + ".trials")
    _options.check_writable("OUTPUT", log)
    read_entries(output)  # or it is not ours to extend
    batches = [
        _options.batch_of(operation, one, num_seqs, context, new_tokens, page_size, dtype, cache)
        for one in shape or ["llama-3-8b"]
    ]
    for batch in batches:
        plain = plain_backend(batch, backend)
        trials = Trials(log, batch, plain)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            most = 1 + SWEEPS * sum(len(values) for values in plain.tunable.values())
            task = progress.add_task(batch.name, total=most)
            best = search(plain.tunable, trials, functools.partial(progress.advance, task))
        entry = judged(batch, plain, best) if best else None
        if entry is None:
            said = f"the default of {plain.name} is as fast as all that was tried"
            print(f"{batch.name}: {said}: nothing is written")
            continue
        write_entry(output, entry)
        took = entry["measured"]
        print(f"{batch.name}: {best}: {took['us']:,} us instead of {took['default_us']:,}")


def read_entries(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the entries of a file that is there; raise if it holds something else."""
    if not path.exists():
        return []
    try:
        with tuning(path):
            return json.loads(path.read_text())["entries"]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'OUTPUT'") from None


def write_entry(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Add an entry to what a file holds now, as another search may have added to it.

    A reader sees the file before or after it, whole.
    """
    entries = [found for found in read_entries(path) if key(found) != key(entry)] + [entry]
    path = path.resolve()  # a link stays one
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps({"version": VERSION, "entries": entries}, indent=2) + "\n")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def key(entry: dict[str, Any]) -> str:
    """Return what an entry is for."""
    parts = ("operation", "backend", "device_kind", "facts")
    return json.dumps([entry[part] for part in parts], sort_keys=True)


def plain_backend(batch: Batch, name: str | None) -> Any:
    """Return the backend to search; raise if it does not run the batch here, or has no fields."""
    here = list(_runs.backends_here(batch))
    chosen = here[0] if name is None else _options.one_of("--backend", name, here)
    found = next(b for b in _pieces.traced(batch).backends if b.name == chosen)
    if not found.tunable:
        rule = f"{chosen} has no field to search for {batch.operation}"
        raise typer.BadParameter(rule, param_hint="'--backend'")
    return found


class Trials:
    """Times of fields on one batch, which a file keeps."""

    def __init__(self, path: pathlib.Path, batch: Batch, plain: Any):
        self.path, self.batch, self.plain = path, batch, plain
        self.of = {
            "batch": dataclasses.asdict(batch) | {"shape": list(batch.shape)},
            "backend": plain.name,
            "device_kind": jax.devices()[0].device_kind,
        }
        self.expected: Any = None
        text = path.read_text(errors="replace") if path.exists() else ""
        if text and not text.endswith("\n"):  # a search was stopped while it wrote
            text = text[: text.rfind("\n") + 1]
            path.write_text(text)
        self.known: dict[str, float | None] = {}
        for number, line in enumerate(text.splitlines(), 1):
            try:
                found = json.loads(line)
                if self.of.items() <= found.items():
                    self.known[_name(found["fields"])] = found["us"]
            except (ValueError, AttributeError, KeyError):
                rule = f"{path}:{number} is no line of a search: remove the file"
                raise typer.BadParameter(rule, param_hint="'OUTPUT'") from None

    def us(self, fields: Fields) -> float | None:
        """Return microseconds of a call with fields; None where they do not run it, or not right.

        Raises what the default raises.
        """
        name = _name(fields)
        if name not in self.known:
            try:
                self.known[name] = self._measure(fields)
            except Exception:  # too much shared memory, or the compiler gives up
                if not fields:
                    raise
                self.known[name] = None
            with self.path.open("a") as file:
                line = self.of | {"fields": fields, "us": self.known[name]}
                file.write(json.dumps(line) + "\n")
        return self.known[name]

    def _measure(self, fields: Fields) -> float | None:
        if self.expected is None:
            self.expected = _runs.own(self.batch, self.plain).run()[0]
        run = _runs.own(self.batch, dataclasses.replace(self.plain, **fields))
        if not relative_error(run.run()[0], self.expected) < TOLERANCE:
            return None
        return round(run.us(), 3)


def _name(fields: Fields) -> str:
    return json.dumps(fields, sort_keys=True)


def search(tunable: Any, trials: Trials, advance: Callable[[], Any]) -> Fields:
    """Return the fields of the fastest trial: each field in turn, the others at their best."""
    best: Fields = {}
    least = trials.us(best)
    advance()
    for _ in range(SWEEPS):
        before = dict(best)
        for field, values in tunable.items():
            tried = [{**best, field: value} for value in values]
            for trial in tried:
                us = trials.us(trial)
                advance()
                if us is not None and (least is None or us < least):
                    best, least = trial, us
        if best == before:
            break
    return best


def judged(batch: Batch, plain: Any, best: Fields) -> dict[str, Any] | None:
    """Let the best and the default take turns; return an entry if the best still wins."""
    runs = [_runs.own(batch, plain), _runs.own(batch, dataclasses.replace(plain, **best))]
    times = [[run.us() for run in runs] for _ in range(ROUNDS)]
    default_us, us = (statistics.median(own) for own in zip(*times))
    if default_us < PAYS * us:
        return None
    problem: Any = _pieces.traced(batch).problem
    facts = {field.name: fact(problem, field.name) for field in dataclasses.fields(problem)}
    return {
        "operation": problem.operation,
        "backend": plain.name,
        "device_kind": jax.devices()[0].device_kind,
        "facts": {name: value for name, value in facts.items() if name not in OPEN_FACTS},
        "fields": best,
        "measured": {"us": round(us, 2), "default_us": round(default_us, 2)},
    }
