"""A progress bar for a job, on stderr: rich where it is installed, else a plain line."""

from __future__ import annotations

import sys
import time

from shmcbw.errors import ShmcbwError
from shmcbw.sizes import format_size

from .job_states import CONCLUDED
from .jobs import Job
from .remote import RemoteJob

LOOK_S = 0.1


def follow(job: Job | RemoteJob) -> None:
    """Show a job until it is concluded; raise its error if it failed or was cancelled."""
    try:
        import rich.console
        import rich.progress
    except ImportError:
        _follow_plainly(job)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("backup", total=job.progress().total_bytes)
        while not _concluded(job):
            bar.update(task, completed=job.progress().current_bytes)
        bar.update(task, completed=job.progress().current_bytes)
    job.wait()


def _follow_plainly(job: Job | RemoteJob) -> None:
    shown = 0.0
    while not _concluded(job):
        if time.monotonic() - shown >= 1:
            shown = time.monotonic()
            progress = job.progress()
            print(f"{format_size(progress.current_bytes)} of {format_size(progress.total_bytes)}", file=sys.stderr)
    job.wait()


def _concluded(job: Job | RemoteJob) -> bool:
    if job.status != CONCLUDED:
        try:
            job.wait(LOOK_S)
        except TimeoutError:
            return False
        except (OSError, ShmcbwError):
            # The caller raises it once the bar is down.
            return True
    return True
