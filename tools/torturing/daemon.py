"""The coordinator's role played by a daemon: ``shmcbw serve`` in the main thread, and a client of it that acts.

The client sits in the same process, so both die at once, and all that it does goes over the QMP socket.  The next
daemon finds the socket of a dead one, adopts the image, and its client asks for jobs and nodes: they must be there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from contextlib import closing
from functools import cached_property
from typing import Any

from shmcbw import SnapshotReader, open_snapshot
from shmcbw.errors import CutAbandonedError, ResizeRefusedError, ShmcbwError
from shmcbw.image import ImageFile
from shmcbw.segment import Segment, attach
from shmcbw.workers.daemon import serve
from shmcbw.workers.jobs import restore_error
from shmcbw.workers.qmp.client import Client, RefusedError
from shmcbw.workers.settings import ImageOption, Options
from tools.torturing import coordinator
from tools.torturing.coordinator import TRIES_S
from tools.torturing.place import Place
from tools.torturing.plan import ImagePlan
from tools.torturing.session import Session

NODE = "image"
LOOK_S = 0.005
#: A daemon answers by then, also after it had to wait for a lock.
CONNECT_LIMIT_S = TRIES_S + 10.0


class DaemonJob:
    """A job of the daemon, with what the role needs of `Job`."""

    _entry = None

    def __init__(self, client: Client, described: dict[str, Any]) -> None:
        self._client = client
        self.id: str = described["id"]
        self.target: str = described["target"]
        self.sync: str = described["sync"]
        self.drained_ns: int = described["drained_ns"]

    def _described(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.execute("x-shmcbw-query-job", id=self.id)
        return found

    @property
    def status(self) -> str:
        status: str = self._described()["status"]
        return status

    @property
    def error(self) -> BaseException | None:
        return restore_error(self._described()["failure"])

    def cancel(self) -> None:
        self._unless_concluded("job-cancel", id=self.id)

    def set_speed(self, speed: int) -> None:
        self._unless_concluded("block-job-set-speed", device=self.id, speed=speed)

    def dismiss(self) -> None:
        self._client.execute("job-dismiss", id=self.id)

    def _unless_concluded(self, verb: str, /, **arguments: Any) -> None:
        try:
            self._client.execute(verb, **arguments)
        except RefusedError:
            if self.status != "concluded":
                raise


class DaemonSnapshot:
    """A copy-before-write node and its reader's; read past the daemon, as any process may."""

    def __init__(self, client: Client, place: Place, name: str, size_bytes: int) -> None:
        self._client = client
        self._place = place
        self.name = name
        self.size_bytes = size_bytes

    @property
    def drained_ns(self) -> int:
        found = self._client.execute("x-shmcbw-query-snapshots", node_name=NODE)
        (drained_ns,) = (each["drained_ns"] for each in found if os.path.basename(each["target"]).startswith(self.name))
        return int(drained_ns)

    @cached_property
    def _reader(self) -> SnapshotReader:
        return open_snapshot(self._place.image, self._place.targets / self.name)

    def pread(self, count: int, offset: int) -> bytes:
        return self._reader.pread(count, offset)

    def discard(self, count: int, offset: int) -> None:
        self._client.execute("blockdev-add", driver="snapshot-access", node_name=f"{self.name}.read", file=self.name)
        try:
            self._client.execute(
                "x-shmcbw-snapshot-discard", node_name=f"{self.name}.read", offset=offset, length=count
            )
        except RefusedError:
            broken = self._reader.broken
            raise broken if broken is not None else AssertionError("refused, and not broken") from None
        finally:
            self._client.execute("blockdev-del", node_name=f"{self.name}.read")

    def close(self) -> None:
        if "_reader" in self.__dict__:
            self._reader.close()
        self._client.execute("blockdev-del", node_name=self.name)


