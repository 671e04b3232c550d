"""The command line's side of a daemon: the jobs, bitmaps and snapshots of images that a daemon serves."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

from shmcbw.errors import JobCancelledError, JobFailedError, NoCoordinatorError, ShmcbwError
from shmcbw.image import ImageFile
from shmcbw.segment import StaleSegmentError, attach

from .coordinator import Coordinator
from .job_states import CONCLUDED, NULL
from .jobs import Progress
from .qmp.client import Client, RefusedError, connect_to_owner
from .qmp.own_commands import READ_BYTES_MAX

LOOK_S = 0.2


def daemon_of(images: Iterable[str]) -> Client | None:
    """A client of the daemon that serves all of these images; None if no daemon serves any of them.

    ShmcbwError: it serves some of them only, or can't be reached.
    """
    found: dict[str, Client | None] = {}
    try:
        for image in images:
            found[image] = _daemon_of(image)
        clients = [client for client in found.values() if client is not None]
        if not clients:
            return None
        if len({client.pid for client in clients}) > 1 or len(clients) < len(found):
            raise ShmcbwError(
                f"{', '.join(found)}: not all of these images are served by one daemon, so there is no cut for all of "
                "them: have one daemon serve them, or back them up one by one"
            )
        return clients.pop()
    finally:
        for each in found.values():
            if each is not None and each not in _kept(found):
                each.close()


def _kept(found: dict[str, Client | None]) -> list[Client]:
    clients = [client for client in found.values() if client is not None]
    complete = len(clients) == len(found) and len({client.pid for client in clients}) == 1
    return clients[-1:] if complete else []


def _daemon_of(image: str) -> Client | None:
    file = ImageFile.open(image, writable=False)
    try:
        with closing(attach(file)) as segment:
            return connect_to_owner(segment)
    except (StaleSegmentError, NoCoordinatorError) as error:
        if isinstance(error, NoCoordinatorError) and error.errno is None:
            raise
        return None
    finally:
        file.close()


class RemoteJob:
    """A job of a daemon, with what `Job` has for those who look at one."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.id = job_id
        self._client = client
        self.described: dict[str, Any] = {}
        self.look()

    def look(self) -> None:
        self.described = self._client.execute("x-shmcbw-query-job", id=self.id)

    @property
    def status(self) -> str:
        self.look()
        status: str = self.described["status"]
        return status

    @property
    def target(self) -> str:
        target: str = self.described["target"]
        return target

    @property
    def drained_ns(self) -> int:
        drained_ns: int = self.described["drained_ns"]
        return drained_ns

    def progress(self) -> Progress:
        self.look()
        return Progress(**self.described["progress"])

    def wait(self, timeout: float | None = None) -> None:
        """As `Job.wait`; an event of the daemon ends it early."""
        waited = 0.0
        while self.status not in (CONCLUDED, NULL):
            if timeout is not None and waited >= timeout:
                raise TimeoutError(f"job {self.id} is {self.described['status']} after {timeout} s")
            try:
                self._client.receive(LOOK_S)
            except TimeoutError:
                waited += LOOK_S
        error = self.described["error"]
        if error is not None:
            if self.described["error_text"] == os.strerror(errno.ECANCELED):
                raise JobCancelledError(error)
            raise JobFailedError(errno.EIO, error)


def job_ids(count: int) -> list[str]:
    """Names for the jobs of one command: known before the daemon has answered."""
    return [f"cli-{os.getpid()}-{number}" for number in range(count)]


def start_backups(
    client: Client,
    pairs: Sequence[tuple[str, str]],
    ids: Sequence[str],
    options: dict[str, Any],
    quiesce: AbstractContextManager[object],
) -> list[RemoteJob]:
    """Have a daemon take one cut for all (image, target): the jobs, which the caller lets go with `call_off`.

    ``quiesce`` is entered and left here: it also holds while the daemon prepares the targets.
    """
    backups = [
        {"image": os.path.abspath(image), "target-file": os.path.abspath(target), "job-id": job_id, **options}
        for (image, target), job_id in zip(pairs, ids, strict=True)
    ]
    with quiesce:
        started = client.execute("x-shmcbw-backup", backups=backups)
    for said in started["notes"]:
        print(f"shmcbw backup: {said}", file=sys.stderr)
    return [RemoteJob(client, job_id) for job_id in started["jobs"]]


