"""The errors that are `ejk`'s own. Wrong arguments raise `TypeError` and `ValueError`."""


class UnsupportedError(NotImplementedError):
    """No backend that may run this call can run it; the message has one line a reason."""
