"""The processes that the fault matrix kills and stops: a coordinator with two workers, writers, a reader.

A world lives through many rounds: whoever died is replaced, as its user would, and everything else goes on.  Nobody is
told anything but by what a user has too: the coordinator's interface and a writer's own loop.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import shmcbw
from shmcbw import _core, failpoints
from shmcbw.epochs import epoch
from shmcbw.failpoints import POINTS
from shmcbw.image import Identity, ImageFile
from shmcbw.invariants import check
from shmcbw.layout import Header, Worker
from shmcbw.segment import JOURNAL_SUFFIX, SHM, Segment, attach, segment_name, worker_byte
from tests.conftest import wait_for
from tests.crash import wave
from tests.owner import Owner
from tests.processes import state

#: Two waves, and more behind them than a worker copies ahead of them.
SIZE = 6 << 20
PATIENCE_S = 30.0
COORDINATOR, WORKER, WRITER, READER = "coordinator", "worker", "writer", "reader"

#: A drained section's limit.  Short, for whoever stands still beyond it is waited for that long.
DRAIN_LIMIT_S = 0.25
#: Beyond every limit that a round has (cut and late copy), twice.
STOP_S = 2 * DRAIN_LIMIT_S + 0.1
RECORD = 60_000


@contextmanager
def attached(image: Path) -> Iterator[Segment]:
    """The control segment of an image, as anybody may look at it."""
    file = ImageFile.open(image, writable=False)
    segment = attach(file)
    try:
        yield segment
    finally:
        segment.close()
        file.close()


def _place(point: str) -> int:
    return Header.failpoints.offset + 8 * (1 + failpoints.index_of(point))


def _word(segment: Segment, point: str) -> int:
    return _core.load_u64(segment.memory, _place(point))


class World:
    """One image, served and written to."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image = image
        self.directory = directory
        with image.open("r+b") as file:
            for number in range(wave.WRITERS):
                for offset in wave.places(number):
                    file.seek(offset)
                    file.write(bytes(wave.BLOCK))
        self.control_path = directory / "control"
        self.control = wave.Control.create(self.control_path)
        self.owner = Owner(image, OWNER_DRAIN_LIMIT_S=str(DRAIN_LIMIT_S))
        self.asked = 1  # it says by itself that it serves
        self.writers: dict[int, subprocess.Popen[bytes]] = {}
        self.guest: subprocess.Popen[bytes] | None = None
        self.reader: subprocess.Popen[bytes] | None = None
        self.stopped: list[int] = []
        self.killed: list[int] = []
        #: Workers that a dead coordinator has left, who may be about to leave.
        self.orphans: list[int] = []
        self.rounds = 0
        self.failed = False
        self._recorded: dict[str, int] = {}
        self._armed: mmap.mmap
        self.hear()
        for number in range(wave.WRITERS):
            self.start_writer(number)
        self.pause()

    # -- the coordinator -----------------------------------------------------------------------------------------------

    def order(self, **command: Any) -> None:
        """Give the coordinator an order, and do not wait for its answer."""
        self.owner.send(**command)
        self.asked += 1

    def hear(self) -> dict[str, Any] | None:
        """Wait for the answers to all orders: the last one, None if it died over it."""
        answer = None
        while self.asked:
            wait_for(self._readable, "the coordinator answers", PATIENCE_S)
            answer = self.owner.answer()
            if answer is None:
                self.asked = 0
                return None
            self.asked -= 1
        return answer

    def ask(self, **command: Any) -> Any:
        """An order to a coordinator that nothing is to happen to: what it answers."""
        self.order(**command)
        answer = self.hear()
        assert answer is not None, f"the coordinator died over {command}"
        assert "ok" in answer, f"{command}: {answer}"
        return answer["ok"]

    def _readable(self) -> bool:
        assert self.owner.process.stdout is not None
        return bool(select.select([self.owner.process.stdout], [], [], 0)[0])

    def start_owner(self, **environment: str) -> None:
        """The next coordinator, in the place of one that died; does not wait until it serves."""
        self.owner.end()
        self.owner = Owner(self.image, OWNER_DRAIN_LIMIT_S=str(DRAIN_LIMIT_S), **environment)
        self.asked = 1

    # -- the writers ---------------------------------------------------------------------------------------------------

    def start_writer(self, number: int) -> None:
        self.writers[number] = wave.start(self.image, self.control_path, number)

    def start_guest(self) -> None:
        """A writer that comes and goes."""
        self.guest = wave.start(self.image, self.control_path, wave.WRITERS)

    def run(self) -> None:
        self.control.mode = wave.RUN

    def pause(self) -> None:
        """Have every writer that is not stopped stand still between two writes."""
        self.control.mode = wave.PAUSE
        wait_for(self._stand_still, "the writers stand still", PATIENCE_S)

    def _stand_still(self) -> bool:
        for number, writer in self.writers.items():
            assert writer.poll() is None, f"writer {number} ended: {writer.returncode}"
        return all(self.control.paused(n) for n, writer in self.writers.items() if writer.pid not in self.stopped)

    def let_write(self, writes: int = wave.WIDTH + 2) -> None:
        """Have them write, and wait until each that is not stopped has done so much: all live writers make progress."""
        goal = {
            number: self.control.count(number) + writes
            for number, writer in self.writers.items()
            if writer.pid not in self.stopped and writer.poll() is None
        }
        self.run()
        wait_for(
            lambda: all(self.control.count(number) >= count for number, count in goal.items()),
            "all live writers make progress",
            PATIENCE_S,
        )

    # -- who there is --------------------------------------------------------------------------------------------------

    def workers(self) -> list[int]:
        """The pids of the workers that hold an id."""
        try:
            with attached(self.image) as segment:
                ids = range(1, segment.geometry.worker_count + 1)
                pids = [segment.worker(i, Worker.pid) for i in ids if segment.locked(worker_byte(i))]
        except shmcbw.ShmcbwError:
            return []
        return [pid for pid in pids if pid]

    def serving_workers(self) -> list[int]:
        """The pids of the workers that serve this coordinator's pool."""
        with attached(self.image) as segment:
            now = segment.header(Header.pool_generation)
            return [
                segment.worker(i, Worker.pid)
                for i in range(1, segment.geometry.worker_count + 1)
                if segment.locked(worker_byte(i))
                and segment.worker(i, Worker.generation) == now
                and segment.worker(i, Worker.pid)
            ]

    def family(self) -> dict[int, str]:
        """The kind of each process, by its pid; also of workers that are just starting or leaving."""
        found = {self.owner.pid: COORDINATOR}
        found |= {writer.pid: WRITER for writer in self._clients()}
        if self.reader is not None:
            found[self.reader.pid] = READER
        try:
            children = [process.pid for process in psutil.Process(self.owner.pid).children()]
        except psutil.NoSuchProcess:
            children = []
        return found | dict.fromkeys([*children, *self.workers(), *self.orphans], WORKER)

    def _clients(self) -> list[subprocess.Popen[bytes]]:
        return [*self.writers.values(), *([self.guest] if self.guest is not None else [])]

    def find_stopped(self, kind: str) -> int | None:
        """The pid of a process of this kind that is stopped, and was not by the test."""
        for pid, found in self.family().items():
            if found == kind and pid not in self.stopped and state(pid) in ("T", "t"):
                return pid
        return None

    def dead_kinds(self) -> set[str]:
        """Of which kind somebody was killed, and not by the test.  A worker's death is its coordinator's to see."""
        found = {COORDINATOR} if self.owner.process.poll() == -signal.SIGKILL else set()
        if any(w.poll() == -signal.SIGKILL and w.pid not in self.killed for w in self._clients()):
            found.add(WRITER)
        if self.reader is not None and self.reader.poll() == -signal.SIGKILL:
            found.add(READER)
        return found

    def stop(self, pids: list[int]) -> None:
        """SIGSTOP, by the test itself."""
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            self.stopped.append(pid)

    def kill_by_test(self, pid: int) -> None:
        """SIGKILL, by the test itself."""
        self.killed.append(pid)
        os.kill(pid, signal.SIGKILL)

    def go_on(self) -> None:
        for pid in self.stopped:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
        self.stopped = []

    # -- failpoints ----------------------------------------------------------------------------------------------------

    def arm(self, point: str, specification: str) -> None:
        with attached(self.image) as segment:
            failpoints.arm(segment.memory, point, specification)
            # Held on to: it may be unlinked by whoever leaves last, and its words still tell what was reached.
            self._armed = mmap.mmap(segment.fd, Header.SIZE)

    def disarm(self) -> None:
        with attached(self.image) as segment:
            failpoints.disarm_all(segment.memory)

    def is_spent(self, point: str) -> bool:
        """Whether the one action of the point that was armed last has happened, in the segment it was armed in."""
        return _core.load_u64(self._armed, _place(point)) == 0

    def record(self, beside: dict[str, str]) -> None:
        """Arm all points so that nothing happens and each notes that it was reached."""
        with attached(self.image) as segment:
            for point in POINTS:
                failpoints.arm(segment.memory, point.name, beside.get(point.name, f"kill@{RECORD}"))
            self._recorded = {point.name: _word(segment, point.name) for point in POINTS}

    def was_reached(self, point: str) -> bool:
        return point in self.reached()

    def reached(self) -> set[str]:
        """The points that were reached since `record`."""
        with attached(self.image) as segment:
            return {point for point, word in self._recorded.items() if _word(segment, point) != word}

    def wake_workers(self) -> None:
        """Have them look around; a post more than needed is harmless."""
        with attached(self.image) as segment:
            for _ in range(2):
                segment.semaphore("pool").post()

    def epoch(self) -> int:
        with attached(self.image) as segment:
            return epoch(segment)

    # -- after a round -------------------------------------------------------------------------------------------------

    def recover(self) -> dict[str, Any] | None:
        """Replace who died, as their user would: one restart, no manual step.  What the coordinator has last said."""
        self.go_on()
        answer, asked = None, self.asked
        if self.owner.process.poll() is None:
            answer = self.hear()
            if asked and answer is None:
                self.owner.process.wait(PATIENCE_S)
        if self.owner.process.poll() is not None:
            died = self.owner.process.returncode
            assert died == -signal.SIGKILL, f"the coordinator ended by itself: {died}"
            self.start_owner()
            # Nothing is armed any more that could explain another death.
            assert self.hear() is not None, f"the next coordinator did not start: {self.owner.process.wait(PATIENCE_S)}"
        for number, writer in list(self.writers.items()):
            if writer.poll() is not None:
                self.start_writer(number)
        if self.guest is not None:
            assert self.guest.wait(PATIENCE_S) in (0, -signal.SIGKILL)
            self.guest = None
        wait_for(lambda: len(self.serving_workers()) == 2, "two workers serve", PATIENCE_S)
        # One that leaves late would be taken for somebody of the next round.
        wait_for(lambda: all(state(pid) in ("", "Z", "X") for pid in self.orphans), "orphans leave", PATIENCE_S)
        self.orphans = []
        return answer

    def end_reader(self) -> int | None:
        """Wait for the reader: its exit status."""
        if self.reader is None:
            return None
        status = self.reader.wait(PATIENCE_S)
        self.reader = None
        return status

    def is_sound(self) -> None:
        """The segment keeps its invariants, and nothing is left over in /dev/shm or beside the targets."""
        with attached(self.image) as segment:
            assert check(segment) == []
            assert self._names() - self._own_names(segment.geometry.slot_count) == set()
        left = [path.name for path in self.directory.iterdir() if ".shmcbw-" in path.name]
        assert left == []

    def _names(self) -> set[str]:
        name = segment_name(Identity.of(os.stat(self.image)))[1:]
        return {file for file in os.listdir(SHM) if file.removeprefix("sem.").partition(".")[0] == name}

    def _own_names(self, slots: int) -> set[str]:
        """What a coordinator without snapshots has there; its journal may tell of a job that was lost."""
        name = segment_name(Identity.of(os.stat(self.image)))[1:]
        semaphores = {f"sem.{name}.{suffix}" for suffix in ("pool", "c", *(f"s{i}" for i in range(slots)))}
        return {name, name + JOURNAL_SUFFIX, *semaphores}

    def close(self) -> None:
        """End everybody in order; nothing may be left."""
        self.control.mode = wave.LEAVE
        for writer in self.writers.values():
            assert writer.wait(PATIENCE_S) == 0
        self.ask(do="close")
        assert self.owner.process.wait(PATIENCE_S) == 0
        assert self._names() == set()

    def kill(self) -> None:
        """End everybody, whatever state a failed round has left them in."""
        for pid in self.family():
            for number in (signal.SIGCONT, signal.SIGKILL):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
        for process in (*self._clients(), self.reader):
            if process is not None:
                process.kill()
                process.wait()
        self.owner.end()
        self.control.close()
