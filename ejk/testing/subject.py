"""A backend under test."""

import contextlib
import re
from collections.abc import Collection, Generator
from typing import Any

from ejk._errors import UnsupportedError
from ejk.testing.oracle import Array


class Refusal(Exception):  # noqa: N818
    """A backend refused a call for a reason that it may give."""


class Subject:
    """A backend, and what it has said of itself.

    Attributes:
        backend: what is passed as `backend=`.
        may_refuse: regular expressions of the only reasons that it may give for refusing.
        batch_invariant: for `num_splits >= 1` a sequence's bits depend on that sequence alone.
    """

    backend: Any
    may_refuse: Collection[str]
    batch_invariant: bool

    def __init__(
        self, backend: Any, may_refuse: Collection[str] = (), batch_invariant: bool = False
    ) -> None:
        if isinstance(may_refuse, str):  # each of its letters would be an expression
            raise TypeError(f"{may_refuse=} must be a list of expressions: [{may_refuse!r}]")
        self.backend, self.may_refuse = backend, may_refuse
        self.batch_invariant = batch_invariant

    def __call__(self, case: Any, **overrides: Any) -> tuple[Array, ...]:
        """Run a case; return its results as NumPy arrays."""
        with self.refusing():
            return case.run(self.backend, **overrides)

    def attempt(self, case: Any, **overrides: Any) -> tuple[Array, ...] | None:
        """Run a variation of a case that it has run; return None if it refuses that one."""
        try:
            return self(case, **overrides)
        except Refusal:
            return None

    @contextlib.contextmanager
    def refusing(self) -> Generator[None]:
        """Let a refusal pass, as a `Refusal`, only if it may give every reason."""
        try:
            yield
        except UnsupportedError as error:
            name = re.escape(getattr(self.backend, "name", str(self.backend)))
            reasons = re.findall(rf"^  {name}: (.*)$", str(error), re.MULTILINE)
            assert reasons, f"a refusal names the backend and a reason: {error}"
            for reason in reasons:
                if not any(re.search(allowed, reason) for allowed in self.may_refuse):
                    raise
            raise Refusal(*reasons) from error
