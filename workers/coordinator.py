"""The coordinator: owns an image, takes cuts, runs jobs, reaps the dead.

It owns the control segment (by the lock on byte 0), the snapshot table and the pool.  It is never on a write's path.
Everything that it must find again after its death is in the segment; what it keeps beside that are handles.

A supervisor thread sleeps on the coordinator's semaphore and looks, at least ten times a second, at workers, slots,
snapshots and jobs.  A post only makes it look earlier.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from shmcbw import _core, states
from shmcbw.bitmap import COPIED, COPIED_FOR_WRITER, SKIPPED, ZERO, Bitmap, bitmap_serials
from shmcbw.clusters import CLUSTER_SIZE_DEFAULT, check_cluster_size
from shmcbw.dirty import DirtyBitmap
from shmcbw.epochs import DRAIN_LIMIT_MAX_S, abandon, epoch
from shmcbw.errors import (
    ClosedError,
    CoordinatorRunningError,
    JobFailedError,
    LayoutVersionError,
    NoCoordinatorError,
    NoFreeSnapshotError,
    ResizeRefusedError,
    SegmentDamagedError,
    ShmcbwError,
    TargetRefusedError,
    naming,
)
from shmcbw.failpoints import hit, index_of
from shmcbw.filter import leave_last
from shmcbw.groups import resolve as resolve_group
from shmcbw.image import Identity, ImageFile, close_descriptor
from shmcbw.layout import SNAPSHOT_COUNT, WORKER_COUNT_MIN, Geometry, Header, Slot, Snapshot
from shmcbw.reader import SnapshotReader
from shmcbw.segment import (
    COORDINATOR,
    Access,
    Segment,
    StaleSegmentError,
    attach,
    create,
    discard_unused,
    sweep,
    try_retire,
    worker_lives,
)
from shmcbw.slots import reap_slot
from shmcbw.snapshots import (
    break_snapshot,
    broken_error,
    damage_snapshot,
    state_of,
    target_path,
    wake_all,
)
from shmcbw.status import describe_segment

from . import damage
from .bitmaps import Bitmaps
from .completion import JobTransaction
from .cut import NO_CUT, Cut
from .forward import ForwardFile
from .groups import Backup, Quiesce, Request, Scratch, backup_group, snapshot_group
from .increments import Increment
from .job_table import JobTable
from .jobs import Job, Progress
from .journal import Journal
from .permissions import ImageLock
from .pool import Pool, absolute
from .resize import check_size, resize, settle
from .saved import SavedBitmaps
from .targets import PARTIAL_SUFFIX, TargetFile, remove_unheld, resolve
from .unfinished import Lost, Unfinished, find_unfinished, give_up, unfinished_in

log = logging.getLogger("shmcbw")

LOOK_NS = 100_000_000
REAP_SLOTS_S = 0.25
READY_TIMEOUT_S = 10.0
TAKE_OVER_S = 2.0


@dataclass(slots=True)
class Entry:
    """An entry of the snapshot table with the handles that the coordinator holds for it."""

    index: int
    serial: int
    target: TargetFile
    bitmap: Bitmap
    #: Our own copy of what the segment says too (damage.py).
    seal: int = 0
    speed: int = 0
    background: int = 0
    cut: Cut = NO_CUT
    odd_epoch: int = 0
    complete: bool = False
    released: bool = False
    #: Its manifest and its bitmap; None if it has neither.
    increment: Increment | None = None
    job_id: str | None = None
    #: Serial number of the snapshot that it backs up; 0: the image.
    source: int = 0


class CoordinatorSnapshot(SnapshotReader):
    """A snapshot without background copying; reads it, and drops it when closed."""

    def __init__(self, coordinator: Coordinator, entry: Entry, segment: Segment, image: ImageFile) -> None:
        target_fd = os.open(entry.target.working_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            super().__init__(segment, entry.index, entry.serial, image, target_fd)
        except BaseException:
            close_descriptor(target_fd)
            raise
        self._pid = os.getpid()
        self._coordinator = coordinator
        self._entry = entry
        self.serial = entry.serial
        self.cut_time_ns = entry.cut.time_ns
        self.drained_ns = entry.cut.drained_ns

    def close(self) -> None:
        """Drop the snapshot and remove its scratch file."""
        if self._closed:
            return
        super().close()
        # In a forked child this is a copy: the snapshot is the parent's.
        if self._pid == os.getpid():
            self._coordinator.drop_snapshot(self._entry)


class Coordinator:
    """Serves one image until closed.  Embeddable: starts processes and one thread, handles no signal.

    image: path of the image.  workers: copy workers (1..239).  cluster_size: bytes, a power of two from 4 KiB to
    2 MiB (default 64 KiB).  slots: writing threads at once (default 64).  group: a group that may attach (mode 0660
    instead of 0600).  drain_limit: seconds that a cut may hold writes, then it is given up.  locking: QEMU's image lock
    (`permissions.py`): "auto", "on" (fail where the file system has none), "off".  state_dir: where persistent bitmaps
    are while nobody serves the image (`saved.py`).  control: the socket over which this process can be asked for
    backups, noted in the segment.  on_event: called with name and data of each event, as QEMU's QMP has them; in order,
    from any thread, with a lock held: it must neither block nor raise, nor call this coordinator or its jobs.

    CoordinatorRunningError: the image has a coordinator.  ImageInUseError: a QEMU has it.  ForeignSegmentError,
    LayoutVersionError: its shared memory belongs to somebody else.  ImageError, OSError: the image can't be served, or
    /dev/shm has no room.

    Takes over what a dead coordinator has left: writers stay attached, jobs and snapshots go on.
    """

    def __init__(
        self,
        image: str | os.PathLike[str],
        *,
        workers: int = 2,
        cluster_size: int | None = None,
        slots: int | None = None,
        group: str | int | None = None,
        drain_limit: float = 0.1,
        locking: str = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        control: str = "",
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        if not 1 <= workers <= 239:
            raise ValueError(f"workers: {workers} is not in 1..239")
        if not 0 < drain_limit <= DRAIN_LIMIT_MAX_S:
            raise ValueError(f"drain_limit: {drain_limit} s is not above 0 and at most {DRAIN_LIMIT_MAX_S:.0f}")
        if cluster_size is not None:
            check_cluster_size(cluster_size)
        self.path = os.fspath(image)
        self._on_event = on_event
        self._access = Access.for_group(group)
        self._drain_limit = drain_limit
        self._lock = threading.RLock()
        #: Cuts that are being prepared or taken, and who waits until there are none.
        self._cutting = 0
        self._idle = threading.Condition(self._lock)
        self._entries: dict[int, Entry] = {}
        #: Made, and their cut not yet taken.
        self._prepared: dict[int, Entry] = {}
        self._snapshots: dict[int, CoordinatorSnapshot] = {}
        #: Serial numbers of snapshots that were seen broken.
        self._seen_broken: set[int] = set()
        self.job_table = JobTable(self)
        self._closing = False
        self._closed = False
        self._slots_looked_s = 0.0
        self._complaints: dict[str, str] = {}
        self._lost: list[Lost] = []
        self._unadopted: list[tuple[int, TargetFile, Cut, OSError | ShmcbwError]] = []
        self._asleep_before: set[int] = set()
        self._pid = os.getpid()
        with naming(self.path, "can't be served"):
            self._start(workers, cluster_size, slots, locking, state_dir, control)

    def _start(
        self,
        workers: int,
        cluster_size: int | None,
        slots: int | None,
        locking: str,
        state_dir: str | os.PathLike[str] | None,
        control: str,
    ) -> None:
        # Absolute, once: the process may change its directory.
        self._image = ImageFile.open(absolute(self.path), writable=False)
        self._image_lock = ImageLock(self._image, locking)
        self._saved = SavedBitmaps(state_dir, self._image, self.path) if state_dir is not None else None
        self._loaded: dict[str, DirtyBitmap] = {}
        try:
            self._sweep()
            geometry = Geometry(
                self._image.size_bytes,
                cluster_size or CLUSTER_SIZE_DEFAULT,
                slots or 64,
                max(workers, WORKER_COUNT_MIN),
            )
            self._segment, adopted = _own_segment(
                self._image,
                self._image_lock,
                self._take_image,
                geometry,
                self._access,
                cluster_size,
                slots,
                self._lost,
            )
        except BaseException:
            self._image_lock.close()
            self._image.close()
            raise
        try:
            #: What must outlive this coordinator and has no word in the segment.
            self.journal = Journal(self._segment)
            self._segment.own_epoch = epoch(self._segment)
            self._segment.set_header(Header.coordinator_pid, self._pid)
            self._segment.set_header(Header.started_ns, time.time_ns())
            self._segment.set_text(Header.image_path.offset, Header.image_path, os.path.abspath(self.path))
            self._segment.set_text(Header.control.offset, Header.control, control)
            #: The image's dirty bitmaps.
            if adopted and self._saved is not None:
                self._loaded = self._saved.load()
            self.bitmaps = Bitmaps(
                self._segment,
                self.journal,
                self._lock,
                self._drain_limit,
                self._saved,
                self._loaded if self._saved is not None else None,
            )
            self._pool = Pool(
                self._segment,
                self._image.path,
                min(workers, self._segment.geometry.worker_count // 2),
                self._image_lock,
            )
            if adopted:
                self._adopt()
            self._watch = damage.Watch(self._segment)
            self._pool.start()
            # Not before: what a start that is refused can't take over, the next one perhaps can.
            for unadopted in self._unadopted:
                self._fail_adoption(*unadopted)
            self._unadopted.clear()
            for lost in self._lost:
                # Its segment is gone, and its serial number with it.
                cut = Cut(lost.backup.cut_time_ns, 0)
                self.job_table.adopt_lost(0, lost.backup.target, cut, "full", lost.error)
            self._supervisor = threading.Thread(target=self._supervise, name="shmcbw-supervisor", daemon=True)
            self._supervisor.start()
            # A program that ends without closing leaves no workers and no segment behind.
            atexit.register(self.close)
        except BaseException:
            self._give_up()
            raise

    def _take_image(self) -> None:
        """Before anybody can attach: the image is ours, and what was saved of its bitmaps is marked in use."""
        self._image_lock.take()
        if self._saved is not None:
            self._loaded = self._saved.load()
            self._saved.mark(None, self._loaded)

    def _sweep(self) -> None:
        """Remove segments that nobody can need any more, and tell of the backups that end with them."""
        found: list[tuple[str, list[Unfinished]]] = []

        def note(segment: Segment) -> None:
            path = segment.text(Header.image_path.offset, Header.image_path)
            found.append((path, unfinished_in(segment.memory)))

        for name in sweep(note, self._image.identity, os.path.abspath(self.path)):
            log.info("removed %s, which nobody used any more", name)
        for path, unfinished in found:
            lost = give_up(unfinished, f"its image {path} was deleted or replaced")
            if path == os.path.abspath(self.path):
                self._lost += lost

    def _give_up(self) -> None:
        """The start has failed: let go of everything, and leave what there was to adopt to the next coordinator."""
        try:
            with contextlib.ExitStack() as stages:
                stages.callback(self._image.close)
                stages.callback(self._leave_segment)
                for entry in self._entries.values():
                    stages.callback(entry.target.close)
                    stages.callback(entry.bitmap.close)
                for snapshot in self._snapshots.values():
                    stages.callback(SnapshotReader.close, snapshot)
        except OSError as error:
            log.warning("%s: while giving up the start: %s", self.path, error)

    # -- adoption --------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Go on where a dead coordinator stopped."""
        segment = self._segment
        self._reach("locked", "adopt")
        found = epoch(segment)
        if found % 2:
            abandon(segment, found)
            wake_all(segment)
        segment.own_epoch = epoch(segment)
        if any(bitmap.start is not None and bitmap.start > segment.own_epoch for bitmap in self.bitmaps.values()):
            self.bitmaps.distrust()
        self._reach("opened", "adopt")
        settle(segment, self._image)
        for slot in range(segment.geometry.slot_count):
            if segment.slot(slot, Slot.pid) and reap_slot(segment, slot):
                segment.count_header(Header.slots_reaped)
        self._reach("slots", "adopt")
        self._pool.return_dead_claims()
        self._reach("claims", "adopt")
        used = [index for index in range(SNAPSHOT_COUNT) if state_of(segment, index) != states.FREE]
        # Of all, before any is freed: the others may have to ask this one.
        counting = [index for index in used if resolve_group(segment, index)]
        self._reach("groups", "adopt")
        for index in used:
            if state_of(segment, index) != states.CREATING:
                self._adopt_entry(index, counts=index in counting)
                self._reach("entry", "adopt")
        # Last: a scribbled path may name the target of another entry, which has its lock by now.
        for index in used:
            if index not in self._entries and state_of(segment, index) == states.CREATING:
                self._undo_creation(index)
        unadopted = {segment.snapshot(index, Snapshot.serial) for index, *_ in self._unadopted}
        self.job_table.adopt_ended(unadopted)
        serials = {entry.serial for entry in self._entries.values()} | unadopted
        self.bitmaps.release_all_but(set(map(str, serials)))
        self._free_strays()

    def _undo_creation(self, index: int) -> None:
        segment, path = self._segment, target_path(self._segment, index)
        if segment.sealed(index):
            in_place = bool(segment.snapshot(index, Snapshot.in_place))
            remove_unheld(path, segment.geometry.image_size, keep_target=in_place)
        else:
            log.error("somebody has overwritten the entry of an unfinished snapshot; %s may be left", path)

    def _adopt_entry(self, index: int, *, counts: bool) -> None:
        """Adopt a snapshot and its job, or drop it, and say so."""
        segment = self._segment
        state = state_of(segment, index)
        entry = self._find_entry(index)
        if entry is None:
            return
        if state not in (*states.LIVE, states.BROKEN, states.COMPLETE):
            self._release_entry(entry)
            return
        if not counts:
            log.error("the snapshot to %s ends: the cut of its group was not completed", entry.target.path)
            self._release_entry(entry)
            return
        if state in states.LIVE and not _is_cut(segment, entry):
            damage_snapshot(segment, index, entry.odd_epoch)
        self._entries[index] = entry
        if segment.snapshot(index, Snapshot.job):
            self.filter(entry)
            self.job_table.adopt(entry)
            return
        try:
            self.add_snapshot(entry)
        except (OSError, ShmcbwError) as error:
            log.error("the unfinished snapshot to %s is dropped: %s", entry.target.working_path, error)
            self._release_entry(entry)

    def _find_entry(self, index: int) -> Entry | None:
        """The handles of an entry of a dead coordinator; None if it can't be adopted, see `_fail_adoption`."""
        segment = self._segment
        word, serial = segment.snapshot(index, Snapshot.state), segment.snapshot(index, Snapshot.serial)
        identity = Identity(
            segment.snapshot(index, Snapshot.target_device), segment.snapshot(index, Snapshot.target_inode)
        )
        complete = word & 0xFFFFFFFF == states.COMPLETE
        cut = Cut(segment.snapshot(index, Snapshot.cut_time_ns), segment.snapshot(index, Snapshot.drained_ns))
        kind = ForwardFile if segment.snapshot(index, Snapshot.in_place) else TargetFile
        working = target_path(segment, index)
        target: TargetFile | None = None
        try:
            if not segment.sealed(index) or serial in (entry.serial for entry in self._entries.values()):
                raise SegmentDamagedError(errno.EUCLEAN, "somebody has overwritten its entry; no file is touched")
            target = kind.adopt(
                working,
                identity,
                segment.geometry.image_size,
                overwrite=bool(segment.snapshot(index, Snapshot.overwrite)),
                complete=complete,
                manifest=bool(segment.snapshot(index, Snapshot.manifest)),
            )
            if target is None:
                raise FileNotFoundError(errno.ENOENT, "it is gone", working)
            return Entry(
                index,
                serial,
                target,
                Bitmap.attach(segment, serial),
                segment.snapshot(index, Snapshot.seal),
                segment.snapshot(index, Snapshot.speed),
                segment.snapshot(index, Snapshot.background),
                cut,
                odd_epoch=word >> 32,
                complete=complete,
                increment=Increment.adopt(self.bitmaps, segment, index),
                source=segment.snapshot(index, Snapshot.source),
            )
        except (OSError, ShmcbwError) as error:
            if target is not None:
                target.close()
            lost = kind(working.removesuffix(PARTIAL_SUFFIX), working, -1, identity)
            self._unadopted.append((index, lost, cut, error))
            return None

    def _fail_adoption(self, index: int, target: TargetFile, cut: Cut, error: OSError | ShmcbwError) -> None:
        """A dead coordinator's snapshot can't go on: drop it, and say so in a job that has failed."""
        segment = self._segment
        log.error("the unfinished %s can't be taken over: %s", target.working_path, error)
        taken = state_of(segment, index) in (*states.LIVE, states.BROKEN, states.COMPLETE)
        if taken and segment.snapshot(index, Snapshot.job):
            number = error.errno if isinstance(error, OSError) else None
            message = f"the unfinished backup to {target.path} can't be taken over: {error}"
            serial = segment.snapshot(index, Snapshot.serial)
            sync = _sync_name(segment.snapshot(index, Snapshot.sync))
            failure = JobFailedError(number or errno.EIO, message)
            self.job_table.adopt_lost(serial, target.path, cut, sync, failure)
        if not (isinstance(error, OSError) and error.errno == errno.EUCLEAN):
            # Before the entry is free: afterwards nobody would know of an unfinished file.  Not if it may be anybody's.
            target.remove()
            remove_unheld(target.working_path, segment.geometry.image_size, keep_target=True)
        self._free_entry(index, segment.snapshot(index, Snapshot.serial))
        self.bitmaps.release_all_but({str(entry.serial) for entry in self._entries.values()})

    def _free_strays(self) -> None:
        """Free entries that this coordinator did not make or adopt, and remove bitmaps that no entry has: those of
        snapshots whose coordinator died in between, and what a scribbler has left."""
        segment = self._segment
        known = {**self._prepared, **self._entries}
        told = {index for index, *_ in self._unadopted}
        strays = [i for i in range(SNAPSHOT_COUNT) if i not in {*known, *told} and state_of(segment, i) != states.FREE]
        for index in strays:
            segment.set_snapshot(index, Snapshot.state, states.state_word(states.FREE, 0))
        if strays:
            wake_all(segment)
            self._pool.wake()
        serials = {entry.serial for entry in known.values()}
        serials |= {segment.snapshot(index, Snapshot.serial) for index in told}
        for serial in bitmap_serials(segment):
            if serial not in serials:
                Bitmap.unlink(segment, serial)

    def _reach(self, step: str, protocol: str = "coordinator") -> None:
        hit(self._segment.failpoints, index_of(f"{protocol}.{step}"))

    # -- snapshots and jobs ----------------------------------------------------------------------------------------

    def backup(
        self,
        target: str | os.PathLike[str],
        *,
        sync: str = "full",
        speed: int = 0,
        on_cbw_error: str = "break-snapshot",
        cbw_timeout: float = 30.0,
        overwrite: bool = False,
        bitmap: str | None = None,
        bitmap_mode: str | None = None,
        in_place: bool = False,
        manifest: bool = False,
        job_id: str | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool | None = None,
        on_source_error: str = "report",
        on_target_error: str = "report",
        max_workers: int = 64,
        max_chunk: int = 0,
        copy_range: bool = False,
        source: CoordinatorSnapshot | None = None,
        discard_source: bool = False,
        quiesce: Quiesce | None = None,
    ) -> Job:
        """Start a backup; returns when the cut is taken: what was written before is in it, what comes later is not.

        sync: "full"; "top" (only what is allocated in the source; holes are left out); "none" (nothing is copied but
        what writers overwrite; ends by cancel); "bitmap" (what is dirty in ``bitmap``); "incremental" (the same, with
        bitmap-mode on-success).  speed: bytes a second of background copying, 0 for no limit.
        on_cbw_error: "break-snapshot" or "break-guest-write".  cbw_timeout: seconds a write waits for a copy, 0 for
        ever.  overwrite: replace an existing target of the same size, when the new one is complete.  quiesce: a context
        manager that is entered when all is prepared, and left when the cut is taken or has failed: for an application
        that can come to rest.  It must not close the coordinator.

        bitmap_mode: what becomes of the bitmap (`DirtyBitmap.finish`): "on-success", "never", "always".  in_place: with
        sync bitmap, ``target`` is an older backup, the bitmap's base, and becomes this one (`forward.py`).  manifest:
        take checksums while copying, and say in TARGET.shmcbw what it holds; with a bitmap that is always done.

        job_id: a name of one's own, a letter and then letters, digits, `-`, `.`, `_`.  auto_finalize: False: the target
        gets its name when `Job.finalize` is called.  auto_dismiss: True: a concluded job is forgotten at once; False:
        it is kept for `Job.dismiss`, also over the coordinator's death; None: it is kept as long as there is room and
        a coordinator.  on_source_error, on_target_error: what to do when a background copy can't read or write:
        "report" (the job fails), "ignore" (try again), "stop" (pause), "enospc" (stop if there is no space, else
        report), "auto" (the same).  max_workers: workers that copy for it in the background at once.  max_chunk: bytes
        of a background copy, 0 for no limit.  copy_range: copy by copy_file_range, which can share the data where the
        file system can (Btrfs, XFS), or copies in the kernel; else, and where it fails, as without.

        source: back up this snapshot instead of the image: no cut is taken, the backup shows that of the snapshot, and
        no writer waits for its target.  discard_source: let go, in the snapshot, of what is copied (`fleecing.py`).

        TargetRefusedError, CutAbandonedError, NoFreeSnapshotError, BitmapError: nothing has changed.
        """
        backup = Backup(
            self,
            target,
            sync=sync,
            speed=speed,
            on_cbw_error=on_cbw_error,
            cbw_timeout=cbw_timeout,
            overwrite=overwrite,
            bitmap=bitmap,
            bitmap_mode=bitmap_mode,
            in_place=in_place,
            manifest=manifest,
            job_id=job_id,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            on_source_error=on_source_error,
            on_target_error=on_target_error,
            max_workers=max_workers,
            max_chunk=max_chunk,
            copy_range=copy_range,
            source=source,
            discard_source=discard_source,
        )
        with naming(self.path, f"no backup to {os.fspath(target)}"):
            return backup_group([backup], quiesce=quiesce)[0]

    def snapshot(
        self,
        scratch: str | os.PathLike[str],
        *,
        on_cbw_error: str = "break-snapshot",
        cbw_timeout: float = 30.0,
        overwrite: bool = False,
        access: Iterable[tuple[int, int]] | None = None,
        quiesce: Quiesce | None = None,
    ) -> CoordinatorSnapshot:
        """Take a snapshot without background copying: old content goes to
        ``SCRATCH.shmcbw-partial``, removed at the end.

        access: the (offset, length) in bytes, in order, that may be read; clusters that none of them touches are
        neither copied nor accessible.  Parameters and errors as for `backup`.
        """
        wanted = Scratch(self, scratch, on_cbw_error=on_cbw_error, cbw_timeout=cbw_timeout, overwrite=overwrite)
        with naming(self.path, f"no snapshot with {os.fspath(scratch)}"):
            snapshot = snapshot_group([wanted], quiesce=quiesce)[0]
            if access is not None:
                try:
                    snapshot.limit(access)
                except BaseException:
                    snapshot.close()
                    raise
            return snapshot

    @property
    def jobs(self) -> list[Job]:
        """The jobs of this coordinator, also adopted ones; the last 100 ended ones of those that nobody dismisses."""
        with self._lock:
            return self.job_table.jobs

    @property
    def snapshots(self) -> list[CoordinatorSnapshot]:
        """Open snapshots without a job, also adopted ones."""
        with self._lock:
            return list(self._snapshots.values())

    def add_job(self, entry: Entry, request: Request) -> Job:
        """The job of a backup whose cut is taken."""
        with self._lock:
            self.filter(entry)
            job = self.job_table.add(entry, request)
        # The workers may have finished before there was a job to look at.
        self._segment.wake_coordinator()
        return job

    def filter(self, entry: Entry) -> None:
        """Leave out what is not in the bitmap of a backup that has one."""
        if entry.increment is not None:
            entry.increment.filter(entry.index, entry.bitmap)
            entry.background = self._segment.snapshot(entry.index, Snapshot.background)
            self._pool.wake()

    def add_snapshot(self, entry: Entry) -> CoordinatorSnapshot:
        """The snapshot of a scratch whose cut is taken; what can't be opened raises, and changes nothing."""
        snapshot = self._make_snapshot(entry)
        with self._lock:
            self._snapshots[entry.index] = snapshot
        return snapshot

    def _make_snapshot(self, entry: Entry) -> CoordinatorSnapshot:
        image = ImageFile.open(self._image.path, writable=False)
        try:
            if image.identity != self._image.identity:
                raise ShmcbwError(f"{self.path} is not the image any more that this coordinator serves")
            return CoordinatorSnapshot(self, entry, self._segment, image)
        except BaseException:
            image.close()
            raise

    # -- how a cut is taken: the parts, for `take_group` --------------------------------------------------------------

    @property
    def lock(self) -> threading.RLock:
        """Held for every change of the snapshot table; of several coordinators in the order of `segment_name`."""
        return self._lock

    @property
    def segment(self) -> Segment:
        return self._segment

    @property
    def drain_limit_s(self) -> float:
        return self._drain_limit

    def put_right(self) -> None:
        """Before a cut: what somebody has scribbled on must not spoil it.  The caller holds the lock."""
        self._look_for_damage()
        self._watch.put_marks_right()

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Until this is left, `close` waits."""
        self._check_process()
        with self._lock:
            self._cutting += 1
        try:
            yield
        finally:
            with self._lock:
                self._cutting -= 1
                self._idle.notify_all()

    def prepare(self, request: Request) -> Entry:
        """Everything that can fail: the target, the bitmap, and every worker has opened the target.

        Nothing has changed if it does.
        """
        self._check_process()
        with self._lock:
            self.check_open()
            self._look_for_damage()
            if request.source is not None:
                self._check_source(request.source)
            index = self._free_index()
            path = resolve(request.target)
            increment = Increment.plan(
                self.bitmaps,
                self._segment,
                request.sync,
                request.bitmap,
                request.bitmap_mode,
                path=path,
                in_place=request.in_place,
                manifest=request.manifest,
            )
            serial = self._begin(index, path, in_place=increment is not None and increment.in_place)
            file: TargetFile | None = None
            job_id: str | None = None
            try:
                self._reach("creating")
                if request.job:
                    job_id = self.job_table.reserve(request, serial, path)
                full = request.job and request.sync != "none"
                if increment is None:
                    file = TargetFile.create(
                        path, self._image, overwrite=request.overwrite, full=full, named=request.job
                    )
                else:
                    file = increment.take_target(serial, path, self._image, overwrite=request.overwrite)
                self._reach("target")
                bitmap, seal = self._fill_entry(index, serial, file, request, increment)
                background = int(request.sync != "none" and not (increment and increment.filters))
                entry = Entry(index, serial, file, bitmap, seal, request.speed, background)
                entry.increment, entry.job_id = increment, job_id
                entry.source = request.source.serial if request.source is not None else 0
                self._prepared[index] = entry
                return entry
            except BaseException:
                if job_id is not None:
                    self.job_table.give_back(job_id)
                if file is not None:
                    file.give_back()
                    file.close()
                if increment is not None:
                    increment.give_up()
                self._free_entry(index, serial)
                raise

    def activate(self, entry: Entry, cut: Cut) -> None:
        """The cut is taken.  The caller holds the lock."""
        entry.cut = cut
        entry.odd_epoch = self._segment.own_epoch - 1
        self._entries[entry.index] = self._prepared.pop(entry.index)
        self.bitmaps.note_boundary(entry.odd_epoch)
        self._pool.wake()

    def follow(self, entry: Entry) -> None:
        """A backup of a snapshot shows that one's cut; no writer has to know of it.  The caller holds the lock.

        If the snapshot is not there any more it is broken at the next look.
        """
        segment, index = self._segment, entry.index
        source = self._source_of(entry)
        entry.cut, entry.odd_epoch = (source.cut, source.odd_epoch) if source is not None else (NO_CUT, 1)
        segment.set_snapshot(index, Snapshot.cut_epoch, entry.odd_epoch)
        segment.set_snapshot(index, Snapshot.cut_time_ns, entry.cut.time_ns)
        segment.set_snapshot(index, Snapshot.drained_ns, entry.cut.drained_ns)
        segment.set_snapshot(index, Snapshot.state, states.state_word(states.FOLLOWING, entry.odd_epoch))
        self._entries[index] = self._prepared.pop(index)
        self._pool.wake()

    def _check_source(self, source: CoordinatorSnapshot) -> None:
        """Whether a snapshot can be backed up; SnapshotBrokenError, ClosedError."""
        if source.broken is not None:
            raise source.broken
        if source.serial not in {snapshot.serial for snapshot in self._snapshots.values()}:
            raise ClosedError(f"the snapshot is closed, or none of {self.path}")

    def _source_of(self, entry: Entry) -> Entry | None:
        """The entry of the snapshot that a backup follows, if it still is there."""
        found = [each for each in self._entries.values() if each.serial == entry.source]
        return found[0] if found else None

    def _look_at_source(self, entry: Entry) -> None:
        """A backup of a snapshot can't be right any more when that is broken, or gone, before all is copied."""
        if entry.source and state_of(self._segment, entry.index) == states.FOLLOWING:
            source = self._source_of(entry)
            error = broken_error(self._segment, source.index) if source is not None else None
            if error is not None:
                number = error.errno or errno.EIO
                break_snapshot(self._segment, entry.index, entry.serial, number, error.cluster)
            elif source is None:
                break_snapshot(self._segment, entry.index, entry.serial, errno.ESTALE, 0)

    def discard(self, entry: Entry) -> None:
        """There was no cut, or nobody wants it any more."""
        # Without the lock: it may be a matter of several coordinators.
        self.job_table.end_job_of(entry)
        with self._lock:
            if entry.released:
                return
            uncut = (states.PREPARING, states.PREPARED, states.ABANDONED)
            if entry.index in self._prepared and state_of(self._segment, entry.index) in uncut:
                entry.target.give_back()
            if entry.increment is not None:
                entry.increment.give_up()
            self._release_entry(entry)

    def _begin(self, index: int, path: str, *, in_place: bool) -> int:
        """Say in the entry what is about to be made, so that a restarted coordinator can remove it: its serial."""
        segment = self._segment
        # Two snapshots with one bitmap would ruin each other: what the header says is only where to begin.
        serial, taken = segment.header(Header.next_serial), set(bitmap_serials(segment))
        while serial in taken:
            serial = serial % 0xFFFFFFFF + 1
        segment.set_header(Header.next_serial, serial % 0xFFFFFFFF + 1)
        segment.set_snapshot(index, Snapshot.serial, serial)
        segment.set_snapshot(index, Snapshot.group, 0)
        segment.set_snapshot(index, Snapshot.in_place, int(in_place))
        place = segment.geometry.snapshot(index, Snapshot.target_path)
        segment.set_text(place, Snapshot.target_path, path + PARTIAL_SUFFIX)
        segment.seal_name(index)
        segment.set_snapshot(index, Snapshot.state, states.state_word(states.CREATING, 0))
        return serial

    def _fill_entry(
        self, index: int, serial: int, file: TargetFile, request: Request, increment: Increment | None
    ) -> tuple[Bitmap, int]:
        """Make the bitmap, fill in the entry and seal it, and wait until the workers have opened the target."""
        segment = self._segment
        bitmap = Bitmap.create(segment, serial, self._access)
        try:
            self._reach("bitmap")
            fields = {
                Snapshot.policy: states.POLICIES[request.on_cbw_error],
                # 0 means none: a tiny timeout is not that.
                Snapshot.timeout_ns: math.ceil(request.cbw_timeout * 1e9),
                Snapshot.sync: states.SYNCS[request.sync],
                Snapshot.broken: 0,
                Snapshot.broken_time_ns: 0,
                Snapshot.background_error: 0,
                # What a bitmap leaves out is marked after the cut (`Increment.filter`).
                Snapshot.background: int(request.sync != "none" and not (increment and increment.filters)),
                Snapshot.manifest: int(file.manifest is not None),
                Snapshot.round: 0,
                Snapshot.max_workers: request.max_workers,
                Snapshot.max_chunk: request.max_chunk,
                Snapshot.cursor: 0,
                Snapshot.speed: request.speed,
                Snapshot.budget_ns: time.monotonic_ns(),
                Snapshot.target_device: file.identity.device,
                Snapshot.target_inode: file.identity.inode,
                Snapshot.job: int(request.job),
                Snapshot.overwrite: int(file.overwrite),
                Snapshot.source: request.source.serial if request.source is not None else 0,
                Snapshot.discard_source: int(request.discard_source),
                Snapshot.copy_range: int(request.copy_range),
                Snapshot.cut_time_ns: 0,
                Snapshot.drained_ns: 0,
            }
            for word, value in fields.items():
                segment.set_snapshot(index, word, value)
            seal = segment.seal(index)
            segment.set_snapshot(index, Snapshot.state, states.state_word(states.PREPARING, 0))
            self._reach("preparing")
            look = functools.partial(self._watch.check_preparing, index, seal)
            refusal = self._pool.wait_ready(index, serial, READY_TIMEOUT_S, look)
            if refusal:
                raise TargetRefusedError(
                    refusal, f"target {file.path}: a copy worker can't open it: {os.strerror(refusal)}"
                )
        except BaseException:
            bitmap.close()
            raise
        return bitmap, seal

    def _free_index(self) -> int:
        for index in range(SNAPSHOT_COUNT):
            if index not in self._entries and state_of(self._segment, index) == states.FREE:
                return index
        raise NoFreeSnapshotError(f"all {SNAPSHOT_COUNT} snapshots of {self.path} are taken")

    def _free_entry(self, index: int, serial: int) -> None:
        """The snapshot is no more: nobody waits for it, its bitmap's name goes, workers let go of its target."""
        self._segment.set_snapshot(index, Snapshot.state, states.state_word(states.FREE, 0))
        try:
            self._reach("freed")
        finally:
            wake_all(self._segment)
            self._pool.wake()
            # An entry that was scribbled on may have the serial of another one.
            if serial not in {each.serial for each in (*self._prepared.values(), *self._entries.values())}:
                Bitmap.unlink(self._segment, serial)

    def _release_entry(self, entry: Entry) -> None:
        """Each step of it, also if one before it failed: nobody would come back for the entry."""
        self._entries.pop(entry.index, None)
        self._prepared.pop(entry.index, None)
        entry.released = True
        with contextlib.ExitStack() as stages:
            stages.callback(entry.target.close)
            stages.callback(entry.bitmap.close)
            stages.callback(self._free_entry, entry.index, entry.serial)
            if entry.target.working_path != entry.target.path:
                # Given up before the file goes, or who comes after our death would report it as lost.
                word = self._segment.snapshot(entry.index, Snapshot.state)
                self._segment.set_snapshot(entry.index, Snapshot.state, states.state_word(states.ABANDONED, word >> 32))
                # Before the entry is free: afterwards nobody would know of an unfinished file.
                entry.target.remove()
                self._reach("removed")

    def end_entry(self, entry: Entry, *, succeeded: bool) -> None:
        """The end of a job's snapshot: its bitmap is what the outcome makes of it, an unfinished target is removed."""
        try:
            if entry.increment is not None and succeeded:
                entry.increment.commit(entry.index)
            elif entry.increment is not None and self._is_damaged(entry):
                # What was copied may be wrong: it does not count.
                entry.increment.give_up()
            elif entry.increment is not None:
                entry.increment.fail(entry.index, entry.target, entry.bitmap, self._pool)
        finally:
            self._release_entry(entry)

    def drop_snapshot(self, entry: Entry) -> None:
        """Called by a snapshot that is being closed."""
        with self._lock:
            self._snapshots.pop(entry.index, None)
            if self._entries.get(entry.index) is entry:
                self._release_entry(entry)

    def count_progress(self, entry: Entry) -> Progress:
        """Bytes by state, from the cluster bytes."""
        geometry = self._segment.geometry
        self._check_process()
        with self._lock:
            if self._entries.get(entry.index) is not entry:
                raise ClosedError("the snapshot is closed")
            counts = entry.bitmap.counts()
            last = entry.bitmap.state(geometry.clusters - 1)
        missing = geometry.clusters * geometry.cluster_size - geometry.image_size

        def size(count: int, state: int) -> int:
            return count * geometry.cluster_size - (missing if last == state else 0)

        writers, background = size(counts.copied_for_writer, COPIED_FOR_WRITER), size(counts.copied, COPIED)
        zero, skipped = size(counts.zero, ZERO), size(counts.skipped, SKIPPED)
        # As in QEMU, the length of a job with a bitmap is what is dirty.
        left_out = skipped if entry.increment is not None and entry.increment.filters else 0
        current = writers + background + zero + skipped - left_out
        return Progress(current, geometry.image_size - left_out, writers, background, zero, skipped)

    def wake_workers(self) -> None:
        """Have every worker look again."""
        self._pool.wake()

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell whoever listens, in order: the caller holds the lock."""
        if self._on_event is not None:
            self._on_event(name, data)

    # -- supervision -----------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        semaphore = self._segment.semaphore("c")
        while not self._closing:
            semaphore.wait(LOOK_NS)
            try:
                with self._lock:
                    unsettled = self._look() if not self._closing else set()
                # Without the lock: a transaction takes those of all its coordinators, in its order.
                for transaction in unsettled:
                    self._see_to(repr(transaction), transaction.settle)
            except Exception:  # the thread's outermost loop: it has to go on, others depend on it
                log.exception("supervision of %s", self.path)

    def _look(self) -> set[JobTransaction]:
        """Each duty is seen to, also if the system refuses another one: a job ends although nobody can be reaped.

        Returns the transactions that have something to settle.
        """
        self._see_to("the copy workers", self._pool.supervise)
        self._see_to("its shared memory", self._look_for_damage)
        now = time.monotonic()
        if now - self._slots_looked_s >= REAP_SLOTS_S:
            self._slots_looked_s = now
            self._see_to("the slots", self._reap_slots)
        for entry in list(self._entries.values()):
            self._look_at_source(entry)
            self._complete_break(entry)
            # No worker could open the target: nobody will copy, so nobody shall wait.
            refusal = self._pool.refusal(entry.index, entry.serial)
            if refusal and state_of(self._segment, entry.index) in states.LIVE:
                break_snapshot(self._segment, entry.index, entry.serial, refusal, 0)
        unsettled: set[JobTransaction] = set()
        for job in self.job_table.jobs:
            if not job.ended:
                self._see_to(repr(job), functools.partial(job.look, unsettled))
        return unsettled

    def _see_to(self, what: str, duty: Callable[[], None]) -> None:
        """Do a duty; where the system refuses, it is done at the next look.  The log has each complaint once."""
        try:
            duty()
        except OSError as error:
            if self._complaints.get(what) != str(error):
                self._complaints[what] = str(error)
                log.warning("%s: looking at %s: %s; will try again", self.path, what, error)
        else:
            self._complaints.pop(what, None)

    def _look_for_damage(self) -> None:
        """Has somebody scribbled on what we have our own copy of?  What depends on it is broken."""
        self._watch.put_header_right()
        trusted = self._watch.put_epoch_right()
        if not trusted:
            self.bitmaps.distrust()
        for entry in self._entries.values():
            found = damage.of_entry(self._segment, entry) or (
                None if trusted or entry.complete else "the epoch changed"
            )
            if found is not None:
                self._break_damaged(entry, found)
            self._put_turns_right(entry)
        known = {*self._prepared, *self._entries}
        if any(i not in known and state_of(self._segment, i) != states.FREE for i in range(SNAPSHOT_COUNT)):
            self._free_strays()
        # Who waits for longer than a look may wait for a claim that nobody has made.
        asleep = self._asleep()
        if asleep & self._asleep_before:
            for entry in self._entries.values():
                self._look_at_bytes(entry, entry.bitmap.histogram(), full=False)
        self._asleep_before = asleep

    def _asleep(self) -> set[int]:
        segment, geometry = self._segment, self._segment.geometry
        return set(_core.nonzero(segment.memory, geometry.slot(0, Slot.asleep), Slot.SIZE, geometry.slot_count))

    def _break_damaged(self, entry: Entry, found: str) -> None:
        if state_of(self._segment, entry.index) != states.BROKEN or damage.of_entry(self._segment, entry) is not None:
            log.error("the snapshot to %s is broken: %s; somebody has overwritten it", entry.target.path, found)
        # Our words again, so that it is told once.
        self._segment.set_snapshot(entry.index, Snapshot.speed, entry.speed)
        self._segment.set_snapshot(entry.index, Snapshot.background, entry.background)
        entry.seal = damage.seal_of(self._segment, entry)
        damage_snapshot(self._segment, entry.index, entry.odd_epoch)

    def _is_damaged(self, entry: Entry) -> bool:
        error = broken_error(self._segment, entry.index)
        return error is not None and error.errno == errno.EUCLEAN

    def is_copied(self, entry: Entry, sync: str) -> bool:
        """Whether all of a backup is copied, and its entry COMPLETE: from here on nobody can break it.

        A restarted coordinator finds it COMPLETE.  Who else says so may be mistaken, so the bytes are asked.
        """
        segment = self._segment
        word, histogram = segment.snapshot(entry.index, Snapshot.state), entry.bitmap.histogram()
        done = not entry.bitmap.counts(histogram).open
        if word & 0xFFFFFFFF not in states.LIVE:
            whole = damage.of_bytes(histogram, segment.geometry.worker_count, full=sync == "full") is None
            if not (entry.complete and done and whole):
                self._break_damaged(entry, "it is not complete")
                return False
            return True
        self._look_at_bytes(entry, histogram, full=sync == "full")
        if sync == "none" or not done:
            return False
        entry.complete = segment.exchange_snapshot(
            entry.index, Snapshot.state, word, states.state_word(states.COMPLETE, word >> 32)
        )
        return entry.complete

    def _put_turns_right(self, entry: Entry) -> None:
        """Of those who copy in the background: who is not there takes no turn."""
        segment, start = self._segment, self._segment.geometry.snapshot(entry.index, Snapshot.turns)
        for value in set(segment.memory[start : start + Snapshot.turns.size]) - {0}:
            if value > segment.geometry.worker_count or not segment.locked(value):
                _core.exchange(segment.memory, start, start + Snapshot.turns.size, value, 0)

    def _look_at_bytes(self, entry: Entry, histogram: list[int], *, full: bool) -> None:
        """Break a snapshot whose cluster bytes can't be, and give claims back that nobody has."""
        if state_of(self._segment, entry.index) not in states.LIVE:
            return
        found = damage.of_bytes(histogram, self._segment.geometry.worker_count, full=full)
        if found is not None:
            self._break_damaged(entry, found)
        claimers = [
            worker_id for worker_id in range(1, self._segment.geometry.worker_count + 1) if histogram[worker_id]
        ]
        self._pool.return_stray_claims(claimers)

    def _reap_slots(self) -> None:
        segment, geometry = self._segment, self._segment.geometry
        used = _core.nonzero(segment.memory, geometry.slot(0, Slot.pid), Slot.SIZE, geometry.slot_count)
        for slot in used:
            pid = segment.slot(slot, Slot.pid)
            if pid and reap_slot(segment, slot):
                log.info("writer pid %d died; its slot %d is free", pid, slot)
                segment.count_header(Header.slots_reaped)

    def _complete_break(self, entry: Entry) -> None:
        """Whoever stored the sticky error may have died before it changed the state."""
        word = self._segment.snapshot(entry.index, Snapshot.state)
        if word & 0xFFFFFFFF in states.LIVE and broken_error(self._segment, entry.index) is not None:
            broken = states.state_word(states.BROKEN, word >> 32)
            self._segment.exchange_snapshot(entry.index, Snapshot.state, word, broken)
            wake_all(self._segment)
        if state_of(self._segment, entry.index) == states.BROKEN and entry.serial not in self._seen_broken:
            self._seen_broken.add(entry.serial)
            self._tell_broken(entry)

    def _tell_broken(self, entry: Entry) -> None:
        error = broken_error(self._segment, entry.index)
        if error is not None:
            data = {
                "snapshot": entry.index,
                "serial": entry.serial,
                "job": entry.job_id,
                "errno": error.errno,
                "error": os.strerror(error.errno or errno.EIO),
                "cluster": error.cluster,
                "offset": error.cluster * self._segment.geometry.cluster_size,
                # Whoever broke it stores the time right after the error, or has died before.
                "time": (error.time_ns or time.time_ns()) / 1e9,
            }
            self.emit("SNAPSHOT_BROKEN", data)

    # -- resize ----------------------------------------------------------------------------------------------------

    def resize(self, size_bytes: int) -> None:
        """Make the image larger; a block device must have been given its new size before.  To the same size: nothing.

        Writers go on meanwhile.  Their handles are as large when they are next asked for their size, or for bytes
        beyond their old end.  Blocks while the copy workers are replaced.

        ResizeRefusedError: snapshots or jobs are active, or that size can't be.  ImageInUseError: a QEMU counts on the
        image's size.  OSError: the file system or /dev/shm has no room.  Nothing has changed then.
        """
        self._check_process()
        with self._lock:
            self.check_open()
            segment = self._segment
            self._refuse_resize_beside_snapshots()
            if segment.header(Header.resize_to) == 0:
                check_size(segment, self._image, size_bytes)
                if size_bytes == segment.geometry.image_size:
                    return
            try:
                self._pool.stop()
                if worker_lives(segment):
                    raise ResizeRefusedError(
                        f"{self.path}: can't be resized while a copy worker of an earlier coordinator lives"
                    )
                # One that failed, and could not be taken back either.
                settle(segment, self._image)
                geometry = check_size(segment, self._image, size_bytes)
                self._image_lock.hold_resize()
                resize(segment, self._image, geometry)
            finally:
                try:
                    self._image_lock.drop_resize()
                finally:
                    self._pool.start()
            log.info("%s has %d bytes now", self.path, size_bytes)

    def _refuse_resize_beside_snapshots(self) -> None:
        segment = self._segment
        used = [index for index in range(SNAPSHOT_COUNT) if state_of(segment, index) != states.FREE]
        if used:
            targets = ", ".join(target_path(segment, index).removesuffix(PARTIAL_SUFFIX) for index in used)
            raise ResizeRefusedError(
                f"{self.path}: can't be resized while {len(used)} snapshots or jobs are active (to {targets}): "
                "end them first"
            )

    # -- what there is ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Plain data: image, epoch, slots, workers, snapshots, jobs, counters."""
        self._check_process()
        with self._lock:
            self.check_open()
            status = describe_segment(self._segment, self.path)
            status["jobs"] = [job.describe() for job in self.job_table.jobs]
        return status

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock, for somebody who may be in a forked child, where it may never be released."""
        self._check_process()
        with self._lock:
            yield

    def check_open(self) -> None:
        """ClosedError if it is closed, or being closed, or another process's."""
        self._check_process()
        if self._closed:
            raise ClosedError("the coordinator is closed")

    def _check_process(self) -> None:
        """A forked child has a copy of this object, with a lock that nobody may ever release."""
        if self._pid != os.getpid():
            raise ClosedError("the coordinator belongs to the parent process")

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel jobs, drop snapshots, end the workers, and let the segment go.

        Writers that are still attached go on in it, with nothing to copy, until they leave or the next coordinator
        adopts it.  Each stage runs also when one before it failed or was interrupted.  Closing twice is harmless.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._cutting)
        atexit.unregister(self.close)
        with naming(self.path, "not all of its coordinator could be ended"), contextlib.ExitStack() as stages:
            # In reverse: what is pushed last runs first.
            stages.callback(self._image.close)
            stages.callback(self._leave_segment)
            stages.callback(self._end_supervision)
            stages.callback(self._drop_everything)
            stages.callback(self._cancel_all)

    def _cancel_all(self) -> None:
        for job in self.jobs:
            if not job.ended:
                job.end()
        with self._lock:
            self.job_table.forget_all()

    def _drop_everything(self) -> None:
        for snapshot in self.snapshots:
            snapshot.close()
        with self._lock:
            for entry in list(self._entries.values()):
                self._release_entry(entry)
            self._free_strays()

    def _end_supervision(self) -> None:
        self._closing = True
        self._segment.semaphore("c").post()
        self._supervisor.join()

    def _leave_segment(self) -> None:
        """Each stage runs also when one before it failed: a lock that stays would keep every other coordinator away."""
        segment = self._segment
        with contextlib.ExitStack() as stages:
            stages.callback(segment.close)
            # A writer that left after `_retire` saw him found our lock held, and relies on us.
            stages.callback(leave_last, segment)
            stages.callback(segment.unlock, COORDINATOR)
            # Before the segment: whoever owns that next is not to find us here.
            stages.callback(self._image_lock.close)
            stages.callback(segment.set_header, Header.coordinator_pid, 0)
            stages.callback(self._retire)
            if hasattr(self, "_pool"):
                stages.callback(self._pool.stop)

    def _retire(self) -> None:
        """Remove the segment if nobody uses it, and save what is persistent; else leave it, and its bitmaps in it."""
        begun = hasattr(self, "bitmaps")
        packed = self.bitmaps.put_away() if begun else self._loaded
        try:
            gone = try_retire(self._segment)
        except OSError:
            if begun:
                self.bitmaps.put_back()
            raise
        if not gone:
            if begun:
                self.bitmaps.put_back()
        elif self._saved is not None:
            try:
                self._saved.save(packed)
            except OSError as error:
                log.error("the bitmaps of %s could not be saved, the next backup is a full one: %s", self.path, error)

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Coordinator of {self.path}{', closed' if self._closed else ''}>"


