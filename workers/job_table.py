"""The jobs of a coordinator: their ids, their place in the journal, and their return after its death.

The journal's section ``jobs`` has, by id:

    serial, parameters   from before the snapshot's entry is PREPARED
    cut                  [time_ns, drained_ns], from the first change on
    status, io_status    where they are not plain from the entry: paused, pending, concluded
    transaction          [id, size], of a job that ends together with others;  decided: they end well
    result               progress and error, from before the entry is FREE, of a job that failed or is kept

What it says of a job that makes no sense is dropped, and logged: its snapshot goes on by what the entry says.

    the entry is        and the journal says     then the job
    ACTIVE, BROKEN      paused                   is paused
    ACTIVE, BROKEN      anything else            runs
    COMPLETE            waiting or pending       is that; where decided or named: it ends well
    COMPLETE            anything else            is synced once more, and goes on from there
    any of these        an error                 ends with it: the target is removed, the entry freed
    FREE, or unusable   a result to be kept      is concluded
    FREE, or unusable   anything else            is forgotten
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from shmcbw import states
from shmcbw.errors import JobFailedError
from shmcbw.layout import Snapshot
from shmcbw.snapshots import state_of

from . import job_states
from .completion import JobTransaction
from .cut import Cut
from .groups import Backup, Request
from .jobs import Job, Progress, restore_error

if TYPE_CHECKING:
    from .coordinator import Coordinator, Entry

log = logging.getLogger("shmcbw")

#: Jobs that nobody will dismiss, kept to be looked at.
JOBS_KEPT = 100


class JobTable:
    """Jobs by id.  Used under the coordinator's lock."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._jobs: dict[str, Job] = {}
        self._reserved: set[str] = set()
        self._next = 1

    @property
    def jobs(self) -> list[Job]:
        return list(self._jobs.values())

    # -- the life of a job -------------------------------------------------------------------------------------------

    def reserve(self, request: Request, serial: int, target: str) -> str:
        """Give a job its id and store it, before anybody else may see its snapshot.

        ValueError: the id is in use.  OSError: /dev/shm is full.
        """
        job_id = request.job_id
        if job_id is None:
            job_id = self._unused_id()
        elif job_id in self._jobs or job_id in self._reserved:
            raise ValueError(f"Job ID '{job_id}' already in use")
        stored: dict[str, Any] = {"serial": serial, "target": target, "parameters": parameters_of(request)}
        if request.transaction is not None:
            stored["transaction"] = [request.transaction.id, request.transaction.size]
        with self._coordinator.journal.change() as document:
            document["jobs"][job_id] = stored
        self._reserved.add(job_id)
        return job_id

    def _unused_id(self) -> str:
        while (job_id := f"backup{self._next}") in self._jobs or job_id in self._reserved:
            self._next += 1
        self._next += 1
        return job_id

    def give_back(self, job_id: str) -> None:
        """There is no job of that id after all."""
        self._reserved.discard(job_id)
        self._change(job_id, None, required=False)

    def add(self, entry: Entry, request: Request) -> Job:
        """The job of a backup whose cut is taken."""
        assert entry.job_id is not None
        job = Job(self._coordinator, entry.job_id, request, entry.target.path, entry.cut, entry)
        job.transaction.join(job)
        job.start()
        # Last: if the caller is interrupted before, there is no job, and he lets go of the entry (`end_job_of`).
        self._enter(job)
        return job

    def end_job_of(self, entry: Entry) -> None:
        """Nobody wants the snapshot any more: end its job, which lets go of it, or give the id back."""
        if entry.job_id in self._jobs:
            self._jobs[entry.job_id].end()
        elif entry.job_id is not None:
            self.give_back(entry.job_id)

    def _enter(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._reserved.discard(job.id)
        ended = [each for each in self.jobs if each.auto_dismiss is None and each.ended]
        for old in ended[:-JOBS_KEPT]:
            del self._jobs[old.id]

    def record(self, job: Job, changes: dict[str, Any], *, required: bool) -> None:
        """Change what the journal says of a job."""
        changes.setdefault("cut", [job.cut_time_ns, job.drained_ns])
        self._change(job.id, changes, required=required)

    def forget(self, job: Job, *, required: bool = True, known: bool = False) -> None:
        """The journal knows of it no more; and we, unless it stays ``known``."""
        self._change(job.id, None, required=required)
        if not known:
            self._jobs.pop(job.id, None)

    def forget_all(self) -> None:
        """The coordinator closes: nobody will come back for its jobs."""
        if self._coordinator.journal.document["jobs"]:
            with self._coordinator.journal.change() as document:
                document["jobs"].clear()

    def _change(self, job_id: str, changes: dict[str, Any] | None, *, required: bool) -> None:
        try:
            with self._coordinator.journal.change() as document:
                if changes is None:
                    document["jobs"].pop(job_id, None)
                else:
                    document["jobs"].setdefault(job_id, {}).update(changes)
        except (OSError, ValueError) as error:
            if required:
                raise
            log.error("job %s: what becomes of it is not in the journal: %s", job_id, error)

    # -- after a death -----------------------------------------------------------------------------------------------

    def _found(self, serial: int) -> tuple[str | None, dict[str, Any]]:
        document = self._coordinator.journal.document["jobs"]
        job_id = next((name for name, found in document.items() if _serial(found) == serial), None)
        return job_id, document[job_id] if job_id is not None else {}

    def adopt(self, entry: Entry) -> None:
        """The job of a snapshot that a dead coordinator has left."""
        found = self._found(entry.serial)[1]
        sync = self._coordinator.segment.snapshot(entry.index, Snapshot.sync)
        name = next((name for name, value in states.SYNCS.items() if value == sync), "full")
        job = self._restore(entry.serial, entry.target.path, name, entry.cut, entry)
        entry.job_id = job.id
        status, io_status = job_states.RUNNING, found.get("io_status")
        complete = state_of(self._coordinator.segment, entry.index) == states.COMPLETE
        # One that has got its name: nobody can take that back.
        named = complete and entry.target.is_named
        if named:
            status = job_states.PENDING
        elif found.get("status") == job_states.PAUSED:
            status = job_states.PAUSED
        elif complete and found.get("status") in (job_states.WAITING, job_states.PENDING):
            status = found["status"]
        elif (error := _stored_error(found)) is not None:
            # Its end had begun: supervision takes the next steps, when there are workers.
            job.failure = error
        job.adopt(status, str(io_status) if io_status in ("failed", "nospace") else "ok")
        job.transaction.join(job, decided=named or found.get("decided") is True)
        log.info("adopted %r", job)

    def adopt_lost(self, serial: int, target: str, cut: Cut, sync: str, error: JobFailedError) -> None:
        """The job of a snapshot that can't be taken over, or is gone (serial number 0): it fails at once."""
        job = self._restore(serial, target, sync, cut, None)
        job.adopt_lost(error)
        job.transaction.join(job)
        job.transaction.settle()

    def _restore(self, serial: int, target: str, sync: str, cut: Cut, entry: Entry | None) -> Job:
        job_id, found = self._found(serial)
        request = _request(self._coordinator, target, found) if found else None
        if request is None:
            request = Backup(self._coordinator, target, sync=sync)
        job = Job(self._coordinator, job_id or self._unused_id(), request, target, cut, entry)
        self._enter(job)
        return job

    def adopt_ended(self, unadopted: set[int]) -> None:
        """Last: jobs that are concluded and kept; of others the journal knows no more, but for those with the snapshots
        ``unadopted``, which are serial numbers."""
        coordinator = self._coordinator
        with coordinator.journal.change() as document:
            for job_id, found in list(document["jobs"].items()):
                if job_id in self._jobs or _serial(found) in unadopted:
                    continue
                job = _concluded(coordinator, job_id, found)
                if job is not None:
                    self._jobs[job_id] = job
                else:
                    log.info("job %s has ended, or had not begun", job_id)
                    del document["jobs"][job_id]


# -- as the journal keeps them -----------------------------------------------------------------------------------------

#: What of a request is a job's, with the types that it may have.
_PARAMETERS: dict[str, tuple[type, ...]] = {
    "sync": (str,),
    "speed": (int,),
    "on_cbw_error": (str,),
    "cbw_timeout": (float, int),
    "overwrite": (bool,),
    "auto_finalize": (bool,),
    "auto_dismiss": (bool, type(None)),
    "on_source_error": (str,),
    "on_target_error": (str,),
    "max_workers": (int,),
    "max_chunk": (int,),
    "copy_range": (bool,),
    "bitmap": (str, type(None)),
    "bitmap_mode": (str, type(None)),
    "in_place": (bool,),
    "manifest": (bool,),
}


def parameters_of(request: Request) -> dict[str, Any]:
    """What a job was asked for, as the journal keeps it."""
    return {name: getattr(request, name) for name in _PARAMETERS}


def _serial(found: Any) -> int | None:
    serial = found.get("serial") if isinstance(found, dict) else None
    return serial if type(serial) is int else None


def _request(coordinator: Coordinator, target: str, found: dict[str, Any]) -> Request | None:
    """What a job was asked for, or None if the journal says nothing that makes sense."""
    given = found.get("parameters")
    try:
        if not isinstance(given, dict) or not all(type(given[name]) in _PARAMETERS[name] for name in given):
            raise ValueError(f"parameters {given!r}")
        transaction = None
        if (place := found.get("transaction")) is not None:
            transaction_id, size = place
            if type(transaction_id) is not str or type(size) is not int or size < 1:
                raise ValueError(f"transaction {place!r}")
            transaction = JobTransaction.adopted(transaction_id, size)
        return Backup(coordinator, target, transaction=transaction, **given)
    except (KeyError, TypeError, ValueError) as error:
        log.error("the journal's parameters of the job to %s are dropped: %s", target, error)
        return None


def _stored_error(found: dict[str, Any]) -> BaseException | None:
    """The error of a job that had failed, though it can't be read; None: it has succeeded, or not ended."""
    if "result" not in found:
        return None
    try:
        return restore_error(found["result"]["error"])
    except (KeyError, TypeError, ValueError) as error:
        return JobFailedError(errno.EIO, f"the job had ended, and its journal does not say how: {error!r}")


def _concluded(coordinator: Coordinator, job_id: str, found: Any) -> Job | None:
    """A job that is kept for somebody to dismiss; None if it is not to be kept, or makes no sense."""
    try:
        if "result" not in found or found["parameters"]["auto_dismiss"] is not False:
            return None
        request = _request(coordinator, str(found["target"]), found)
        if request is None:
            return None
        progress = Progress(**{name: int(value) for name, value in found["result"]["progress"].items()})
        cut = Cut(*map(int, found["cut"]))
        job = Job(coordinator, job_id, request, str(found["target"]), cut, None)
        job.adopt_result(progress, restore_error(found["result"]["error"]))
        return job
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        log.error("the journal's result of job %s is dropped: %r", job_id, error)
        return None
