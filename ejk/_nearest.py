"""The name that a wrong one was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(wrong: str, names: Iterable[str]) -> str | None:
    """Return the name that is nearest to a wrong one, whatever the case, if any is near."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wrong.lower(), lower, n=1)
    return lower[near[0]] if near else None


def did_you_mean(wrong: str, names: Iterable[str]) -> str:
    """Return the question to put behind a message about a wrong name, if any is near."""
    near = nearest(wrong, names)
    return f": did you mean {near!r}?" if near else ""
