"""Which JAX and which CUDA kernels of Pallas Mosaic GPU take."""

import os

import jax

from ejk import _jax

# `plgpu.kernel` as this package calls it; and an interpreter that knows the products.
OLDEST_JAX, OLDEST_INTERPRETER = (0, 11, 2), (0, 12, 0)
# ptxas compiles masks of JAX's own attention wrongly, which JAX refuses.
WRONG_CUDA = range(12080, 12091)
MOST_WARPGROUPS = 4  # of a kernel


def missing(interpret: bool) -> str | None:
    """Say what does not fit; None if all does."""
    oldest = OLDEST_INTERPRETER if interpret else OLDEST_JAX
    if jax.__version_info__ < oldest:
        what = "interpreter" if interpret else "kernels"
        return f"jax {jax.__version__}: its {what} want {'.'.join(map(str, oldest))} or later"
    if interpret and (threads := interpreter_threads()) < MOST_WARPGROUPS:
        return (
            f"its interpreter wants {MOST_WARPGROUPS} threads, and XLA has {threads}: set "
            f"JAX_NUM_CPU_DEVICES={MOST_WARPGROUPS}"
        )
    if not interpret and (version := _jax.cuda_version()) in WRONG_CUDA:
        return f"CUDA {version} compiles masks wrongly: 12.9.1 and later do not"
    return None


def interpreter_threads() -> int:
    """Return on how many threads XLA runs a CPU's programs.

    Each warpgroup has one and waits there for others: of too few it would wait forever.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    cores = int(os.environ.get("NPROC", 0)) or cores
    return max(cores, len(jax.local_devices(backend="cpu")))
