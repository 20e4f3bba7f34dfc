"""The sizes of a page manager."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a page manager has of everything; it checks itself."""

    num_pages: int
    page_size: int
    max_seqs: int
    max_blocks: int
    sliding_window: int | None

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_seqs", "max_blocks"):
            object.__setattr__(self, name, at_least(name, getattr(self, name), 1))
        if self.sliding_window is not None:
            window = at_least("sliding_window", self.sliding_window, 1)
            object.__setattr__(self, "sliding_window", window)
        for name in ("num_pages", "max_blocks"):
            size = getattr(self, name) * self.page_size
            if size >= 2**31:
                raise ValueError(
                    f"{name} * page_size={size} must be below 2**31: slots and positions are 32-bit"
                )

    def width(self, name: str, blocks: object) -> int:
        """Check how many columns a table is to have, and return it as Python's."""
        if (checked := at_least(name, blocks, 0)) > self.max_blocks:
            raise ValueError(f"{name}={checked} must be at most max_blocks={self.max_blocks}")
        return checked

    def check_tokens(self, num_tokens: int, whose: str) -> None:
        """Raise if a sequence would have more tokens than a row of the table has room for."""
        most = self.max_blocks * self.page_size
        if num_tokens > most:
            raise ValueError(
                f"{whose} would have {num_tokens} tokens, and max_blocks={self.max_blocks} pages "
                f"of page_size={self.page_size} hold {most}: end it, or make max_blocks larger"
            )


def at_least(name: str, value: object, least: int, otherwise: int | None = None) -> int:
    """Check an integer, and return it as Python's; for None `otherwise`, if that is given."""
    if value is None and otherwise is not None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}={value!r:.80} must be an int")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)