class DaemonCoordinator:
    """What the role needs of `Coordinator`, over QMP."""

    def __init__(self, client: Client, place: Place) -> None:
        self._client = client
        self._place = place

    @property
    def jobs(self) -> list[DaemonJob]:
        return [DaemonJob(self._client, each) for each in self.status()["jobs"]]

    def find_snapshots(self) -> dict[str, DaemonSnapshot]:
        """By their nodes' names."""
        nodes = self._client.execute("query-named-block-nodes")
        found = {}
        for name in (node["node-name"] for node in nodes if node["drv"] == "copy-before-write"):
            found[name] = self._snapshot(name)
        for name in (node["node-name"] for node in nodes if node["drv"] == "snapshot-access"):
            # Of one who died in the middle of a discard.
            self._client.execute("blockdev-del", node_name=name)
        return found

    def _snapshot(self, name: str) -> DaemonSnapshot:
        return DaemonSnapshot(self._client, self._place, name, os.stat(self._place.image).st_size)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._client.execute("x-shmcbw-query-image", node_name=NODE)
        return status

    def backup(
        self, path: os.PathLike[str], *, sync: str, speed: int, on_cbw_error: str, cbw_timeout: float
    ) -> DaemonJob:
        name = os.path.basename(path)
        wanted = {"image": str(self._place.image), "target-file": str(path), "job-id": name, "sync": sync}
        wanted |= {"speed": speed, "on-cbw-error": on_cbw_error, "cbw-timeout": cbw_timeout}  # type: ignore[dict-item]
        self._cut("x-shmcbw-backup", backups=[wanted])
        return DaemonJob(self._client, self._client.execute("x-shmcbw-query-job", id=name))

    def snapshot(self, path: os.PathLike[str], *, on_cbw_error: str, cbw_timeout: float) -> DaemonSnapshot:
        name = os.path.basename(path)
        self._cut(
            "x-shmcbw-snapshot-add",
            image=str(self._place.image),
            node_name=name,
            scratch_file=str(path),
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
        )
        return self._snapshot(name)

    def _cut(self, command: str, /, **arguments: Any) -> None:
        try:
            self._client.execute(command, **arguments)
        except RefusedError as error:
            if "limit of" in str(error) or "in the middle of a write" in str(error):
                raise CutAbandonedError(str(error)) from None
            raise

    def resize(self, size_bytes: int) -> None:
        try:
            self._client.execute("block_resize", node_name=NODE, size=size_bytes)
        except RefusedError as error:
            raise ResizeRefusedError(str(error)) from None
        finally:
            self._let_go()

    @cached_property
    def _segment(self) -> Segment:
        with closing(ImageFile.open(self._place.image, writable=False)) as image:
            return attach(image)

    def close(self) -> None:
        """Have the daemon end: it cancels and drops what there is."""
        self._let_go()
        self._client.execute("quit")
        self._client.close()

    def _let_go(self) -> None:
        if "_segment" in self.__dict__:
            self.__dict__.pop("_segment").close()


class Role(coordinator.Role):
    """One incarnation's client."""

    def _start(self) -> Any:
        deadline = time.monotonic() + CONNECT_LIMIT_S
        while True:
            try:
                # By its pid: a dead one's socket may still be there.
                client = Client(str(self.place.qmp), pid=os.getpid())
            except (OSError, EOFError, ShmcbwError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_S)
            else:
                return DaemonCoordinator(client, self.place)

    def _find_snapshots(self) -> Any:
        found: Any = self.coordinator
        return found.find_snapshots()


def _act(role: Role) -> None:
    """The client's thread.  Whatever ends it but the role's end ends the process."""
    try:
        Session([role]).run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _serve(place: Place, incarnation: int) -> None:
    role = Role(place, incarnation)
    client = threading.Thread(target=_act, args=(role,), name="client", daemon=True)
    client.start()
    plan = role.plan
    options = Options(
        images=(ImageOption(str(place.image), NODE),),
        qmp=str(place.qmp),
        workers=plan.workers,
        cluster_size=plan.cluster_size,
        slots=plan.slots,
    )

    def to_the_end() -> bool:
        serve(options)
        return True

    if coordinator.started(to_the_end, role.events) is None:
        raise SystemExit(2)
    client.join()


def run(place: Place, number: int, incarnation: int) -> None:
    """The whole life of one incarnation of either kind; returns when it has closed the coordinator, as ordered."""
    assert number == 0
    image_plan = ImagePlan.load(place.plan)
    if image_plan.daemon:
        _serve(place, incarnation)
        return
    places = [Place(place.directory.parent / name) for name in image_plan.together] or [place]
    Session([coordinator.Role(each, incarnation) for each in places]).run()
