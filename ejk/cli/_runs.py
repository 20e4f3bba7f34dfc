"""Programs of a batch that are timed: `ejk` with a backend, and other ways to do the same."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ejk._backend import Backend
from ejk._backend_report import backend_report
from ejk._shards import POOL_NAMES
from ejk.cli import _peers, _timing
from ejk.cli._batch import Batch

CACHED = 2**28  # bytes; a run that reads less may find them in the GPU's cache
MOST_CALLS = 16


class Run(NamedTuple):
    """What is timed: so many calls, each on memory of its own, and the result of one."""

    calls: int
    run: Callable[[], Any]

    def us(self) -> float:
        """Return microseconds of a call."""
        return _timing.call_us(self.run, self.calls)


def num_calls(batch: Batch) -> int:
    """Return of how many calls a run is made, so that no GPU's cache holds what they read."""
    if jax.default_backend() == "cpu" or batch.operation == "write":
        return 1
    return max(1, min(MOST_CALLS, CACHED // batch.pool_bytes))


def own(batch: Batch, backend: str | Backend | None) -> Run:
    """Compile and run `ejk`'s call with a backend."""
    calls = num_calls(batch)
    given = batch.arguments(calls)
    arrays = {name: x for name, x in given.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in given.items() if name not in arrays}
    if batch.operation == "write":
        return _write(batch, backend, arrays, static)
    program = jax.jit(lambda own: batch.call(**own, **static, backend=backend))
    tables = [arrays["block_tables"] + i * batch.num_pages for i in range(calls)]

    def run() -> Any:
        return [program(arrays | {"block_tables": table}) for table in tables]

    return Run(calls, run)


def _write(batch: Batch, backend: Any, arrays: dict[str, Any], static: dict[str, Any]) -> Run:
    """Write again and again to the same pools, which are donated."""
    pools = {name: jnp.copy(arrays.pop(name)) for name in POOL_NAMES if name in arrays}
    returned = POOL_NAMES if batch.has_scales else POOL_NAMES[:2]

    @functools.partial(jax.jit, donate_argnums=0)
    def program(pools: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        caches = batch.call(**pools, **given, **static, backend=backend)
        return pools | {n: x for n, x in zip(returned, caches) if n in pools}

    def run() -> Any:
        nonlocal pools
        pools = program(pools, arrays)
        return pools  # good until the next run

    return Run(1, run)


def backends_here(batch: Batch) -> Iterator[str]:
    """Name the backends that run a batch on this device, best first."""
    report = backend_report(operation=batch.call, **batch.types())
    names = {name: reasons for name, reasons in report.refusals.items() if not reasons}
    if report.chosen:
        yield report.chosen
    yield from (name for name in names if name != report.chosen)


def peers(batch: Batch) -> dict[str, Callable[[], Run]]:
    """Return other ways to run a batch, as far as they take it."""
    plain = batch.dtype == batch.cache_dtype and not batch.shape.value_head_dim
    if batch.operation != "decode" or not plain:
        return {}
    is_gpu = jax.default_backend() == "gpu"
    gather = functools.partial(_paged, batch, _peers.gather)
    found: dict[str, Callable[[], Run]] = {"gather and einsum": gather}
    if is_gpu and batch.dtype == "bfloat16":
        found["jax's Pallas GPU paged_attention"] = functools.partial(
            _paged, batch, _peers.pallas_gpu, heads_first=True
        )
    if is_gpu and batch.dtype != "float32":
        found["cuDNN, contiguous cache"] = functools.partial(_dense, batch, "cudnn")
    else:
        found["dot_product_attention, contiguous cache"] = functools.partial(_dense, batch, None)
    return found


def _sizes(batch: Batch) -> Any:
    """Return what peers read of a batch."""
    names = ("num_seqs", "num_pages", "max_blocks")
    return SimpleNamespace(
        **batch.shape._asdict(), **{name: getattr(batch, name) for name in names}
    )


def _paged(batch: Batch, peer: Callable[..., Any], heads_first: bool = False) -> Run:
    calls, sizes = num_calls(batch), _sizes(batch)
    given = SimpleNamespace(**batch.arguments(calls))
    if heads_first:
        given.key_cache, given.value_cache = (
            jnp.swapaxes(pool, 0, 1) for pool in (given.key_cache, given.value_cache)
        )

    @jax.jit
    def program(arrays: dict[str, Any], tables: Any) -> Any:
        return peer(sizes, SimpleNamespace(**arrays), arrays["query"], None, tables)

    tables = [given.block_tables + i * batch.num_pages for i in range(calls)]
    return Run(calls, lambda: [program(vars(given), table) for table in tables])


def _dense(batch: Batch, implementation: str | None) -> Run:
    """Attend to the same keys and values in one contiguous cache, without pages."""
    sizes, given = _sizes(batch), batch.arguments()
    shape = batch.shape

    @jax.jit
    def contiguous(pool: Any, tables: Any) -> Any:
        pages = pool[tables].transpose(0, 1, 3, 2, 4)
        return pages.reshape(batch.num_seqs, -1, shape.num_kv_heads, shape.head_dim)

    tables = given["block_tables"]
    arrays = {
        "key_cache": contiguous(given["key_cache"], tables),
        "value_cache": contiguous(given["value_cache"], tables),
        "context_lens": given["context_lens"],
    }

    @jax.jit
    def program(arrays: dict[str, Any], query: Any) -> Any:
        return _peers.dense(sizes, SimpleNamespace(**arrays), query, implementation)

    return Run(1, lambda: [program(arrays, given["query"])])
