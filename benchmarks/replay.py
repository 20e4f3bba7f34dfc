"""Runs one compiled step again and again, as XLA's command buffers and without them.

    python benchmarks/replay.py                    200 times each: the same bits
    python benchmarks/replay.py --steps 3 --tiny   interpreted on a CPU, which has no such buffers

A command buffer (a CUDA graph) is recorded once and replayed: what a kernel was given by value
stays as it was recorded. So pools, tables, lengths and bounds change between the steps: in place,
by programs to which they are donated; and as other arrays at other addresses, which asks the buffer
for an update. Each way runs in a process of its own, under the same flags but one.
"""

import argparse
import concurrent.futures
import functools
import glob
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NO_BUFFERS = "--xla_gpu_enable_command_buffer="
# All kinds of commands that a step has; custom calls are kernels of Triton and Mosaic. Alone, too.
BUFFERS = NO_BUFFERS + (
    "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE,CONDITIONAL --xla_gpu_graph_min_graph_size=1"
)
LAYERS = 3
RECORDED, LAUNCHED = "kCommandBuffer", "cuGraphLaunch"


def run(steps: int, tiny: bool) -> dict[str, Any]:
    """Run the step; return a digest of what each gave, and how often a buffer was launched."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from soak import SERVING, TINY

    import ejk

    on_gpu = jax.default_backend() == "gpu"
    sizes, rng = TINY if tiny else SERVING, np.random.default_rng(0)
    backends = {
        name: make(interpret=not on_gpu)
        for name, make in (
            ("write", ejk.TritonWriteKVCache), ("copy", ejk.TritonCopyKVCache),
            ("decode", ejk.TritonPageAttention), ("ragged", ejk.TritonRaggedPageAttention),
        )
    }  # fmt: skip
    hopper = on_gpu and jax.local_devices()[0].compute_capability.startswith("9.")
    layers = 1 if tiny else LAYERS
    seqs, per_layer = sizes.max_seqs, sizes.num_pages // layers
    capacity = sizes.max_blocks * sizes.page_size

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(pools: Any, query: Any, state: Any) -> Any:
        lens, tables, bounds, copies = state
        results = []
        for layer in range(layers):
            own = ejk.layer_block_tables(tables, layer, num_pages=per_layer)
            pools = ejk.copy_kv_pages(
                *pools, copies[:, 0] + layer * per_layer, copies[:, 1] + layer * per_layer,
                backend=backends["copy"],
            )  # fmt: skip
            slots = ejk.slot_mapping(
                own, lens - 1, page_size=sizes.page_size, num_pages=layers * per_layer
            )
            group = sizes.heads // sizes.kv_heads
            key, value = query[:seqs, ::group], query[seqs : 2 * seqs, ::group]
            pools = ejk.write_kv_cache(key, value, *pools, slots, backend=backends["write"])
            results.append(
                ejk.page_attention(query[:seqs], *pools, lens, own, backend=backends["decode"])
            )
            for name in [backends["ragged"], *["mosaic_gpu"] * hopper]:
                results.append(
                    ejk.ragged_page_attention(query, *pools, lens, own, bounds, backend=name)
                )
            query = query.at[:seqs].set(results[0])
        # What the next step sees: longer contexts, other pages, other bounds.
        moved = jnp.roll(tables, 1, 0), jnp.roll(bounds, 1).at[0].set(0).sort()
        state = (lens % capacity + 1, *moved, (copies + 1) % per_layer)
        return pools, results, state

    def draw() -> Any:
        lens = rng.integers(1, capacity, seqs)
        tables = rng.permutation(seqs * sizes.max_blocks).reshape(seqs, -1) % per_layer
        bounds = np.sort(rng.integers(0, 4 * seqs, seqs + 1))
        copies = rng.permutation(per_layer)[:8].reshape(4, 2)
        return tuple(jnp.asarray(x, jnp.int32) for x in (lens, tables, bounds, copies))

    cache = ejk.empty_kv_cache(
        per_layer, sizes.kv_heads, sizes.page_size, sizes.head_dim, num_layers=layers
    )
    pools: Any = jax.tree.map(
        lambda x, seed: jax.random.normal(jax.random.key(seed), x.shape, x.dtype),
        cache[:2], (1, 2),
    )  # fmt: skip
    query = jax.random.normal(
        jax.random.key(3), (4 * seqs, sizes.heads, sizes.head_dim), jnp.bfloat16
    )
    state, kept, digests = draw(), [], []
    for number in range(steps):
        if number % 5 == 4:  # arrays elsewhere; those that are kept hold the old addresses
            kept = [jax.tree.map(jnp.copy, pools), state]
            pools, state = kept[0], draw()
        pools, results, state = step(pools, query, state)
        digest = hashlib.sha256()
        for x in jax.tree.leaves(results):
            digest.update(np.asarray(x).tobytes())
        digests.append(digest.hexdigest())
    digests += [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in pools]
    launches = launched(step, pools, query, state) if on_gpu else 0
    return {"digests": digests, "launched": launches, "on_gpu": on_gpu}


def launched(step: Any, pools: Any, query: Any, state: Any) -> int:
    """Count the launches of graphs in three more steps under the profiler."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                pools, results, state = step(pools, query, state)
                jax.block_until_ready(results)
        [path] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        return sum(
            LAUNCHED in event.name
            for plane in jax.profiler.ProfileData.from_file(path).planes
            for line in plane.lines
            for event in line.events
        )


def child(flags: str, arguments: list[str]) -> dict[str, Any]:
    """Run the step in a process under `flags`; also count the buffers in what XLA compiled."""
    with tempfile.TemporaryDirectory() as folder:
        flags += f" --xla_dump_to={folder} --xla_enable_command_buffers_during_profiling=true"
        environment = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is compiled is to be dumped
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both ways share the device
        }
        done = subprocess.run(
            [sys.executable, __file__, "--child", *arguments],
            env=os.environ | environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            return {"failed": done.stderr[-2000:]}
        dumps = glob.glob(f"{folder}/*jit_step*thunk_sequence_after_thunk_passes*")
        recorded = sum(Path(path).read_text().count(RECORDED) for path in dumps)
        return json.loads(done.stdout.splitlines()[-1]) | {"recorded": recorded}


def unexpected(with_buffers: dict[str, Any], without: dict[str, Any]) -> list[str]:
    """Say where XLA has not done what the flags ask for."""
    if not with_buffers.get("on_gpu"):
        return []
    said = [] if with_buffers["launched"] else ["XLA launched no command buffer with the flags"]
    return said + (["XLA launched command buffers without them"] if without.get("launched") else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.steps, args.tiny)))
        return
    arguments = ["--steps", str(args.steps), *["--tiny"] * args.tiny]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with_buffers, without = pool.map(
            lambda flags: child(flags, arguments), (BUFFERS, NO_BUFFERS)
        )
    failed = [x["failed"] for x in (with_buffers, without) if "failed" in x]
    found = failed or [
        f"step {number}: other bits with command buffers"
        for number, both in enumerate(zip(with_buffers["digests"], without["digests"]))
        if len({*both}) > 1
    ]
    keys = ("recorded", "launched")
    result = {
        "counts": {"steps": args.steps},
        "buffers": {
            way: {key: x.get(key) for key in keys}
            for way, x in (("on", with_buffers), ("off", without))
        },
        "found": (found + unexpected(with_buffers, without))[:20],
    }
    print(json.dumps(result))
    sys.exit(bool(result["found"]))


if __name__ == "__main__":
    main()
