"""A snapshot in the table: is it broken, break it, read it.

Reading never blocks a writer: a cluster that is not copied yet is read from the source into a private buffer, and the
bytes count only if the cluster's byte is still below COPIED and the snapshot unbroken afterwards (I7).  The writer
stores data only after it saw the byte at COPIED or stored the sticky error, so a reader that got new data sees one of
the two at its second look.  QEMU instead makes writers wait for such readers; a reader that dies would hold them.
"""

from __future__ import annotations

import errno
import os
import time

from . import _core, states
from .bitmap import COPIED, COPIED_FOR_WRITER, PENDING, SKIPPED, ZERO, Bitmap
from .clusters import byte_range, inward, outward
from .errors import ClosedError, OutOfRangeError, SnapshotBrokenError, SnapshotInaccessibleError
from .failpoints import hit, index_of
from .groups import counts
from .image import HONEST_HOLES, ImageFile, file_size, next_data
from .layout import Slot, Snapshot, Word
from .segment import Segment

_READ_PIECE_BYTES = 1 << 20
_BREAK_ERROR, _BREAK_STATE = index_of("break.error"), index_of("break.state")
_LOOKED, _READ = index_of("reader.looked"), index_of("reader.read")


def state_of(segment: Segment, index: int) -> int:
    """The state (see `states.py`) of an entry."""
    return segment.snapshot(index, Snapshot.state) & 0xFFFFFFFF


def is_active(segment: Segment, index: int, serial: int) -> bool:
    """Whether the entry still is the snapshot with this serial, and active."""
    return state_of(segment, index) == states.ACTIVE and segment.snapshot(index, Snapshot.serial) == serial


def broken_error(segment: Segment, index: int) -> SnapshotBrokenError | None:
    """Why the entry's snapshot is broken, or None."""
    found = states.split_error(segment.snapshot(index, Snapshot.broken), segment.snapshot(index, Snapshot.state) >> 32)
    if found is None:
        return None
    number, cluster = found
    return SnapshotBrokenError(number or errno.EIO, cluster, segment.snapshot(index, Snapshot.broken_time_ns))


def store_first_error(segment: Segment, index: int, word: Word, odd_epoch: int, number: int, cluster: int) -> bool:
    """Store an error of one cut in a sticky word, unless one of the same cut is there: whether this one is the first.

    What another cut left in the word is replaced; 2^19 cuts later its tag could be taken for ours.
    """
    while True:
        there = segment.snapshot(index, word)
        if states.split_error(there, odd_epoch) is not None:
            return False
        if segment.exchange_snapshot(index, word, there, states.error_word(number, odd_epoch, cluster)):
            return True


def break_snapshot(segment: Segment, index: int, serial: int, number: int, cluster: int) -> None:
    """Break an active snapshot: from when this returns, no read of it succeeds and no write waits for it.

    The sticky error comes first (the first one wins), then the state, then the caller may store data: a reader that
    saw the data sees the error at its second look.  Died in between: the error alone already fails every read, and
    the next waiter or the coordinator completes the state.  Both words carry the cut's epoch, so a caller that slept
    while the entry was used again breaks nothing.
    """
    word = segment.snapshot(index, Snapshot.state)
    if word & 0xFFFFFFFF != states.ACTIVE or segment.snapshot(index, Snapshot.serial) != serial:
        return
    odd = word >> 32
    if store_first_error(segment, index, Snapshot.broken, odd, number, cluster):
        segment.set_snapshot(index, Snapshot.broken_time_ns, time.time_ns())
    hit(segment.failpoints, _BREAK_ERROR)
    segment.exchange_snapshot(index, Snapshot.state, word, states.state_word(states.BROKEN, odd))
    hit(segment.failpoints, _BREAK_STATE)
    wake_all(segment)
    segment.wake_coordinator()


