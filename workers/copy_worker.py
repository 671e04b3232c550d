"""A copy worker: a process of the pool that copies clusters from source to target.

    python -m shmcbw.workers.copy_worker IMAGE ID GENERATION

It gets names, never handles, and reads all it must know from the segment, so it goes on serving writers when its
coordinator dies.  In each round: what writers wait for, always first; then, if nothing was wanted, one chunk of
background copying, a few milliseconds at the measured speed of the target; then spin a little, then sleep.

Died here?  Its claims are the bytes equal to its id; whoever takes its lock gives them back (I3).  A cluster it had
half written stays PENDING and is copied again from a source that could not change meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shmcbw import _core, states
from shmcbw.bitmap import COPIED, COPIED_FOR_WRITER, PENDING, Bitmap
from shmcbw.clusters import byte_range
from shmcbw.errors import ShmcbwError
from shmcbw.failpoints import hit, index_of
from shmcbw.filter import leave_last
from shmcbw.image import Identity, close_descriptor
from shmcbw.layout import SNAPSHOT_COUNT, Header, Snapshot, Worker, words
from shmcbw.segment import COORDINATOR, Segment, attach, start_ticks, worker_byte
from shmcbw.slots import lives_any_writer
from shmcbw.snapshots import break_snapshot, marked_uncopied, store_first_error, target_path

from .copying import Copied, CopyRange, Source, copy_run
from .fleecing import SnapshotSource
from .manifest import PARTIAL_SUFFIX, Manifest, sidecar
from .starting import failed_start_status
from .targets import open_unfinished

_OPENED, _ACKNOWLEDGED = index_of("worker.opened"), index_of("worker.acknowledged")
_CLAIMED, _BACKGROUND = index_of("worker.claimed"), index_of("worker.background")
_COPYING, _COPIED = index_of("worker.copying"), index_of("worker.copied")
_PUBLISHED, _WOKE = index_of("worker.published"), index_of("worker.woke")
_FAILED, _DELIVERED = index_of("worker.failed"), index_of("worker.delivered")
_LOCKED, _SERVING, _LEFT = index_of("worker.locked"), index_of("worker.serving"), index_of("worker.left")
_ASLEEP = index_of("worker.asleep")

AWAY, BUSY, LOOKING, ASLEEP = range(4)

WANTED_LIMIT_BYTES = 1 << 20
CHUNK_MAX_BYTES = 1 << 20
CHUNK_TIME_NS = 2_000_000
HOLE_CHUNK_CLUSTERS = 1 << 16
AHEAD_MAX_BYTES = 1 << 20
HOT_NS = 200_000
COLD_AFTER = 4
SLEEP_NS = 1_000_000_000
GRACE_S = 5.0
TURN_NS = 10_000_000
BUDGET_BURST_NS = 100_000_000


@dataclass(slots=True)
class Target:
    """A snapshot as this worker serves it."""

    index: int
    serial: int
    fd: int
    bitmap: Bitmap
    skip_holes: bool
    manifest_fd: int  # -1: no checksums
    in_place: bool
    snapshot: SnapshotSource | None  # what is copied; None: the image
    copy_range: CopyRange | None
    exhausted_at: tuple[int, int] = (-1, -1)  # the cursor and the round in which nothing was left to copy,
    exhausted_until_ns: int = 0  # believed until then: both are hints
    ns_per_byte: float = 20.0  # before the first measurement: begin with small chunks


class CopyWorker:
    """The loop of one worker process."""

    def __init__(self, segment: Segment, source: Source, worker_id: int, generation: int) -> None:
        self.segment = segment
        self.source = source
        self.worker_id = worker_id
        self.generation = generation
        self.cluster_size = segment.geometry.cluster_size
        self.clusters = segment.geometry.clusters
        self.copier = _core.Copier(segment.memory, segment.geometry.core_layout(), worker_id)
        self.pool = segment.semaphore("pool")
        self.targets: dict[int, Target] = {}
        self.turn = 0
        self.served_ns = 0
        self.in_vain = 0
        self.may_spin = len(os.sched_getaffinity(0)) > 1
        self.orphan_since: float | None = None
        self.checked_s = 0.0
        self.leaving = False
        self.start_ticks = start_ticks(os.getpid())

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the pool moves on to a later generation, or nobody needs us any more."""
        limit = max(1, WANTED_LIMIT_BYTES // self.cluster_size)
        while not self.leaving and not self._is_outdated():
            if self.copier.changed():
                self._follow_table()
            self._check_surroundings()
            wanted = self.copier.claim_wanted(limit, 0)
            if wanted is not None:
                self._serve(*wanted)
                continue
            self._set_state(BUSY)
            wait_ns = self._copy_background_chunk()
            if wait_ns == 0:
                continue
            wanted = self._look(limit)
            if wanted is None:
                wanted = self._sleep(limit, wait_ns)
            if wanted is not None:
                self._serve(*wanted)
        self._set_state(AWAY)

    def _is_outdated(self) -> bool:
        """Whether the pool has moved on to a later generation; ours may not have become the pool's yet."""
        ahead = (self.segment.header(Header.pool_generation) - self.generation) & 0xFFFFFFFF
        return 0 < ahead < 1 << 31

    def _look(self, limit: int) -> tuple[int, int, int, int, int, int] | None:
        """Stay hot for a short while after the last request: waking costs more than the copy.

        Windows that end in vain make it stop; a post that comes so soon after we fell asleep that a spin would have
        caught it makes it begin again.
        """
        left = self.served_ns + HOT_NS - time.monotonic_ns()
        if not self.may_spin or left <= 0 or self.in_vain >= COLD_AFTER:
            return None
        wanted = self.copier.claim_wanted(limit, left)
        self.in_vain = 0 if wanted is not None else self.in_vain + 1
        return wanted

    def _sleep(self, limit: int, wait_ns: int) -> tuple[int, int, int, int, int, int] | None:
        """Say ASLEEP, look once more, sleep.  A writer publishes its want, then loads our state: one sees the other."""
        self._set_state(ASLEEP)
        wanted = self.copier.claim_wanted(limit, 0)
        if wanted is not None or self.copier.changed():
            if wanted is None:
                self._follow_table()
            return wanted
        self.segment.set_worker(self.worker_id, Worker.sleeps, self.segment.worker(self.worker_id, Worker.sleeps) + 1)
        self._reach(_ASLEEP)
        posted = self.pool.wait(min(wait_ns, SLEEP_NS))
        self._set_state(BUSY)
        if posted and time.monotonic_ns() - self.served_ns < 2 * HOT_NS:
            self.in_vain = 0
        return None

    def _set_state(self, state: int) -> None:
        self.segment.set_worker(self.worker_id, Worker.state, state)

    def _reach(self, point: int) -> None:
        hit(self.segment.failpoints, point)

    def _count(self, word: str) -> None:
        _core.add_u64(self.segment.memory, self.segment.geometry.worker(self.worker_id, getattr(Worker, word)), 1)

    def _check_surroundings(self) -> None:
        """Twice a second, between two copies: is there a coordinator, and do our words say what we have stored?

        An orphan leaves when no coordinator has come within the grace time and nobody needs it, or the image is
        deleted or the header damaged, so that none can come.
        """
        now = time.monotonic()
        if now - self.checked_s < 0.5:
            return
        self.checked_s = now
        self._check_claims()
        self.announce()
        try:
            deleted = os.fstat(self.source.file.fd).st_nlink == 0
            led = self.segment.locked(COORDINATOR)
        except OSError:
            return
        if led:
            self.orphan_since = None
        elif self.segment.damaged():
            # No coordinator can adopt this; the next one waits for us to leave.
            self.leaving = True
        elif not deleted and any(map(self._needs_us, self.targets.values())):
            self.orphan_since = None
        elif self.orphan_since is None:
            self.orphan_since = now
        elif now - self.orphan_since > GRACE_S:
            self.leaving = True

    def _needs_us(self, target: Target) -> bool:
        """Whether an orphan has anything to copy for this snapshot: in the background, or for a writer that lives.

        One whose cut was never taken, or that is copied already, waits for a coordinator and not for workers.
        """
        segment, index = self.segment, target.index
        word = segment.snapshot(index, Snapshot.state)
        if word & 0xFFFFFFFF not in states.LIVE or segment.snapshot(index, Snapshot.serial) != target.serial:
            return False
        if _core.find_byte(target.bitmap.memory, 0, self.clusters, PENDING) == self.clusters:
            return False
        error = states.split_error(segment.snapshot(index, Snapshot.background_error), word >> 32)
        return (bool(segment.snapshot(index, Snapshot.background)) and error is None) or lives_any_writer(segment)

    def announce(self) -> None:
        """Say who serves here; again and again, for others may scribble."""
        self.segment.set_worker(self.worker_id, Worker.start_ticks, self.start_ticks)
        self.segment.set_worker(self.worker_id, Worker.pid, os.getpid())
        self.segment.set_worker(self.worker_id, Worker.generation, self.generation)
        for target in self.targets.values():
            self._acknowledge(target.index, target.serial, 0)

    def _acknowledge(self, index: int, serial: int, number: int) -> None:
        memory, geometry = self.segment.memory, self.segment.geometry
        _core.store_u32(memory, geometry.worker(self.worker_id, Worker.ready_errno) + 4 * index, number)
        _core.store_u32(memory, geometry.worker(self.worker_id, Worker.ready_serial) + 4 * index, serial)

    # -- the snapshot table ----------------------------------------------------------------------------------------

    def _follow_table(self) -> None:
        """Open targets of new snapshots, let go of those that are gone, and say so in our entry."""
        for index in range(SNAPSHOT_COUNT):
            state = self.segment.snapshot(index, Snapshot.state) & 0xFFFFFFFF
            serial = self.segment.snapshot(index, Snapshot.serial)
            target = self.targets.get(index)
            wanted = state in (states.PREPARING, states.PREPARED, *states.LIVE)
            if target is not None and (not wanted or target.serial != serial):
                self._let_go(target)
            if wanted and index not in self.targets:
                self._open_target(index, serial)

    def _open_target(self, index: int, serial: int) -> None:
        number = 0
        try:
            if not self.segment.sealed(index) or any(target.serial == serial for target in self.targets.values()):
                raise OSError(errno.EUCLEAN, "somebody has overwritten the entry")
            expected = Identity(
                self.segment.snapshot(index, Snapshot.target_device),
                self.segment.snapshot(index, Snapshot.target_inode),
            )
            # Opened once and kept: a write error that the kernel notices late is reported to this descriptor.
            fd = open_unfinished(target_path(self.segment, index), expected, self.source.size_bytes)
            with contextlib.ExitStack() as undo:
                undo.callback(close_descriptor, fd)
                bitmap = Bitmap.attach(self.segment, serial)
                undo.callback(bitmap.close)
                snapshot = SnapshotSource.open(self.segment, index, self.source.file)
                if snapshot is not None:
                    undo.callback(snapshot.close)
                manifest_fd = self._open_manifest(index, expected)
                undo.pop_all()
            self.copier.attach_bitmap(index, serial, bitmap.memory)
            skip_holes = self.segment.snapshot(index, Snapshot.sync) == states.SYNC_TOP
            in_place = bool(self.segment.snapshot(index, Snapshot.in_place))
            copy_range = CopyRange() if self.segment.snapshot(index, Snapshot.copy_range) else None
            self.targets[index] = Target(
                index, serial, fd, bitmap, skip_holes, manifest_fd, in_place, snapshot, copy_range
            )
            self._reach(_OPENED)
        except OSError as error:
            number = error.errno or errno.EIO
            if index in self.targets:
                self._let_go(self.targets[index])
        self._acknowledge(index, serial, number)
        with self._may_fail():
            self._reach(_ACKNOWLEDGED)
            self.segment.wake_coordinator()

    def _open_manifest(self, index: int, expected: Identity) -> int:
        """The descriptor of the manifest that was made for this target; -1 if it has none."""
        if not self.segment.snapshot(index, Snapshot.manifest):
            return -1
        path = sidecar(target_path(self.segment, index).removesuffix(PARTIAL_SUFFIX)) + PARTIAL_SUFFIX
        try:
            found = Manifest.open(path, writable=True)
        except ShmcbwError as error:
            raise OSError(errno.ESTALE, str(error)) from None
        if found.description.target != expected:
            found.close()
            raise OSError(errno.ESTALE, "the manifest was replaced")
        fcntl.flock(found.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return found.fd

    def _let_go(self, target: Target) -> None:
        self.copier.detach_bitmap(target.index)
        target.bitmap.close()
        close_descriptor(target.fd)
        if target.manifest_fd >= 0:
            close_descriptor(target.manifest_fd)
        if target.snapshot is not None:
            target.snapshot.close()
        # From here on this worker writes nothing into it (`Pool.wait_let_go`).
        ready = self.segment.geometry.worker(self.worker_id, Worker.ready_serial) + 4 * target.index
        _core.store_u32(self.segment.memory, ready, 0)
        del self.targets[target.index]

    # -- what a writer waits for -----------------------------------------------------------------------------------

    def _serve(self, slot: int, sequence: int, want_first: int, index: int, first: int, end: int) -> None:
        """Copy a claimed run that the slot waits for; then, for a sequential writer, some more behind it."""
        target = self.targets[index]
        copied = self._copy(target, first, end, COPIED_FOR_WRITER, _CLAIMED)
        self._count("wanted_chunks")
        self._charge(target, copied.written_bytes)
        self.served_ns = time.monotonic_ns()
        if copied.error is not None:
            with self._may_fail():
                self._reach(_FAILED)
                self.copier.deliver_error(
                    slot, sequence, want_first, index, copied.failed_cluster, copied.error.errno or errno.EIO
                )
                self._reach(_DELIVERED)
                self.segment.wake_slot(slot)
            return
        self._copy_ahead(target, first, end)

    def _copy_ahead(self, target: Target, first: int, end: int) -> None:
        """Where clusters before the wanted ones were copied for writers too, copy as many behind them: a sequential
        writer will want those next.  The bytes themselves are the memory of it, whichever worker served."""
        limit = max(1, AHEAD_MAX_BYTES // self.cluster_size)
        run = 0
        while run < min(limit, first) and target.bitmap.state(first - 1 - run) == COPIED_FOR_WRITER:
            run += 1
        if run < 2 or end >= self.clusters:
            return
        claimed = _core.claim(target.bitmap.memory, end, min(end + run, self.clusters), self.worker_id, run)
        if claimed is not None:
            self._count("ahead_chunks")
            copied = self._copy(target, *claimed, COPIED_FOR_WRITER, _CLAIMED)
            self._charge(target, copied.written_bytes)

    # -- background ------------------------------------------------------------------------------------------------

    def _copy_background_chunk(self) -> int:
        """One chunk for one snapshot, in turn.  0: did some work; else how long (ns) there will be none."""
        wait_ns = SLEEP_NS
        for target in sorted(self.targets.values(), key=lambda target: (target.index - self.turn) % SNAPSHOT_COUNT):
            answer = self._chunk_of(target)
            if answer == 0:
                self.turn = target.index + 1
                return 0
            wait_ns = min(wait_ns, answer)
        return wait_ns

    def _chunk_of(self, target: Target) -> int:
        segment, index = self.segment, target.index
        word = segment.snapshot(index, Snapshot.state)
        if (
            word & 0xFFFFFFFF not in states.LIVE
            or segment.snapshot(index, Snapshot.serial) != target.serial
            or not segment.snapshot(index, Snapshot.background)
            or states.split_error(segment.snapshot(index, Snapshot.background_error), word >> 32) is not None
        ):
            return SLEEP_NS
        # The round before the cursor: who changes both stores the round last.
        round_, cursor = segment.snapshot(index, Snapshot.round), segment.snapshot(index, Snapshot.cursor)
        if (cursor, round_) == target.exhausted_at and time.monotonic_ns() < target.exhausted_until_ns:
            return SLEEP_NS
        start = min(cursor, self.clusters)
        first = _core.find_byte(target.bitmap.memory, start, self.clusters, PENDING)
        if first == self.clusters:
            first = _core.find_byte(target.bitmap.memory, 0, start, PENDING)
            if first == start:
                target.exhausted_at = cursor, round_
                target.exhausted_until_ns = time.monotonic_ns() + SLEEP_NS
                segment.wake_coordinator()
                return SLEEP_NS
        limit = self._chunk_clusters(target, first)
        wait_ns = self._spend_budget(target, min(limit * self.cluster_size, CHUNK_MAX_BYTES))
        if wait_ns:
            return wait_ns
        turn = self._take_turn(index)
        if turn is None:
            return TURN_NS
        try:
            claimed = _core.claim(target.bitmap.memory, first, min(first + limit, self.clusters), self.worker_id, limit)
            if claimed is not None:
                segment.exchange_snapshot(index, Snapshot.cursor, cursor, claimed[1])
                self._copy_claimed_chunk(target, *claimed, word >> 32)
        finally:
            self._end_turn(turn)
        return 0

    def _copy_claimed_chunk(self, target: Target, first: int, end: int, odd_epoch: int) -> None:
        started = time.monotonic_ns()
        copied = self._copy(target, first, end, COPIED, _BACKGROUND)
        self._count("background_chunks")
        if copied.written_bytes:
            # The sync at the end then finds most of it on its way.
            _core.start_writeback(target.fd, *byte_range(first, end, self.cluster_size, self.source.size_bytes))
            measured = (time.monotonic_ns() - started) / copied.written_bytes
            target.ns_per_byte += (measured - target.ns_per_byte) / 4
        if copied.error is not None:
            number = (copied.error.errno or errno.EIO) | (states.SOURCE_ERROR if copied.from_source else 0)
            word = Snapshot.background_error
            store_first_error(self.segment, target.index, word, odd_epoch, number, copied.failed_cluster)
            self.segment.wake_coordinator()

    def _take_turn(self, index: int) -> int | None:
        """A byte among those of the job's ``max_workers``, or None if all are taken; -1: none is needed.

        Claimed as clusters are, so what a dead worker had is found and given back in the same way.
        """
        count = self.segment.snapshot(index, Snapshot.max_workers)
        if not 0 < count < self.segment.geometry.worker_count:
            return -1
        start = self.segment.geometry.snapshot(index, Snapshot.turns)
        claimed = _core.claim(self.segment.memory, start, start + count, self.worker_id, 1)
        return claimed[0] if claimed is not None else None

    def _end_turn(self, turn: int) -> None:
        if turn >= 0:
            _core.exchange(self.segment.memory, turn, turn + 1, self.worker_id, PENDING)

    def _chunk_clusters(self, target: Target, first: int) -> int:
        """How much to take at once: a few milliseconds of writing; of a hole, many clusters."""
        offset = first * self.cluster_size
        source = target.snapshot or self.source
        try:
            hole = (source.data_from(offset) - offset) // self.cluster_size
        except OSError:
            # It will fail again where the copy is made, and there it is the job's error.
            hole = 0
        size = min(CHUNK_MAX_BYTES, int(CHUNK_TIME_NS / max(target.ns_per_byte, 0.01)))
        speed = self.segment.snapshot(target.index, Snapshot.speed)
        if speed:
            size = min(size, speed // 10)
        clusters = max(1, size // self.cluster_size, min(hole, HOLE_CHUNK_CLUSTERS))
        max_chunk = self.segment.snapshot(target.index, Snapshot.max_chunk)
        return min(clusters, max(1, max_chunk // self.cluster_size)) if max_chunk else clusters

    # -- the byte budget -------------------------------------------------------------------------------------------

    def _spend_budget(self, target: Target, count: int) -> int:
        """Take ``count`` bytes of the snapshot's speed, paid before they move; or how long (ns) to wait for them."""
        segment, index = self.segment, target.index
        while speed := segment.snapshot(index, Snapshot.speed):
            cost = count * 1_000_000_000 // speed
            spent, now = self._spent(index, speed), time.monotonic_ns()
            until = max(spent, now - max(cost, BUDGET_BURST_NS)) + cost
            if until > now:
                return until - now
            if segment.exchange_snapshot(index, Snapshot.budget_ns, spent, until):
                return 0
        return 0

    def _charge(self, target: Target, count: int) -> None:
        """What writers needed is counted against the budget and never delayed."""
        segment, index = self.segment, target.index
        while count and (speed := segment.snapshot(index, Snapshot.speed)):
            spent = self._spent(index, speed)
            until = max(spent, time.monotonic_ns() - BUDGET_BURST_NS) + count * 1_000_000_000 // speed
            if segment.exchange_snapshot(index, Snapshot.budget_ns, spent, until):
                return

    def _spent(self, index: int, speed: int) -> int:
        """The budget word; one that was scribbled on is put back to where it may be: no more can have been spent than
        what the whole image takes."""
        spent = self.segment.snapshot(index, Snapshot.budget_ns)
        limit = time.monotonic_ns() + 2 * self.source.size_bytes * 1_000_000_000 // speed + SLEEP_NS
        if spent <= limit:
            return spent
        now = time.monotonic_ns()
        self.segment.exchange_snapshot(index, Snapshot.budget_ns, spent, now)
        return now

    def _before_write(self) -> None:
        self._reach(_COPYING)

    # -- one run ---------------------------------------------------------------------------------------------------

    def _copy(self, target: Target, first: int, end: int, state: int, claimed: int) -> Copied:
        """Copy and publish a claimed run, give back what failed, and wake who waits for any of it (I2).

        claimed: the failpoint of the claim.
        """
        if target.snapshot is not None:
            copy = target.snapshot.copy_run
        else:
            copy = functools.partial(copy_run, self.source, in_place=target.in_place, copy_range=target.copy_range)
        try:
            self._reach(claimed)
            copied = copy(
                target.fd,
                first,
                end,
                cluster_size=self.cluster_size,
                copied_state=state,
                skip_holes=target.skip_holes,
                before_write=self._before_write,
                manifest_fd=target.manifest_fd,
            )
            self._reach(_COPIED)
        except OSError as error:
            # Of a failpoint: nothing of the run counts.
            copied = Copied(error=error, failed_cluster=first, from_source=False)
        memory = target.bitmap.memory
        self._check_marks(target, first, end)
        for run_first, run_end, run_state in copied.runs:
            published = _core.exchange(memory, run_first, run_end, self.worker_id, run_state)
            if published != run_end - run_first:
                # Nobody else may change a claim: a writer may have gone on, and the copy have its data.
                self._break_damaged(target, run_first)
        if copied.error is not None:
            self._count("errors")
            _core.exchange(memory, copied.failed_cluster, end, self.worker_id, PENDING)
            cursor = self.segment.snapshot(target.index, Snapshot.cursor)
            if cursor > copied.failed_cluster:
                self.segment.exchange_snapshot(target.index, Snapshot.cursor, cursor, copied.failed_cluster)
        with self._may_fail():
            self._reach(_PUBLISHED)
            if target.snapshot is not None:
                target.snapshot.let_go(copied.runs)
            for slot in self.copier.sleepers(first, end):
                self.segment.wake_slot(slot)
            self._reach(_WOKE)
        return copied

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        """What only tells somebody: who is not told looks again, and asks again."""
        try:
            yield
        except OSError as error:
            print(f"shmcbw copy worker {self.worker_id}: a writer is not told: {error}", file=sys.stderr)

    # -- scribbled memory ------------------------------------------------------------------------------------------

    def _break_damaged(self, target: Target, cluster: int) -> None:
        break_snapshot(self.segment, target.index, target.serial, errno.EUCLEAN, cluster)
        self.segment.wake_coordinator()

    def _check_marks(self, target: Target, first: int, end: int) -> None:
        """After the copy, before it is published: a cluster that was written since the cut can't have been ours to
        copy, unless somebody has let its writer go on by scribbling."""
        word = self.segment.snapshot(target.index, Snapshot.state)
        if word & 0xFFFFFFFF != states.ACTIVE:
            return
        marked = marked_uncopied(self.segment, target.bitmap, first, end, word >> 32)
        if marked is not None:
            self._break_damaged(target, marked)

    def _check_claims(self) -> None:
        """Between two copies nothing is claimed by us: a byte with our id holds a writer, or a job, for nobody."""
        waited_for = self.copier.sleepers(0, self.clusters)
        for target in self.targets.values():
            if not waited_for and not self.segment.snapshot(target.index, Snapshot.background):
                continue
            turns = self.segment.geometry.snapshot(target.index, Snapshot.turns)
            _core.exchange(self.segment.memory, turns, turns + Snapshot.turns.size, self.worker_id, PENDING)
            cluster = _core.find_byte(target.bitmap.memory, 0, self.clusters, self.worker_id)
            if cluster != self.clusters:
                self._break_damaged(target, cluster)

    def close(self) -> None:
        for target in list(self.targets.values()):
            self._let_go(target)
        self.copier.release()


def main(arguments: list[str]) -> int:
    """Attach to the image's segment as the worker with this id; serve; leave."""
    path, worker_id, generation = arguments[0], int(arguments[1]), int(arguments[2])
    # A terminal's Ctrl-C goes to the whole group: the coordinator decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        source = Source(path)
        segment = attach(source.file)
        if source.size_bytes != segment.geometry.image_size:
            raise ShmcbwError(f"{path} is being resized")
        if segment.header(Header.last_generation) != generation:
            # Ours died while we started, and a later coordinator needs the ids for workers of its own.
            return 0
        if not segment.try_lock(worker_byte(worker_id)):
            raise OSError(errno.EBUSY, "its id is taken")
        hit(segment.failpoints, _LOCKED)
        for name, word in words(Worker):
            if word.size in (4, 8) and name != "generation":
                segment.set_worker(worker_id, word, 0)
        memory, geometry = segment.memory, segment.geometry
        for index in range(SNAPSHOT_COUNT):
            _core.store_u32(memory, geometry.worker(worker_id, Worker.ready_serial) + 4 * index, 0)
        worker = CopyWorker(segment, source, worker_id, generation)
    except (ShmcbwError, OSError) as error:
        print(f"shmcbw copy worker {worker_id}: {error}", file=sys.stderr)
        return failed_start_status(error)
    worker._follow_table()
    worker.announce()
    hit(segment.failpoints, _SERVING)
    segment.wake_coordinator()
    worker.run()
    worker.close()
    segment.set_worker(worker_id, Worker.pid, 0)
    hit(segment.failpoints, _LEFT)
    segment.unlock(worker_byte(worker_id))
    leave_last(segment)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
