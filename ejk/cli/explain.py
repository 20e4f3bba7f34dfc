"""`ejk explain`: which backend runs a call, why not the others, in which pieces, at what cost."""

import json
from typing import Annotated, Any, NamedTuple

import jax
import typer

from ejk._backend import Backend, Choice
from ejk.backends.triton._backend import TritonBackend
from ejk.cli import _options, _pieces, _tpu
from ejk.cli._batch import Batch
from ejk.cli._devices import DEVICES, Device, device_of, gpu_target
from ejk.cli._machine import this_machine
from ejk.cli._output import Table, show


class Answer(NamedTuple):
    """What is told of one call on one platform.

    Attributes:
        batch: its name.
        device: the name of the device, or "cpu".
        chosen: the backend that runs it.
        refusals: why each better one does not, and each worse one, by name.
        pieces: its kernels: name, programs, and how the blocks of each are cut.
        moved_bytes: what the call has to read and write.
        flops: of its products.
        floor_us: what the slower of both takes at the device's peaks, which were not measured;
            None of a CPU, and of a device whose peaks are not known.
        measured_us: what it took here.
    """

    batch: str
    device: str
    chosen: str
    refusals: dict[str, list[str]]
    pieces: list[dict[str, Any]]
    moved_bytes: int
    flops: int
    floor_us: float | None
    measured_us: float | None = None


def explain(
    device: Annotated[str, typer.Argument(help=f"{', '.join(DEVICES)}, cpu, or here.")] = "here",
    operation: _options.Operation = "decode",
    shape: _options.ShapeText = "llama-3-8b",
    num_seqs: _options.NumSeqs = 64,
    context: _options.Context = 4096,
    new_tokens: _options.NewTokens = None,
    page_size: _options.PageSize = 16,
    dtype: _options.Dtype = "bfloat16",
    cache: _options.CacheDtype = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run it on this device.")] = False,
    as_json: _options.AsJson = False,
) -> None:
    """Say which backend would run a call, in which pieces, and what it should cost.

    Example: ejk explain h100 --shape llama-3-8b --batch 64 --context 4096
    """
    _options.one_of("DEVICE", device, (*DEVICES, "cpu", "here"))
    batch = _options.batch_of(
        operation, shape, num_seqs, context, new_tokens, page_size, dtype, cache
    )
    if measure and device != "here":
        rule = f"'--measure' runs on this machine's device, not on {device}"
        raise typer.BadParameter(f"{rule}: leave DEVICE out", param_hint="'--measure'")
    name, facts = named(device)
    answer = answered(batch, name, facts)
    if measure:
        from ejk.cli._timing import call_us

        arguments = batch.arguments()
        arrays = {n: x for n, x in arguments.items() if isinstance(x, jax.Array)}
        static = {n: x for n, x in arguments.items() if n not in arrays}
        program = jax.jit(lambda given: batch.call(**given, **static))
        answer = answer._replace(measured_us=round(call_us(lambda: program(arrays)), 2))
    print(json.dumps(answer._asdict(), indent=2) if as_json else text(answer, facts))


def named(device: str) -> tuple[str, Device | None]:
    """Return a device's name and facts; None of a CPU."""
    if device != "here":
        return device, DEVICES.get(device)
    here = jax.devices()[0]
    return here.device_kind, device_of(here, this_machine().platform or "cpu")


def answered(batch: Batch, name: str, device: Device | None) -> Answer:
    call = _pieces.traced(batch)
    platform = device.platform if device else "cpu"
    backends = call.backends
    if device and platform in ("cuda", "rocm"):
        target = gpu_target(device.target, device.units)
        backends = tuple(_pieces.for_target(backend, target) for backend in backends)
    choice = Choice(backends, automatic=True)
    refusals = {
        b.name: [f"runs on {platform} where it is asked for by name: nobody has run it there"]
        if platform in b.only_if_asked and platform in b.platforms
        else list(choice.refusals(b, call.problem, platform))
        for b in backends
    }
    chosen = next(backend for backend in backends if not refusals[backend.name])
    floor = None
    if device and device.gb_per_s and device.tflops:
        floor = max(batch.moved_bytes / device.gb_per_s / 1e3, batch.flops / device.tflops / 1e6)
    return Answer(
        batch.name,
        name,
        chosen.name,
        {name: reasons for name, reasons in refusals.items() if reasons},
        pieces(chosen, call, device),
        batch.moved_bytes,
        batch.flops,
        floor and round(floor, 2),
    )


def pieces(chosen: Backend, call: _pieces.Call, device: Device | None) -> list[dict[str, Any]]:
    """Return what a backend launches, as far as it launches kernels of its own."""
    if device is None or chosen.name == "xla":
        return []
    if isinstance(chosen, TritonBackend):
        target = gpu_target(device.target, device.units)
        found = _pieces.launches(chosen, target, call)
    elif device.platform == "tpu" and device.target and not _tpu.is_missing():
        with _tpu.one_device(device.target):
            found = _pieces.pallas_launches(chosen, device.platform, call)
    else:
        found = _pieces.pallas_launches(chosen, device.platform, call)
    return [_piece(launch, device) for launch in found]


def _piece(launch: _pieces.Launch, device: Device) -> dict[str, Any]:
    programs = 1
    for size in launch.grid:
        programs *= size
    blocks = {
        name.lower(): value
        for name, value in launch.constants.items()
        if name in ("BLOCK_KV", "BLOCK_GROUP", "BLOCK_ROWS", "NUM_SPLITS", "PAGES")
    }
    waves = {} if device.platform == "tpu" else {"waves": round(programs / device.units, 2)}
    return {
        "kernel": launch.name,
        "programs": programs,
        **waves,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        **blocks,
    }


def text(answer: Answer, device: Device | None) -> str:
    """Return what the command prints."""
    lines = [f"{answer.batch} on {answer.device}: {answer.chosen} runs it"]
    lines += [f"  not {name}: {why[0]}" for name, why in answer.refusals.items()]
    if answer.pieces:
        found = dict.fromkeys(head for piece in answer.pieces for head in piece)
        heads = [head for head in found if any(piece.get(head) for piece in answer.pieces)]
        rows = [[_spell(piece.get(head)) for head in heads] for piece in answer.pieces]
        lines += ["", show(Table(heads, rows))]
    gflop = answer.flops / 1e9
    lines += ["", f"it moves {answer.moved_bytes:,} bytes"]
    if gflop:
        lines[-1] += f" and takes {gflop:,.2f} GFLOP"
    if device and device.gb_per_s and device.tflops and answer.floor_us:
        is_memory = answer.moved_bytes / device.gb_per_s > gflop / device.tflops * 1e6
        bound, rate = "products", f"{device.tflops:,} TFLOP/s"
        if is_memory:
            bound, rate = "memory", f"{device.gb_per_s:,} GB/s"
        lines.append(
            f"no program takes less than {answer.floor_us:,} us "
            f"({bound} at the data sheet's {rate}; not measured)"
        )
    elif device:
        lines.append("the peaks of this board are not known here: ejk bench measures its memory")
    if answer.measured_us:
        rate = answer.moved_bytes / answer.measured_us / 1e3
        lines.append(f"measured here: {answer.measured_us:,} us, {rate:,.1f} GB/s")
    return "\n".join(lines)


def _spell(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
