"""Backends with a planted fault, as another package might have them: for `ejk check` to find."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp

import ejk


@dataclasses.dataclass(frozen=True)
class DropsACopy(ejk.XlaCopyKVCache):
    """Forgets the first copy."""

    name = "drops"

    def run(self, problem, operands, platform):
        sources = jnp.where(jnp.arange(problem.num_copies) == 0, -1, operands.sources)
        return super().run(problem, operands._replace(sources=sources), platform)


@dataclasses.dataclass(frozen=True)
class LosesTheLast(ejk.XlaPageAttention):
    """Does not see the last token of a sequence that fills its pages."""

    name = "loses"

    def run(self, problem, operands, platform):
        full = operands.context_lens >= problem.capacity
        lens = jnp.where(full, problem.capacity - 1, operands.context_lens)
        return super().run(problem, operands._replace(context_lens=lens), platform)


@dataclasses.dataclass(frozen=True)
class RefusesAll(ejk.XlaCopyKVCache):
    """Runs nothing."""

    name = "refuses"

    def limits(self, problem, platform):
        return ("has no room",)


@dataclasses.dataclass(frozen=True)
class LosesTheDevice(ejk.XlaCopyKVCache):
    """From the first call of several copies on nothing works, as after a fault of a GPU."""

    name = "breaks"
    is_lost = [False]  # noqa: RUF012

    def run(self, problem, operands, platform):
        self.is_lost[0] |= problem.num_copies > 2
        if self.is_lost[0]:
            raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an access")
        return super().run(problem, operands, platform)


@dataclasses.dataclass(frozen=True)
class Crashes(ejk.XlaCopyKVCache):
    """Takes the process with it at the first call of several copies."""

    name = "crashes"

    def run(self, problem, operands, platform):
        if problem.num_copies > 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().run(problem, operands, platform)


class NoBackend:
    """None at all."""
