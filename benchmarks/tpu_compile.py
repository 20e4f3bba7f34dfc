"""Compiles one TPU kernel ahead of time, and nothing else: a process of `tpu_profile`.

The static profiler of libtpu follows a kernel's branches as far as it knows the scalars that they
depend on, and it knows none that are prefetched. So the kernel is given copies in scalar memory,
which its first step fills with constants. Block tables stay unknown: they only form addresses.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tpu_kernels
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu

from ejk.cli._tpu import TOPOLOGIES, used_vmem

NAME = "priced_kernel"


class _LaunchedError(Exception):
    """The kernel was launched: nothing after it is wanted."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A `pallas_call` as it was made, and its operands."""

    kernel: Callable[..., None]
    options: dict[str, Any]
    operands: tuple[Any, ...]


def capture(call: Callable[[], Any]) -> Launch:
    """Run `call` on concrete arrays until it launches a kernel."""
    launches = []

    def pallas_call(kernel, **options):
        def launch(*operands):
            launches.append(Launch(kernel, options, operands))
            raise _LaunchedError

        return launch

    with (
        mock.patch.object(pl, "pallas_call", pallas_call),
        contextlib.suppress(_LaunchedError),
        jax.ensure_compile_time_eval(),
    ):
        call()
    [launch] = launches
    return launch


def price(launch: Launch, table_size: int, copies: bool) -> Callable[..., Any]:
    """Return the launch with its scalars known, and without its copies if not `copies`.

    Prefetched arrays of `table_size` elements or more are the tables.
    """
    spec = copy.copy(launch.options["grid_spec"])
    known = {
        number: np.asarray(scalars)
        for number, scalars in enumerate(launch.operands[: spec.num_scalar_prefetch])
        if scalars.size < table_size
    }

    def kernel(*refs):
        refs, known_refs = list(refs[: -len(known)]), refs[-len(known) :]
        starts = [pl.program_id(axis) == 0 for axis in range(len(spec.grid))]

        @pl.when(functools.reduce(jnp.logical_and, starts))
        def _write_constants():
            for ref, values in zip(known_refs, known.values()):
                for index in np.ndindex(values.shape):
                    ref[index] = jnp.asarray(values[index])

        for number, ref in zip(known, known_refs):
            refs[number] = ref
        with contextlib.nullcontext() if copies else without_copies():
            launch.kernel(*refs)

    scratch = [pltpu.SMEM(values.shape, values.dtype) for values in known.values()]
    spec.scratch_shapes = (*spec.scratch_shapes, *scratch)
    return pl.pallas_call(kernel, **launch.options | dict(grid_spec=spec, name=NAME))


@contextlib.contextmanager
def without_copies() -> Iterator[None]:
    """Make every copy one that starts nothing and waits for nothing."""
    nothing = mock.Mock(spec=["start", "wait"])
    with (
        mock.patch.object(pltpu, "make_async_copy", lambda *_, **__: nothing),
        mock.patch.object(pltpu, "async_copy", lambda *_, **__: nothing),
    ):
        yield


@contextlib.contextmanager
def one_core(generation: str) -> Iterator[jax.sharding.Sharding]:
    """Lower for a chip of one core: the profiler follows no second one."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh([topology.devices[0]], "x")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        info = dataclasses.replace(pltpu.get_tpu_info(), num_cores=1)
        with mock.patch.object(pltpu, "get_tpu_info", lambda: info):
            yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def compile_alone(launch: Launch, call: Callable[..., Any], where: jax.sharding.Sharding) -> str:
    """Compile `call` on the launch's operands; returns the program.

    Arrays are in memory as their axes say, so that XLA puts no copies around the kernel: the
    profiler would end the process at some of them.
    """

    def row_major(x):
        return Format(Layout(tuple(range(len(x.shape)))), where)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_major(x))

    results = [row_major(x) for x in jax.tree.leaves(launch.options["out_shape"])]
    jitted = jax.jit(lambda *operands: jax.tree.leaves(call(*operands)), out_shardings=results)
    text = jitted.lower(*jax.tree.map(abstract, launch.operands)).compile().as_text()
    assert text is not None
    return text


def main() -> None:
    case = json.loads(sys.argv[1])
    workload = tpu_kernels.workload(case["workload"], case["num_seqs"])
    kernel = tpu_kernels.KERNELS[case["kernel"]]
    with one_core(case["generation"]) as where:
        launch = capture(lambda: kernel(workload, where, **case["fields"]))
        call = price(launch, workload.num_seqs * workload.max_blocks, case["copies"])
        start = time.perf_counter()
        program = compile_alone(launch, call, where)
    seconds = time.perf_counter() - start
    print(json.dumps({"vmem_bytes": max(used_vmem(program)), "compile_s": round(seconds, 2)}))


if __name__ == "__main__":
    main()
