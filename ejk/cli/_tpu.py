"""Programs for TPUs that are not here, which libtpu compiles."""

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Generator

import jax
from jax.experimental import topologies

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
ACCELERATORS = {
    "v4": "v4-8", "v5e": "v5litepod-4", "v5p": "v5p-8", "v6e": "v6e-4", "v7x": "tpu7x-8",
}  # fmt: skip


def is_missing() -> bool:
    return importlib.util.find_spec("libtpu") is None


@contextlib.contextmanager
def one_device(generation: str) -> Generator[jax.sharding.NamedSharding]:
    """Lower for one device of a generation, which arrays are placed on."""
    absent = {
        "TPU_WORKER_HOSTNAMES": "localhost",  # or libtpu looks for a TPU first
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": ACCELERATORS[generation],  # or it warns that it found none
    }
    for name, value in absent.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh([topology.devices[0]], "x")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def used_vmem(program: str) -> list[int]:
    """Read the bytes next to the core that each kernel of a compiled program uses."""
    kernels = [line for line in program.splitlines() if "tpu_custom_call" in line]
    found = (re.findall(r'"used_scoped_memory_configs":(\[.*?\])', line) for line in kernels)
    return [
        max(int(memory["size"]) for memory in json.loads(own[0]) if memory["memory_space"] == "1")
        for own in found
        if own
    ]
