"""The call that `ejk check` is running, in a file: what a process leaves that crashes in it."""

import glob
import os
import re
import tempfile
from types import TracebackType

PREFIX = "ejk-check-"


class InFlight:
    """A file that holds the line of one call, and is removed unless the process dies.

    A segmentation fault leaves it: each line reaches the system before the call begins.
    """

    def __enter__(self) -> "InFlight":
        number, self.path = tempfile.mkstemp(".txt", f"{PREFIX}{os.getpid()}-")
        self.file = open(number, "w", encoding="utf-8")
        return self

    def __call__(self, line: str) -> None:
        self.file.seek(0)
        self.file.truncate()
        print(line, file=self.file, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.file.close()
        os.remove(self.path)


def crashed() -> list[tuple[str, str]]:
    """Return the files of processes of this user that have died, each with what it holds."""
    if os.name != "posix":  # elsewhere signal 0 is none
        return []
    found: list[tuple[str, str]] = []
    for path in sorted(glob.glob(os.path.join(tempfile.gettempdir(), f"{PREFIX}*-*.txt"))):
        number = re.match(r"\d+", os.path.basename(path).removeprefix(PREFIX))
        if number and os.stat(path).st_uid == os.getuid() and not _lives(int(number[0])):
            with open(path, encoding="utf-8") as file:
                found.append((path, file.read().strip()))
    return found


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
