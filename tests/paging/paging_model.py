"""A page manager beside a model of it: lists of tokens, and one simulated pool of a slot a token.

What a step computes for a token depends on all tokens before it, on the salt and on the version of
the weights. So a page that is reused for the wrong sequence holds the wrong numbers, even where its
tokens are the same. Pages that lose their content are poisoned at once; a step that fails leaves
junk.
"""

import collections
import contextlib
import pickle

import numpy as np

from ejk import paging

POISON, JUNK = -1, -2


class Sequence:
    """What a sequence is to hold: tokens, and of those that are computed the numbers."""

    def __init__(self, tokens, salt, numbers):
        self.tokens, self.salt, self.numbers = list(tokens), salt, list(numbers)


def computed(version, salt, before, token):
    """What a model of this version computes for a token, from what it did for the one before."""
    return hash((version, salt, before, token)) & (2**62 - 1)


def numbers_of(version, salt, tokens):
    numbers, before = [], 0
    for token in tokens:
        before = computed(version, salt, before, token)
        numbers.append(before)
    return numbers


class Model:
    """Does each operation to the manager and to lists, and compares the two."""

    def __init__(self, module=paging, **sizes):
        self.module = module
        self.manager = module.PageManager(record_freed=True, **sizes)
        self.page_size, self.num_pages = sizes["page_size"], sizes["num_pages"]
        self.window = sizes.get("sliding_window") or 2**31
        self.most = sizes["max_blocks"] * self.page_size
        self.pool = np.full(self.num_pages * self.page_size, POISON)
        self.seqs: dict[int, Sequence] = {}
        self.ended: list[int] = []
        self.least = {}  # shapes of batches
        self.version = 0
        self.refused = 0  # operations for want of pages

    # Operations.

    def allocate(self, tokens, salt=None, num_new=None, most=None):
        with self.unchanged_by_errors():
            seq = self.manager.allocate(
                tokens, num_new_tokens=num_new, cache_salt=salt, max_computed_tokens=most
            )
            assert seq not in self.seqs and seq not in self.ended
            hit, held = self.manager.num_computed_tokens(seq), self.manager.num_tokens(seq)
            assert hit % self.page_size == 0 and hit < len(tokens)
            assert most is None or hit <= most
            assert held == min(len(tokens), hit + (num_new or len(tokens)))
            numbers = numbers_of(self.version, salt, tokens[:hit])
            self.seqs[seq] = Sequence(tokens[:held], salt, numbers)
            return seq

    def append(self, seqs, added):
        """Append a list of tokens to each."""
        with self.unchanged_by_errors():
            packed = [token for tokens in added for token in tokens]
            self.manager.append(seqs, packed, [len(tokens) for tokens in added])
            for seq, tokens in zip(seqs, added):
                self.seqs[seq].tokens += tokens

    def fork(self, seq):
        with self.unchanged_by_errors():
            origin = self.seqs[seq]
            new = self.manager.fork(seq)
            self.seqs[new] = Sequence(origin.tokens, origin.salt, origin.numbers)

    def free(self, seqs):
        self.manager.free(seqs)
        for seq in seqs:
            del self.seqs[seq]
        self.ended += seqs

    def preempt(self, seq):
        tokens = self.manager.preempt(seq).tolist()
        assert tokens == self.seqs[seq].tokens
        salt = self.seqs.pop(seq).salt
        self.ended.append(seq)
        return tokens, salt

    def truncate(self, seqs, num_tokens):
        """Truncate, or be refused because of the window, and only then."""
        before = self.state()
        try:
            self.manager.truncate(seqs, num_tokens)
        except ValueError as error:
            assert "sliding_window" in str(error)
            assert any(n < len(self.seqs[seq].numbers) for seq, n in zip(seqs, num_tokens))
            assert self.state() == before
        else:
            for seq, n in zip(seqs, num_tokens):
                del self.seqs[seq].tokens[n:], self.seqs[seq].numbers[n:]

    def reset(self):
        self.manager.reset_prefix_cache()
        self.version += 1

    def waiting(self):
        """Count the tokens of each sequence that are not computed."""
        return {seq: len(has.tokens) - len(has.numbers) for seq, has in self.seqs.items()}

    def step(self, seqs, q_lens, ends, cut=None):
        """Make a batch and run it: it `ends` well, unrun or halfway. `cut` rejects tokens of it."""
        batch = self.manager.batch(seqs, q_lens, **self.least)
        self.check_inputs(batch, seqs, q_lens)
        self.lose(batch.freed)
        if ends == "unrun":
            return
        self.copy(batch.copies)
        slots, bounds = batch.inputs.slot_mapping, batch.inputs.cu_q_lens
        if ends == "halfway":
            self.spoil(slots[slots >= 0])
            return
        news = {}
        for i, seq in enumerate(seqs):
            has, new = self.seqs[seq], []
            for token in has.tokens[len(has.numbers) :][: q_lens[i]]:
                before = (has.numbers + new or [0])[-1]
                new.append(computed(self.version, has.salt, before, token))
            self.pool[slots[bounds[i] : bounds[i + 1]]] = new
            news[seq] = new
        self.ran(batch, {seq: self.seqs[seq].numbers + news[seq] for seq in seqs})
        for i, seq in enumerate(seqs):
            numbers = self.seqs[seq].numbers
            self.check_reads(batch.inputs.block_tables[i], numbers + news[seq], len(numbers))
        if cut is not None:  # of the first sequence, and other tokens come in their place
            self.check_cut(seqs[0], q_lens[0], news, *cut)
        self.manager.commit(batch)
        for seq, new in news.items():
            self.seqs[seq].numbers += new

    # What happens to the pool; a subclass has others beside it.

    def lose(self, pages):
        self.slots(pages)[:] = POISON

    def copy(self, copies):
        copies = copies[copies[:, 0] >= 0]
        assert (copies >= 0).all()
        self.slots(copies[:, 1])[:] = self.slots(copies[:, 0]).copy()

    def spoil(self, slots):
        self.pool[slots] = JUNK

    def ran(self, batch, numbers):
        """What a subclass does with a batch that runs; `numbers` are all of each sequence."""

    def check_cut(self, seq, q_len, news, rejected, instead):
        has = self.seqs[seq]
        keep = len(has.numbers) + max(q_len - rejected, 0)
        self.truncate([seq], [keep])
        del news[seq][keep - len(has.numbers) :]
        self.append([seq], [instead[: self.most - keep]])

    # What is compared.

    def slots(self, pages):
        return Slots(self.pool.reshape(-1, self.page_size), pages)

    def check_inputs(self, batch, seqs, q_lens):
        inputs, total = batch.inputs, sum(q_lens)
        num_rows, num_tokens = inputs.context_lens.size, inputs.tokens.size
        assert all(x.dtype == np.int32 for x in inputs)
        assert num_rows >= len(seqs) and num_tokens >= total
        assert inputs.positions.size == inputs.slot_mapping.size == num_tokens
        assert inputs.block_tables.shape[0] == num_rows == inputs.cu_q_lens.size - 1
        assert (batch.seqs == seqs).all() and (batch.q_lens == q_lens).all()
        ends = []
        for i, seq in enumerate(seqs):
            has = self.seqs[seq]
            begin, end = len(has.numbers), len(has.numbers) + q_lens[i]
            ends.append(end)
            rows = slice(inputs.cu_q_lens[i], inputs.cu_q_lens[i + 1])
            assert inputs.tokens[rows].tolist() == has.tokens[begin:end]
            assert inputs.positions[rows].tolist() == list(range(begin, end))
            table, blocks = inputs.block_tables[i], -(-end // self.page_size)
            assert table[:blocks].tolist() == self.manager.block_table(seq)[:blocks].tolist()
            assert (table[blocks:] == -1).all()
            pages, offsets = np.divmod(inputs.slot_mapping[rows], self.page_size)
            assert (pages == table[np.arange(begin, end) // self.page_size]).all()
            assert (offsets == np.arange(begin, end) % self.page_size).all()
        assert inputs.context_lens.tolist() == ends + [0] * (num_rows - len(seqs))
        assert batch.max_context_len == max(ends) and batch.max_q_len == max(q_lens)
        assert (inputs.cu_q_lens[len(seqs) :] == total).all()
        assert (inputs.slot_mapping[total:] == -1).all() and (inputs.positions[total:] == -1).all()
        assert (inputs.block_tables[len(seqs) :] == -1).all() and not inputs.tokens[total:].any()
        written = inputs.slot_mapping[:total]
        assert np.unique(written).size == total  # and nobody else's:
        others = [self.slots_of(s) for s in self.seqs if s not in seqs]
        assert not np.isin(written, np.concatenate([*others, [POISON]])).any()

    def slots_of(self, seq):
        """The slots of a sequence's tokens: another may fill more of a page that is shared."""
        pages, offsets = np.divmod(np.arange(len(self.seqs[seq].tokens)), self.page_size)
        return self.manager.block_table(seq)[pages] * self.page_size + offsets

    def check_reads(self, table, numbers, first_query):
        """All that the token at `first_query` and later ones see is this sequence's own."""
        first = max(first_query + 1 - self.window, 0)
        positions = np.arange(first, len(numbers))
        pages = np.asarray(table)[positions // self.page_size]
        assert (pages >= 0).all()
        read = self.pool[pages * self.page_size + positions % self.page_size]
        assert read.tolist() == numbers[first:]

    def check(self):
        """Everything that holds between operations."""
        of, s = self.manager._ledger.pages, self.manager._seqs
        statistics = self.manager.statistics()
        mentions = collections.Counter()
        for seq, has in self.seqs.items():
            table = self.manager.block_table(seq)
            assert self.manager.num_tokens(seq) == len(has.tokens)
            assert self.manager.num_computed_tokens(seq) == len(has.numbers)
            assert self.manager.tokens(seq).tolist() == has.tokens
            assert table.size == -(-len(has.tokens) // self.page_size)
            behind = max(len(has.numbers) + 1 - self.window, 0) // self.page_size
            assert (table[:behind] == -1).all() and (table[behind:] >= 0).all()
            source = int(s.copy_from[s.row(seq)])
            mentions.update(table[table >= 0].tolist() + [source] * (source >= 0))
            if source >= 0:
                table[len(has.numbers) // self.page_size] = source  # until the copy is made
            self.check_reads(table, has.numbers, len(has.numbers))
        assert {p: n for p, n in enumerate(of.references.tolist()) if n} == mentions
        free, cached = of._stack[: of.num_free].tolist(), list(of._cached)
        assert sorted([*free, *cached, *mentions]) == list(range(self.num_pages))
        assert statistics.used_pages == len(mentions)
        assert statistics.free_pages == len(free) and statistics.cached_pages == len(cached)
        assert statistics.num_seqs == len(self.seqs)
        assert of.published[cached].all() and not of.published[free].any()
        self.check_content(s, of)
        assert of._page_of == {of._digest_of[page]: page for page in np.flatnonzero(of.published)}
        assert of._digest_of.count(None) == np.count_nonzero(~of.published)
        unused = s.tables[s._handles < 0]
        assert (unused == -1).all()

    def check_content(self, seqs, pages):
        """What is written next is not known by what was there before."""
        for seq, has in self.seqs.items():
            column, rest = divmod(len(has.tokens), self.page_size)
            if rest and len(has.tokens) > len(has.numbers):
                page = seqs.tables[seqs.row(seq), column]
                assert not pages.published[page]

    def state(self):
        """Everything that the manager knows, as bytes."""
        self.manager._seqs._seen[:] = 0  # which it forgets
        return pickle.dumps(self.manager)

    @contextlib.contextmanager
    def unchanged_by_errors(self):
        before = self.state()
        try:
            yield
        except self.module.OutOfPagesError as error:
            statistics = self.manager.statistics()
            assert error.free == statistics.free_pages
            assert error.evictable <= statistics.cached_pages
            self.refused += 1
            assert error.needed > error.free + error.evictable
            assert self.state() == before
        except self.module.OutOfSequencesError:
            assert len(self.seqs) == self.manager.sizes.max_seqs
            assert self.state() == before


class Slots:
    """The slots of some pages."""

    def __init__(self, pool, pages):
        self.pool, self.pages = pool, pages

    def __setitem__(self, _, numbers):
        self.pool[self.pages] = numbers

    def copy(self):
        return self.pool[self.pages]
