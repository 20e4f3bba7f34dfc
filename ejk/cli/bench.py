"""`ejk bench`: how fast calls are here, beside what else is installed and what memory gives."""

import importlib
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.progress import Progress

from ejk.cli import _ceiling, _options, _runs
from ejk.cli._batch import Batch
from ejk.cli._machine import this_machine
from ejk.cli._output import Table, show
from ejk.cli._trial import relative_error

TOLERANCE = 0.05  # of the largest value: what is timed must first be right
LARGEST_YARDSTICK = 2**30  # bytes


def bench(
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
    plot: Annotated[
        pathlib.Path | None, typer.Option(help="Also draw the times to this file.")
    ] = None,
    as_json: _options.AsJson = False,
) -> None:
    """Time a call with each backend that runs it here, and with what else does the same.

    Times of a GPU are how long it was busy, of other devices those of the clock. What a call moves
    is compared with the rate at which the device reads, or for writes copies, as many bytes in the
    same run. The exit code is 1 where a backend of ejk fails or is wrong.

    Example: ejk bench --shape 4/2/64 --batch 2 --context 64
    """
    if plot is not None:
        _check_plot(plot)
    batches = [
        _options.batch_of(operation, one, num_seqs, context, new_tokens, page_size, dtype, cache)
        for one in shape or ["llama-3-8b"]
    ]
    jobs = [(batch, jobs_of(batch)) for batch in batches]
    found: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        total = sum(len(own) for _, own in jobs)
        task = progress.add_task("timing", total=total)
        for batch, own in jobs:
            ceiling = ceiling_of(batch)
            expected: Any = None
            for name, make in own.items():
                progress.update(task, description=f"{batch.name}: {name}", advance=1)
                line, expected = timed(batch, name, make, ceiling, expected)
                found.append(line)
    device, machine = jax.devices()[0], this_machine()
    result = {
        "device": device.device_kind,
        "platform": machine.platform,
        "versions": machine.packages,
        "results": found,
    }
    if plot is not None:
        draw(plot, device.device_kind, found)
    print(json.dumps(result, indent=2) if as_json else text(device, found))
    if any("failed" in line and line["contender"].startswith("ejk ") for line in found):
        raise typer.Exit(1)


def jobs_of(batch: Batch) -> dict[str, Callable[[], _runs.Run]]:
    """Return what is timed of a batch by name; `ejk`'s own choice first."""
    own = {
        f"ejk {name}": (lambda name=name: _runs.own(batch, name))
        for name in _runs.backends_here(batch)
    }
    return {**own, **_runs.peers(batch)}


def ceiling_of(batch: Batch) -> float:
    num_bytes = min(max(batch.moved_bytes, 2**20), LARGEST_YARDSTICK)
    measure = _ceiling.copy_ceiling if batch.operation == "write" else _ceiling.read_ceiling
    return measure(num_bytes)


def timed(
    batch: Batch, name: str, make: Callable[[], _runs.Run], ceiling: float, expected: Any
) -> tuple[dict[str, Any], Any]:
    """Check and time one way; return its line, and the result that the next are compared with."""
    line: dict[str, Any] = {"batch": batch.name, "contender": name}
    try:
        run = make()
        out = run.run()
        out = out[0] if isinstance(out, list) else None
        if out is not None and expected is not None:
            error = relative_error(out, expected)
            line["error"] = float(f"{error:.1e}")
            if not error < TOLERANCE:
                return line | {"failed": f"is wrong: off by {error:.1e}"}, expected
        us = run.us()
    except Exception as error:  # one that fails must not cost the others their turn
        said = " ".join(str(error).split())
        return line | {"failed": f"{type(error).__name__}: {said}"[:200]}, expected
    rate = batch.moved_bytes / us / 1e3
    line |= {"us": round(us, 2), "gb_per_s": round(rate, 2), "of_ceiling": round(rate / ceiling, 4)}
    line |= {"ceiling_gb_per_s": round(ceiling, 2)}
    if batch.flops:
        line["tflops"] = round(batch.flops / us / 1e6, 3)
    return line, out if expected is None else expected


def text(device: Any, found: list[dict[str, Any]]) -> str:
    """Return what the command prints."""
    lines = [f"on {device.device_kind}"]
    if device.platform == "cpu":
        lines = ["on a CPU: XLA runs, and these times say nothing of a GPU or a TPU"]
    for name in dict.fromkeys(line["batch"] for line in found):
        own = [line for line in found if line["batch"] == name]
        ceiling = next((line["ceiling_gb_per_s"] for line in own if "us" in line), None)
        what = "copies" if name.startswith("write") else "reads"
        lines += ["", f"{name}; this device {what} {ceiling:,} GB/s" if ceiling else name]
        rows = [_row(line) for line in own]
        heads = ("", "us", "GB/s", "of the ceiling", "TFLOP/s", "")
        lines.append(show(Table(heads, rows)))
    return "\n".join(lines)


def _row(line: dict[str, Any]) -> list[str]:
    if "us" not in line:
        return [line["contender"], "", "", "", "", line["failed"]]
    tflops = f"{line['tflops']:,}" if "tflops" in line else ""
    share = f"{line['of_ceiling']:.1%}"
    return [line["contender"], f"{line['us']:,}", f"{line['gb_per_s']:,}", share, tflops, ""]


def _check_plot(path: pathlib.Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        rule = 'matplotlib is not installed: pip install "ejk[bench]"'
        raise typer.BadParameter(rule, param_hint="'--plot'")
    _options.one_of("--plot", path.suffix, (".png", ".svg", ".pdf"))
    _options.check_writable("--plot", path)


def draw(path: pathlib.Path, device: str, found: list[dict[str, Any]]) -> None:
    """Draw a bar for each way, a group of bars for each batch, and the ceiling's time."""
    lines = [line for line in found if "us" in line]
    make = importlib.import_module("matplotlib.figure").Figure
    figure = make(figsize=(8, 1.2 + 0.4 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{line['contender']}\n{line['batch']}" for line in lines]
    places = list(range(len(lines)))[::-1]
    axes.barh(places, [line["us"] for line in lines], color="#4c78a8")
    floors = [line["us"] * line["of_ceiling"] for line in lines]
    axes.plot(floors, places, "k|", markersize=14, label="the same bytes at the memory's own rate")
    axes.set_yticks(places, names, fontsize=8)
    axes.set_xlabel("microseconds a call (shorter is better)")
    axes.set_title(f"attention over a paged cache on {device}")
    axes.legend(fontsize=8)
    figure.savefig(path)
