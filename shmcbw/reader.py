"""Reading a snapshot: its bytes, its block status, and letting parts of it go.  From any process, beside everything.

Reading never blocks a writer: a cluster that is not copied yet is read from the source into a private buffer, and the
bytes count only if the cluster's byte is still below COPIED and the snapshot unbroken afterwards (I7).  The writer
stores data only after it saw the byte at COPIED or stored the sticky error, so a reader that got new data sees one of
the two at its second look.  Block status is answered by the same rule: a hole of the source counts only if the second
look still finds the cluster uncopied, for then nobody has written, zeroed or discarded there since the cut.  QEMU
instead makes writers wait for such readers, and answers status from today's source; a reader that dies would hold the
writers, and a map that says "hole" where old data is makes sparse copies silently wrong.

No lock is held around input and output, so reads from several threads run beside each other.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import ExitStack, contextmanager

from . import _core, states
from .bitmap import COPIED, COPIED_FOR_WRITER, PENDING, SKIPPED, ZERO, Bitmap
from .clusters import byte_range, inward, outward
from .errors import (
    ClosedError,
    NoSnapshotError,
    OutOfRangeError,
    SnapshotBrokenError,
    SnapshotInaccessibleError,
    naming,
)
from .failpoints import hit, index_of
from .groups import counts
from .image import (
    HONEST_HOLES,
    Identity,
    ImageFile,
    close_descriptor,
    file_size,
    flags_without_waiting,
    next_data,
)
from .layout import SNAPSHOT_COUNT, Snapshot
from .segment import Segment, attach
from .snapshots import (
    PARTIAL_SUFFIX,
    break_snapshot,
    broken_error,
    marked_uncopied,
    open_target,
    state_of,
    target_path,
    wake_all,
)

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

_READ_PIECE_BYTES = 1 << 20
_DISCARD_WAIT_S = 1.0
#: A cluster's byte changes a few times in its life; one that never stops changing is scribbled on.
_LOOKS_MAX = 1000
_LOOKED, _READ, _DISCARD = (index_of(f"reader.{step}") for step in ("looked", "read", "discard"))


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
    """Reads one snapshot; made by `open_snapshot`, or by a coordinator.  Usable from several threads at once.

    Errors of all calls: SnapshotBrokenError (first errno, cluster, time), OutOfRangeError, ClosedError (this reader is
    closed, or the snapshot has ended), OSError if source or target can't be read.
    """

    def __init__(self, segment: Segment, index: int, serial: int, image: ImageFile, target_fd: int) -> None:
        """``image`` and ``target_fd`` are the reader's own from here on; the segment is its caller's."""
        if not counts(segment, index):
            raise ClosedError("the snapshot is one of a group whose cut was not completed")
        self.serial = serial
        self._segment = segment
        self._index = index
        self._odd_epoch = segment.snapshot(index, Snapshot.state) >> 32
        self._image = image
        self._target_fd = target_fd
        self._honest_holes = _core.file_system(image.fd) in HONEST_HOLES
        self._source_now, self._target_now = flags_without_waiting(image.fd), flags_without_waiting(target_fd)
        self._bitmap = Bitmap.attach(segment, serial)
        self._closed = False
        #: Of a backup: its target gets its name, and must not have holes.  Now, for the entry may be used again.
        is_job = bool(segment.snapshot(index, Snapshot.job))
        self._is_backup = is_job and segment.snapshot(index, Snapshot.sync) != states.SYNC_NONE
        #: Threads by calls that are inside.  `close` waits for them: a closed file's number is soon another file's.
        self._inside: dict[object, int] = {}
        self._inside_pid = os.getpid()

    @property
    def size_bytes(self) -> int:
        return self._segment.geometry.image_size

    @property
    def cluster_size_bytes(self) -> int:
        return self._segment.geometry.cluster_size

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def broken(self) -> SnapshotBrokenError | None:
        """Why the snapshot can't be right any more, or None."""
        if self._closed:
            return None
        error = broken_error(self._segment, self._index)
        return error if self._segment.snapshot(self._index, Snapshot.state) >> 32 == self._odd_epoch else None

    # -- is it still there -----------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise unless the snapshot is open and unbroken.  Called before a read, and after it as its second look.

        The sticky error first, the whole state word last: it carries the cut's epoch, so an entry that was used again
        between the two loads is not taken for ours.  A complete one can still be read: nobody can break it any more.
        """
        error = broken_error(self._segment, self._index) if not self._closed else None
        word = self._segment.snapshot(self._index, Snapshot.state) if not self._closed else 0
        alive = (states.ACTIVE, states.COMPLETE)
        if error is None and word in [states.state_word(state, self._odd_epoch) for state in alive]:
            return
        if error is None and word == states.state_word(states.BROKEN, self._odd_epoch):
            # Broken between the two loads: the error was stored before the state, so it is there now.
            error = broken_error(self._segment, self._index)
            word = self._segment.snapshot(self._index, Snapshot.state)
        if error is not None and word >> 32 == self._odd_epoch:
            raise error
        raise ClosedError("the snapshot is closed")

    def _damaged(self, cluster: int) -> SnapshotBrokenError:
        """Break the snapshot over what only somebody who scribbles on the shared memory can have made."""
        self._check()
        break_snapshot(self._segment, self._index, self.serial, errno.EUCLEAN, cluster)
        return SnapshotBrokenError(errno.EUCLEAN, cluster, time.time_ns())

    @contextmanager
    def _call(self, what: str, count: int, offset: int) -> Iterator[None]:
        """Around a call on a range: the snapshot is open and unbroken when it begins, and `close` waits for its end."""
        if offset < 0 or count < 0 or offset + count > self.size_bytes:
            raise OutOfRangeError(f"{what} of {count} bytes at {offset}: the snapshot has {self.size_bytes} bytes")
        if self._inside_pid != os.getpid():
            # In a forked child: the parent's threads are not here.
            self._inside, self._inside_pid = {}, os.getpid()
        call = object()
        # In this order: `close` says closed, and then looks who is inside.
        self._inside[call] = threading.get_ident()
        try:
            self._check()
            yield
        finally:
            self._inside.pop(call, None)

    def _refuse(self, offset: int, stop: int) -> SnapshotInaccessibleError:
        """For a range whose first byte is inaccessible."""
        first, end = outward(offset, stop - offset, self.cluster_size_bytes)
        inaccessible_end = min(_core.run(self._bitmap.memory, first, end)[1] * self.cluster_size_bytes, stop)
        return SnapshotInaccessibleError(
            errno.EACCES, f"bytes {offset}..{inaccessible_end} are not part of the snapshot"
        )

    # -- bytes -----------------------------------------------------------------------------------------------------

    def pread(self, count: int, offset: int) -> bytes:
        """Return ``count`` bytes of the snapshot at ``offset``; never waits for a copy and never triggers one.

        SnapshotInaccessibleError if any of them was discarded or is not part of the snapshot.
        """
        buffer = bytearray(count if 0 <= count <= self.size_bytes else 0)
        self._read(memoryview(buffer), count, offset, partial=False)
        return bytes(buffer)

    def pread_some(self, count: int, offset: int) -> bytes:
        """As `pread`, but where a part is inaccessible return what comes before it.

        SnapshotInaccessibleError if not even the first byte is accessible.
        """
        buffer = bytearray(count if 0 <= count <= self.size_bytes else 0)
        return bytes(buffer[: self._read(memoryview(buffer), count, offset, partial=True)])

    def pread_into(self, buffer: Buffer, offset: int, *, partial: bool = False) -> int:
        """Fill a writable buffer from ``offset`` and return its length; with ``partial`` see `pread_some`."""
        view = memoryview(buffer).cast("B")
        return self._read(view, len(view), offset, partial=partial)

    def pread_now(self, buffer: Buffer, offset: int) -> bool:
        """Fill a writable buffer without waiting for a disk; False with an undefined content if that can't be.

        Then `pread_into` says what it is: a wait, an inaccessible part, an error of a file.
        """
        if self._source_now is None or self._target_now is None:
            return False
        view = memoryview(buffer).cast("B")
        try:
            with self._call("read", len(view), offset):
                return self._fill(view, offset, self._source_now, self._target_now) == len(view)
        except SnapshotBrokenError:
            raise
        except OSError:
            return False

    def _read(self, view: memoryview, count: int, offset: int, *, partial: bool) -> int:
        with self._call("read", count, offset):
            with naming(self._image.path, f"{count} bytes at {offset} of its snapshot can't be read"):
                found = self._fill(view, offset)
            if found < count and not (partial and found):
                raise self._refuse(offset + found, offset + count)
            return found

    def _fill(self, view: memoryview, offset: int, source_flags: int = 0, target_flags: int = 0) -> int:
        """Read into the view up to the first inaccessible byte: how many that are.  Flags: of preadv."""
        size, memory, failpoints = self.cluster_size_bytes, self._bitmap.memory, self._segment.failpoints
        position, stop = offset, offset + len(view)
        looked, looks = position, 0
        while position < stop:
            first, end = outward(position, min(stop - position, _READ_PIECE_BYTES), size)
            looked, looks = position, looks + 1 if looked == position else 1
            if looks > _LOOKS_MAX:
                raise self._damaged(first)
            value, run_end = _core.run(memory, first, end)
            length = min(run_end * size, stop) - position
            piece = view[position - offset : position - offset + length]
            hit(failpoints, _LOOKED)
            if value == ZERO:
                piece[:] = bytes(length)
            elif value in (COPIED, COPIED_FOR_WRITER):
                _read_fully(self._target_fd, piece, position, "target", target_flags)
                hit(failpoints, _READ)
                # A discard says SKIPPED and then punches the target: who got its zeroes sees that.  The fence keeps the
                # second look behind the read.
                _core.fence()
                if _core.run(memory, first, run_end) != (value, run_end):
                    continue
            elif value < COPIED:
                _read_fully(self._image.fd, piece, position, "source", source_flags)
                hit(failpoints, _READ)
                good_end = self._still_uncopied(first, run_end)
                if good_end == first:
                    continue
                length = min(good_end * size, stop) - position
            elif value > ZERO:
                raise self._damaged(first)
            else:
                break
            position += length
        self._check()
        return position - offset

    def _still_uncopied(self, first: int, end: int) -> int:
        """The second look: up to where the bytes are still below COPIED.  The fence keeps it behind the read (I7)."""
        _core.fence()
        marked = marked_uncopied(self._segment, self._bitmap, first, end, self._odd_epoch)
        if marked is not None:
            raise self._damaged(marked)
        while first < end:
            value, run_end = _core.run(self._bitmap.memory, first, end)
            if value >= COPIED:
                break
            first = run_end
        return first

    # -- block status ----------------------------------------------------------------------------------------------

    def block_status(self, count: int, offset: int, *, limit: int = 0) -> list[Extent]:
        """The extents of a range, merged: what reads as data, what is known to read as zeroes, what is inaccessible.

        At most ``limit`` extents (0: all): then they may end before the range does.
        """
        with self._call("block status", count, offset):
            with naming(self._image.path, "what is data of its snapshot can't be found out"):
                return self._extents(count, offset, limit)

    def block_status_some(self, count: int, offset: int, *, limit: int = 0) -> list[Extent]:
        """As `block_status`, but only up to the first inaccessible byte.

        SnapshotInaccessibleError if that is the first one.
        """
        with self._call("block status", count, offset):
            with naming(self._image.path, "what is data of its snapshot can't be found out"):
                found = self._extents(count, offset, limit)
            border = next((i for i, extent in enumerate(found) if extent.status == "inaccessible"), len(found))
            if found and border == 0:
                raise self._refuse(offset, offset + count)
            return found[:border]

    def _extents(self, count: int, offset: int, limit: int) -> list[Extent]:
        size = self.cluster_size_bytes
        found: list[Extent] = []
        position, stop = offset, offset + count
        looked, looks = position, 0
        while position < stop:
            first, end = outward(position, stop - position, size)
            looked, looks = position, looks + 1 if looked == position else 1
            if looks > _LOOKS_MAX:
                raise self._damaged(first)
            value, run_end = _core.run(self._bitmap.memory, first, end)
            if value < COPIED:
                hit(self._segment.failpoints, _LOOKED)
                status, reach = self._source_status(position, min(run_end * size, stop))
                hit(self._segment.failpoints, _READ)
                good_end = self._still_uncopied(first, run_end)
                reach = min(reach, good_end * size, stop)
                if reach <= position:
                    continue
            else:
                if value > ZERO:
                    raise self._damaged(first)
                known = {ZERO: "zero", COPIED: "data", COPIED_FOR_WRITER: "data"}
                status, reach = known.get(value, "inaccessible"), min(run_end * size, stop)
            if found and found[-1].status == status:
                found[-1] = Extent(found[-1].offset, found[-1].length + reach - position, status)
            elif limit and len(found) == limit:
                break
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

    # -- letting go ------------------------------------------------------------------------------------------------

    def discard(self, count: int, offset: int, *, wait_s: float = _DISCARD_WAIT_S) -> int:
        """Let go of the whole clusters inside a range: writers need not have them copied, reads of them fail (EACCES).

        Returns the bytes that this call has let go; their space in the target is given back.  Part of a cluster is
        none: nothing happens, successfully.  A cluster that is being copied right now is waited for, at most ``wait_s``
        seconds; one that hangs longer stays.  SnapshotInaccessibleError (EPERM) for the snapshot of a backup: it would
        finish with holes.
        """
        with self._call("discard", count, offset):
            geometry = self._segment.geometry
            return self._let_go([inward(offset, count, geometry.cluster_size, geometry.image_size)], wait_s)

    def limit(self, extents: Iterable[tuple[int, int]]) -> int:
        """Let go of all clusters that none of the (offset, length) touches, as `discard` does; the extents in order."""
        with self._call("limit", 0, 0):
            size, gaps, end = self.cluster_size_bytes, [], 0
            for offset, length in extents:
                first, stop = outward(offset, length, size)
                if offset < 0 or length < 0 or offset + length > self.size_bytes or first + 1 < end:
                    raise OutOfRangeError(
                        f"limit: {length} bytes at {offset} are outside the snapshot, or not in order"
                    )
                if length:
                    gaps.append((end, max(first, end)))
                    end = max(stop, end)
            return self._let_go([*gaps, (end, self._segment.geometry.clusters)], _DISCARD_WAIT_S)

    def _let_go(self, ranges: Iterable[tuple[int, int]], wait_s: float) -> int:
        """Let clusters go, in ranges of (first, end): how many bytes."""
        if self._is_backup:
            raise SnapshotInaccessibleError(errno.EPERM, "nothing can be discarded from a backup that is being made")
        deadline = time.monotonic() + wait_s
        total = 0
        for position, end in ranges:
            while position < end:
                value, run_end = _core.run(self._bitmap.memory, position, end)
                if value in (PENDING, COPIED, COPIED_FOR_WRITER, ZERO):
                    hit(self._segment.failpoints, _DISCARD)
                    _core.exchange(self._bitmap.memory, position, run_end, value, SKIPPED)
                    total += self._punch(position, run_end)
                elif value >= COPIED or time.monotonic() >= deadline:
                    position = run_end
                else:
                    time.sleep(0.0005)
        wake_all(self._segment)
        return total

    def _punch(self, first: int, end: int) -> int:
        """Give the space of those clusters back that are let go; how many bytes they are.

        Not of the whole run: a worker may have claimed some of it first.  SKIPPED is for good, and no worker writes
        there any more: it publishes after its last write, and a dead one's claims are returned after its last call.  So
        this also frees what a dead worker had half written.
        """
        geometry = self._segment.geometry
        total = 0
        while first < end:
            value, run_end = _core.run(self._bitmap.memory, first, end)
            if value == SKIPPED:
                offset, length = byte_range(first, run_end, geometry.cluster_size, geometry.image_size)
                total += length
                try:
                    _core.punch_hole(self._target_fd, offset, length)
                except OSError:
                    # The space stays in use, no more: nobody reads these bytes again.
                    pass
            first = run_end
        return total

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of files and memory; the snapshot goes on.  Waits for calls of other threads that are inside."""
        if self._closed:
            return
        self._closed = True
        while self._inside_pid == os.getpid() and set(self._inside.values()) - {threading.get_ident()}:
            time.sleep(0.001)
        self._bitmap.close()
        close_descriptor(self._target_fd)
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.serial} of {self._image.path}{', closed' if self._closed else ''}>"


