"""The filter: the writer's side.  Round out to clusters, make sure they are copied, forward the write.

`Disk` adds to the core's write path (``_core/filter.c``: six steps, one call) what is rare or policy: attaching, slots
per thread, fork, timeouts, failed copies, the way out of a drained section that nobody ends.  A write that finds
nothing to copy runs no line of this file.

    disk.pwrite -> core: steps 1-6 -> slot -> copy worker -> copying -> cluster bytes -> core -> back

Owned here: this process's handles.  Never done here: copying, taking a cut, starting a process.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
import weakref
from types import TracebackType

from . import _core, states
from .bitmap import Bitmap
from .epochs import DRAIN_LIMIT_MAX_S, abandon
from .errors import (
    ClosedError,
    CopyFailedError,
    CopyTimeoutError,
    NoCoordinatorError,
    NoFreeSlotError,
    OutOfRangeError,
    ReadOnlyImageError,
    ShmcbwError,
    naming,
)
from .failpoints import failure
from .image import ImageFile, file_size
from .layout import HISTOGRAM_COUNT, SNAPSHOT_COUNT, Header, Slot, Snapshot
from .segment import COORDINATOR, Segment, attach, in_use, try_retire
from .slots import acquire_slot, release_slot
from .snapshots import break_snapshot, is_active, state_of

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from typing import Any

_ATTACH, _UNMAPPED, _FAILED, _LATE, _GATED, _FAULT, _RANGE, _FAILPOINT, _UNMARKED = range(9)
_RELEASE_INSIDE, _RELEASE_FORKED = 1, 2
_ATTACH_TRIES = 100
_ATTACH_PAUSE_S = 0.01

_COUNTERS = (
    "writes",
    "write_bytes",
    "first_touches",
    "wait_count",
    "wait_total_ns",
    "gate_count",
)

_disks: weakref.WeakSet[Disk] = weakref.WeakSet()


class _Lease:
    """A thread's slot; thread-local storage drops it when the thread ends, and the slot goes back."""

    def __init__(self, disk: Disk, slot: int) -> None:
        self._disk = weakref.ref(disk)
        self._slot = slot
        self._pid = os.getpid()

    def __del__(self) -> None:
        disk = self._disk()
        if disk is not None and self._pid == os.getpid():
            try:
                disk._give_back(self._slot)
            except OSError:
                # It is cleared, but still locked: by this handle, which may take it again, until that is closed.
                pass


