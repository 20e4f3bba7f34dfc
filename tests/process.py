"""One process of `test_processes`: its share of calls that are split over the devices of all.

    python tests/process.py <its number> <how many> <port of the first> <simulated devices of each>

With no simulated devices, each takes the GPU of its number, and they are connected by NCCL. Each
compares the shards that it holds with the same call on one of its own devices.
"""

import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def main(number: int, count: int, port: int, devices: int):
    if devices:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", count, number, local_device_ids=None if devices else [number]
    )
    assert jax.process_count() == count and jax.device_count() == count * max(devices, 1)
    for name, run in CASES.items():
        run(jax.make_mesh((jax.device_count(),), ("x",)))
        print(name, flush=True)


def kernel(backend):
    """The real kernel on a GPU; elsewhere it is interpreted."""
    return backend(interpret=jax.default_backend() == "cpu", num_sms=6)


def split(mesh, given, specs):
    """Place arrays that every process holds: each of them its own shards alone."""

    def place(x, spec):
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x)[index]
        )

    return {name: place(x, specs.get(name, PartitionSpec())) for name, x in given.items()}


def check(function, mesh, given, specs, *, gathers=0, exact=True, sharded=None):
    """Run on all devices, and on one; compare, and look for what moves."""
    import meshes

    expected = jax.jit(function)(given)
    compiled = jax.jit(sharded or function).lower(split(mesh, given, specs)).compile()
    moved = [name for name, _ in meshes.collectives(compiled.as_text())]
    assert moved == ["all-gather"] * gathers, moved
    for ours, whole in zip(compiled(split(mesh, given, specs)), expected):
        assert len(ours.addressable_shards) == jax.local_device_count()
        for shard in ours.addressable_shards:
            tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-5}
            compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
            compare(shard.data, np.asarray(whole)[shard.index], **tolerance)


def decode(mesh, **placed):
    import meshes

    import ejk
    from ejk.testing.shapes import Shape

    given, options = meshes.arrays(
        meshes.split_case(Shape("", 16, 8, 32, 16, num_seqs=8, num_pages=32), num_splits=1)
    )
    function = meshes.attend(kernel(ejk.TritonPageAttention), options)
    check(function, mesh, given, meshes.specs(given, "HND", **placed))


def context(mesh):
    import meshes

    import ejk
    from ejk.testing.shapes import Shape

    shape = Shape("", 16, 8, 32, 16, num_seqs=8, num_pages=32)
    given, _ = meshes.arrays(meshes.split_case(shape, features=()))
    backend = kernel(ejk.TritonPageAttention)
    specs = {name: PartitionSpec("x") for name in ("key_cache", "value_cache")}

    def own_pages(given):
        return ejk.page_attention(**given, axis_name="x", return_lse=True, backend=backend)

    inputs = {name: specs.get(name, PartitionSpec()) for name in given}
    sharded = jax.shard_map(own_pages, mesh=mesh, in_specs=(inputs,), out_specs=PartitionSpec())
    whole = meshes.attend(backend, {})
    check(whole, mesh, given, specs, gathers=1, exact=False, sharded=sharded)


def write(mesh):
    import ejk

    pool, rows = np.zeros((6, 8, 16, 32), np.float32), np.arange(9 * 8 * 32, dtype=np.float32)
    given = {
        "key": rows.reshape(9, 8, 32),
        "value": -rows.reshape(9, 8, 32),
        "key_cache": pool,
        "value_cache": pool + 1,
        "slot_mapping": np.array([3, 80, 3, -1, 50, 96, 17, 80, 5], np.int32),
    }
    heads = PartitionSpec(None, "x")
    specs = {name: heads for name in given if name != "slot_mapping"}
    backend = ejk.TritonWriteKVCache(interpret=jax.default_backend() == "cpu")

    def function(given):
        return ejk.write_kv_cache(**jax.tree.map(jnp.asarray, given), backend=backend)

    check(function, mesh, given, specs)


CASES: dict[str, Callable[[jax.sharding.Mesh], None]] = {
    "decode, heads": lambda mesh: decode(mesh, kv_heads="x"),
    "decode, sequences": lambda mesh: decode(mesh, seqs="x"),
    "decode, context": context,
    "write, heads": write,
}

if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
