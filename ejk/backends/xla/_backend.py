"""What all XLA backends have in common: they run everything, anywhere."""

from typing import Any

from ejk import _backend

DECODE_BLOCKS: _backend.Tunable = {"block_kv": (64, 128, 256, 512, 1024, 2048)}
RAGGED_BLOCKS: _backend.Tunable = {
    "block_q": (16, 32, 64, 128),
    "block_kv": (128, 256, 512, 1024),
}


class XlaBackend(_backend.Backend):
    """A backend that is an XLA program, which XLA can look into and split over devices."""

    name = "xla"
    is_opaque = False

    @property
    def platforms(self) -> tuple[str, ...]:
        return _backend.PLATFORMS

    def limits(self, problem: Any, platform: str) -> tuple[str, ...]:
        return ()