class Disk(_core.Filter):
    """An image, opened for writing through the filter.  Made by `shmcbw.open`; usable from several threads.

    pwrite(data, offset, *, unchanged=False) -> int
        Write any bytes-like object at any byte offset; returns its length.  Waits only while an active snapshot still
        needs old content of a cluster it touches, at most that snapshot's cbw_timeout.  ``unchanged=True`` expects
        the data to equal what is there: it is compared, and if so nothing is copied, marked or stored.  A write lies
        wholly before or wholly after each cut, whatever its length (I5); one that stores for longer than the
        coordinator's drain_limit makes a cut fail.
    try_pwrite(data, offset, patience_ns) -> bool
        pwrite for event loops: waits for copies for at most ``patience_ns``, then returns False with nothing done.  (At
        the gate of a cut it waits like any write, at most the coordinator's drain_limit.)
    pwrite_zeroes(count, offset) -> int, pdiscard(count, offset) -> int
        Make a range read as zeroes, with a hole where the file can have one.  Writes like any other.
    pread(count, offset) -> bytes, pread_into(buffer, offset) -> int
        Read the image as it is now.  Never wait.

    Errors, all before anything is changed: OutOfRangeError, ClosedError, ReadOnlyImageError, NoFreeSlotError (too many
    writing threads), CopyFailedError and CopyTimeoutError (policy break-guest-write only), KeyboardInterrupt.
    OSError(EIO or ENOSPC) if the image was truncated or its file system is full: then part of the data may be stored.
    """

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        with naming(os.fspath(path), "can't be opened"):
            self._image = ImageFile.open(path, writable=not read_only)
        self._mapping: mmap.mmap | None = None
        #: Mappings of the size before a resize; calls that are inside use them.
        self._former: list[mmap.mmap] = []
        self._segment: Segment | None = None
        self._bitmaps: dict[int, Bitmap] = {}
        self._lock = threading.RLock()
        self._local = threading.local()
        self._slots: set[int] = set()
        self._totals = dict.fromkeys(_COUNTERS, 0)
        self._wait_max_ns = 0
        self._histogram = [0] * HISTOGRAM_COUNT
        self._closed = False
        self._size_bytes = self._image.size_bytes
        try:
            with naming(self.path, "can't be opened through the filter"):
                self._attach()
                if not read_only:
                    self._take_slot()
        except BaseException:
            self.close()
            raise
        _disks.add(self)

    # -- what a handle is ------------------------------------------------------------------------------------------

    @property
    def path(self) -> str:
        return self._image.path

    @property
    def size_bytes(self) -> int:
        """Bytes of the image; follows a resize by its coordinator."""
        self._follow_resize()
        return self._size_bytes

    @property
    def cluster_size_bytes(self) -> int:
        return self._attached().geometry.cluster_size

    @property
    def closed(self) -> bool:
        return self._closed

    def flush(self) -> None:
        """Sync the source to its storage (fdatasync); snapshots' targets are their owner's business."""
        if self._closed:
            raise ClosedError(f"{self.path}: flush of a closed disk")
        with naming(self.path, "its data can't be synced"):
            os.fdatasync(self._image.fd)

    def statistics(self) -> dict[str, Any]:
        """Counters of this handle since it was opened, all its threads together.

        writes, write_bytes, first_touches (writes that marked a cluster), wait_count (writes that waited for a copy),
        wait_total_ns, wait_max_ns, gate_count (rounds at the gate of a cut), wait_histogram_ns: {upper bound: count}.
        """
        with self._lock:
            totals: dict[str, Any] = dict(self._totals)
            longest, histogram = self._wait_max_ns, list(self._histogram)
            for slot in self._slots:
                counters, slot_longest, slot_histogram = self._read_counters(slot)
                for name, value in counters.items():
                    totals[name] += value
                longest = max(longest, slot_longest)
                histogram = [a + b for a, b in zip(histogram, slot_histogram, strict=True)]
        totals["wait_max_ns"] = longest
        totals["wait_histogram_ns"] = {1 << bucket: count for bucket, count in enumerate(histogram) if count}
        return totals

    def _read_counters(self, slot: int) -> tuple[dict[str, int], int, list[int]]:
        segment = self._attached()
        counters = {name: segment.slot(slot, getattr(Slot, name)) for name in _COUNTERS}
        base = segment.geometry.slot(slot, Slot.wait_histogram)
        histogram = [_core.load_u64(segment.memory, base + 8 * bucket) for bucket in range(HISTOGRAM_COUNT)]
        return counters, segment.slot(slot, Slot.wait_max_ns), histogram

    # -- attaching -------------------------------------------------------------------------------------------------

    def _attached(self) -> Segment:
        if self._segment is None:
            raise ClosedError(f"{self.path}: the disk is closed")
        return self._segment

    def _attach(self) -> None:
        """Attach to the image's segment.  NoCoordinatorError if nobody owns it."""
        image = self._image
        for _ in range(_ATTACH_TRIES):
            segment = attach(image)
            try:
                if not segment.locked(COORDINATOR):
                    raise NoCoordinatorError(
                        errno.ENOENT, f"{self.path}: no coordinator serves this image (the last one ended or died)"
                    )
                if not segment.header(Header.retired) and segment.linked():
                    self._setup(
                        segment.memory,
                        self._map_image(segment.geometry.image_size),
                        image.fd,
                        image.writable,
                        segment.geometry.core_layout(),
                        segment.semaphore("pool"),
                        *segment.failpoints,
                    )
                    self._segment = segment
                    self._size_bytes = segment.geometry.image_size
                    return
            except BaseException:
                segment.close()
                raise
            segment.close()
            time.sleep(_ATTACH_PAUSE_S)
        raise NoCoordinatorError(errno.EAGAIN, f"{self.path}: the coordinator is ending")

    def _map_image(self, size_bytes: int) -> mmap.mmap:
        """The mapping of the image at the size that its segment has; calls that are inside keep the one they use."""
        if self._mapping is None or len(self._mapping) != size_bytes:
            mapping = self._image.map(size_bytes)
            if self._mapping is not None:
                self._former.append(self._mapping)
            self._mapping = mapping
        return self._mapping

    def _follow_resize(self) -> None:
        """If the image has been resized since this handle looked last: be as large, too.

        Nothing moves, so whoever does not look goes on as before: the clusters it can reach are the same ones.
        """
        with self._lock:
            segment = self._segment
            geometry = segment.larger_geometry() if segment is not None else None
            if segment is None or geometry is None:
                return
            memory = segment.map_larger(geometry)
            self._grow(memory, self._map_image(geometry.image_size), geometry.core_layout())
            segment.follow(memory, geometry)
            # Mapped anew, at the new length, when the next snapshot is seen.
            self._forget_bitmaps()
            self._size_bytes = geometry.image_size

    def _take_slot(self) -> None:
        """Give the calling thread a slot of its own."""
        with self._lock:
            for _ in range(_ATTACH_TRIES):
                segment = self._attached()
                try:
                    slot = acquire_slot(segment, self._slots)
                except NoFreeSlotError:
                    if not self._is_gone(segment):
                        raise
                else:
                    try:
                        # Partner: `segment.try_retire` stores `retired` and then tests the locks.  One sees the other.
                        if not self._is_gone(segment):
                            self._bind(slot, segment.semaphore(f"s{slot}"))
                            self._slots.add(slot)
                            self._local.lease = _Lease(self, slot)
                            return
                    except BaseException:
                        release_slot(segment, slot)
                        raise
                    release_slot(segment, slot)
                self._leave_segment()
                self._attach()
            raise NoCoordinatorError(errno.EAGAIN, f"{self.path}: the coordinator is ending")

    def _is_gone(self, segment: Segment) -> bool:
        """Whether the segment was removed while no thread of this handle had a slot in it."""
        return not self._slots and (segment.header(Header.retired) == 1 or not segment.linked())

    def _leave_segment(self) -> None:
        self._release(_RELEASE_INSIDE)
        self._forget_bitmaps()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _give_back(self, slot: int) -> None:
        """The thread that had this slot has ended, or the handle is closing."""
        with self._lock:
            if slot not in self._slots or self._segment is None:
                return
            counters, longest, histogram = self._read_counters(slot)
            for name, value in counters.items():
                self._totals[name] += value
            self._wait_max_ns = max(self._wait_max_ns, longest)
            self._histogram = [a + b for a, b in zip(self._histogram, histogram, strict=True)]
            self._slots.discard(slot)
            self._unbind(slot)
            release_slot(self._segment, slot)

    def _after_fork(self) -> None:
        """In the child: the slots and the descriptor that holds their locks belong to the parent."""
        self._lock = threading.RLock()
        self._local = threading.local()
        self._slots = set()
        self._release(_RELEASE_FORKED)
        self._forget_bitmaps()
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    # -- what the core asks ----------------------------------------------------------------------------------------

    def _resolve(self, reason: int, index: int, value: int, cluster: int) -> None:
        """Called by the core, out of flight: returns to have the write start over, or raises to refuse it."""
        if reason == _ATTACH:
            self._resolve_attach(for_writing=bool(index))
        elif reason == _UNMAPPED:
            self._map_bitmap(index)
        elif reason == _FAILED:
            self._copy_failed(index, value, cluster)
        elif reason == _LATE:
            self._copy_late(index, value, cluster)
        elif reason == _GATED:
            self._leave_gate(value)
        elif reason == _UNMARKED:
            self._break_all(cluster)
        elif reason == _FAULT:
            raise self._fault(value, cluster)
        elif reason == _FAILPOINT:
            raise failure(cluster, value)
        elif value >= 1 << 63 or cluster >= 1 << 63:
            raise OutOfRangeError(f"{self.path}: a negative or huge range: the image has {self._size_bytes} bytes")
        else:
            self._follow_resize()
            if value + cluster > self._size_bytes:
                raise OutOfRangeError(
                    f"{self.path}: {cluster} bytes at {value}: the image has {self._size_bytes} bytes"
                )

    def _resolve_attach(self, *, for_writing: bool) -> None:
        if self._closed:
            raise ClosedError(f"{self.path}: the disk is closed")
        if for_writing and not self._image.writable:
            raise ReadOnlyImageError(errno.EBADF, f"{self.path}: the disk was opened read-only")
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.path}: the disk is closed")
            if self._segment is None:
                # What a fork in the middle of a write has left.
                self._release(_RELEASE_INSIDE)
                with naming(self.path, "its shared memory can't be used"):
                    self._attach()
        if for_writing and getattr(self._local, "lease", None) is None:
            with naming(self.path, "this thread can't write"):
                self._take_slot()

    def _map_bitmap(self, index: int) -> None:
        """Map the bitmap of a snapshot that became active, and let go of those that are no more."""
        segment = self._attached()
        with self._lock:
            for old in [i for i in self._bitmaps if state_of(segment, i) == states.FREE or i == index]:
                self._detach_bitmap(old)
                self._bitmaps.pop(old).close()
            serial = segment.snapshot(index, Snapshot.serial)
            try:
                bitmap = Bitmap.attach(segment, serial)
            except OSError as error:
                if is_active(segment, index, serial):
                    self._apply_policy(index, serial, error.errno or errno.EIO, 0, "its bitmap can't be mapped")
                return
            self._bitmaps[index] = bitmap
            self._attach_bitmap(index, serial, bitmap.memory)

    def _forget_bitmaps(self) -> None:
        for bitmap in self._bitmaps.values():
            bitmap.close()
        self._bitmaps = {}

    def _copy_failed(self, index: int, number: int, cluster: int) -> None:
        if index < SNAPSHOT_COUNT and index in self._bitmaps:
            self._apply_policy(index, self._bitmaps[index].serial, number, cluster, os.strerror(number))

    def _copy_late(self, index: int, serial: int, cluster: int) -> None:
        self._apply_policy(index, serial, errno.ETIMEDOUT, cluster, "cbw_timeout is over")

    def _apply_policy(self, index: int, serial: int, number: int, cluster: int, why: str) -> None:
        """break-snapshot: break it and let the write go on.  break-guest-write: refuse the write."""
        segment = self._attached()
        if segment.snapshot(index, Snapshot.policy) != states.BREAK_GUEST_WRITE:
            break_snapshot(segment, index, serial, number, cluster)
        elif is_active(segment, index, serial):
            kind = CopyTimeoutError if number == errno.ETIMEDOUT else CopyFailedError
            raise kind(
                number,
                f"{self.path}: cluster {cluster} was not copied ({why}); policy break-guest-write: nothing written",
            )

    def _leave_gate(self, odd: int) -> None:
        """The drained section with this odd epoch lasts.  If its coordinator is dead or its limit is over, end it."""
        segment = self._attached()
        try:
            orphaned = not segment.locked(COORDINATOR)
        except OSError:
            # No write fails because nobody can say: the deadline ends the section.
            orphaned = False
        left_ns = segment.header(Header.drain_deadline_ns) - time.monotonic_ns()
        if orphaned or not 0 < left_ns <= DRAIN_LIMIT_MAX_S * 1e9:
            abandon(segment, odd)

    def _break_all(self, cluster: int) -> None:
        """A store was not seen in flight, for somebody has overwritten its mark: any cut may have half of it."""
        segment = self._attached()
        for index in range(SNAPSHOT_COUNT):
            break_snapshot(segment, index, segment.snapshot(index, Snapshot.serial), errno.EUCLEAN, cluster)

    def _fault(self, offset: int, length: int) -> OSError:
        size = file_size(self._image.fd)
        what = f"{self.path}: {length} bytes at {offset}"
        if size < self._size_bytes:
            return OSError(errno.EIO, f"{what}: the image was truncated from {self._size_bytes} to {size} bytes")
        if os.fstatvfs(self._image.fd).f_bavail == 0:
            return OSError(errno.ENOSPC, f"{what}: no space left to fill a hole of the image")
        return OSError(errno.EIO, f"{what}: a page of the image can't be read or written")

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back.  Waits for calls of other threads that are inside; closing twice is harmless.

        Called by the handler of a signal that came in the middle of a write of the same thread, it returns at once: the
        write ends with ClosedError and nothing written, and the handle lets go when it has left.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if not self._defer_close():
            self._finish_close()

    def _finish_close(self) -> None:
        while self._stop():
            time.sleep(0.001)
        with self._lock, naming(self.path, "not all of it could be given back"):
            try:
                for slot in list(self._slots):
                    self._give_back(slot)
                if self._segment is not None:
                    leave_last(self._segment)
            finally:
                # What could not be given back is free with the segment's descriptor, which holds its lock.
                self._slots.clear()
                self._leave_segment()
                if self._mapping is not None:
                    for mapping in (self._mapping, *self._former):
                        mapping.close()
                    self._mapping = None
                self._image.close()

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __repr__(self) -> str:
        return f"<Disk {self.path} of {self.size_bytes} bytes{', closed' if self._closed else ''}>"


