"""How a launch of the TPU kernel is cut, and the memory it needs: pure functions, no Pallas."""

import dataclasses

import jax.numpy as jnp

from ejk.backends.page_attention import PageAttentionProblem

LANES = 128
SUBLANES = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """The static shape of one launch."""

    problem: PageAttentionProblem
    num_seqs: int  # of this launch: a multiple of what its cores take in a step
    block_pages: int
    round_blocks: int = 1  # blocks that are computed together
    step_seqs: int = 1  # sequences of a grid step
    cores: int = 1
    shared: str = "batch"  # what the cores share: "batch" or "kv_head"
    reordered_copies: int = 0  # of a round, to put in order heads that lie inside tokens

    @property
    def block_kv(self) -> int:
        return self.block_pages * self.problem.page_size

    @property
    def core_seqs(self) -> int:
        return self.num_seqs // self.cores if self.shared == "batch" else self.num_seqs

    @property
    def core_steps(self) -> int:
        return self.core_seqs // self.step_seqs

    @property
    def has_two_pools(self) -> bool:
        return not (self.problem.latent or self.problem.fused)

    @property
    def kv_heads(self) -> int:
        """KV heads of a core."""
        heads = self.problem.num_kv_heads
        return heads // self.cores if self.shared == "kv_head" else heads

    @property
    def rows(self) -> int:
        """Query heads of a core."""
        return self.kv_heads * self.head_rows

    @property
    def head_rows(self) -> int:
        """Query rows of a KV head."""
        return self.problem.group

    def page_shape(self, head_dim: int) -> tuple[int, ...]:
        """Return the shape of a page in VMEM: that of the pool, less the pages."""
        layout = self.problem.layout
        sizes = {layout.kv_heads: self.kv_heads, layout.slots: self.problem.page_size}
        if layout.halves is not None:
            sizes[layout.halves] = 2
        return (*(sizes[axis] for axis in sorted(sizes)), head_dim)

    @property
    def key_bytes(self) -> int:
        """Bytes of a block's keys, each head's in whole lanes."""
        problem = self.problem
        head_bytes = round_up(problem.head_dim, LANES) * problem.cache_dtype.itemsize
        return self.block_kv * self.kv_heads * head_bytes

    def vmem(self) -> dict[str, int]:
        """Return the bytes of each buffer in VMEM; those of blocked operands count twice."""
        problem, rows, block_kv = self.problem, self.rows, self.block_kv
        dtype, f32 = problem.cache_dtype, jnp.dtype(jnp.float32)
        keys, values = problem.head_dim, problem.value_head_dim
        heads = (self.kv_heads, self.head_rows)
        # Below the line: what the compiler keeps of a block, found by compiling. float32 is split
        # in parts for the highest precision; heads inside a token, or pages that are no whole
        # tiles, are put in order first, in 32 bits where a chip has no 16-bit vectors.
        copies = 2 if problem.query_dtype == f32 else 1
        nhd, whole_tiles = problem.cache_layout == "NHD", problem.page_size % SUBLANES == 0
        *lead, last = self.page_shape(max(keys, values))[problem.fused :]
        page = tiled((*lead[:-1], round_up(lead[-1], SUBLANES), last), f32)
        blocks = (2, self.round_blocks, self.block_pages)
        steps = (2, self.step_seqs)  # one is computed while another is copied
        return {
            "k_buf": tiled((*blocks, *self.page_shape(keys)), dtype),
            "v_buf": tiled((*blocks, *self.page_shape(values)), dtype) * self.has_two_pools,
            "q": tiled((*steps, *heads, keys), problem.query_dtype),
            "out": tiled((*steps, *heads, values), problem.out_dtype),
            "lse": tiled((*steps, 1, rows), f32) * problem.return_lse,
            "sinks and slopes": 2 * tiled((rows, 1), f32) * (problem.has_sinks + problem.has_alibi),
            "m and l": 2 * tiled((rows, LANES), f32),
            "acc": tiled((rows, values), f32),
            "logits": 3 * tiled((self.round_blocks * rows, block_kv), f32),
            "operands of products": copies
            * tiled((block_kv, max(keys, values)), problem.query_dtype),
            "reordered heads": self.block_pages * page * (
                nhd * max(copies, self.round_blocks * self.reordered_copies)
                + 4 * (not whole_tiles)
            ),
            "the compiler's own": 2**19,
        }  # fmt: skip


def tiled(shape: tuple[int, ...], dtype) -> int:
    """Return the bytes of an array in VMEM, its last two axes padded to whole tiles."""
    *lead, rows, lanes = shape
    packing = max(1, 4 // dtype.itemsize)
    tile = SUBLANES * packing
    while tile > packing and tile >= 2 * rows:
        tile //= 2  # short arrays have short tiles
    size = dtype.itemsize * round_up(rows, tile) * round_up(lanes, LANES)
    for axis in lead:
        size *= axis
    return size


def seqs_per_launch(problem: PageAttentionProblem, smem_limit_bytes: int) -> int:
    """Return how many sequences' table rows and lengths fit in scalar memory; 0: not even one."""
    words = smem_limit_bytes // 4 - 5 * LANES  # each of the five prefetched arrays is padded
    return words // (problem.max_blocks + 1 + problem.own_windows)


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b
