"""The short list of shapes that the properties draw from: real models, and awkward ones.

Contexts are a few pages long so that an interpreted kernel takes milliseconds.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call.

    Attributes:
        name: printed in place of the sizes.
        num_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: heads of keys and values.
        head_dim: width of queries and keys.
        page_size: tokens of a page.
        max_blocks: width of the block tables.
        num_pages: of the pool.
        num_seqs: sequences of a batch.
        value_head_dim: width of the values, or None for `head_dim`.
        latent: the values are the first `value_head_dim` entries of the keys.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_blocks: int = 3
    num_pages: int = 12
    num_seqs: int = 3
    value_head_dim: int | None = None
    latent: bool = False

    @property
    def width(self) -> int:
        """The width of the values."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def fusible(self) -> bool:
        """One array can hold keys and values."""
        return not self.latent and self.width == self.head_dim

    @property
    def capacity(self) -> int:
        return self.max_blocks * self.page_size


REAL = (
    Shape("llama-3-8b, an eighth", 8, 2, 128, page_size=16),  # group 4
    Shape("llama-2-7b, an eighth", 4, 4, 128, page_size=16),  # group 1
    Shape("qwen2.5-0.5b", 14, 2, 64, page_size=16),  # group 7
    Shape("smollm2-135m", 9, 3, 64, page_size=8),  # group 3
    Shape("gpt-oss-20b, an eighth", 8, 1, 64, page_size=48),  # group 8
    Shape("llama-4-scout, an eighth", 5, 1, 128, page_size=16),  # group 5
    Shape("phi-2, half", 16, 16, 80, page_size=16, num_seqs=2, max_blocks=2),
    Shape("phi-3-mini, a quarter", 8, 8, 96, page_size=8),
    Shape("gemma-2-9b, a quarter", 4, 2, 256, page_size=16),  # group 2
    Shape("deepseek-v3, an eighth", 16, 1, 576, 16, value_head_dim=512, latent=True, num_seqs=2),
)
AWKWARD = (
    Shape("one of everything", 1, 1, 1, page_size=1, max_blocks=1, num_pages=1, num_seqs=1),
    Shape("single slots", 6, 2, 8, page_size=1, max_blocks=9, num_pages=40),
    Shape("odd pages", 4, 1, 8, page_size=3, max_blocks=5, num_pages=20, num_seqs=5),
    Shape("group of 17", 17, 1, 64, page_size=3, max_blocks=7, num_pages=24),
    Shape("narrow values", 3, 3, 64, page_size=8, value_head_dim=24),
    Shape("wide values", 4, 2, 8, page_size=16, value_head_dim=128),
    Shape("odd head", 2, 1, 33, page_size=8, value_head_dim=17),
    Shape("long", 4, 2, 128, page_size=16, max_blocks=20, num_pages=70),
    Shape("long, short pages", 4, 1, 64, page_size=1, max_blocks=300, num_pages=700, num_seqs=2),
    Shape("two blocks", 2, 1, 8, page_size=48, max_blocks=14, num_pages=30, num_seqs=2),
    Shape("latent, small", 5, 1, 24, page_size=3, max_blocks=6, value_head_dim=16, latent=True),
    Shape("latent, group of 35", 70, 2, 24, page_size=16, value_head_dim=20, latent=True),
)
SHAPES = REAL + AWKWARD
BY_NAME = {shape.name: shape for shape in SHAPES}
