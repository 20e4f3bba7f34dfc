"""Times `ejk.page_attention` on a TPU, and prints what was predicted next to it.

    python benchmarks/tpu.py                        every workload of tpu_kernels.py
    python benchmarks/tpu.py --only "page 16"

Each workload is first compared with the XLA backend. The time is that of a program of `CALLS`
chained calls, over `CALLS`: the median of five rounds of programs queued without waiting.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable

import jax
import numpy as np
import timing
import tpu_kernels
import tpu_prices
import workloads
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from workloads import Arrays, Workload

import ejk

CALLS = 64
TOLERANCE = 2e-2  # of the largest value; what is timed must first be right


@dataclasses.dataclass(frozen=True)
class Measured:
    """A workload's time a call in microseconds, and what was predicted, if anything."""

    workload: Workload
    us: float
    predicted: tpu_prices.Prediction | None
    hbm_gb_per_s: float

    @property
    def share(self) -> float:
        return self.workload.kv_bytes / self.us / 1e3 / self.hbm_gb_per_s


def generation() -> str:
    """Return the name of the TPU that is here, or end and say that there is none."""
    found = jax.devices()[0]
    if found.platform != "tpu":
        sys.exit(
            f"no TPU here: JAX sees {found.device_kind}. `benchmarks/tpu_static.py` needs none"
        )
    version = str(pltpu.get_tpu_info().chip_version)
    return {"7x": "v7x"}.get(version, version)


def measure(workload: Workload, backend: ejk.Backend, calls: int = CALLS, **timed: int) -> float:
    """Check a workload, then return the microseconds of a call."""
    arrays = row_major(workloads.arrays(workload, layers=1))
    options = dict(workload.options)

    def call(query, rest, backend):
        *rest, key_scale, value_scale = rest
        scales = dict(key_scale=key_scale, value_scale=value_scale)
        return ejk.page_attention(query, *rest, backend=backend, **scales, **options)

    query, *rest = arrays
    check(workload, *(jax.jit(call, static_argnums=2)(query, rest, b) for b in (backend, "xla")))

    @jax.jit
    def run(query, rest):
        return jax.lax.fori_loop(0, calls, lambda _, q: call(q, rest, backend), query)

    return timing.wall_time(lambda: run(query, rest), **timed) / calls


def check(workload: Workload, out: jax.Array, expected: jax.Array) -> None:
    out, expected = (np.asarray(x, np.float32) for x in (out, expected))
    error = np.abs(out - expected).max() / np.abs(expected).max()
    if not error < TOLERANCE:
        raise AssertionError(f"{workload.name} is wrong: relative error {error:.1e}")


def row_major(arrays: Arrays) -> Arrays:
    """Put the pools in memory as their axes say: else XLA copies them in front of every call."""
    where = Format(Layout((0, 1, 2, 3)), arrays.key_cache.sharding)
    return arrays._replace(
        key_cache=jax.device_put(arrays.key_cache, where),
        value_cache=jax.device_put(arrays.value_cache, where),
    )


def predictions(chip: str) -> dict[str, tpu_prices.Prediction]:
    """Return what was predicted of a generation, by workload."""
    _, prices = tpu_prices.load()
    return {
        name: tpu_prices.predict(price)
        for (kernel, generation, name), price in prices.items()
        if (kernel, generation) == ("ejk", chip) and price.bundles is not None
    }


def table(rows: Iterable[Measured]) -> str:
    """Write measured next to predicted."""
    lines = [
        "| workload | measured us | predicted us | measured/predicted | measured of HBM | "
        "predicted of HBM |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted = ["-", "-"] if row.predicted is None else [
            f"{row.predicted.us:,.1f}", f"{row.us / row.predicted.us:.2f}"
        ]  # fmt: skip
        share = "-" if row.predicted is None else f"{row.predicted.share:.0%}"
        cells = [row.workload.name, f"{row.us:,.1f}", *predicted, f"{row.share:.0%}", share]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [name for name, of in tpu_kernels.WORKLOADS.items() if of.new_tokens == 1]
    parser.add_argument("--only", nargs="+", choices=names, help="workloads")
    args = parser.parse_args(argv)
    chip = generation()
    info = pltpu.get_tpu_info()
    hbm = info.num_cores * info.mem_bw_bytes_per_second / 1e9
    predicted = predictions(chip)
    print(f"TPU {chip}, jax {jax.__version__}; {hbm:,.0f} GB/s by its data sheet\n")
    rows = []
    for name in args.only or names:
        workload = tpu_kernels.WORKLOADS[name]
        us = measure(workload, ejk.PallasPageAttention())
        rows.append(Measured(workload, us, predicted.get(name), hbm))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