def leave_last(segment: Segment) -> None:
    """Remove the segment if its coordinator is gone and nobody is left in it.

    A coordinator that ends while writers are attached leaves them the segment; whoever leaves last removes it.  The
    coordinator's lock is held meanwhile, so no coordinator can adopt.
    """
    while segment.try_lock(COORDINATOR):
        try:
            if not segment.linked() or try_retire(segment):
                return
        finally:
            segment.unlock(COORDINATOR)
        # Whoever left after we saw him found the lock held, and relies on its holder to look again.
        if in_use(segment):
            return


def open(path: str | os.PathLike[str], *, read_only: bool = False) -> Disk:
    """Open an image through the filter; its coordinator's segment is found by the image itself.

    NoCoordinatorError: nobody serves the image.  ReadOnlyImageError, FileNotFoundError and other OSErrors: the image
    can't be opened so.  ForeignSegmentError, LayoutVersionError: the shared memory under its name can't be used.
    NoFreeSlotError: the coordinator needs more slots.
    """
    try:
        return Disk(path, read_only=read_only)
    except NoCoordinatorError as error:
        message = f"{os.fspath(path)}: {error.strerror}"
        if os.fspath(path) in str(error.strerror):
            raise
        raise NoCoordinatorError(error.errno, message) from None


def _after_fork_in_child() -> None:
    for disk in list(_disks):
        disk._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)

__all__ = ["Disk", "ShmcbwError", "open"]
