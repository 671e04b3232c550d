"""A backup job: a snapshot, background copying, and a result; states are QEMU's.

from      to         when
created   running    the cut is taken
running   waiting    every cluster is copied or zero
running   aborting   cancelled, broken, or a background copy failed
waiting   pending    the target is synced
waiting   aborting   the sync failed
pending   concluded  the target has its name
aborting  concluded  the target is removed
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shmcbw.errors import JobCancelledError, JobFailedError

if TYPE_CHECKING:
    from .coordinator import Coordinator, Entry

CREATED, RUNNING, WAITING, PENDING = "created", "running", "waiting", "pending"
ABORTING, CONCLUDED = "aborting", "concluded"

TRANSITIONS = {
    CREATED: {RUNNING, ABORTING},
    RUNNING: {WAITING, ABORTING},
    WAITING: {PENDING, ABORTING},
    PENDING: {CONCLUDED, ABORTING},
    ABORTING: {CONCLUDED},
    CONCLUDED: set(),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a job.  ``current_bytes`` of ``total_bytes`` need no more copying; the others say why."""

    current_bytes: int
    total_bytes: int
    copied_for_writers_bytes: int
    copied_in_background_bytes: int
    zero_bytes: int
    skipped_bytes: int


class Job:
    """A backup under way; made by `Coordinator.backup`."""

    def __init__(self, coordinator: Coordinator, entry: Entry, job_id: str, sync: str) -> None:
        self.id = job_id
        self.sync = sync
        self.target = entry.target.path
        self.cut_time_ns = entry.cut.time_ns
        self.drained_ns = entry.cut.drained_ns
        self._coordinator = coordinator
        self._entry = entry
        self._condition = threading.Condition()
        self._status = CREATED
        self._error: BaseException | None = None
        self._progress: Progress | None = None
        #: Set by `Coordinator.cancel_job` while the target is being synced.
        self.cancel_requested = False

    @property
    def status(self) -> str:
        """created, running, waiting, pending, aborting or concluded."""
        return self._status

    @property
    def error(self) -> BaseException | None:
        """Why the job failed or was cancelled; None while it runs and when it succeeded."""
        return self._error

    def move(self, status: str, error: BaseException | None = None) -> None:
        """Called by the coordinator: one step of the table above."""
        with self._condition:
            if status not in TRANSITIONS[self._status]:
                raise AssertionError(f"job {self.id}: {self._status} -> {status}")
            self._error = self._error or error
            self._status = status
            self._condition.notify_all()

    def wait(self, timeout: float | None = None) -> None:
        """Return when the job is concluded; raise its error if it failed or was cancelled.

        TimeoutError if it is not concluded after ``timeout`` seconds; it goes on.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._status == CONCLUDED, timeout):
                raise TimeoutError(f"job {self.id} is {self._status} after {timeout} s")
        if self._error is not None:
            raise self._error

    def progress(self) -> Progress:
        """Counted from the cluster bytes themselves, so exact whoever died."""
        with self._condition:
            if self._progress is not None:
                return self._progress
        return self._coordinator.count_progress(self._entry)

    def freeze_progress(self, progress: Progress) -> None:
        """Called by the coordinator before it lets the bitmap go."""
        with self._condition:
            self._progress = progress

    def cancel(self) -> None:
        """Cancel: the snapshot is dropped and the unfinished target removed.  Harmless when concluded."""
        self._coordinator.cancel_job(self)

    def set_speed(self, speed: int) -> None:
        """Change the rate limit of background copying (bytes a second, 0 for none), at once."""
        self._coordinator.set_speed(self._entry, speed)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self._status} to {self.target}>"


def failure(number: int, message: str) -> JobFailedError:
    return JobFailedError(number, message)


def cancelled(job_id: str) -> JobCancelledError:
    return JobCancelledError(f"job {job_id} was cancelled; its unfinished target was removed")