def call_off(path: str, ids: Sequence[str]) -> None:
    """Cancel jobs that have not ended, and have the daemon forget all of them.

    Over a connection of its own: whoever was interrupted may still have an answer due on the other one.  What was asked
    for there comes before this: commands that alter something take turns.  A daemon that has gone is told of on stderr:
    the next one goes on with the jobs.
    """
    try:
        with Client(path) as client:
            for job_id in ids:
                for verb in ("job-cancel", "job-dismiss"):
                    with contextlib.suppress(RefusedError):
                        client.execute(verb, id=job_id)
    except (ConnectionError, FileNotFoundError):
        print(f"shmcbw backup: no daemon is left to cancel {', '.join(ids)}", file=sys.stderr)


# -- verbs -------------------------------------------------------------------------------------------------------------


def owner_of(image: str) -> Client:
    """A client of the daemon that serves an image; NoCoordinatorError if none does."""
    client = daemon_of([image])
    if client is None:
        raise NoCoordinatorError(errno.ENOENT, f"{image}: no daemon serves it (shmcbw serve {image})")
    return client


def _node(client: Client, image: str) -> str:
    node: str = client.execute("x-shmcbw-find-image", filename=os.path.abspath(image))["node-name"]
    return node


def job_verb(client: Client, image: str, verb: str, name: str | None, *, speed: int | None) -> list[dict[str, Any]]:
    """Run a verb; for ``list`` the jobs."""
    if verb == "list":
        described = client.execute("x-shmcbw-query-image", node_name=_node(client, image))["jobs"]
        return [_short(each) for each in described]
    assert name is not None
    if verb == "wait":
        RemoteJob(client, name).wait()
    elif verb == "set-speed":
        client.execute("block-job-set-speed", device=name, speed=speed or 0)
    else:
        client.execute(f"job-{verb}", id=name)
    return []


def _short(job: dict[str, Any]) -> dict[str, Any]:
    progress = job["progress"]
    found = {"id": job["id"], "status": job["status"], "target": job["target"], "speed": job["speed"]}
    found |= {"bytes": progress["current_bytes"], "of": progress["total_bytes"]}
    return found | ({"error": job["error"]} if job["error"] else {})


def resize_image(image: str, size: int, *, added: bool) -> int:
    """Make an image ``size`` bytes large, or larger by so much: its size then.

    By the daemon that serves it, else as its coordinator for the moment.  Errors as of `Coordinator.resize`.
    """
    with closing(ImageFile.open(image, writable=False)) as file:
        size_bytes = file.size_bytes + size if added else size
    client = daemon_of([image])
    if client is not None:
        with client:
            client.execute("block_resize", node_name=_node(client, image), size=size_bytes)
        return size_bytes
    with Coordinator(image, workers=1) as coordinator:
        coordinator.resize(size_bytes)
    return size_bytes


def snapshot_verb(
    client: Client, image: str, verb: str, name: str | None, *, scratch: str | None, output: Any
) -> list[dict[str, Any]]:
    """Run a verb; for ``list`` the snapshots.  NAME is the copy-before-write node, NAME.read its reader."""
    node = _node(client, image)
    if verb == "list":
        found: list[dict[str, Any]] = client.execute("x-shmcbw-query-snapshots", node_name=node)
        return found
    if verb == "add":
        if scratch is None:
            raise ShmcbwError("add needs SCRATCH, a file that is made for old data")
        _add_snapshot(client, image, str(name), os.path.abspath(scratch))
    elif verb == "remove":
        client.execute("blockdev-del", node_name=f"{name}.read")
        client.execute("blockdev-del", node_name=name)
    else:
        size, position = os.stat(image).st_size, 0
        while position < size:
            length = min(READ_BYTES_MAX, size - position)
            data = client.execute("x-shmcbw-snapshot-read", node_name=f"{name}.read", offset=position, length=length)
            output.write(base64.b64decode(data["data"]))
            position += length
    return []


def _add_snapshot(client: Client, image: str, name: str, scratch: str) -> None:
    client.execute("x-shmcbw-snapshot-add", image=os.path.abspath(image), node_name=name, scratch_file=scratch)
    client.execute("blockdev-add", driver="snapshot-access", node_name=f"{name}.read", file=name)
