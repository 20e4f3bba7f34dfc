"""The errors that are `ejk`'s own. Wrong arguments raise `TypeError` and `ValueError`."""


class UnsupportedError(NotImplementedError):
    """No backend that may run this call can run it; the message has one line a reason."""


class Mendable(str):
    """A refusal for want of something that can be installed or changed.

    It reads `reason: mend`. `mend` says what to do, a command where there is one: automatic choice
    that passes a backend over for such a reason warns.
    """

    def __new__(cls, reason: str, mend: str) -> "Mendable":
        return super().__new__(cls, f"{reason}: {mend}")
