"""The errors that are `ejk`'s own. Wrong arguments raise `TypeError` and `ValueError`."""


class UnsupportedError(NotImplementedError):
    """No backend that may run this call can run it; the message has one line a reason."""


class TuningError(ValueError):
    """A file of tuning holds something else; the message names file, entry and rule."""


class Mendable(str):
    """A refusal for want of something that can be installed or changed.

    It is made of the reason and of what to do, a command where there is one, and reads
    `reason: mend`. Automatic choice that passes a backend over for such a reason warns.
    """

    def __new__(cls, *parts: str) -> "Mendable":
        return super().__new__(cls, ": ".join(parts))  # one part where a copy is made
