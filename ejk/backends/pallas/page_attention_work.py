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
    num_seqs: int  # of this launch: a multiple of the cores that share them
    block_pages: int
    cores: int = 1
    shared: str = "batch"  # what the cores share: "batch" or "kv_head"

    @property
    def block_kv(self) -> int:
        return self.block_pages * self.problem.page_size

    @property
    def core_seqs(self) -> int:
        return self.num_seqs // self.cores if self.shared == "batch" else self.num_seqs

    @property
    def kv_heads(self) -> int:
        """KV heads of a core."""
        heads = self.problem.num_kv_heads
        return heads // self.cores if self.shared == "kv_head" else heads

    @property
    def rows(self) -> int:
        """Query heads of a core."""
        return self.kv_heads * self.problem.group

    def page_shape(self, head_dim: int) -> tuple[int, int, int]:
        """Return the shape of a page in VMEM."""
        heads, slots = self.kv_heads, self.problem.page_size
        nhd = self.problem.cache_layout == "NHD"
        return (slots, heads, head_dim) if nhd else (heads, slots, head_dim)

    def vmem(self) -> dict[str, int]:
        """Return the bytes of each buffer in VMEM; those of blocked operands count twice."""
        problem, rows, block_kv = self.problem, self.rows, self.block_kv
        dtype, f32 = problem.dtype, jnp.dtype(jnp.float32)
        keys, values = problem.head_dim, problem.value_head_dim
        heads = (self.kv_heads, problem.group)
        # Below the line: what the compiler keeps of a block, found by compiling. float32 is split
        # in parts for the highest precision; heads inside a token, or pages that are no whole
        # tiles, are put in order first, in 32 bits where a chip has no 16-bit vectors.
        copies = 4 if dtype == f32 else 2
        nhd, whole_tiles = problem.cache_layout == "NHD", problem.page_size % SUBLANES == 0
        *lead, last = self.page_shape(max(keys, values))
        page = tiled((*lead[:-1], round_up(lead[-1], SUBLANES), last), f32)
        return {
            "k_buf": 2 * tiled((self.block_pages, *self.page_shape(keys)), dtype),
            "v_buf": 0 if problem.latent else 2 * tiled(
                (self.block_pages, *self.page_shape(values)), dtype
            ),
            "q": 2 * tiled((*heads, keys), dtype),
            "out": 2 * tiled((*heads, values), dtype),
            "lse": 2 * tiled((1, rows), f32) * problem.return_lse,
            "sinks and slopes": 2 * tiled((rows, 1), f32) * (problem.has_sinks + problem.has_alibi),
            "m and l": 2 * tiled((rows, LANES), f32),
            "acc": tiled((rows, values), f32),
            "logits": 3 * tiled((rows, block_kv), f32),
            "operands of products": copies * tiled((block_kv, max(keys, values)), dtype),
            "reordered heads": self.block_pages * page * (
                nhd * (1 + copies // 2) + 4 * (not whole_tiles)
            ),
            "the compiler's own": 2**20,
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


def seqs_per_launch(max_blocks: int, smem_limit_bytes: int) -> int:
    """Return how many sequences' table rows and lengths fit in scalar memory; 0: not even one."""
    words = smem_limit_bytes // 4 - 5 * LANES  # each of the five prefetched arrays is padded
    return words // (max_blocks + 1)


def round_up(a: int, b: int) -> int:
    return -(-a // b) * b
