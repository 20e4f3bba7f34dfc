"""What all XLA backends have in common: they run everything, anywhere."""

from typing import Any

from ejk import _backend


class XlaBackend(_backend.Backend):
    """A backend that is an XLA program, which XLA can look into and split over devices."""

    name = "xla"
    is_opaque = False

    @property
    def platforms(self) -> tuple[str, ...]:
        return _backend.PLATFORMS

    def limits(self, problem: Any, platform: str) -> tuple[str, ...]:
        return ()
