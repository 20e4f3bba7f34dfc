"""What a page manager counts."""

from typing import NamedTuple


class Statistics(NamedTuple):
    """Counts of a page manager; `used_pages + free_pages + cached_pages` is the number of pages."""

    num_seqs: int
    """Live sequences."""
    used_pages: int
    """Pages that a sequence holds, or a copy not yet made."""
    free_pages: int
    """Pages that hold nothing."""
    cached_pages: int
    """Pages that nobody holds, but whose content may be asked for again."""
    queried_tokens: int
    """Tokens of all sequences allocated until now."""
    hit_tokens: int
    """How many of them were found in cached or held pages."""
    evictions: int
    """Cached pages that were taken for something else."""
    forks: int
    copies: int
    """Pages copied as a shared one was written to."""
    preemptions: int

    @property
    def hit_rate(self) -> float:
        """The share of the queried tokens that need not be computed; 0 before the first."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0
