"""What is known of any attention to pages when a call is traced."""

import dataclasses

import numpy as np

from ejk._cache_types import CacheType, Scales, cache_type_of
from ejk._indices import Size
from ejk.backends.layouts import LAYOUTS, Layout


@dataclasses.dataclass(frozen=True)
class PagedFacts:
    """What is known of pools and options of any attention to pages when a call is traced."""

    num_seqs: Size
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    num_pages: Size
    page_size: int
    max_blocks: Size
    query_dtype: np.dtype
    cache_dtype: np.dtype
    cache_layout: str
    fused: bool
    """`key_cache` holds the keys and the values."""
    latent: bool
    """The values are the first `value_head_dim` entries of the keys."""
    has_window: bool
    soft_cap: float | None
    has_sinks: bool
    has_alibi: bool
    return_lse: bool
    scales: Scales = dataclasses.field(default="none", kw_only=True)
    """What has a scale: a KV head, or a token and KV head. Latent attention's are `key_scale`
    alone, and so are those of tokens in fused pools, which lie as the pool does."""

    num_prefix_groups: Size = dataclasses.field(default=0, kw_only=True)
    """Groups of sequences that may share their first pages; 0: nothing is known of any.

    A hint: `prefix_groups` says of each sequence in which group it is, if in one of these, and
    `prefix_pages` how many pages its sequences share, if their tables agree.
    """

    @property
    def cache_type(self) -> CacheType:
        """What the elements of the pools hold."""
        return cache_type_of(self.cache_dtype)

    @property
    def group(self) -> int:
        """Query heads that read one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def capacity(self) -> Size:
        """Tokens that a row of the block table can name."""
        return self.max_blocks * self.page_size

    @property
    def layout(self) -> Layout:
        """Where the axes of the pools are, as they were handed over."""
        layout = LAYOUTS[self.cache_layout]
        return layout.fused if self.fused else layout
