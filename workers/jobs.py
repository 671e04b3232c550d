"""A backup job: a snapshot, background copying, and a result.  States and verbs are QEMU's (`job_states.py`).

A job is looked at by its coordinator's supervisor, and told what to do by verbs, from any thread.  All of it happens
under the coordinator's lock, so that states and events have one order; how jobs end is decided by their
transaction (`completion.py`), which may touch several coordinators.

What a job must know after the death of its coordinator is in its snapshot's entry (paused, speed, errors) and in the
journal (`job_table.py`).
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shmcbw import states
from shmcbw.errors import JobCancelledError, JobFailedError, JobStateError, ShmcbwError, SnapshotBrokenError
from shmcbw.failpoints import hit, index_of
from shmcbw.image import close_descriptor
from shmcbw.layout import Snapshot
from shmcbw.snapshots import broken_error

from . import job_states
from .completion import JobTransaction
from .error_actions import IGNORE, REPORT, STOP, Ignored, resolve
from .job_states import ABORTING, CONCLUDED, CREATED, NULL, PAUSED, PENDING, RUNNING, UNDEFINED, WAITING, check_verb
from .targets import sync_file

if TYPE_CHECKING:
    from .coordinator import Coordinator, Entry
    from .cut import Cut
    from .groups import Request

log = logging.getLogger("shmcbw")

_COMPLETE, _SYNCED, _NAMED = (index_of(f"coordinator.{step}") for step in ("complete", "synced", "named"))
_MANIFEST = index_of("target.manifest")


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a job.  ``current_bytes`` of ``total_bytes`` need no more copying; the others say why.

    It also moves while the job is paused: writers go on having clusters copied.
    """

    current_bytes: int
    total_bytes: int
    copied_for_writers_bytes: int
    copied_in_background_bytes: int
    zero_bytes: int
    skipped_bytes: int


class Sync:
    """The sync of a target, and what else is to be written of it, in a thread of its own, for it may take long.

    It syncs by the open file that was there all along, but through a descriptor of its own: who cancels meanwhile does
    not wait for it.
    """

    def __init__(self, fd: int, size_bytes: int, seal: Callable[[], None], wake: Callable[[], None]) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._seal = seal
        self._wake = wake
        self._sealing = threading.Lock()
        self._given_up = False
        self.done = False
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            sync_file(self._fd, self._size_bytes)
            with self._sealing:
                if not self._given_up:
                    self._seal()
        except Exception as error:  # the thread's outermost level: whatever it is, the job ends with it
            self.error = error
        finally:
            close_descriptor(self._fd)
            self.done = True
            self._wake()

    def give_up(self) -> None:
        """Nothing is written any more when this returns."""
        self._given_up = True
        with self._sealing:
            pass


