"""A dirty bitmap as an export shows it: ``qemu:dirty-bitmap:NAME``.

The exporter, who has the image's coordinator, puts the bitmap's set into a file in memory; every serving process maps
that, also one that takes a dead one's place, so all clients see the same:

    offset 0, 8 bytes    magic; zeroed when the bitmap can't be trusted any more, and then its block status is EIO
    8, 8                 epoch from which on marked clusters are dirty too, or all ones: the set is all there is
    16, 8; 24, 8         bytes of the image; granularity
    32                   the bits (`shmcbw/dirty.py`)

For a snapshot the set is frozen: all that was dirty when the export was added, which is after the cut.  So it has all
that changed up to the cut and perhaps more, never less.  For an image a bitmap that records is shown as it is *now*,
out of the epoch map.  While it is exported a bitmap is in use: nobody can clear it under its readers.

The file has no name, so no death leaves it behind: serving processes open it through their parent's descriptor.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from itertools import islice

from shmcbw.dirty import DirtyBitmap, DirtySet, EpochMap
from shmcbw.errors import naming
from shmcbw.image import ImageFile
from shmcbw.segment import Segment, attach

from .specification import BitmapSpec
from .wire import STATE_DIRTY

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"shmcbw B"
_FROZEN = (1 << 64) - 1

Extents = list[tuple[int, int]]


class BitmapFile:
    """The exporter's side: the file, until it is closed."""

    def __init__(self, bitmap: DirtyBitmap, epochs: EpochMap, *, live: bool) -> None:
        """``live``: with what will be written from now on, if it records; else frozen."""
        follows = live and bitmap.recording
        found = bitmap.kept_now(epochs) if follows else bitmap.dirty(epochs)
        start = bitmap.start if follows else None
        self._fd = os.memfd_create(f"shmcbw-bitmap-{bitmap.name}"[:200], os.MFD_CLOEXEC)
        try:
            header = _HEADER.pack(_MAGIC, _FROZEN if start is None else start, found.size_bytes, found.granularity)
            with open(self._fd, "wb", closefd=False) as file:
                file.write(header + found.bits)
        except BaseException:
            os.close(self._fd)
            raise
        self.spec = BitmapSpec(bitmap.name, f"/proc/{os.getpid()}/fd/{self._fd}")

    def distrust(self) -> None:
        """The bitmap may have missed writes: no reader is to take it for the truth any more."""
        os.pwrite(self._fd, bytes(8), 0)

    def close(self) -> None:
        os.close(self._fd)


class BitmapReader:
    """A serving process's side.  OSError if the file can't be mapped; ValueError if it is none."""

    def __init__(self, spec: BitmapSpec, image: str) -> None:
        self.name = spec.name
        with naming(spec.name, "the dirty bitmap can't be mapped"), open(spec.file, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._segment: Segment | None = None
        try:
            magic, start, size_bytes, granularity = _HEADER.unpack_from(self._memory)
            if magic != _MAGIC:
                raise ValueError(f"{spec.file} is not the dirty bitmap {spec.name!r}")
            self._set = DirtySet(size_bytes, granularity, self._memory[_HEADER.size :])
            self._start = start if start != _FROZEN else None
            if self._start is not None:
                file_of_image = ImageFile.open(image, writable=False)
                try:
                    self._segment = attach(file_of_image)
                finally:
                    file_of_image.close()
        except BaseException:
            self.close()
            raise

    def extents(self, length: int, offset: int, *, limit: int) -> Extents:
        """(length, flags) from the offset on, about ``limit`` of them at most; OSError (EIO): not to be trusted."""
        found = self._set if self._start is None else self._now(self._start)
        stop = min(offset + length, found.size_bytes)
        extents: Extents = []
        position = offset
        runs = list(islice(found.extents(offset, stop), limit // 2)) if offset < stop else []
        for start, dirty in runs:
            if start > position:
                extents.append((start - position, 0))
            extents.append((dirty, STATE_DIRTY))
            position = start + dirty
        if len(runs) < limit // 2:
            if position < stop:
                extents.append((stop - position, 0))
            if stop < offset + length:
                # The image was resized: of what is new nobody knows.
                extents.append((offset + length - max(stop, offset), STATE_DIRTY))
        # Last: what was overwritten meanwhile has been looked at, too.
        if self._memory[:8] != _MAGIC:
            raise OSError(errno.EIO, f"dirty bitmap {self.name!r} is inconsistent: it may have missed writes")
        return extents

    def _now(self, start: int) -> DirtySet:
        """The set joined with what the epochs tell."""
        segment = self._segment
        assert segment is not None
        found = self._set.copy()
        geometry = segment.geometry
        EpochMap(segment.memory, geometry.epoch_map_offset, found.size_bytes, geometry.cluster_size).add_to(
            found, start
        )
        return found

    def close(self) -> None:
        self._memory.close()
        if self._segment is not None:
            self._segment.close()
