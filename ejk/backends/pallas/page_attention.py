"""`ejk.page_attention` on TPUs: which calls the Pallas kernel takes, and how it is launched."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

from ejk.backends._fields import at_least
from ejk.backends.page_attention import (
    PageAttentionBackend,
    PageAttentionOperands,
    PageAttentionProblem,
)
from ejk.backends.pallas.page_attention_tuned import (
    CHIPS,
    MAX_BLOCK_KV,
    SMEM_LIMIT_BYTES,
    TOO_OLD,
    UNKNOWN,
    Chip,
)
from ejk.backends.pallas.page_attention_work import Work, round_up, seqs_per_launch


@dataclasses.dataclass(frozen=True)
class PallasPageAttention(PageAttentionBackend):
    """Run `ejk.page_attention` as a Pallas kernel on a TPU.

    A core computes a sequence in one pass whatever `num_splits` says: it has no other cores of
    its own to give parts to. What `num_splits >= 1` promises holds: block sizes follow from the
    model and the chip alone, so a sequence's result has the same bits in any batch.

    Attributes:
        pages_per_compute_block: pages that one step of the loop takes. None: by chip and sizes.
        megacore_mode: what the two cores of a megacore chip (v4, v5p) share: `"batch"`, the
            sequences, or `"kv_head"`, the KV heads. None: the sequences on such a chip, or the KV
            heads of a single one.
        vmem_limit_bytes: memory next to the cores that the kernel may use. None: by chip.
        interpret: run the kernel on the CPU instead, in Pallas' interpreter of TPU kernels, in
            which memory that was not written reads as NaN and a read out of bounds raises. May
            be `pltpu.InterpretParams`, to detect races or choose when copies happen.
    """

    pages_per_compute_block: int | None = None
    megacore_mode: Literal["batch", "kv_head"] | None = None
    vmem_limit_bytes: int | None = None
    interpret: bool | Hashable = False

    name = "pallas"
    features = frozenset(
        {
            "attn_logits_soft_cap",
            "sliding_window",
            "sinks",
            "alibi_slopes",
            "value_head_dim",
            "return_lse",
            'cache_layout="HND"',
            'cache_layout="NHD"',
            'cache_layout="KV_HEADS_FIRST"',
        }
    )

    def __post_init__(self):
        if self.megacore_mode not in (None, "batch", "kv_head"):
            raise ValueError(
                f"megacore_mode={self.megacore_mode!r} must be 'batch', 'kv_head' or None"
            )
        at_least(self, pages_per_compute_block=1, vmem_limit_bytes=1)

    @property
    def platforms(self) -> tuple[str, ...]:
        return ("cpu",) if self.interpret else ("tpu",)

    @property
    def effects(self) -> frozenset[Any]:
        """The interpreter's callbacks run in order."""
        return _callback_effects() if self.interpret else frozenset()

    def limits(self, problem: PageAttentionProblem, platform: str) -> tuple[str, ...]:
        reasons = []
        if (version := _chip_version()) in TOO_OLD:
            reasons.append(f"TPU {version}: the kernel needs a v4 or later")
        if problem.dtype not in (jnp.float32, jnp.bfloat16):
            reasons.append(f"dtype={problem.dtype}: the matrix unit takes float32 and bfloat16")
        if self.megacore_mode == "kv_head":
            if problem.num_kv_heads % 2:
                reasons.append(
                    f'megacore_mode="kv_head": num_kv_heads={problem.num_kv_heads} must be even'
                )
            if problem.cache_layout == "NHD":
                reasons.append(
                    'megacore_mode="kv_head": cache_layout="NHD" keeps a token\'s heads in one '
                    "tile, and copies take whole tiles"
                )
        if seqs_per_launch(problem.max_blocks, SMEM_LIMIT_BYTES) < 1:
            reasons.append(
                f"max_blocks={problem.max_blocks}: the table of one sequence must fit in "
                f"{SMEM_LIMIT_BYTES} bytes of scalar memory; larger pages make it shorter"
            )
        work, limit = self._work(problem), self._vmem_limit()
        needs = {name: size for name, size in work.vmem().items() if size}
        if (total := sum(needs.values())) > limit:
            parts = ", ".join(f"{name} {size}" for name, size in needs.items())
            reasons.append(
                f"a block of {work.block_pages} page{'s' * (work.block_pages > 1)} of "
                f"page_size={problem.page_size} needs {total} bytes of VMEM, above "
                f"vmem_limit_bytes={limit}: {parts}"
            )
        return tuple(reasons)

    def run(self, problem, operands, platform):
        step = seqs_per_launch(problem.max_blocks, SMEM_LIMIT_BYTES)
        parts = []
        for begin in range(0, problem.num_seqs, step):
            end = min(begin + step, problem.num_seqs)
            part = operands._replace(
                query=operands.query[begin:end],
                context_lens=operands.context_lens[begin:end],
                block_tables=operands.block_tables[begin:end],
            )
            parts.append(self._launch(dataclasses.replace(problem, num_seqs=end - begin), part))
        if len(parts) == 1:
            return parts[0]
        return tuple(jnp.concatenate(results) for results in zip(*parts))

    def _launch(self, problem: PageAttentionProblem, operands: PageAttentionOperands):
        from jax.experimental.pallas import tpu as pltpu

        from ejk.backends.pallas.page_attention_launch import launch

        interpret = self.interpret
        if interpret is True:
            interpret = pltpu.InterpretParams(
                uninitialized_memory="nan", out_of_bounds_reads="raise"
            )
        with jax.enable_x64(False):  # a kernel's integers have 32 bits, whatever the caller's have
            return launch(self._work(problem), operands, self._vmem_limit(), interpret)

    def _work(self, problem: PageAttentionProblem) -> Work:
        """Cut a launch in blocks and share it between cores."""
        chip = _chip()
        mode, cores = self.megacore_mode, chip.cores if self.megacore_mode is None else 2
        if mode is None:
            two_shares = problem.num_kv_heads % 2 == 0 and problem.cache_layout != "NHD"
            mode = "kv_head" if problem.num_seqs == 1 and two_shares else "batch"
        num_seqs = round_up(problem.num_seqs, cores) if mode == "batch" else problem.num_seqs
        # The size of a block must not follow from how many sequences there are.
        block_pages = self.pages_per_compute_block or self._block_pages(problem, chip)
        return Work(problem, num_seqs, block_pages, cores, mode)

    def _block_pages(self, problem: PageAttentionProblem, chip: Chip) -> int:
        page_bytes = sum(Work(problem, 1, 1).vmem()[name] for name in ("k_buf", "v_buf")) // 2
        tokens = chip.block_bytes * problem.page_size // page_bytes
        tokens = min(max(tokens, chip.block_kv), MAX_BLOCK_KV)
        pages = -(-tokens // problem.page_size)
        limit = self._vmem_limit()
        while pages > 1 and sum(Work(problem, 1, pages).vmem().values()) > limit:
            pages = -(-pages // 2)
        if problem.num_splits > 0:
            return pages  # the same for every batch and table
        seen = -(-problem.visible_bound // problem.page_size) + problem.has_window
        return min(pages, seen, problem.max_blocks)

    def _vmem_limit(self) -> int:
        return self.vmem_limit_bytes or _chip().vmem_limit_bytes


def _tpu_info():
    """The chip that the computation is lowered for, as far as anyone can say."""
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info()
    except ValueError:  # no TPU here, and no abstract mesh of TPUs around the call
        return None


def _chip_version() -> str | None:
    info = _tpu_info()
    return None if info is None else str(info.chip_version)


def _chip() -> Chip:
    info = _tpu_info()
    if info is None:
        return UNKNOWN
    return CHIPS.get(str(info.chip_version), UNKNOWN)._replace(cores=info.num_cores)


@functools.cache
def _callback_effects() -> frozenset[Any]:
    def call_back():
        io_callback(lambda: None, None)
        io_callback(lambda: None, None, ordered=True)

    return frozenset(jax.make_jaxpr(call_back)().effects)
