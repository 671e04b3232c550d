"""How a copy worker that can't start says why: by its exit status, for it has no pipe to whoever started it."""

from __future__ import annotations

import errno
import os

#: An exit status from here on is this and an errno (at most 133); below, it is Python's.
_ERRNO_BASE = 100
#: Another worker has its id.
ID_TAKEN_STATUS = _ERRNO_BASE + errno.EBUSY


def failed_start_status(error: Exception) -> int:
    """The exit status of a worker that this error keeps from starting."""
    number = error.errno if isinstance(error, OSError) else None
    return _ERRNO_BASE + number if number and number <= 133 else 1


def describe_status(status: int) -> str:
    """What an exit status (as `subprocess` gives it: negative for a signal) says."""
    if status < 0:
        return f"killed by signal {-status}"
    if status > _ERRNO_BASE:
        return os.strerror(status - _ERRNO_BASE)
    return f"exit status {status}"