class _OpenedReader(SnapshotReader):
    """A reader with a segment of its own."""

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._segment.close()


def open_snapshot(
    image: str | os.PathLike[str], snapshot: int | str | os.PathLike[str] | None = None
) -> SnapshotReader:
    """Open a snapshot of a served image for reading, in whatever process; close it, or use it in a with statement.

    ``snapshot``: its serial number, or the path of its scratch or target; None if there is but one.  The reader does
    not keep the snapshot: when its coordinator drops it, or its backup is finished, reads fail (ClosedError).

    NoCoordinatorError, NoSnapshotError: there is none (it says which there are); SnapshotBrokenError; PermissionError
    and other OSErrors: image or target can't be read.  A target that we may not write is read, and keeps its space.
    """
    with naming(os.fspath(image), "no snapshot of it can be opened"):
        return _open(image, snapshot)


def _open(image: str | os.PathLike[str], snapshot: int | str | os.PathLike[str] | None) -> SnapshotReader:
    with ExitStack() as undo:
        file = ImageFile.open(image, writable=False)
        undo.callback(file.close)
        segment = attach(file)
        undo.callback(segment.close)
        index, serial = _find(segment, os.fspath(image), snapshot)
        target_fd = open_snapshot_target(segment, index)
        undo.callback(close_descriptor, target_fd)
        reader = _OpenedReader(segment, index, serial, file, target_fd)
        # They are its own from here on.
        undo.pop_all()
        undo.callback(reader.close)
        # All of it was of one snapshot only if the entry still is that one's.
        reader._check()
        if segment.snapshot(index, Snapshot.serial) != serial:
            raise ClosedError("the snapshot is closed")
        undo.pop_all()
    return reader


