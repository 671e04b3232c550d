"""What a job does about an error of its background copying: report, ignore, stop, enospc or auto, as in QEMU.

They are about background copies only: what fails for a writer goes by the snapshot's policy (`on_cbw_error`).

QEMU's ``ignore`` tries again at once, and with an error that stays it has been seen to raise 540 events a second.  Here
each try waits longer than the last one, up to a second, until something was copied again; and a job raises at most one
event a second, which says how many errors it stands for.
"""

from __future__ import annotations

import errno

REPORT, IGNORE, STOP = "report", "ignore", "stop"
ACTIONS = (REPORT, IGNORE, STOP, "enospc", "auto")

RETRY_MIN_S = 0.1
RETRY_MAX_S = 1.0
EVENT_PAUSE_S = 1.0


def resolve(action: str, number: int) -> str:
    """One of REPORT, IGNORE and STOP, for an errno.  ``auto`` is ``enospc`` for a job."""
    if action in ("enospc", "auto"):
        return STOP if number == errno.ENOSPC else REPORT
    return action


class Ignored:
    """The errors that a job ignores: when to try again, and when to tell.  Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        #: An error was seen, and the copying is not tried again yet.
        self.waiting = False
        self.operation = ""
        self._count = 0
        self._told_s = float("-inf")
        self._retry_s = 0.0
        self._pause_s = 0.0
        self._copied_bytes = -1

    def add(self, now_s: float, operation: str, copied_bytes: int) -> None:
        """An error; ``copied_bytes``: how much was copied by then."""
        progressed = copied_bytes != self._copied_bytes
        self._pause_s = RETRY_MIN_S if progressed else min(2 * self._pause_s, RETRY_MAX_S)
        self._copied_bytes = copied_bytes
        self._retry_s = now_s + self._pause_s
        self._count += 1
        self.operation = operation
        self.waiting = True

    def may_retry(self, now_s: float) -> bool:
        return now_s >= self._retry_s

    def retried(self) -> None:
        self.waiting = False

    def report(self, now_s: float) -> int:
        """How many errors an event of this moment stands for; 0: none is due."""
        if not self._count or now_s - self._told_s < EVENT_PAUSE_S:
            return 0
        count, self._count, self._told_s = self._count, 0, now_s
        return count
