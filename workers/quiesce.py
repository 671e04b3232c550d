"""Commands around a cut: an application is brought to rest before it and let go after it.

What `shmcbw backup --pre-cut CMD --post-cut CMD` gives to `quiesce=` of a backup.  Both run in a shell; what they print
goes to stderr.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from types import TracebackType

from shmcbw.errors import QuiesceError

log = logging.getLogger("shmcbw")


class QuiesceCommands:
    """A context manager that runs a command before and one after; None: nothing to run.

    If the first fails there is no cut: QuiesceError, with its exit status.  The second runs whatever became of the
    first and of the cut.  If it fails the cut is as good as before: ``failure`` says what happened.
    """

    def __init__(self, before: str | None, after: str | None) -> None:
        self._before = before
        self._after = after
        self.failure: str | None = None

    def __enter__(self) -> QuiesceCommands:
        try:
            problem = _run(self._before)
        except BaseException:
            self._let_go()
            raise
        if problem:
            self._let_go()
            raise QuiesceError(f"no cut was taken: the command before it, {self._before!r}, {problem}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        problem = _run(self._after)
        if problem:
            self.failure = f"the command after the cut, {self._after!r}, {problem}"
            log.error("%s", self.failure)


def _run(command: str | None) -> str | None:
    """Run a shell command; None, or what was wrong with how it ended."""
    if command is None:
        return None
    # Not to stdout: there a caller may expect one JSON object.
    status = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
    if status < 0:
        return f"was ended by signal {-status}"
    return f"ended with exit status {status}" if status else None
