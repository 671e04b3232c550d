"""What can be seen from outside: pids, marks, deaths that were noticed, what is left over.  Reads only.

The driver attaches to control segments to aim its kills and to see how soon the dead are reaped; it takes no lock and
stores no word.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from shmcbw import states
from shmcbw.bitmap import Bitmap
from shmcbw.epochs import epoch
from shmcbw.errors import ShmcbwError
from shmcbw.image import Identity
from shmcbw.layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Worker
from shmcbw.segment import Segment, attach_named, segment_name
from shmcbw.snapshots import state_of
from tools.torturing.place import Place

SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Death:
    """Somebody who died and is to be reaped: a writer's slot, or a worker's entry."""

    role: str
    pid: int
    dead_ns: int


class Watch:
    """One image as seen from outside."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.identity = Identity.of(os.stat(place.image))
        self._segment: Segment | None = None

    def follow(self) -> Segment | None:
        """The segment that is there now, or None."""
        if self._segment is not None and not self._segment.linked():
            self.close()
        if self._segment is None:
            try:
                self._segment = attach_named(self.identity, os.geteuid())
            except (ShmcbwError, OSError):
                return None
        return self._segment

    def worker_pids(self) -> list[int]:
        """Pids of workers by id; of the dead ones too, until they are reaped."""
        segment = self._segment
        if segment is None:
            return []
        pids = [segment.worker(worker, Worker.pid) for worker in range(1, segment.geometry.worker_count + 1)]
        return [pid for pid in pids if pid]

    def generation_is_whole(self, workers: int) -> bool:
        """Whether so many workers of the present generation live."""
        segment = self._segment
        if segment is None:
            return False
        now = segment.header(Header.pool_generation)
        found = [
            segment.worker(worker, Worker.pid)
            for worker in range(1, segment.geometry.worker_count + 1)
            if segment.worker(worker, Worker.generation) == now and segment.locked(worker)
        ]
        return sum(pid != 0 for pid in found) >= workers

    def workers_replaced(self) -> int:
        return self._segment.header(Header.workers_replaced) if self._segment is not None else 0

    def in_flight(self, pid: int) -> bool:
        """Whether a writer is in the middle of a write."""
        segment = self._segment
        if segment is None:
            return False
        slots = range(segment.geometry.slot_count)
        return any(segment.slot(slot, Slot.pid) == pid and segment.slot(slot, Slot.in_flight) for slot in slots)

    def drained(self) -> bool:
        """Whether the epoch is odd."""
        return self._segment is not None and epoch(self._segment) % 2 == 1

    def reaped(self, death: Death) -> bool:
        """Whether the segment names the dead one no more."""
        segment = self._segment
        if segment is None:
            return True
        if death.role == "worker":
            return death.pid not in self.worker_pids()
        return all(segment.slot(slot, Slot.pid) != death.pid for slot in range(segment.geometry.slot_count))

    def claims(self, pid: int) -> int:
        """How many clusters a worker has claimed."""
        segment = self._segment
        if segment is None:
            return 0
        workers = range(1, segment.geometry.worker_count + 1)
        ids = [worker for worker in workers if segment.worker(worker, Worker.pid) == pid]
        claims = 0
        for index in range(SNAPSHOT_COUNT) if ids else ():
            if state_of(segment, index) == states.ACTIVE:
                try:
                    bitmap = Bitmap.attach(segment, segment.snapshot(index, Snapshot.serial))
                except OSError:
                    continue
                claims += sum(bitmap.memory[:].count(worker) for worker in ids)
                bitmap.close()
        return claims

    def describe(self, death: Death) -> str:
        """What the segment says of a dead one."""
        segment = self._segment
        if segment is None or death.role != "worker":
            return f"a {death.role}"
        workers = range(1, segment.geometry.worker_count + 1)
        generations = {
            worker: segment.worker(worker, Worker.generation)
            for worker in workers
            if segment.worker(worker, Worker.pid) == death.pid
        }
        now = segment.header(Header.pool_generation)
        return f"a copy worker, {{id: generation}} {generations} (now {now}), with {self.claims(death.pid)} claims"

    def is_worker(self, pid: int) -> bool:
        """Whether the process with this pid is a copy worker of this image: numbers in a segment are hearsay."""
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.fsencode(self.place.image) in arguments and b"shmcbw.workers.copy_worker" in arguments

    def names(self) -> list[str]:
        """What there is in /dev/shm of this image."""
        name = segment_name(self.identity)[1:]
        found = (file.removeprefix("sem.") for file in os.listdir(SHM))
        return sorted(file for file in found if file == name or file.startswith(f"{name}."))

    def litter(self) -> None:
        """Sabotage: what the search for leaks must find."""
        (Path(SHM) / f"{segment_name(self.identity)[1:]}.litter").touch()
        (self.place.targets / "backup-0-0.shmcbw-partial").touch()

    def remove_names(self) -> None:
        """What a failed round has left."""
        for name in self.names():
            for file in (Path(SHM) / name, Path(SHM) / f"sem.{name}"):
                file.unlink(missing_ok=True)

    def close(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def processes_of(directory: Path) -> list[psutil.Process]:
    """Processes with a path in the directory among their arguments: copy workers, also of coordinators that died."""
    found = []
    inside = f"{directory}/"
    for process in psutil.process_iter():
        try:
            if any(argument.startswith(inside) for argument in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_all(processes: list[psutil.Process], timeout_s: float = 5.0) -> None:
    """Kill workers that were left over, by their ids, and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
    deadline = time.monotonic() + timeout_s
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)


def signal_pid(pid: int, number: int) -> bool:
    """Signal a process that `Watch.is_worker` knows; False if it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def kill_pid(pid: int) -> bool:
    return signal_pid(pid, signal.SIGKILL)


def is_at_rest(pid: int) -> bool:
    """Whether a stop has taken effect, or the process is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True
