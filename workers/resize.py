"""Resize: a served image gets larger while writers write.

The control segment ends with the epoch map, so a larger image is a longer segment and nothing in it moves.  A writer
that has not noticed goes on as before, without waiting: its clusters have the same numbers, the same marks and, in
later snapshots, the same bytes.  It notices when it is asked for bytes beyond its end, or for its size (`filter.Disk`).

    1  no snapshot, and no copy worker lives         one of the old size would copy a part of the cluster that was the
                                                     last one; they wait for nothing, since nothing is to be copied
    2  announce: resize_to                           from here on both sizes of file and segment are right
    3  the segment grows, with its space             what may fail for want of memory fails before the image is touched
    4  the image grows
    5  commit: image_size; then resize_to goes       from here on the new size counts, and workers are started

    died after     the next coordinator (`settle`)
    1, 2, 3        finds the image at its old size: takes it back
    4, 5           finds the image at its new size: goes on at 5

The size of the image itself says how far it came, so nothing else has to be remembered.  Writers don't wait for any of
it: cuts are taken, and sizes changed, by the holder of the coordinator's lock alone.

Rejected: a second segment that writers would have to move to.  It needs a drained section that ends in another
segment, a way out of it for writers whose coordinator has died in between, and it loses the epochs that dirty bitmaps
count from.
"""

from __future__ import annotations

import mmap
import os
import stat

from shmcbw import _core
from shmcbw.epochs import epoch
from shmcbw.errors import ResizeRefusedError
from shmcbw.failpoints import hit, index_of
from shmcbw.image import ImageFile, close_descriptor, file_size
from shmcbw.layout import Geometry, Header
from shmcbw.segment import Segment

from .permissions import ImageLock

_ANNOUNCED, _ALLOCATED, _GROWN, _COMMITTED = (
    index_of(f"resize.{step}") for step in ("announced", "allocated", "grown", "committed")
)
_MARKS_AT_ONCE = 1 << 20


def check_size(segment: Segment, image: ImageFile, size_bytes: int) -> Geometry:
    """The geometry of the new size; ResizeRefusedError with what is wrong with it."""
    old, found = segment.geometry.image_size, file_size(image.fd)
    what = f"{image.path}: can't be resized from {old} to {size_bytes} bytes"
    if size_bytes < old:
        raise ResizeRefusedError(f"{what}: a served image does not shrink")
    if stat.S_ISBLK(os.fstat(image.fd).st_mode):
        if found != size_bytes:
            raise ResizeRefusedError(f"{what}: the device has {found}: give the device its new size first")
    elif found != old:
        raise ResizeRefusedError(f"{what}: somebody else has given it {found}")
    try:
        return segment.geometry.resized(size_bytes)
    except ValueError as error:
        raise ResizeRefusedError(f"{what}: {error}") from None


def resize(segment: Segment, image: ImageFile, geometry: Geometry) -> None:
    """Give image and segment their new size.  Of the image no snapshot is taken, and no worker lives.

    OSError with nothing changed if the file system, or /dev/shm, does not take it.
    """
    segment.set_header(Header.resize_to, geometry.image_size)
    try:
        hit(segment.failpoints, _ANNOUNCED)
        os.ftruncate(segment.fd, geometry.segment_size)
        os.posix_fallocate(segment.fd, 0, geometry.segment_size)
        hit(segment.failpoints, _ALLOCATED)
        memory = segment.map_larger(geometry)
        _grow(image, geometry.image_size)
        hit(segment.failpoints, _GROWN)
    except OSError as error:
        settle(segment, image)
        if segment.geometry.image_size != geometry.image_size:
            raise OSError(
                error.errno, f"{image.path}: not resized to {geometry.image_size} bytes: {error.strerror}"
            ) from error
        return
    _commit(segment, image, geometry, memory)


def settle(segment: Segment, image: ImageFile) -> None:
    """Bring a resize to its end that somebody began and did not finish.  By the holder of the coordinator's lock."""
    size_bytes = segment.header(Header.resize_to)
    if size_bytes == 0:
        return
    if size_bytes == segment.geometry.image_size:
        # Died after the commit.
        segment.set_header(Header.resize_to, 0)
    elif file_size(image.fd) == size_bytes:
        geometry = segment.geometry.resized(size_bytes)
        # A block device had its new size before the segment had.
        os.posix_fallocate(segment.fd, 0, geometry.segment_size)
        _commit(segment, image, geometry, segment.map_larger(geometry))
    else:
        os.ftruncate(segment.fd, segment.geometry.segment_size)
        segment.set_header(Header.resize_to, 0)


def _commit(segment: Segment, image: ImageFile, geometry: Geometry, memory: mmap.mmap) -> None:
    """Nothing here can fail: everything it needs is there."""
    _mark_foreign(segment, image, memory, geometry)
    segment.set_header(Header.image_size, geometry.image_size)
    hit(segment.failpoints, _COMMITTED)
    segment.set_header(Header.resize_to, 0)
    segment.follow(memory, geometry)
    image.size_bytes = geometry.image_size


def _grow(image: ImageFile, size_bytes: int) -> None:
    """Make the file larger, by the descriptor of the same file opened for writing."""
    if file_size(image.fd) == size_bytes:
        return
    fd = os.open(f"/proc/self/fd/{image.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        close_descriptor(fd)


def _mark_foreign(segment: Segment, image: ImageFile, memory: mmap.mmap, geometry: Geometry) -> None:
    """What a device has beyond its old end may be anything: it counts as written now, for dirty bitmaps (I6).

    A file has zeroes there, as the image would have had: that is clean, as in QEMU.
    """
    if not stat.S_ISBLK(os.fstat(image.fd).st_mode):
        return
    first = segment.geometry.image_size // geometry.cluster_size
    now = epoch(segment) & ~1
    # Word by word only where writers may be; nobody knows of the others yet.
    _core.store_u32(memory, geometry.epoch_map_offset + 4 * first, now)
    for cluster in range(first + 1, geometry.clusters, _MARKS_AT_ONCE):
        count = min(_MARKS_AT_ONCE, geometry.clusters - cluster)
        offset = geometry.epoch_map_offset + 4 * cluster
        memory[offset : offset + 4 * count] = now.to_bytes(4, "little") * count


def resize_unserved(path: str, size_bytes: int) -> None:
    """Make a file that no coordinator serves larger or smaller.  ImageInUseError if a QEMU has it; OSError."""
    image = ImageFile.open(path, writable=True)
    lock = ImageLock(image)
    try:
        lock.take()
        lock.hold_resize()
        os.ftruncate(image.fd, size_bytes)
    finally:
        lock.close()
        image.close()
