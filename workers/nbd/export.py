"""What an NBD server serves: an image through the filter, or a snapshot as it was at its cut.

Both have the same methods; offsets and lengths are bytes, checked by the caller against ``info.size_bytes``.  The ones
called ``…_now`` never wait for a copy or a disk: they say that it would take longer, and the caller goes to a thread.
``read`` fills a view and may return less than its length: up to the first byte that is not part of a snapshot.
``extents`` too; it returns at least one, or raises.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import Protocol

from shmcbw import _core
from shmcbw.filter import Disk
from shmcbw.image import HONEST_HOLES, ImageFile, close_descriptor, flags_without_waiting, next_data
from shmcbw.reader import SnapshotReader

from . import wire
from .dirty import BitmapReader, Extents
from .specification import ExportSpec
from .wire import ExportInfo

ALLOCATION = "base:allocation"
DIRTY = "qemu:dirty-bitmap:"


#: A hot write needs none of it; a first touch with a warm target is done within it.
PATIENCE_NS = 1_000_000
EXTENTS_LIMIT = 4096
_PIECE_BYTES = 1 << 20
_ZEROES = bytes(_PIECE_BYTES)


class Export(Protocol):
    """What a connection needs of an export."""

    info: ExportInfo
    #: Each write is on the disk before it is answered.
    writethrough: bool

    def read_now(self, view: memoryview, offset: int) -> bool: ...
    def read(self, view: memoryview, offset: int) -> int: ...
    def write_now(self, data: memoryview, offset: int) -> bool: ...
    def write(self, data: bytes, offset: int) -> None: ...
    def write_zeroes(self, length: int, offset: int, *, no_hole: bool, fast: bool) -> None: ...
    def discard(self, length: int, offset: int) -> None: ...
    def flush(self) -> None: ...
    def cache(self, length: int, offset: int) -> None: ...
    def extents(self, context: str, length: int, offset: int) -> Extents: ...
    def close(self) -> None: ...


class DiskExport:
    """An image as it is now.  Writes go through the filter, so each connection is a writer like any other."""

    def __init__(self, spec: ExportSpec) -> None:
        path, writable = spec.image, spec.writable
        with ExitStack() as opened:
            self._disk = opened.enter_context(Disk(path, read_only=not writable))
            self._image = ImageFile.open(path, writable=False)
            opened.callback(self._image.close)
            self._dirty = _bitmaps(spec, opened)
            self._fd = self._image.fd
            self._honest_holes = _core.file_system(self._fd) in HONEST_HOLES
            self._now = flags_without_waiting(self._fd)
            self._punches = writable and _can_punch(path, self._disk.size_bytes)
            self._close = opened.pop_all().close
        flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.SEND_DF | wire.SEND_CACHE
        # All connections write into one page cache, and a flush syncs the file: it covers what any of them has written.
        flags |= wire.CAN_MULTI_CONN
        if writable:
            flags |= wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO
        else:
            flags |= wire.READ_ONLY
        self.writethrough = spec.writethrough
        self.info = _info(spec, self._disk.size_bytes, flags, f"image {path}")

    def read_now(self, view: memoryview, offset: int) -> bool:
        # By the file and not by the mapping: a page that is not in memory is BlockingIOError here, and a wait there.
        if self._now is None:
            return False
        try:
            return os.preadv(self._fd, [view], offset, self._now) == len(view)
        except OSError:
            return False

    def read(self, view: memoryview, offset: int) -> int:
        return read_fully(self._fd, view, offset)

    def write_now(self, data: memoryview, offset: int) -> bool:
        return self._disk.try_pwrite(data, offset, PATIENCE_NS)

    def write(self, data: bytes, offset: int) -> None:
        self._disk.pwrite(data, offset)

    def write_zeroes(self, length: int, offset: int, *, no_hole: bool, fast: bool) -> None:
        if fast and (no_hole or not self._punches):
            raise OSError(errno.ENOTSUP, "zeroes are no faster than data here")
        if not no_hole:
            self._disk.pwrite_zeroes(length, offset)
            return
        for position in range(offset, offset + length, _PIECE_BYTES):
            self._disk.pwrite(memoryview(_ZEROES)[: offset + length - position], position)

    def discard(self, length: int, offset: int) -> None:
        self._disk.pdiscard(length, offset)

    def flush(self) -> None:
        self._disk.flush()

    def cache(self, length: int, offset: int) -> None:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def extents(self, context: str, length: int, offset: int) -> Extents:
        if context != ALLOCATION:
            return self._dirty[context].extents(length, offset, limit=EXTENTS_LIMIT)
        if not self._honest_holes:
            return [(length, 0)]
        found: Extents = []
        position, stop = offset, offset + length
        while position < stop and len(found) < EXTENTS_LIMIT:
            data = next_data(self._fd, position, stop)
            if data > position:
                found.append((data - position, wire.STATE_HOLE | wire.STATE_ZERO))
                position = data
                continue
            # A hole or the end is there at the latest; another writer may have made one at this very byte meanwhile.
            hole = min(os.lseek(self._fd, position, os.SEEK_HOLE), stop)
            if hole > position:
                found.append((hole - position, 0))
                position = hole
        return found

    def close(self) -> None:
        self._close()


class SnapshotExport:
    """A snapshot.  Read-only, but for a discard, which says "I have read this part": the snapshot lets it go."""

    def __init__(self, spec: ExportSpec, reader: SnapshotReader) -> None:
        """The reader is the export's from here on."""
        self._reader = reader
        with ExitStack() as opened:
            opened.enter_context(reader)
            self._dirty = _bitmaps(spec, opened)
            self._close = opened.pop_all().close
        flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_DF | wire.CAN_MULTI_CONN
        flags |= wire.SEND_TRIM if spec.writable else wire.READ_ONLY
        self.writethrough = False
        self.info = _info(spec, reader.size_bytes, flags, "snapshot")

    def read_now(self, view: memoryview, offset: int) -> bool:
        return self._reader.pread_now(view, offset)

    def read(self, view: memoryview, offset: int) -> int:
        return self._reader.pread_into(view, offset, partial=True)

    def write_now(self, data: memoryview, offset: int) -> bool:
        raise OSError(errno.EPERM, "a snapshot can't be written")

    def write(self, data: bytes, offset: int) -> None:
        raise OSError(errno.EPERM, "a snapshot can't be written")

    def write_zeroes(self, length: int, offset: int, *, no_hole: bool, fast: bool) -> None:
        raise OSError(errno.EPERM, "a snapshot can't be written")

    def discard(self, length: int, offset: int) -> None:
        self._reader.discard(length, offset)

    def flush(self) -> None:
        """Nothing was written."""

    def cache(self, length: int, offset: int) -> None:
        raise OSError(errno.EINVAL, "not offered")

    def extents(self, context: str, length: int, offset: int) -> Extents:
        if context != ALLOCATION:
            return self._dirty[context].extents(length, offset, limit=EXTENTS_LIMIT)
        flags = {"data": 0, "zero": wire.STATE_HOLE | wire.STATE_ZERO}
        found: Extents = []
        # A request that runs into what is not part of the snapshot is answered up to there.
        for extent in self._reader.block_status_some(length, offset, limit=EXTENTS_LIMIT):
            found.append((extent.length, flags[extent.status]))
        return found

    def close(self) -> None:
        self._close()


def _bitmaps(spec: ExportSpec, opened: ExitStack) -> dict[str, BitmapReader]:
    """The dirty bitmaps of an export by their contexts; ``opened`` closes them."""
    found = {}
    for each in spec.bitmaps:
        reader = BitmapReader(each, spec.image)
        opened.callback(reader.close)
        found[DIRTY + each.name] = reader
    return found


def _info(spec: ExportSpec, size_bytes: int, flags: int, description: str) -> ExportInfo:
    contexts = (ALLOCATION, *(DIRTY + each.name for each in spec.bitmaps))
    return ExportInfo(spec.name, size_bytes, flags, spec.description or description, contexts=contexts)


def read_fully(fd: int, view: memoryview, offset: int) -> int:
    """All of a range of a file: its length; EIO where the file ends within it."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"the image ends at byte {offset + done}: it was truncated")
        done += count
    return done


def _can_punch(path: str, size_bytes: int) -> bool:
    """Whether the file can have holes made: tried behind its end, where nothing is."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _core.punch_hole(fd, size_bytes + (1 << 20), 4096)
    except OSError:
        return False
    finally:
        close_descriptor(fd)
    return True
