"""What one device has of contexts whose pages are split over several."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class OwnPages(NamedTuple):
    """One device's part of each sequence: its pages alone, in order of position."""

    tables: jax.Array  # int32 [num_seqs, max_blocks]: its own ids, then -1
    lens: jax.Array  # int32 [num_seqs]: tokens in these pages
    windows: jax.Array | None  # int32 [num_seqs]: the last so many of them are visible
    distances: jax.Array | None  # int32 [num_seqs, max_blocks]: from the last token to each page
    is_own: jax.Array  # bool [num_seqs, max_blocks]: which entries of the whole table are here
    before: jax.Array  # int32 [num_seqs, max_blocks]: tokens here before each entry

    @classmethod
    def of(
        cls,
        context_lens: jax.Array,
        block_tables: jax.Array,
        *,
        first_page: jax.Array,
        num_pages: int,
        page_size: int,
        sliding_window: jax.Array | None = None,
        has_distances: bool = False,
    ) -> "OwnPages":
        """Compact a table that names the pages of all devices.

        A sequence's last page alone may be partly filled, and it comes last here, too. So the
        tokens that are here are counted as if they followed each other, and those that a window
        shows are the last of them.

        Args:
            context_lens: int32 `[num_seqs]`, of the whole contexts.
            block_tables: int32 `[num_seqs, max_blocks]`.
            first_page: the id of this device's first page.
            num_pages: that it has.
            page_size: slots of a page.
            sliding_window: int32 `[]`.
            has_distances: they are wanted.
        """
        num_seqs, max_blocks = block_tables.shape
        length = jnp.clip(context_lens, 0, max_blocks * page_size)[:, None]
        begin = jnp.arange(max_blocks, dtype=jnp.int32)[None] * page_size
        is_own = (block_tables >= first_page) & (block_tables - first_page < num_pages)

        # A prefix sum and a scatter: there is nothing to sort. Pages past the length come last,
        # where nobody looks.
        before = jnp.cumsum(is_own, axis=1, dtype=jnp.int32) - is_own.astype(jnp.int32)
        place = jnp.where(is_own, before, max_blocks)
        seq = jnp.arange(num_seqs, dtype=jnp.int32)[:, None]

        def compact(x: jax.Array, fill: int) -> jax.Array:
            return jnp.full(x.shape, fill, jnp.int32).at[seq, place].set(x, mode="drop")

        def count(first: jax.Array | int) -> jax.Array:
            """Count the tokens here from position `first` on."""
            seen = jnp.minimum(begin + page_size, length) - jnp.maximum(begin, first)
            return jnp.where(is_own, jnp.maximum(seen, 0), 0).sum(1, dtype=jnp.int32)

        windows = distances = None
        if sliding_window is not None:
            windows = count(jnp.maximum(length - jnp.maximum(sliding_window, 0), 0))
        if has_distances:
            distances = compact(begin - (length - 1), 0)
        tables = compact(block_tables - first_page, -1)
        return cls(tables, count(0), windows, distances, is_own, before * page_size)

    def up_to(self, seq: jax.Array, position: jax.Array, page_size: int) -> jax.Array:
        """Count the tokens here of sequences `seq` up to positions that they have, or below 0."""
        at = jnp.maximum(position, 0)
        block, slot = at // page_size, at % page_size
        own = jnp.where(self.is_own[seq, block], slot + 1, 0)
        return jnp.where(position < 0, 0, self.before[seq, block] + own)
