"""What the Mosaic GPU backends have in common: platforms, target, first refusals."""

import abc
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ejk import _jax
from ejk.backends.gpu import Target
from ejk.backends.mosaic_gpu._installed import missing
from ejk.backends.paged_problem import PagedProblem
from ejk.backends.triton._backend import TritonBackend

COMPUTE_CAPABILITY = 90


class MosaicGpuBackend(TritonBackend):
    """A Mosaic kernel between those of Triton: subclass it and an operation's class."""

    name = "mosaic_gpu"

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("cuda",)

    @property
    def effects(self) -> frozenset[Any]:
        """The interpreter's callbacks run in order."""
        return _jax.callback_effects() if self.interpret else frozenset()

    def limits(self, problem: Any, platform: str) -> Sequence[str]:
        # What Triton's kernel is for is said first, not that something is not installed.
        if reasons := self.unfit(problem):
            return reasons
        if reason := missing(self.interpret):
            return (reason,)
        return super().limits(problem, platform)

    @abc.abstractmethod
    def unfit(self, problem: Any) -> Sequence[str]:
        """Say why a problem is none of this kernel's, on whatever target."""


def unfit_target(target: Target) -> list[str]:
    """Say why a kernel for Hopper does not run on a target."""
    capability = target.compute_capability
    if capability in (None, COMPUTE_CAPABILITY):
        return []
    return [f"compute_capability={capability} must be {COMPUTE_CAPABILITY}, Hopper's"]


def unfit_cache(problem: PagedProblem, block_kv: int) -> list[str]:
    """Say why TMA does not copy a problem's pages to blocks of so many tokens."""
    page_size, dtype = problem.page_size, problem.query_dtype
    reasons: list[str] = []
    if dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"dtype={dtype}: it takes bfloat16 and float16")
    if page_size % 8 or (block_kv % page_size and page_size % block_kv):
        parts = ", ".join(str(8 << i) for i in range((block_kv // 8).bit_length() - 1))
        reasons.append(
            f"page_size={page_size} must be {parts} or a multiple of {block_kv}: a copy takes "
            "8 tokens or more, and a block ends with a page"
        )
    return reasons


def left_to_triton(what: str) -> tuple[str, str]:
    """Say why automatic choice passes over a call that this backend could run."""
    return "triton", f"for {what}, triton is as fast or faster, and compiled sooner"
