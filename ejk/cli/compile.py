"""`ejk compile`: what a call's kernels take of a device that need not be here."""

import importlib.util
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import typer

from ejk.backends.gpu import Target
from ejk.backends.mosaic_gpu._backend import MosaicGpuBackend
from ejk.backends.triton._backend import TritonBackend
from ejk.cli import _mosaic, _offline, _options, _pieces, _tpu
from ejk.cli._batch import Batch
from ejk.cli._devices import GPUS, gpu_target
from ejk.cli._output import Table, show

Line = dict[str, Any]


def compile(
    target: Annotated[str, typer.Argument(help="sm_80, sm_90, gfx942, v5e, v6e, ...")],
    operation: _options.Operation = "decode",
    shape: _options.ShapeText = "llama-3-8b",
    num_seqs: _options.NumSeqs = 64,
    context: _options.Context = 4096,
    new_tokens: _options.NewTokens = None,
    page_size: _options.PageSize = 16,
    dtype: _options.Dtype = "bfloat16",
    cache: _options.CacheDtype = None,
    backend: Annotated[
        str | None, typer.Option(help="Whose kernels; what runs by itself, if not given.")
    ] = None,
    fields: _options.Fields = None,
    as_json: _options.AsJson = False,
) -> None:
    """Compile a call's kernels for a device that need not be here, and print what they take.

    Of GPUs the kernels of Triton and Mosaic GPU: registers and spills of a thread, shared memory of
    a program, tensor core instructions. Of TPUs those of Pallas: memory next to the core. The exit
    code is 1 where nothing can be compiled.

    Example: ejk compile sm_90 --shape 4/2/64 --batch 2 --context 64
    """
    _options.one_of("TARGET", target, (*GPUS, *_tpu.TOPOLOGIES))
    batch = _options.batch_of(
        operation, shape, num_seqs, context, new_tokens, page_size, dtype, cache
    )
    of = for_tpu if target in _tpu.TOPOLOGIES else for_gpu
    try:
        lines = list(of(batch, target, backend, fields or []))
    except (ImportError, NotImplementedError, ValueError) as error:
        said = " ".join(str(error).split())
        print(f"{batch.name} for {target}: {said}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"target": target, "batch": batch.name, "kernels": lines}, indent=2))
        return
    heads = list(dict.fromkeys(head for line in lines for head in line))
    rows = [[_spell(line.get(head)) for head in heads] for line in lines]
    print(f"{batch.name} for {target}\n\n{show(Table(heads, rows))}")


def for_gpu(batch: Batch, target: str, name: str | None, fields: list[str]) -> Iterator[Line]:
    """Compile what Triton or Mosaic GPU would launch."""
    if importlib.util.find_spec("triton") is None:  # told before anything else
        raise NotImplementedError('triton is not installed: pip install "ejk[triton]"')
    gpu, call = gpu_target(target), _pieces.traced(batch)
    chosen = _options.with_fields(backend_for(call, gpu, name), fields)
    if reasons := unfit(chosen, gpu, call.problem):
        raise NotImplementedError(f"{chosen.name}: {reasons[0]}")
    if isinstance(chosen, MosaicGpuBackend):
        lacks = [*chosen.refusals(call.problem, "cuda"), _mosaic.missing()]
        if reason := next(filter(None, lacks), None):
            raise NotImplementedError(f"{reason}; or leave it to --backend triton")
    for launch in _pieces.launches(chosen, gpu, call):
        start = time.perf_counter()
        if launch.kernel is None:
            found = _mosaic.compile_call(batch.call.__name__, **batch.types(), backend=chosen)
            read = _read_mosaic(found)
        else:
            found = _offline.compile_kernel(
                launch.kernel,
                launch.pointers,
                launch.constants,
                target,
                num_warps=launch.num_warps or 4,
                num_stages=launch.num_stages or 1,
                max_registers=launch.max_registers,
            )
            read = _read(found, target)
        seconds = time.perf_counter() - start
        line = {
            "kernel": launch.name,
            "programs": launch.grid[0],
            "warps": launch.num_warps,
            "stages": launch.num_stages,
        }
        yield line | read | {"compile_s": round(seconds, 2)}


def backend_for(call: _pieces.Call, gpu: Target, name: str | None) -> TritonBackend:
    """Return the backend of this name; or the one that would run by itself, on AMD Triton's."""
    found = {
        backend.name: _pieces.for_target(backend, gpu)
        for backend in call.backends
        if isinstance(backend, TritonBackend)
        and not (gpu.is_amd and isinstance(backend, MosaicGpuBackend))
    }
    if name is not None:
        return found[_options.one_of("--backend", name, found)]
    fit = {name: x for name, x in found.items() if not unfit(x, gpu, call.problem)}
    for backend in fit.values():
        preferred = backend.passed_over(call.problem, "cuda")
        if preferred is None or preferred[0] not in fit:
            return backend
    return found["triton"]


def unfit(backend: TritonBackend, gpu: Target, problem: Any) -> Sequence[str]:
    """Say why a backend's kernels are none for a call on a GPU, whatever is installed here."""
    found = backend.unfit(problem) if isinstance(backend, MosaicGpuBackend) else ()
    return found or backend.limits_on(gpu, problem)


def _read_mosaic(assembled: _mosaic.Assembled) -> Line:
    return {
        "registers": assembled.registers,
        "spilled_bytes": assembled.spilled,
        "shared_bytes": assembled.shared_memory,
        "tensor_core": len(re.findall(r"\bwgmma\.mma_async", assembled.ptx)),
    }


def _read(compiled: Any, target: str) -> Line:
    if target.startswith("sm_"):
        cuda = _offline.read_cuda(compiled, target)
        return {
            "registers": cuda.registers,
            "spilled_bytes": cuda.spill_store_bytes,
            "shared_bytes": cuda.shared_bytes,
            "tensor_core": cuda.matrix_products,
            "wide_copies": cuda.wide_async_copies,
        }
    amd = _offline.read_amd(compiled)
    return {
        "registers": amd.vgprs,
        "spilled_registers": amd.vgpr_spills + amd.sgpr_spills,
        "shared_bytes": amd.lds_bytes,
        "tensor_core": amd.matrix_products,
    }


def for_tpu(batch: Batch, generation: str, name: str | None, fields: list[str]) -> Iterator[Line]:
    """Compile Pallas' program with libtpu, without a TPU."""
    _options.one_of("--backend", name or "pallas", ("pallas",))
    if _tpu.is_missing():
        raise NotImplementedError('libtpu is not installed: pip install "ejk[tpu]"')
    backend = next(b for b in _pieces.traced(batch).backends if b.name == "pallas")
    chosen = _options.with_fields(backend, fields)
    with _tpu.one_device(generation) as where:
        types = batch.types()
        arrays = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            for name, x in types.items()
            if isinstance(x, jax.ShapeDtypeStruct)
        }
        static = {name: x for name, x in types.items() if name not in arrays}
        call = jax.jit(lambda given: batch.call(**given, **static, backend=chosen))
        start = time.perf_counter()
        compiled = call.lower(arrays).compile()
        seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temporary = None if memory is None else memory.temp_size_in_bytes
    for used in _tpu.used_vmem(compiled.as_text() or ""):
        yield {
            "kernel": f"pallas {batch.operation}",
            "vmem_bytes": used,
            "temporary_bytes": temporary,
            "compile_s": round(seconds, 2),
        }


def _spell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int | float) else str(value)
