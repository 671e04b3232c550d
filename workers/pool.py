"""The pool: starts copy workers, notices their death, gives their claims back, replaces them.

Workers are started as ``python -m shmcbw.workers.copy_worker`` rather than by multiprocessing: a spawned child would
run the embedding program's main module again, and starts five times slower.  They are told names only (but for the
image's lock, which they inherit), and outlive the coordinator on purpose.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

from shmcbw import _core
from shmcbw.bitmap import PENDING, Bitmap
from shmcbw.errors import PoolError
from shmcbw.failpoints import hit, index_of
from shmcbw.layout import SNAPSHOT_COUNT, Header, Snapshot, Worker
from shmcbw.segment import Segment, worker_byte
from shmcbw.snapshots import wake_all

from .permissions import ImageLock
from .starting import ID_TAKEN_STATUS, describe_status

log = logging.getLogger("shmcbw")

_REAPING, _REAPED, _SPAWNED = (index_of(f"coordinator.{step}") for step in ("reaping", "reaped", "spawned"))
_GENERATION = index_of("adopt.generation")

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
RESPAWN_PAUSE_S = 0.5
PATIENCE_S = 2.0


class Pool:
    """The copy workers of one coordinator: ids, processes, generation."""

    def __init__(self, segment: Segment, image_path: str, count: int, image_lock: ImageLock) -> None:
        self._segment = segment
        self._image_lock = image_lock
        self._image_path = image_path
        self._count = count
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._started_s: dict[int, float] = {}
        self._generation = 0
        self._leads = False
        self._complaint = ""

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by worker id."""
        return {worker_id: process.pid for worker_id, process in self._processes.items()}

    def start(self) -> None:
        """Start ours on free ids, then raise the generation, so that workers of an earlier coordinator leave.

        In this order, so that there is always somebody who serves writers, whoever dies meanwhile; only where there are
        not ids enough for both do the old ones leave first.  Returns when all of ours serve; PoolError if they don't
        within 20 s: then the old ones stay.
        """
        self._generation = self._next_generation()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            free = self._free_ids()
            if len(self._processes) + len(free) < self._count and not self._leads:
                self._lead()
            for worker_id in free[: self._count - len(self._processes)]:
                self._spawn(worker_id)
            if len(self._processes) == self._count and all(map(self._serves, self._processes)):
                self._lead()
                return
            dead = {i: process.returncode for i, process in self._processes.items() if process.poll() is not None}
            lost = [worker_id for worker_id, status in dead.items() if status < 0 or status == ID_TAKEN_STATUS]
            if len(lost) < len(dead) or time.monotonic() > deadline:
                self.stop()
                why = ", ".join(f"{i}: {describe_status(status)}" for i, status in dead.items()) or "they are too slow"
                raise PoolError(f"{self._image_path}: the copy workers did not start ({why}); stderr has their words")
            for worker_id in lost:
                # Killed, or a worker that a dead coordinator had just started was faster: another one takes its place.
                del self._processes[worker_id]
            self._segment.semaphore("c").wait(10_000_000)

    def _next_generation(self) -> int:
        """A number that no worker of this image has had, also none of a coordinator that died over its start."""
        segment = self._segment
        number = (segment.header(Header.last_generation) + 1) & 0xFFFFFFFF
        segment.set_header(Header.last_generation, number)
        return number

    def _lead(self) -> None:
        """Our generation is the pool's from here on: workers of older ones leave."""
        self._leads = True
        self._raise_generation(self._generation)

    def _raise_generation(self, number: int) -> None:
        self._segment.set_header(Header.pool_generation, number)
        hit(self._segment.failpoints, _GENERATION)
        # Ours take posts that were meant for those that are to leave.
        self.wake(range(self._segment.geometry.worker_count))

    def _free_ids(self) -> list[int]:
        ids = range(1, self._segment.geometry.worker_count + 1)
        return [i for i in ids if i not in self._processes and not self._segment.locked(worker_byte(i))]

    def _spawn(self, worker_id: int) -> None:
        self._return_claims(worker_id)
        command = [
            sys.executable,
            # Not the current directory: a file in it could take the place of a module.
            "-P",
            "-m",
            "shmcbw.workers.copy_worker",
            self._image_path,
            str(worker_id),
            str(self._generation),
        ]
        # The one handle that a worker gets: it keeps the image locked for as long as anybody copies (permissions.py).
        lock = (self._image_lock.fd,) if self._image_lock.held else ()
        self._processes[worker_id] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=lock
        )
        self._started_s[worker_id] = time.monotonic()
        hit(self._segment.failpoints, _SPAWNED)

    def _serves(self, worker_id: int) -> bool:
        return (
            self._segment.worker(worker_id, Worker.generation) == self._generation
            and self._segment.worker(worker_id, Worker.pid) == self._processes[worker_id].pid
        )

    def supervise(self) -> None:
        """Reap the dead, return their claims, wake who waited for them, and start others in their place."""
        if self._segment.header(Header.pool_generation) != self._generation:
            log.error("somebody has overwritten the pool's generation: workers will leave, and be replaced")
            self._segment.set_header(Header.pool_generation, self._generation)
        if self._segment.header(Header.last_generation) != self._generation:
            log.error("somebody has overwritten the number of the last generation: no worker could start")
            self._segment.set_header(Header.last_generation, self._generation)
        self._reap_strangers()
        if len(self._processes) < self._count:
            # Their start failed after a resize: tried again.
            for worker_id in self._free_ids()[: self._count - len(self._processes)]:
                self._spawn(worker_id)
        for worker_id, process in list(self._processes.items()):
            if process.poll() is None:
                continue
            if time.monotonic() - self._started_s[worker_id] < RESPAWN_PAUSE_S:
                continue
            log.warning("copy worker %d (pid %d): %s", worker_id, process.pid, describe_status(process.returncode))
            # If this fails, the dead one stays in the table and the next look tries again.
            self._started_s[worker_id] = time.monotonic()
            self._spawn(worker_id)
            self._segment.count_header(Header.workers_replaced)
            wake_all(self._segment)
            self.wake()

    def _reap_strangers(self) -> None:
        """Workers of a dead coordinator may die after we took over, with clusters claimed; nobody takes their place."""
        segment = self._segment
        for worker_id in range(1, segment.geometry.worker_count + 1):
            # A worker has its pid there before it claims, and takes it away before it gives up its lock.
            if (
                worker_id not in self._processes
                and segment.worker(worker_id, Worker.pid)
                and not segment.locked(worker_byte(worker_id))
            ):
                log.warning("copy worker %d of an earlier coordinator died", worker_id)
                self._return_claims(worker_id)
                wake_all(segment)
                self.wake()

    def return_stray_claims(self, claimers: Iterable[int]) -> None:
        """Give back the claims of those ids that neither we nor anybody else has: of an orphan that died after the
        adoption, or of nobody."""
        for worker_id in claimers:
            if worker_id not in self._processes and not self._segment.locked(worker_byte(worker_id)):
                self._return_claims(worker_id)
                wake_all(self._segment)
                self.wake()

    def return_dead_claims(self) -> None:
        """For an adopting coordinator: clear every id that nobody holds."""
        for worker_id in self._free_ids():
            self._return_claims(worker_id)

    def _return_claims(self, worker_id: int) -> None:
        """Bytes equal to a dead worker's id go back to PENDING (I3).  Its lock is free: all its calls have ended."""
        segment = self._segment
        if not segment.try_lock(worker_byte(worker_id)):
            return
        try:
            hit(segment.failpoints, _REAPING)
            for index in range(SNAPSHOT_COUNT):
                self._return_claims_in(index, worker_id)
            hit(segment.failpoints, _REAPED)
            for word in (Worker.state, Worker.pid, Worker.generation):
                segment.set_worker(worker_id, word, 0)
        finally:
            segment.unlock(worker_byte(worker_id))

    def _return_claims_in(self, index: int, worker_id: int) -> None:
        segment = self._segment
        turns = segment.geometry.snapshot(index, Snapshot.turns)
        _core.exchange(segment.memory, turns, turns + Snapshot.turns.size, worker_id, PENDING)
        try:
            bitmap = Bitmap.attach(segment, segment.snapshot(index, Snapshot.serial))
        except FileNotFoundError:
            # No other error: the id would be given out again with claims that nobody copies.
            return
        if bitmap.release_claims(worker_id):
            segment.set_snapshot(index, Snapshot.cursor, 0)
        bitmap.close()

    def wait_ready(self, index: int, serial: int, timeout_s: float, look: Callable[[], None]) -> int:
        """Wait until the workers have tried to open a snapshot's target: 0, or the errno of the first refusal.

        Dead workers are replaced meanwhile, and ``look`` is called, again and again.  One that neither dies nor answers
        (stopped) is not waited for longer than two seconds if another one is ready; TimeoutError if none is after
        ``timeout_s``.
        """
        started = time.monotonic()
        while True:
            self.supervise()
            look()
            answers = [self._answer(worker_id, index, serial) for worker_id in self._processes]
            refusal = next((answer for answer in answers if answer), 0)
            waited = time.monotonic() - started
            if refusal or None not in answers or (0 in answers and waited > min(PATIENCE_S, timeout_s)):
                return refusal
            if waited > timeout_s:
                raise TimeoutError(f"no copy worker has opened the target within {timeout_s} s")
            self.wake()
            self._segment.semaphore("c").wait(5_000_000)

    def wait_let_go(self, index: int, serial: int, timeout_s: float) -> bool:
        """Wait until no worker can write into the target of a snapshot that is not active any more: whether that came
        in time.  The dead are replaced meanwhile; one that is stopped is waited for in vain."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.supervise()
            # All of them: one of a dead coordinator may still be in the middle of a chunk.
            alive = [i for i in range(1, self._segment.geometry.worker_count + 1) if self._lives(i)]
            if all(self._answer(worker_id, index, serial) is None for worker_id in alive):
                return True
            if time.monotonic() > deadline:
                return False
            self.wake()
            self._segment.semaphore("c").wait(5_000_000)

    def _lives(self, worker_id: int) -> bool:
        return self._segment.locked(worker_byte(worker_id))

    def refusal(self, index: int, serial: int) -> int:
        """The errno with which all workers failed to open a snapshot's target; 0 if any of them serves it."""
        answers = [self._answer(worker_id, index, serial) for worker_id in self._processes]
        return 0 if None in answers or 0 in answers or not answers else answers[0] or 0

    def _answer(self, worker_id: int, index: int, serial: int) -> int | None:
        memory, geometry = self._segment.memory, self._segment.geometry
        if _core.load_u32(memory, geometry.worker(worker_id, Worker.ready_serial) + 4 * index) != serial:
            return None
        number = _core.load_u32(memory, geometry.worker(worker_id, Worker.ready_errno) + 4 * index)
        return number if number < 4096 else errno.EUCLEAN

    def wake(self, worker_ids: Iterable[int] | None = None) -> None:
        """There is work, or the table has changed: one post for each worker."""
        try:
            pool = self._segment.semaphore("pool")
            for _ in worker_ids if worker_ids is not None else range(max(self._count, 1)):
                pool.post()
            self._complaint = ""
        except OSError as error:
            # A post only wakes: without it the workers look a second later.
            if str(error) != self._complaint:
                log.warning("the copy workers can't be woken: %s", error)
            self._complaint = str(error)

    def stop(self) -> None:
        """End the workers: they leave by themselves when the generation moves on; who does not is killed.

        Before ours is the pool's generation, only ours end: whoever serves now goes on.
        """
        if self._leads:
            self._raise_generation(self._next_generation())
            self._leads = False
        else:
            for process in self._processes.values():
                process.kill()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes.values():
            while process.poll() is None and time.monotonic() < deadline:
                self.wake()
                try:
                    process.wait(0.02)
                except subprocess.TimeoutExpired:
                    continue
            if process.poll() is None:
                process.kill()
                process.wait()
        for worker_id in self._processes:
            self._return_claims(worker_id)
        self._processes.clear()


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that still means the same in a worker: a memfd's /proc/self becomes this process."""
    name = os.path.abspath(os.fspath(path))
    prefix = "/proc/self/"
    return f"/proc/{os.getpid()}/{name.removeprefix(prefix)}" if name.startswith(prefix) else name
