"""The page manager: sequences come, grow, share, are cut and go; batches are made of them."""

from typing import Any

import numpy as np

from ejk.paging._arguments import Integers, chosen, dealt_out, integers, kept
from ejk.paging._batch import Batch, Least, build, seqs_of
from ejk.paging._content import CacheSalt, root
from ejk.paging._ledger import Int32s, Int64s, Ledger
from ejk.paging._sizes import Sizes, at_least
from ejk.paging._statistics import Statistics


class PageManager:
    """Says which pages hold the tokens of which sequence, and what the next step has to write.

    The keys and values themselves lie in pools on the device, of which the manager knows the number
    of pages alone: page `p` is page `p` in every layer. A step goes

        seq = manager.allocate(prompt)      or  manager.append(seq, tokens)
        batch = manager.batch([seq, ...])   what to compute: tokens, slots, tables
        copy the pages `batch.copies`, run the step on `batch.inputs`
        manager.commit(batch)               the tokens are computed: their full pages may be reused

    A token is *computed* once a batch that has it was committed. Only full pages of computed tokens
    are ever reused, so a step that fails publishes nothing: make the batch again, or truncate. JAX
    orders what runs on a device, so a batch may be committed as soon as its step is dispatched.

    Sequences share pages in two ways. A prompt reuses full pages whose content is known: the same
    tokens after the same tokens under the same salt, held by others or cached since. And a fork has
    the pages of its origin. Who writes to a page that others hold too gets a copy of it. Of two
    sequences that compute equal pages in one step both keep theirs, for their bits may differ, and
    the first one's are reused.

    A method that raises has changed nothing. Not safe for use by several threads at once.

    Args:
        num_pages: pages of one layer's pool.
        page_size: tokens of a page.
        max_seqs: sequences that may live at once.
        max_blocks: pages that a sequence may have: the largest width of a table.
        sliding_window: of the model, if all layers that use these pages have one: a token sees that
            many positions, itself included. Pages behind it are given up by `commit`.
        prefix_caching: whether pages are reused at all.
        record_freed: whether batches say which pages have lost their content, so that the caller
            can poison them.

    Examples:
        >>> from ejk.paging import PageManager
        >>> manager = PageManager(num_pages=8, page_size=4, max_seqs=4, max_blocks=4)
        >>> seq = manager.allocate([5, 6, 7, 8, 9])
        >>> batch = manager.batch([seq])
        >>> print(batch.inputs.slot_mapping, batch.inputs.context_lens)
        [ 0  1  2  3  4 -1] [5]
        >>> manager.commit(batch)  # after the step that writes these slots
        >>> other = manager.allocate([5, 6, 7, 8, 1, 2])  # page 0 is computed already
        >>> manager.block_table(other), manager.num_computed_tokens(other)
        (array([0, 2], dtype=int32), 4)

    Source:
        vLLM's PagedAttention (Kwon et al., 2023, arXiv:2309.06180), for pages, copies on write and
        chained hashes; SGLang's RadixAttention (Zheng et al., 2023, arXiv:2312.07104), for prefixes
        that outlive their requests.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        max_blocks: int,
        sliding_window: int | None = None,
        prefix_caching: bool = True,
        record_freed: bool = False,
    ):
        self.sizes = Sizes(num_pages, page_size, max_seqs, max_blocks, sliding_window)
        self._ledger = Ledger(self.sizes, prefix_caching=prefix_caching, record_freed=record_freed)
        self._seqs = self._ledger.seqs
        self._batches = self._preemptions = 0

    # Sequences come and go.

    def allocate(
        self,
        tokens: Integers,
        *,
        num_new_tokens: int | None = None,
        cache_salt: CacheSalt = None,
        max_computed_tokens: int | None = None,
    ) -> int:
        """Begin a sequence with these tokens, reusing the pages of as many as are known.

        The last token at least is left to compute, for its logits. See `num_computed_tokens`.

        Args:
            tokens: ids of the prompt, one at least, each in `[0, 2**31)`.
            num_new_tokens: how many of the tokens that are to be computed get pages now; None for
                all. `append` adds the others, from the one that `num_tokens` counts up to.
            cache_salt: of a tenant or an adapter: sequences of different salts share no page.
            max_computed_tokens: reuse no more than the pages that so many tokens fill; None: all.

        Returns:
            The sequence: an integer that this manager never gives out again.

        Raises:
            OutOfPagesError: too few pages are free or cached.
            OutOfSequencesError: `max_seqs` sequences live.
        """
        ids = integers("tokens", tokens).astype(np.int32)
        if not ids.size:
            raise ValueError("tokens is empty, and must have one: its logits choose the next")
        count = at_least("num_new_tokens", num_new_tokens, 1, otherwise=ids.size)
        most = at_least("max_computed_tokens", max_computed_tokens, 0, otherwise=ids.size)
        self.sizes.check_tokens(ids.size, "the sequence")
        first = root(cache_salt, self._ledger.epoch)
        self._seqs.check_room()
        return self._seqs.handle(self._ledger.open(ids, count, most, first))

    def fork(self, seq: int) -> int:
        """Begin a sequence that has the tokens and the pages of another; return it.

        The first of them that appends to the last page, where that is not full, gets a copy of it.

        Raises:
            ValueError: the sequence has tokens that are not computed.
            OutOfSequencesError: `max_seqs` sequences live.
        """
        row = self._seqs.row(seq)
        if waiting := int(self._seqs.lens[row] - self._seqs.computed[row]):
            raise ValueError(
                f"seq={seq} has {waiting} tokens that are not computed, and a fork must have none: "
                "commit its batch first, or truncate it"
            )
        self._seqs.check_room()
        return self._seqs.handle(self._ledger.fork(row))

    def free(self, seqs: Integers) -> None:
        """End sequences. Their published pages stay cached; of each, later ones go first."""
        for row in self._seqs.rows(seqs).tolist():
            self._ledger.close(row)

    def preempt(self, seq: int) -> Int32s:
        """End a sequence for the sake of others, and return its tokens.

        `allocate` with these tokens and the same salt resumes it, reusing what is still cached.
        `num_computed_tokens` then says from which token on it must be computed again.
        """
        row = self._seqs.row(seq)
        tokens = self._ledger.tokens(row)
        self._ledger.close(row)
        self._preemptions += 1
        return tokens

    # Sequences grow and are cut.

    def append(self, seqs: Integers, tokens: Integers, q_lens: Integers | None = None) -> None:
        """Append tokens to sequences, and give them the pages that they lack.

        Args:
            seqs: one sequence or several.
            tokens: any number for one sequence; for several one each or, with `q_lens`, packed.
            q_lens: how many of the packed tokens each sequence gets.

        Raises:
            OutOfPagesError: too few pages are free or cached. No sequence has changed.
        """
        rows = self._seqs.rows(seqs)
        ids = integers("tokens", tokens).astype(np.int32)
        added = dealt_out(ids.size, rows.size, q_lens)
        lens = self._seqs.lens[rows] + added
        if rows.size:
            longest = int(lens.argmax())
            self.sizes.check_tokens(int(lens[longest]), f"seqs[{longest}]")
        self._ledger.grow(rows, added, ids)

    def truncate(self, seqs: Integers, num_tokens: Integers) -> None:
        """Cut sequences to their first `num_tokens` each: those after them were rejected.

        No token that is cut counts as computed when a batch that has it is committed, whatever has
        been appended in its place by then.

        Raises:
            ValueError: a sequence is shorter, or the window of its next token would reach back to
                pages that were given up.
        """
        rows = self._seqs.rows(seqs)
        handles = self._seqs.handles(rows)
        ends = kept(self._seqs.lens[rows], num_tokens, handles)
        gone = np.flatnonzero(self._ledger.first_seen(ends) < self._seqs.first_block[rows])
        if gone.size:
            i = gone[0]
            raise ValueError(
                f"num_tokens[{i}]={ends[i]} is too few: the next token would see pages behind "
                f"sliding_window={self.sizes.sliding_window}, which seqs[{i}]={handles[i]} has "
                "given up; truncate before the commit"
            )
        self._ledger.cut(rows, ends)

    # Steps.

    def batch(
        self,
        seqs: Integers,
        q_lens: Integers | None = None,
        *,
        min_seqs: int = 1,
        min_tokens: int = 1,
        min_blocks: int = 1,
    ) -> Batch:
        """Make the arrays of a step that computes tokens of these sequences.

        Each goes on where it is computed up to. So the next chunk of a prompt follows the one that
        was committed, and the batch of a step that failed is made again.
        Steps are to be dispatched in the order in which their batches were made: a page that was
        given up between two batches may be written by both.

        Args:
            seqs: the sequences, in the order of the rows. Each must have tokens to compute.
            q_lens: how many tokens each computes; None for all that it has.
            min_seqs: no fewer rows; their number is rounded up from there.
            min_tokens: no fewer tokens. There are as many as rows if every sequence computes one.
            min_blocks: no narrower table; `max_blocks` at most.
        """
        rows = self._seqs.rows(seqs)
        least = Least(
            at_least("min_seqs", min_seqs, 0),
            at_least("min_tokens", min_tokens, 0),
            self.sizes.width("min_blocks", min_blocks),
        )
        waiting = self._seqs.lens[rows] - self._seqs.computed[rows]
        lens = chosen(waiting, q_lens, self._seqs.handles(rows))
        self._batches += 1
        return build(self._ledger, rows, lens, self._batches, least)

    def commit(self, batch: Batch) -> None:
        """Take a batch's tokens as computed: publish the pages that they fill, pass the window.

        To be called when the step that writes the batch's slots has been dispatched. Tokens that
        were cut since are not computed; sequences that were freed since are passed over.

        Raises:
            ValueError: it is another manager's, was committed, or a later one has its sequences.
        """
        rows = self._seqs.living(seqs_of(batch, self._ledger))
        stale = self._seqs.handles(rows[self._seqs.batch[rows] != batch.number])
        if stale.size:
            raise ValueError(
                f"batch.number={batch.number} must be the newest batch of seq={stale[0]}, and not "
                "be committed yet: commit each step's once"
            )
        self._seqs.batch[rows] = 0
        self._ledger.advance(rows)

    # What is known.

    def num_tokens(self, seqs: Integers) -> Any:
        """Count the tokens of a sequence, an int, or of several, an array."""
        return self._read(self._seqs.lens, seqs)

    def num_computed_tokens(self, seqs: Integers) -> Any:
        """Count the computed tokens of a sequence, an int, or of several, an array."""
        return self._read(self._seqs.computed, seqs)

    def tokens(self, seq: int) -> Int32s:
        """Return all tokens of a sequence, those of pages behind the window too."""
        return self._ledger.tokens(self._seqs.row(seq))

    def block_table(self, seq: int) -> Int32s:
        """Return the pages of a sequence in the order of its tokens; -1 behind the window."""
        row = self._seqs.row(seq)
        return self._seqs.tables[row, : self._ledger.num_blocks(row)].copy()

    def statistics(self) -> Statistics:
        """Count pages and events."""
        of = self._ledger
        return Statistics(
            num_seqs=self._seqs.num_live,
            used_pages=self.sizes.num_pages - of.pages.num_free - of.pages.num_cached,
            free_pages=of.pages.num_free,
            cached_pages=of.pages.num_cached,
            queried_tokens=of.queried_tokens,
            hit_tokens=of.hit_tokens,
            evictions=of.pages.evictions,
            forks=of.forks,
            copies=of.copies,
            preemptions=self._preemptions,
        )

    def reset_prefix_cache(self) -> None:
        """Reuse no page that was computed until now, as when the model's weights change.

        Live sequences keep their pages, but nobody else gets them.
        """
        self._ledger.forget()

    def _read(self, of_rows: Int64s, seqs: Integers) -> Any:
        found = of_rows[self._seqs.rows(seqs)]
        return found if np.ndim(seqs) else int(found[0])
