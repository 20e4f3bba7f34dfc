"""Which first tokens sequences share: found on the device, alike for every backend.

`prefix_groups` says who may share first pages, and `prefix_pages` how many each group does. Both
are a caller's, and may be wrong: what is shared is what the tables say.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SharedPrefixes(NamedTuple):
    """What each sequence shares with others. A group goes by its first sequence."""

    leader: jax.Array  # int32 [num_seqs]: the first sequence of the group; its own outside of one
    pages: jax.Array  # int32 [num_seqs]: that the group shares; 0 for none
    page_size: int

    @classmethod
    def of(
        cls,
        prefix_groups: jax.Array,
        prefix_pages: jax.Array,
        block_tables: jax.Array,
        limits: jax.Array,
        page_size: int,
    ) -> "SharedPrefixes":
        """Find what the sequences of each group share.

        Pages past the shortest limit of a group are cut off. A group of one shares nothing, nor
        does one of whose other pages the tables name two. An id may be invalid: its tokens are
        then hidden from all.

        Args:
            prefix_groups: int32 `[num_seqs]`; outside `[0, num_groups)` for no group.
            prefix_pages: int32 `[num_groups]`, at least one.
            block_tables: int32 `[num_seqs, max_blocks]`.
            limits: int32 `[num_seqs]`: how many first tokens each sequence may share.
            page_size: slots of a page.
        """
        num_seqs, max_blocks = block_tables.shape
        num_groups, seq = prefix_pages.shape[0], jnp.arange(num_seqs, dtype=jnp.int32)
        is_grouped = (prefix_groups >= 0) & (prefix_groups < num_groups)
        group = jnp.where(is_grouped, prefix_groups, 0)
        first = jnp.full((num_groups,), num_seqs, jnp.int32)
        first = first.at[group].min(jnp.where(is_grouped, seq, num_seqs))
        leader = jnp.where(is_grouped, first[group], seq)
        pages = jnp.minimum(prefix_pages[group], limits // page_size)
        pages = jnp.where(is_grouped, jnp.clip(pages, 0, max_blocks), 0)
        pages = jnp.full_like(pages, max_blocks).at[leader].min(pages)[leader]
        entry = jnp.arange(max_blocks, dtype=jnp.int32)[None]
        differs = (block_tables != block_tables[leader]) & (entry < pages[:, None])
        shares = cls(leader, pages, page_size)
        return shares.only((shares.total(jnp.ones_like(seq)) > 1) & ~shares.any(differs.any(1)))

    def only(self, kept: jax.Array) -> "SharedPrefixes":
        """Dissolve the groups that are not kept: bool `[num_seqs]`, alike for all of a group."""
        return self._replace(pages=jnp.where(kept, self.pages, 0))

    @property
    def tokens(self) -> jax.Array:
        """How many tokens the group shares: int32 `[num_seqs]`."""
        return self.pages * self.page_size

    def total(self, x: jax.Array) -> jax.Array:
        """Return the sum of `x [num_seqs]` over each sequence's group."""
        return jnp.zeros_like(x).at[self.leader].add(x)[self.leader]

    def most(self, x: jax.Array) -> jax.Array:
        """Return the largest of `x [num_seqs]`, at least 0, in each sequence's group."""
        return jnp.zeros_like(x).at[self.leader].max(x)[self.leader]

    def any(self, x: jax.Array) -> jax.Array:
        """Say of each sequence whether `x`, bool `[num_seqs]`, is true of some of its group."""
        return self.most(x.astype(jnp.int32)) > 0

    @property
    def _key(self) -> jax.Array:
        """What sequences are sorted by: their leader; those that share nothing come last."""
        return jnp.where(self.tokens > 0, self.leader, self.leader.shape[0])

    @property
    def order(self) -> jax.Array:
        """The sequences, int32 `[num_seqs]`, group by group; last those that share nothing."""
        return jnp.argsort(self._key, stable=True).astype(jnp.int32)

    def bounds(self, sizes: jax.Array) -> jax.Array:
        """Return where the group of each leader begins and ends in that order: `[num_seqs + 1]`.

        `sizes`, int32 `[num_seqs]`, is what each sequence takes: 1, or its rows. Who leads no
        group has an empty one.
        """
        of_leader = jnp.zeros_like(sizes).at[self._key].add(sizes, mode="drop")
        return jnp.pad(jnp.cumsum(of_leader, dtype=jnp.int32), (1, 0))
