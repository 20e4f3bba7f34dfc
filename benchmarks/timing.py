"""How runs are timed: what `python -m ejk bench` times with, too.

It is this checkout's, also where `compare.py` times an `ejk` that has no command line yet.
"""

from pathlib import Path

import ejk

ejk.__path__.append(str(Path(__file__).parents[1] / "ejk"))

from ejk.cli._timing import *  # noqa: E402, F403
