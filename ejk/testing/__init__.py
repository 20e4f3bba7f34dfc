"""Holds backends, kernels and engines to the definitions: `pip install 'ejk[testing]'`.

Float64 definitions of the operations, strategies that draw poisoned calls, and the properties that
`ejk`'s own backends are held to.
"""

from ejk.backends.triton.interpreter.grids import shuffled as shuffled
from ejk.backends.triton.interpreter.memory import DeadlockError as DeadlockError
from ejk.backends.triton.interpreter.memory import MemoryAccessError as MemoryAccessError
from ejk.testing import bounds as bounds
from ejk.testing import oracle as oracle
from ejk.testing.agreement import assert_backend_agrees as assert_backend_agrees
from ejk.testing.agreement import calls as calls
from ejk.testing.configurations import Configuration as Configuration
from ejk.testing.dumps import dump as dump
from ejk.testing.interpreter import interpret as interpret
from ejk.testing.memory import MemoryChecker as MemoryChecker
from ejk.testing.memory import RaceError as RaceError
from ejk.testing.memory import memory_checked as memory_checked
from ejk.testing.properties import PROPERTIES as PROPERTIES
from ejk.testing.shapes import Shape as Shape
from ejk.testing.subject import Refusal as Refusal
from ejk.testing.subject import Subject as Subject

__all__ = [
    "PROPERTIES",
    "Configuration",
    "DeadlockError",
    "MemoryAccessError",
    "MemoryChecker",
    "RaceError",
    "Refusal",
    "Shape",
    "Subject",
    "assert_backend_agrees",
    "bounds",
    "calls",
    "dump",
    "interpret",
    "memory_checked",
    "oracle",
    "shuffled",
]
