"""Pages: which are free, held or cached, and which content each of them is known to have.

A page is free; or held, by as many sequences as `references` says; or cached: nobody holds it, but
its content is known by a digest and may be asked for again. A held page may be published, too, so
that a second sequence finds it. Cached pages are evicted when the free ones run out, the least
recently used first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ejk.paging._errors import OutOfPagesError

Pages = npt.NDArray[np.int32]


class PageAllocator:
    """The states of all pages. A method that raises has changed nothing."""

    def __init__(self, num_pages: int, *, record_freed: bool):
        self.references = np.zeros(num_pages, np.int32)
        """Table entries, and copies not yet made, that name each page."""
        self.published = np.zeros(num_pages, np.bool_)
        self.evictions = 0
        self.num_free = num_pages
        self._stack = np.arange(num_pages, dtype=np.int32)[::-1].copy()
        """The free pages, the next one last, in its first `num_free` entries."""
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_pages  # None: not published
        self._record_freed = record_freed
        self._freed: list[Pages] = []

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def take(self, count: int, reused: Pages | None = None) -> Pages:
        """Hold `reused`, found pages of known content, and `count` other pages; return the latter.

        Raises:
            OutOfPagesError: there are not as many.
        """
        evictable = len(self._cached)
        if reused is not None:
            evictable -= int((self.references[reused] == 0).sum())
        if count > self.num_free + evictable:
            raise OutOfPagesError(count, self.num_free, evictable)
        if reused is not None:
            self.hold(reused)
        from_stack = min(count, self.num_free)
        self.num_free -= from_stack
        taken = self._stack[self.num_free : self.num_free + from_stack][::-1].copy()
        if from_stack < count:
            evicted = [self._cached.popitem(last=False)[0] for _ in range(count - from_stack)]
            self.evictions += len(evicted)
            self.unpublish(evicted)
            self._record(np.array(evicted, np.int32))
            taken = np.append(taken, np.array(evicted, np.int32))
        self.references[taken] = 1
        return taken

    def hold(self, pages: Pages) -> None:
        """Let one more holder have each of these pages, which are held or cached."""
        for page in pages[self.references[pages] == 0].tolist():
            del self._cached[page]
        np.add.at(self.references, pages, 1)

    def release(self, pages: Pages) -> None:
        """Take a holder off each page; of those that nobody holds then, the first is evicted first.

        A page may be named once for every holder that gives it up.
        """
        np.subtract.at(self.references, pages, 1)
        gone = pages[self.references[pages] == 0]
        if gone.size > 1:
            gone = gone[np.sort(np.unique(gone, return_index=True)[1])]
        known = self.published[gone]
        self._cached.update(dict.fromkeys(gone[known].tolist()))
        self._free(gone[~known])

    def find(self, digests: Iterable[bytes]) -> Pages:
        """Look up the page of each content; -1 where it is not known."""
        get = self._page_of.get
        return np.array([get(digest, -1) for digest in digests], np.int32)

    def publish(self, pages: Sequence[int], digests: Sequence[bytes]) -> None:
        """Make held pages known by their content. A page that is known already stays the one."""
        new = list[int]()
        for page, digest in zip(pages, digests):
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest
                new.append(page)
        self.published[new] = True

    def unpublish(self, pages: Iterable[int]) -> None:
        """Forget the content of published pages."""
        for page in pages:
            digest = self._digest_of[page]
            assert digest is not None
            del self._page_of[digest]
            self._digest_of[page] = None
            self.published[page] = False

    def forget(self) -> None:
        """Forget all contents: cached pages become free."""
        self.unpublish(list(self._page_of.values()))
        cached = np.array(list(self._cached), np.int32)
        self._cached.clear()
        self._free(cached)

    def take_freed(self) -> Pages:
        """Return the pages whose content has been lost since the last call, if that is recorded."""
        freed = np.concatenate([np.empty(0, np.int32), *self._freed])
        self._freed.clear()
        return freed

    def _free(self, pages: Pages) -> None:
        self._stack[self.num_free : self.num_free + pages.size] = pages[::-1]
        self.num_free += pages.size
        self._record(pages)

    def _record(self, pages: Pages) -> None:
        if self._record_freed and pages.size:
            self._freed.append(pages)