class Job:
    """A backup under way; made by `Coordinator.backup`.

    The verbs raise JobStateError, with QEMU's text, in a state that does not accept them.  A job whose ``auto_dismiss``
    is None (nobody will dismiss it, and who holds it can't know its state) is lenient in two of them: see `cancel` and
    `set_speed`.
    """

    type = "backup"

    def __init__(
        self, coordinator: Coordinator, job_id: str, request: Request, target: str, cut: Cut, entry: Entry | None
    ) -> None:
        self.id = job_id
        self.coordinator = coordinator
        self.request = request
        self.sync = request.sync
        self.auto_finalize = request.auto_finalize
        self.auto_dismiss = request.auto_dismiss
        self.target = target
        self.cut_time_ns = cut.time_ns
        self.drained_ns = cut.drained_ns
        self.transaction = request.transaction or JobTransaction.of_one()
        #: "ok", "failed" or "nospace": why it stopped.
        self.io_status = "ok"
        #: Why it is going to end; its transaction acts on it.
        self.failure: BaseException | None = None
        self._entry = entry
        self._condition = threading.Condition()
        self._status = UNDEFINED
        self._error: BaseException | None = None
        self._progress: Progress | None = None
        self._speed = request.speed
        self._ignored = Ignored()
        self._syncing: Sync | None = None

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """One of `job_states.STATES`."""
        return self._status

    @property
    def ended(self) -> bool:
        return self._status in (ABORTING, CONCLUDED, NULL)

    @property
    def paused(self) -> bool:
        return self._status == PAUSED

    @property
    def speed(self) -> int:
        """The rate limit, bytes a second; 0: none."""
        return self._speed

    @property
    def error(self) -> BaseException | None:
        """Why the job failed or was cancelled; None while it runs and when it succeeded."""
        return self._error

    @property
    def error_text(self) -> str | None:
        """The error in QEMU's words: those of its errno."""
        if self._error is None:
            return None
        if isinstance(self._error, JobCancelledError):
            return os.strerror(errno.ECANCELED)
        number = self._error.errno if isinstance(self._error, OSError) else None
        return os.strerror(number) if number else str(self._error)

    def progress(self) -> Progress:
        """Counted from the cluster bytes themselves, so exact whoever died."""
        with self._condition:
            if self._progress is not None:
                return self._progress
        assert self._entry is not None
        return self.coordinator.count_progress(self._entry)

    def describe(self) -> dict[str, Any]:
        """Plain data: all that QEMU's query-jobs and query-block-jobs tell, and more."""
        with self.coordinator.held():
            progress = self.progress()
            return {
                "id": self.id,
                "type": self.type,
                "status": self._status,
                "sync": self.sync,
                "target": self.target,
                "cut_time_ns": self.cut_time_ns,
                "drained_ns": self.drained_ns,
                "speed": self._speed,
                "io_status": self.io_status,
                "paused": self.paused,
                "busy": self._status == RUNNING,
                "auto_finalize": self.auto_finalize,
                "auto_dismiss": self.auto_dismiss,
                "progress": asdict(progress),
                "error": str(self._error) if self._error is not None else None,
                "error_text": self.error_text,
                "failure": describe_error(self._error),
            }

    # -- verbs -------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Return when the job is concluded; raise its error if it failed or was cancelled.

        TimeoutError if it is not concluded after ``timeout`` seconds; it goes on.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._status in (CONCLUDED, NULL), timeout):
                raise TimeoutError(f"job {self.id} is {self._status} after {timeout} s")
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Stop background copying at the next chunk.  What writers need is copied on."""
        with self.coordinator.held():
            check_verb(self.id, self._status, "pause")
            if self._status == PAUSED:
                raise JobStateError("Job is already paused")
            self.record(status=PAUSED)
            self._stop_copying()
            self.move(PAUSED)

    def resume(self) -> None:
        """Go on after `pause`, or after an error stopped the job: that is forgotten, and tried again."""
        with self.coordinator.held():
            # In QEMU's order: this is said in every state.
            if self._status != PAUSED:
                raise JobStateError("Can't resume a job that was not paused")
            check_verb(self.id, self._status, "resume")
            self.record(status=RUNNING, io_status="ok")
            self.io_status = "ok"
            self.move(RUNNING)
            self._start_copying()

    def set_speed(self, speed: int) -> None:
        """Change the rate limit of background copying (bytes a second, 0 for none), at once.

        What was spent under the old one is forgotten.  With ``auto_dismiss`` None nothing happens to a job that copies
        no more.
        """
        if not 0 <= speed < 1 << 62:
            raise ValueError("Parameter 'speed' expects a non-negative value")
        with self.coordinator.held():
            if self.auto_dismiss is None and self._status not in job_states.VERBS["set-speed"]:
                return
            check_verb(self.id, self._status, "set-speed")
            self._speed = speed
            if self._entry is not None:
                self.coordinator.segment.set_snapshot(self._entry.index, Snapshot.budget_ns, time.monotonic_ns())
                self.coordinator.segment.set_snapshot(self._entry.index, Snapshot.speed, speed)
                self._entry.speed = speed
                self.coordinator.wake_workers()

    def cancel(self) -> None:
        """Cancel, and with it all jobs of its transaction: snapshots are dropped, unfinished targets removed.

        With ``auto_dismiss`` None: harmless when concluded.
        """
        try:
            self.transaction.cancel(self, self._cancelled())
        except JobStateError:
            if self.auto_dismiss is not None:
                raise

    def complete(self) -> None:
        """For jobs with two phases; a backup never is in the state `ready`, so JobStateError."""
        check_verb(self.id, self._status, "complete")

    def change(self) -> None:
        """For jobs that have what can be changed while they run (QEMU: of a mirror, when it copies): JobStateError."""
        check_verb(self.id, self._status, "change")
        raise JobStateError("Job type does not support change")

    def finalize(self) -> None:
        """Let a pending job, and all of its transaction, come to its end: the targets get their names."""
        self.transaction.finalize(self)

    def dismiss(self) -> None:
        """Forget a concluded job."""
        with self.coordinator.held():
            check_verb(self.id, self._status, "dismiss")
            self.coordinator.job_table.forget(self)
            self.move(NULL)

    # -- steps, under the coordinator's lock -------------------------------------------------------------------------

    def move(self, status: str) -> None:
        """One step of the table, and its event."""
        job_states.check_step(self.id, self._status, status)
        with self._condition:
            self._status = status
            self._condition.notify_all()
        self.coordinator.emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status})

    def start(self) -> None:
        self.move(CREATED)
        self.move(RUNNING)

    def adopt(self, status: str, io_status: str) -> None:
        """Be what the journal says, without events: nothing has happened.  A paused one is not asked about: its
        entry's word says so, and is written once more in case that was the step at which somebody died."""
        self._status = status
        self.io_status = io_status
        if self._entry is not None:
            self._speed = self.coordinator.segment.snapshot(self._entry.index, Snapshot.speed)
            if status == PAUSED:
                self._stop_copying()
            elif status == RUNNING:
                self._start_copying()

    def adopt_lost(self, error: JobFailedError) -> None:
        """A job whose snapshot can't be taken over: it fails, and nothing is known to be copied."""
        self._status = RUNNING
        self._progress = Progress(0, self.coordinator.segment.geometry.image_size, 0, 0, 0, 0)
        self.failure = error

    def adopt_result(self, progress: Progress, error: BaseException | None) -> None:
        """A job that had ended when its coordinator died."""
        self._status = CONCLUDED
        self._progress = progress
        self._error = error

    def look(self, unsettled: set[JobTransaction]) -> None:
        """See what has become of the snapshot; add the transaction if it has something to settle."""
        if self.failure is None and self._status in (RUNNING, PAUSED):
            self._look_at_snapshot()
        # A transaction acts at once, unless the others have not come, or what was decided is still to be done.
        waits = self._status == WAITING or (self._status == PENDING and self.transaction.finalizes_itself)
        if self.failure is not None or waits or self.transaction.failed:
            unsettled.add(self.transaction)

    def _look_at_snapshot(self) -> None:
        assert self._entry is not None
        segment, index = self.coordinator.segment, self._entry.index
        word = segment.snapshot(index, Snapshot.state)
        if word & 0xFFFFFFFF == states.BROKEN:
            self.failure = broken_error(segment, index) or JobFailedError(errno.EIO, "the snapshot is broken")
        elif self._status == RUNNING and not self._act_on_errors(word):
            if self._syncing is not None:
                self._end_sync(self._syncing)
            elif self._all_is_copied(word):
                self._begin_sync(self._entry)

    def _all_is_copied(self, word: int) -> bool:
        """Then the entry is COMPLETE: nobody can break it any more, and a restarted coordinator goes on from there."""
        assert self._entry is not None
        segment = self.coordinator.segment
        adopted = word & 0xFFFFFFFF == states.COMPLETE
        if not self.coordinator.is_copied(self._entry, self.sync):
            return False
        if adopted:
            return True
        hit(segment.failpoints, _COMPLETE)
        return True

    def _begin_sync(self, entry: Entry) -> None:
        segment = self.coordinator.segment
        self._progress = self.progress()
        increment = entry.increment

        def seal() -> None:
            if increment is not None:
                increment.seal(entry.index, entry.target, entry.bitmap)
            hit(segment.failpoints, _SYNCED)

        try:
            fd = os.dup(entry.target.fd)
        except OSError as error:
            # Not again at every look: it could be for ever.
            self.failure = self._finishing_failed(error)
            return
        try:
            sync = Sync(fd, segment.geometry.image_size, seal, segment.wake_coordinator)
            threading.Thread(target=sync.run, name=f"shmcbw-{self.id}", daemon=True).start()
        except BaseException:
            close_descriptor(fd)
            raise
        self._syncing = sync

    def _end_sync(self, sync: Sync) -> None:
        if not sync.done:
            return
        if sync.error is not None:
            self.failure = self._finishing_failed(sync.error)
            return
        if self.transaction.size > 1:
            self.record(required=False, status=WAITING)
        self.move(WAITING)

    def _finishing_failed(self, error: Exception) -> JobFailedError:
        number = error.errno if isinstance(error, OSError) else None
        message = f"finishing {self.target}: {getattr(error, 'strerror', None) or error}"
        return JobFailedError(number or errno.EIO, message)

    def _act_on_errors(self, word: int) -> bool:
        """Act on an error of background copying: whether there is one that was not dealt with."""
        assert self._entry is not None
        segment, index = self.coordinator.segment, self._entry.index
        found = states.split_error(segment.snapshot(index, Snapshot.background_error), word >> 32)
        now = time.monotonic()
        if found is None:
            if count := self._ignored.report(now):
                self._emit_error(self._ignored.operation, IGNORE, count)
            return False
        if self._ignored.waiting:
            if self._ignored.may_retry(now):
                # The rest first: this cluster is not the next one.
                self._start_copying(found[1] + 1)
            return True
        number, from_source = found[0] & ~states.SOURCE_ERROR, bool(found[0] & states.SOURCE_ERROR)
        operation = "read" if from_source else "write"
        action = resolve(self.request.on_source_error if from_source else self.request.on_target_error, number)
        if action == IGNORE:
            self._ignored.add(now, operation, self.progress().current_bytes)
            if count := self._ignored.report(now):
                self._emit_error(operation, action, count)
            return True
        what = f"copy of cluster {found[1]} to {self.target}: {operation}: {os.strerror(number)}"
        if action == STOP:
            io_status = "nospace" if number == errno.ENOSPC else "failed"
            log.warning("%r stops: %s", self, what)
            self._stop_copying()
            self.record(required=False, status=PAUSED, io_status=io_status)
            self.io_status = io_status
            self._emit_error(operation, action)
            self.move(PAUSED)
            return True
        self._emit_error(operation, REPORT)
        self.failure = JobFailedError(number, f"background {what}")
        return True

    def _stop_copying(self) -> None:
        if self._entry is not None:
            self._entry.background = 0
            self.coordinator.segment.set_snapshot(self._entry.index, Snapshot.background, 0)

    def _start_copying(self, cursor: int | None = None) -> None:
        """Have the workers copy in the background, whatever stopped them."""
        if self._entry is None:
            return
        segment, index = self.coordinator.segment, self._entry.index
        self._ignored.retried()
        if cursor is not None:
            segment.set_snapshot(index, Snapshot.cursor, cursor)
        segment.set_snapshot(index, Snapshot.background_error, 0)
        self._entry.background = int(self.sync != "none")
        segment.set_snapshot(index, Snapshot.background, self._entry.background)
        # After the others: a worker that sees it looks at all of them again.
        segment.set_snapshot(index, Snapshot.round, (segment.snapshot(index, Snapshot.round) + 1) & 0xFFFFFFFF)
        self.coordinator.wake_workers()

    # -- the end, as its transaction says ----------------------------------------------------------------------------

    def become_pending(self, *, kept: bool) -> None:
        """All of the transaction wait.  ``kept``: it may stay so for long."""
        if kept:
            self.record(required=False, status=PENDING)
        self.move(PENDING)
        if not self.auto_finalize:
            self.coordinator.emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})

    def conclude(self) -> bool:
        """Give the target its name; False if that fails: then `abort` is next."""
        assert self._entry is not None
        segment = self.coordinator.segment
        try:
            self._entry.target.finish(lambda: hit(segment.failpoints, _MANIFEST))
            hit(segment.failpoints, _NAMED)
        except (OSError, ShmcbwError) as error:
            self.failure = self._finishing_failed(error)
            return False
        if self.auto_dismiss is False:
            self.record(required=False, status=CONCLUDED, result=True)
        self._let_go(succeeded=True)
        return True

    def end(self) -> None:
        """Its coordinator closes: cancel it, whatever its transaction has decided, waits for, or has met."""
        try:
            self.transaction.settle()
            self.transaction.cancel(self, self._cancelled())
        except JobStateError:
            pass
        with self.coordinator.held():
            if not self.ended:
                self.record_failure()
                self.abort()

    def record_failure(self) -> None:
        """The result is in the journal before anything is let go."""
        self._error = self.failure or self._cancelled()
        left = self._left()
        if left is not None and isinstance(self.failure, JobFailedError):
            self._error = JobFailedError(self.failure.errno, f"{self.failure.strerror}; {left}")
        if self._progress is None and self._entry is not None:
            self._progress = self.progress()
        self.record(required=False, status=CONCLUDED, result=True)

    def _left(self) -> str | None:
        """What a failure leaves of the target, in words; None: nothing."""
        increment = self._entry.increment if self._entry is not None else None
        return increment.leaves(self.target) if increment is not None else None

    def _cancelled(self) -> JobCancelledError:
        return cancelled(self.id, self._left())

    def abort(self) -> None:
        """Remove the unfinished target, and let the snapshot go."""
        log.warning("%r: %s", self, self._error)
        if self._status == PAUSED:
            self.move(RUNNING)
        self.move(ABORTING)
        if self._syncing is not None:
            self._syncing.give_up()
        self._let_go(succeeded=False)

    def _let_go(self, *, succeeded: bool) -> None:
        """The last steps; each of them, also if the snapshot can't be let go as it should."""
        if self._progress is None:
            self._progress = self.progress()
        entry, self._entry = self._entry, None
        try:
            if entry is not None:
                self.coordinator.end_entry(entry, succeeded=succeeded)
        finally:
            if succeeded:
                self._emit_end("BLOCK_JOB_COMPLETED")
            elif isinstance(self._error, JobCancelledError):
                self._emit_end("BLOCK_JOB_CANCELLED")
            else:
                self._emit_end("BLOCK_JOB_COMPLETED", error=self.error_text)
            self._end()

    def _end(self) -> None:
        if self.auto_dismiss is not False:
            self.coordinator.job_table.forget(self, required=False, known=self.auto_dismiss is None)
        self.move(CONCLUDED)
        if self.auto_dismiss:
            self.move(NULL)

    # -- events and the journal --------------------------------------------------------------------------------------

    def _emit_end(self, name: str, **more: Any) -> None:
        progress = self.progress()
        data = {"type": self.type, "device": self.id, "len": progress.total_bytes, "offset": progress.current_bytes}
        self.coordinator.emit(name, {**data, "speed": self._speed, **more})

    def _emit_error(self, operation: str, action: str, count: int = 0) -> None:
        data = {"device": self.id, "operation": operation, "action": action}
        self.coordinator.emit("BLOCK_JOB_ERROR", {**data, **({"x-shmcbw-count": count} if count else {})})

    def record(self, *, required: bool = True, result: bool = False, **changes: Any) -> None:
        """Store what has changed in the journal.  OSError: it can't be; logged only, unless it is ``required``."""
        if result:
            changes["result"] = {"progress": asdict(self.progress()), "error": describe_error(self._error)}
        self.coordinator.job_table.record(self, changes, required=required)

    def __repr__(self) -> str:
        return f"<Job {self.id} {self._status} to {self.target}>"


def cancelled(job_id: str, left: str | None = None) -> JobCancelledError:
    return JobCancelledError(f"job {job_id} was cancelled; {left or 'its unfinished target was removed'}")


def describe_error(error: BaseException | None) -> dict[str, Any] | None:
    """An error as the journal keeps it."""
    if error is None:
        return None
    if isinstance(error, JobCancelledError):
        return {"kind": "cancelled", "message": str(error)}
    number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
    if isinstance(error, SnapshotBrokenError):
        return {"kind": "broken", "errno": number, "cluster": error.cluster, "time_ns": error.time_ns}
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return {"kind": "failed", "errno": number, "message": message}


def restore_error(found: dict[str, Any] | None) -> BaseException | None:
    """The error that `describe_error` has described; KeyError, TypeError: it has not."""
    if found is None:
        return None
    if found["kind"] == "cancelled":
        return JobCancelledError(str(found["message"]))
    if found["kind"] == "broken":
        return SnapshotBrokenError(int(found["errno"]), int(found["cluster"]), int(found["time_ns"]))
    return JobFailedError(int(found["errno"]), str(found["message"]))
