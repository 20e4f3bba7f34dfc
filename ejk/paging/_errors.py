"""What a page manager raises when it has no room. Wrong arguments are `TypeError`, `ValueError`."""


class OutOfPagesError(RuntimeError):
    """Too few pages are free or can be evicted. Nothing has changed, the sequence neither.

    Attributes:
        needed: pages that the call would have taken.
        free: pages that hold nothing.
        evictable: cached pages that no sequence holds, and that the call would not have reused.
    """

    def __init__(self, needed: int, free: int, evictable: int):
        super().__init__(
            f"{needed} pages are needed, but {free} are free and {evictable} can be evicted: free "
            "or preempt a sequence, or give the pools more pages"
        )
        self.needed, self.free, self.evictable = needed, free, evictable

    def __reduce__(self) -> tuple[type["OutOfPagesError"], tuple[int, int, int]]:
        return OutOfPagesError, (self.needed, self.free, self.evictable)


class OutOfSequencesError(RuntimeError):
    """As many sequences live as the manager has rows for. Nothing has changed."""