def _own_segment(
    image: ImageFile,
    image_lock: ImageLock,
    take_image: Callable[[], None],
    geometry: Geometry,
    access: Access,
    cluster_size: int | None,
    slots: int | None,
    lost: list[Lost],
) -> tuple[Segment, bool]:
    """Create the image's segment, or take over the one that a dead coordinator left: (segment, adopted).

    lost: gets the backups of one that can't be taken over.
    """
    deadline = time.monotonic() + TAKE_OVER_S
    while True:
        try:
            return create(image, geometry, access, take_image), False
        except FileExistsError:
            pass
        try:
            segment = attach(image)
        except NoCoordinatorError as error:
            # Gone meanwhile, or not finished: its creator is at work or dead.
            if error.errno == errno.EAGAIN:
                discard_unused(image.identity, image.owner)
            continue
        except (StaleSegmentError, LayoutVersionError) as error:
            log.warning("%s: discarded if nobody uses it", error)
            unfinished = find_unfinished(image.identity)
            discard_unused(image.identity, image.owner)
            lost += give_up(unfinished, str(error))
            continue
        try:
            locked = segment.try_lock(COORDINATOR)
            linked = not locked or segment.linked()
            retired = locked and linked and try_retire(segment)
        except BaseException:
            segment.close()
            raise
        if not locked:
            pid = segment.header(Header.coordinator_pid)
            segment.close()
            # Whoever leaves last, or sweeps, holds this lock for a moment too.
            if time.monotonic() < deadline and not _lives(pid):
                time.sleep(0.01)
                continue
            raise CoordinatorRunningError(
                errno.EBUSY, f"{image.path}: a coordinator serves this image already (pid {pid or 'unknown'})"
            )
        found = segment.geometry
        fits = cluster_size in (None, found.cluster_size) and slots in (None, found.slot_count)
        if not linked or retired:
            segment.close()
        elif fits:
            try:
                image_lock.take()
            except BaseException:
                segment.close()
                raise
            segment.set_header(Header.retired, 0)
            return segment, True
        else:
            segment.close()
            raise ShmcbwError(
                f"{image.path}: writers or unfinished jobs use its segment with cluster size {found.cluster_size} and "
                f"{found.slot_count} slots: adopt it with these, or end them first"
            )


def _sync_name(sync: int) -> str:
    return next((name for name, value in states.SYNCS.items() if value == sync), "full")


def _is_cut(segment: Segment, entry: Entry) -> bool:
    """Whether the words that an adopted snapshot has twice agree, and its cut lies before the epoch."""
    odd = segment.snapshot(entry.index, Snapshot.cut_epoch)
    return odd == entry.odd_epoch and odd % 2 == 1 and odd < epoch(segment)


def _lives(pid: int) -> bool:
    """Whether a process has this id, for a message's sake: the lock decides who owns what."""
    if not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
