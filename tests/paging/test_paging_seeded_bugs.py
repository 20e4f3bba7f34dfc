"""Bugs put into the page manager: walks of random operations find each of them."""

import random

import paging_copy
import paging_operations as operations
import pytest

BUGS = {
    "a shared page is written to": ("_ledger", "references[pages] > 1", "references[pages] > 2"),
    "of all who write, the one with fewest tokens keeps the page": (
        "_ledger", "(-s.lens[rows], pages)", "(s.lens[rows], pages)",
    ),
    "a fork holds no pages": ("_ledger", "        self.pages.hold(self.held(row))\n", ""),
    "a fork shares the list of digests": ("_ledger", "s.chains[row].copy()", "s.chains[row]"),
    "digests outlive what is cut": ("_ledger", "del s.chains[row][", "s.chains[row]["),
    "what is overwritten stays published": (
        "_ledger", "        self.pages.unpublish(kept)\n", "",
    ),
    "a page that was kept stays published": (
        "_ledger", "np.append(own, pages[keeps])", "own",
    ),
    "the page of a copy is given up before": (
        "_ledger",
        "        s.tables[rows, columns] = fresh\n",
        "        s.tables[rows, columns] = fresh\n        self.pages.release(s.copy_from[rows])\n",
    ),
    "the page of a copy is never given up": (
        "_ledger", "            self.pages.release(s.copy_from[copied])\n", "",
    ),
    "a copy is made again": ("_ledger", "            s.copy_from[copied] = -1\n", ""),
    "a copy that no batch has named is taken as made": (
        "_ledger", " & s.copy_in_batch[rows]", "",
    ),
    "a copy that has nothing to be made for stays": (
        "_ledger", "(ends <= s.computed[rows])", "(ends < s.computed[rows])",
    ),
    "the page of a copy is lost with its sequence": (
        "_ledger", "np.append(self.held(row)[::-1], source[source >= 0])", "self.held(row)[::-1]",
    ),
    "what is not computed is published": (
        "_ledger", "s.computed[rows] // self.page_size - first",
        "s.lens[rows] // self.page_size - first",
    ),
    "what was cut counts as computed": (
        "_ledger", "(s.lens, s.computed, s.batch_end)", "(s.lens, s.computed)",
    ),
    "live sequences publish what older weights computed": (
        "_ledger", "        self.epoch += 1\n", "",
    ),
    "older weights are not told apart": ("_allocator", "list(self._page_of.values())", "[]"),
    "the window is too narrow": ("_ledger", "num_tokens + 1 - ", "num_tokens + 2 - "),
    "the window is too wide": ("_ledger", "num_tokens + 1 - ", "num_tokens - "),
    "tokens behind the window are lost": (
        "_ledger", "            s.behind[new] = s.behind[row].copy()", "            pass",
    ),
    "all of a prompt is reused": (
        "_ledger", "min(tokens.size - 1, most)", "min(tokens.size, most)",
    ),
    "more is reused than is asked for": (
        "_ledger", "min(tokens.size - 1, most)", "(tokens.size - 1)",
    ),
    "gaps are passed over": ("_ledger", "last_gap < self", "-1 < 0 * last_gap + 0 * self"),
    "pages are alike whatever is before": ("_content", "before + page", "page"),
    "salts are alike": ("_content", "{text}", ""),
    "reused pages are evicted for the others": (
        "_allocator", "            evictable -= int", "            evictable -= 0 * int",
    ),
    "an evicted page is found": ("_allocator", "            self.unpublish(evicted)\n", ""),
    "a second page takes the place of a published one": (
        "_allocator", "if self._page_of.setdefault(digest, page) == page:",
        "self._page_of[digest] = page\n            if True:",
    ),
    "a page is free as often as it is named": (
        "_allocator", "gone = gone[np.sort(np.unique(gone, return_index=True)[1])]", "pass",
    ),
    "a cached page is not held": ("_allocator", "del self._cached[page]", "pass"),
    "a cached page is free, too": ("_allocator", "self._free(gone[~known])", "self._free(gone)"),
    "handles come again": (
        "_sequences", "self._next_handles[row] += self._max_seqs", "pass",
    ),
    "a row keeps its table": ("_sequences", "        self.tables[row] = -1\n", ""),
    "a row keeps what was behind the window": (
        "_sequences", "        self.behind.pop(row, None)\n", "",
    ),
    "padding has slot 0": ("_batch", "(slots, num_tokens, -1)", "(slots, num_tokens, 0)"),
    "later pages are in the table": ("_batch", "if (s.lens[rows] > end).any():", "if False:"),
    "a page is copied the other way": (
        "_batch", "[s.copy_from[copying], to]", "[to, s.copy_from[copying]]",
    ),
}  # fmt: skip


@pytest.mark.fault("page manager", "shared")
@pytest.mark.fast(8)
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_caught(bug):
    module = paging_copy.load(*BUGS[bug])
    with pytest.raises(Exception) as info:
        for seed in range(300):
            operations.walk(random.Random(seed), 50, module)
    assert not isinstance(info.value, SyntaxError | NameError | ImportError | AttributeError)