def _find(segment: Segment, image: str, wanted: int | str | os.PathLike[str] | None) -> tuple[int, int]:
    """The (index, serial) of a snapshot."""
    there = {}
    for index in range(SNAPSHOT_COUNT):
        if state_of(segment, index) in (states.ACTIVE, states.BROKEN, states.COMPLETE) and counts(segment, index):
            serial = segment.snapshot(index, Snapshot.serial)
            there[index] = serial, target_path(segment, index)
    path = os.path.realpath(wanted) if isinstance(wanted, (str, os.PathLike)) else ""
    names = {path, f"{path}{PARTIAL_SUFFIX}"} if path else set()
    found = [i for i, (serial, name) in there.items() if wanted is None or serial == wanted or name in names]
    if len(found) == 1:
        return found[0], there[found[0]][0]
    what = "the only one is asked for" if wanted is None else f"none is {path or wanted}"
    which = ", ".join(f"{serial} ({name.removesuffix(PARTIAL_SUFFIX)})" for serial, name in there.values()) or "none"
    raise NoSnapshotError(f"{image}: {what}; its snapshots: {which}")


def open_snapshot_target(segment: Segment, index: int) -> int:
    """The file that a snapshot's old data goes to, writable if we may: what is discarded gives its space back."""
    path = target_path(segment, index)
    expected = Identity(segment.snapshot(index, Snapshot.target_device), segment.snapshot(index, Snapshot.target_inode))
    try:
        fd = open_target(path, path, expected, segment.geometry.image_size, os.O_RDWR)
    except PermissionError:
        fd = open_target(path, path, expected, segment.geometry.image_size, os.O_RDONLY)
    if fd is None:
        raise OSError(errno.ESTALE, "another file than the snapshot's target", path)
    return fd


def _read_fully(fd: int, piece: memoryview, offset: int, what: str, flags: int) -> None:
    done = 0
    while done < len(piece):
        count = os.preadv(fd, [piece[done:]], offset + done, flags)
        if count == 0:
            raise OSError(errno.EIO, f"the {what} ends at byte {offset + done}: it was truncated")
        done += count
