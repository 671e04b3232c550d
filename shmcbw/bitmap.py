"""Cluster bytes: the bitmap of one snapshot, a segment of its own, one byte per cluster.

The byte is bitmap, claim and owner at once:

    byte     state              a write may go on   a snapshot reads
    0        PENDING            no                  the source, then looks again
    1..239   COPYING, worker    no                  the source, then looks again
    240      COPIED             yes                 the target
    241      SKIPPED            yes                 not at all (EACCES): not part of the snapshot, or discarded
    242      COPIED_FOR_WRITER  yes                 the target
    243      ZERO               yes                 zeroes: the target has a hole there

Three values instead of one COPIED keep progress exact whoever dies (it is counted from the bytes, not from counters
beside them), and a map of the bytes shows what was copied for whom.  A fresh segment is all PENDING: starting a
snapshot of any size costs no fill.

Claim = compare-and-swap PENDING -> worker id; publish = compare-and-swap id -> final state after the data is in the
target; failure or death = back to PENDING.  The claims of a dead worker are exactly the bytes equal to its id (I3).
"""

from __future__ import annotations

import mmap
import os

from . import _core
from .image import close_descriptor
from .segment import SHM, Access, Segment, create_shared_memory, open_shared_memory, unlink_shared_memory

PENDING = 0
COPIED = 240
SKIPPED = 241
COPIED_FOR_WRITER = 242
ZERO = 243


class Counts:
    """Clusters by state."""

    def __init__(
        self, pending: int, copying: int, copied: int, skipped: int, copied_for_writer: int, zero: int
    ) -> None:
        self.pending = pending
        self.copying = copying
        self.copied = copied
        self.skipped = skipped
        self.copied_for_writer = copied_for_writer
        self.zero = zero

    @property
    def open(self) -> int:
        """Clusters that still keep a writer waiting."""
        return self.pending + self.copying


def bitmap_name(segment: Segment, serial: int) -> str:
    return f"{segment.name}.{serial}"


def bitmap_serials(segment: Segment) -> list[int]:
    """The serial numbers of all bitmaps that have a name."""
    prefix = segment.name[1:] + "."
    names = [file.removeprefix(prefix) for file in os.listdir(SHM) if file.startswith(prefix)]
    return [int(name) for name in names if name.isascii() and name.isdigit()]


class Bitmap:
    """The mapped cluster bytes of one snapshot."""

    def __init__(self, memory: mmap.mmap, clusters: int, serial: int) -> None:
        self.memory = memory
        self.clusters = clusters
        self.serial = serial

    @classmethod
    def create(cls, segment: Segment, serial: int, access: Access) -> Bitmap:
        """A new bitmap, all PENDING; OSError if /dev/shm has no room."""
        size = segment.geometry.bitmap_size
        fd = create_shared_memory(bitmap_name(segment, serial), size, access)
        try:
            return cls(mmap.mmap(fd, size), segment.geometry.clusters, serial)
        finally:
            close_descriptor(fd)

    @classmethod
    def attach(cls, segment: Segment, serial: int) -> Bitmap:
        """Map an existing bitmap; FileNotFoundError if its snapshot is gone, OSError if it can't be mapped."""
        size = segment.geometry.bitmap_size
        fd = open_shared_memory(bitmap_name(segment, serial))
        try:
            status, owner = os.fstat(fd), os.fstat(segment.fd)
            if status.st_size < size or status.st_uid != owner.st_uid:
                raise FileNotFoundError(2, "not the bitmap of this snapshot", bitmap_name(segment, serial))
            return cls(mmap.mmap(fd, size), segment.geometry.clusters, serial)
        finally:
            close_descriptor(fd)

    @staticmethod
    def unlink(segment: Segment, serial: int) -> None:
        unlink_shared_memory(bitmap_name(segment, serial))

    def histogram(self) -> list[int]:
        """How many clusters have each byte; one pass (about 1 ms a million clusters), other threads go on."""
        return _core.histogram(self.memory, 0, self.clusters)

    def counts(self, found: list[int] | None = None) -> Counts:
        """Clusters by state, from a `histogram`."""
        found = found or self.histogram()
        return Counts(
            found[PENDING],
            sum(found[1:COPIED]),
            found[COPIED],
            # An unknown value is never readable: it counts with what is not part of the snapshot.
            found[SKIPPED] + sum(found[ZERO + 1 :]),
            found[COPIED_FOR_WRITER],
            found[ZERO],
        )

    def state(self, cluster: int) -> int:
        return _core.run(self.memory, cluster, cluster + 1)[0]

    def release_claims(self, worker_id: int) -> int:
        """Give the claims of a dead worker back; returns how many.  The caller holds the worker's lock (I3)."""
        return _core.exchange(self.memory, 0, self.clusters, worker_id, PENDING)

    def close(self) -> None:
        try:
            self.memory.close()
        except BufferError:
            pass