def target_path(segment: Segment, index: int) -> str:
    """Where the snapshot's data goes."""
    return segment.text(segment.geometry.snapshot(index, Snapshot.target_path), Snapshot.target_path)


def wake_all(segment: Segment) -> None:
    """Have every sleeping writer look again."""
    geometry = segment.geometry
    for slot in _core.nonzero(segment.memory, geometry.slot(0, Slot.asleep), Slot.SIZE, geometry.slot_count):
        segment.wake_slot(slot)


class Extent:
    """A run of a snapshot: bytes, and "data", "zero" or "inaccessible"."""

    __slots__ = ("length", "offset", "status")

    def __init__(self, offset: int, length: int, status: str) -> None:
        self.offset = offset
        self.length = length
        self.status = status

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash((self.offset, self.length, self.status))

    def __repr__(self) -> str:
        return f"Extent({self.offset}, {self.length}, {self.status!r})"


class SnapshotReader:
    """Reads one snapshot.  From any process and thread; holds a private descriptor of source and target each."""

    def __init__(self, segment: Segment, index: int, serial: int, image: ImageFile, target_fd: int) -> None:
        if not counts(segment, index):
            raise ClosedError("the snapshot is one of a group whose cut was not completed")
        self._segment = segment
        self._index = index
        self._odd_epoch = segment.snapshot(index, Snapshot.state) >> 32
        self._image = image
        self._target_fd = target_fd
        self._bitmap = Bitmap.attach(segment, serial)
        self._honest_holes = _core.file_system(image.fd) in HONEST_HOLES
        self._closed = False

    @property
    def size_bytes(self) -> int:
        return self._segment.geometry.image_size

    def _check(self) -> None:
        """Raise unless the snapshot is open and unbroken.  Called before a read, and after it as its second look.

        The sticky error first, the whole state word last: it carries the cut's epoch, so an entry that was used again
        between the two loads is not taken for ours.
        """
        error = broken_error(self._segment, self._index) if not self._closed else None
        word = self._segment.snapshot(self._index, Snapshot.state) if not self._closed else 0
        if word == states.state_word(states.ACTIVE, self._odd_epoch) and error is None:
            return
        if error is not None and word >> 32 == self._odd_epoch:
            raise error
        raise ClosedError("the snapshot is closed")

    def _check_range(self, what: str, count: int, offset: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size_bytes:
            raise OutOfRangeError(f"{what} of {count} bytes at {offset}: the snapshot has {self.size_bytes} bytes")

    def pread(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes of the snapshot at ``offset``; never waits for a copy and never triggers one.

        SnapshotBrokenError (first errno, cluster, time), SnapshotInaccessibleError for what was discarded or is not
        part of it, OutOfRangeError, ClosedError; OSError if source or target can't be read.
        """
        self._check_range("read", count, offset)
        self._check()
        size = self._segment.geometry.cluster_size
        pieces = []
        position, stop = offset, offset + count
        while position < stop:
            first, end = outward(position, min(stop - position, _READ_PIECE_BYTES), size)
            value, run_end = _core.run(self._bitmap.memory, first, end)
            length = min(run_end * size, stop) - position
            hit(self._segment.failpoints, _LOOKED)
            if value == ZERO:
                pieces.append(bytes(length))
            elif value in (COPIED, COPIED_FOR_WRITER):
                data = _read_fully(self._target_fd, length, position, "target")
                hit(self._segment.failpoints, _READ)
                # A discard by another thread punches the target: then the bytes are not the snapshot's.
                if _core.run(self._bitmap.memory, first, run_end) != (value, run_end):
                    continue
                pieces.append(data)
            elif value < COPIED:
                data = _read_fully(self._image.fd, length, position, "source")
                hit(self._segment.failpoints, _READ)
                good_end = self._still_uncopied(first, run_end)
                if good_end == first:
                    continue
                pieces.append(data[: min(good_end * size, stop) - position])
            else:
                raise SnapshotInaccessibleError(
                    errno.EACCES, f"bytes {position}..{min(run_end * size, stop)} are not part of the snapshot"
                )
            position += len(pieces[-1])
        self._check()
        return b"".join(pieces)

    def _still_uncopied(self, first: int, end: int) -> int:
        """The second look: up to where the bytes are still below COPIED.  The fence keeps it behind the read (I7)."""
        _core.fence()
        while first < end:
            value, run_end = _core.run(self._bitmap.memory, first, end)
            if value >= COPIED:
                break
            first = run_end
        return first

    def block_status(self, count: int, offset: int) -> list[Extent]:
        """The extents of a range, merged: what reads as data, what is known to read as zeroes, what is inaccessible.

        Answers for the snapshot, never for today's source: a cluster that was overwritten, zeroed or discarded since
        the cut is looked up among the copied ones.
        """
        self._check_range("block status", count, offset)
        self._check()
        size = self._segment.geometry.cluster_size
        found: list[Extent] = []
        position, stop = offset, offset + count
        while position < stop:
            first, end = outward(position, stop - position, size)
            value, run_end = _core.run(self._bitmap.memory, first, end)
            if value < COPIED:
                status, reach = self._source_status(position, min(run_end * size, stop))
                good_end = self._still_uncopied(first, run_end)
                reach = min(reach, good_end * size, stop)
                if reach <= position:
                    continue
            else:
                known = {ZERO: "zero", COPIED: "data", COPIED_FOR_WRITER: "data"}
                status, reach = known.get(value, "inaccessible"), min(run_end * size, stop)
            if found and found[-1].status == status:
                found[-1] = Extent(found[-1].offset, found[-1].length + reach - position, status)
            else:
                found.append(Extent(position, reach - position, status))
            position = reach
        self._check()
        if file_size(self._image.fd) < self.size_bytes:
            raise OSError(errno.EIO, f"the source was truncated to {file_size(self._image.fd)} bytes")
        return found

    def _source_status(self, position: int, stop: int) -> tuple[str, int]:
        if not self._honest_holes:
            return "data", stop
        data = next_data(self._image.fd, position, stop)
        if data > position:
            return "zero", data
        return "data", min(os.lseek(self._image.fd, position, os.SEEK_HOLE), stop)

    def discard(self, count: int, offset: int) -> None:
        """Let go of the whole clusters inside a range: writers need not have them copied, reads of them fail (EACCES).

        Part of a cluster is none: nothing happens, successfully.  A cluster that is being copied right now is waited
        for, at most a second; one that hangs longer stays.
        """
        self._check_range("discard", count, offset)
        self._check()
        geometry = self._segment.geometry
        first, end = inward(offset, count, geometry.cluster_size, geometry.image_size)
        deadline = time.monotonic() + 1.0
        position = first
        while position < end:
            value, run_end = _core.run(self._bitmap.memory, position, end)
            if value in (PENDING, COPIED, COPIED_FOR_WRITER, ZERO):
                _core.exchange(self._bitmap.memory, position, run_end, value, SKIPPED)
                if value in (COPIED, COPIED_FOR_WRITER):
                    self._punch_target(position, run_end)
                continue
            if value < COPIED and time.monotonic() < deadline:
                time.sleep(0.0005)
                continue
            position = run_end
        wake_all(self._segment)

    def _punch_target(self, first: int, end: int) -> None:
        """Give space back where the file system can; a target that can't keeps what it has."""
        geometry = self._segment.geometry
        offset, length = byte_range(first, end, geometry.cluster_size, geometry.image_size)
        try:
            _core.punch_hole(self._target_fd, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
                raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bitmap.close()
        os.close(self._target_fd)
        self._image.close()


def _read_fully(fd: int, count: int, offset: int, what: str) -> bytes:
    data = os.pread(fd, count, offset)
    while len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"the {what} ends at byte {offset + len(data)}: it was truncated")
        data += more
    return data
