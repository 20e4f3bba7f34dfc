"""A backend under test."""

import contextlib
import re
from collections.abc import Collection, Generator
from typing import Any

from ejk._errors import UnsupportedError
from ejk.testing.oracle import Array


def reasons_of(error: Exception, backend: Any) -> list[str]:
    """Return why a backend refused a call, of what an error says of several."""
    name = re.escape(getattr(backend, "name", str(backend)))
    return re.findall(rf"^  {name}: (.*)$", str(error), re.MULTILINE)


class Refusal(Exception):  # noqa: N818
    """A backend refused a call for a reason that it may give."""


class Subject:
    """A backend, and what it has said of itself.

    Attributes:
        backend: what is passed as `backend=`.
        may_refuse: regular expressions of the only reasons that it may give for refusing.
        batch_invariant: for `num_splits >= 1` a sequence's bits depend on that sequence alone.
        equal_bits: under `jit`, of pages in another order and without the LSE an output has the
            same bits. Otherwise each is within the bound.
    """

    backend: Any
    may_refuse: Collection[str]
    batch_invariant: bool
    equal_bits: bool = True

    def __init__(
        self,
        backend: Any,
        may_refuse: Collection[str] = (),
        batch_invariant: bool = False,
        equal_bits: bool = True,
    ) -> None:
        if isinstance(may_refuse, str):  # each of its letters would be an expression
            raise TypeError(f"{may_refuse=} must be a list of expressions: [{may_refuse!r}]")
        self.backend, self.may_refuse = backend, may_refuse
        self.batch_invariant, self.equal_bits = batch_invariant, equal_bits

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
            reasons = reasons_of(error, self.backend)
            assert reasons, f"a refusal names the backend and a reason: {error}"
            for reason in reasons:
                if not any(re.search(allowed, reason) for allowed in self.may_refuse):
                    raise
            raise Refusal(*reasons) from error
