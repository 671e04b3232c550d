"""Commands on jobs: job-* by id, block-job-* by what they call the device, which is the id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..jobs import Job
from .desk import Arguments, Desk, Handler
from .schema import QMPError


def find_job(desk: Desk, job_id: str, *, block: bool) -> Job:
    """The job of an id; QMPError as QEMU says it for job-* or block-job-* commands."""
    for _, job in desk.jobs():
        if job.id == job_id:
            return job
    if block:
        raise QMPError(f"Block job '{job_id}' not found", "DeviceNotActive")
    raise QMPError("Job not found")


def _verb(act: Callable[[Job], None], member: str, *, block: bool) -> Handler:
    def handler(desk: Desk, arguments: Arguments) -> dict[str, Any]:
        act(find_job(desk, arguments[member], block=block))
        return {}

    return handler


def _block_job_cancel(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    job = find_job(desk, arguments["device"], block=True)
    if job.paused and not arguments.get("force", False):
        raise QMPError(f"The block job for device '{job.id}' is currently paused")
    job.cancel()
    return {}


def _set_speed(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    find_job(desk, arguments["device"], block=True).set_speed(arguments["speed"])
    return {}


def _query_jobs(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    found = []
    for _, job in desk.jobs():
        described = job.describe()
        entry = {
            "id": job.id,
            "type": described["type"],
            "status": described["status"],
            "current-progress": described["progress"]["current_bytes"],
            "total-progress": described["progress"]["total_bytes"],
        }
        if described["error_text"] is not None:
            entry["error"] = described["error_text"]
        found.append(entry)
    return found


def _query_block_jobs(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    found = []
    for _, job in desk.jobs():
        described = job.describe()
        entry = {
            "device": job.id,
            "type": described["type"],
            "len": described["progress"]["total_bytes"],
            "offset": described["progress"]["current_bytes"],
            "busy": described["busy"],
            "paused": described["paused"],
            "speed": described["speed"],
            "io-status": described["io_status"],
            "ready": False,
            "status": described["status"],
            "auto-finalize": described["auto_finalize"],
            "auto-dismiss": described["auto_dismiss"] is not False,
        }
        if described["error_text"] is not None:
            entry["error"] = described["error_text"]
        found.append(entry)
    return found


_VERBS: dict[str, Callable[[Job], None]] = {
    "pause": Job.pause,
    "resume": Job.resume,
    "cancel": Job.cancel,
    "complete": Job.complete,
    "change": Job.change,
    "finalize": Job.finalize,
    "dismiss": Job.dismiss,
}
#: These of the block-job verbs go by id.
_BY_ID = ("finalize", "dismiss", "change")

HANDLERS: dict[str, Handler] = {
    **{f"job-{name}": _verb(act, "id", block=False) for name, act in _VERBS.items()},
    **{
        f"block-job-{name}": _verb(act, "id" if name in _BY_ID else "device", block=True)
        for name, act in _VERBS.items()
    },
    "block-job-cancel": _block_job_cancel,
    "block-job-set-speed": _set_speed,
    "query-jobs": _query_jobs,
    "query-block-jobs": _query_block_jobs,
}
