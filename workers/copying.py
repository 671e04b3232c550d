"""Copy one claimed run of clusters from the source to a target.

A fresh target reads as zeroes where it is not written.  So a hole costs one lseek, a cluster of zeroes one look, and
only the rest is written, with calls that return an errno (ENOSPC, EIO) instead of stores that turn into SIGBUS.  In a
target that is brought forward in place, a hole is punched for them.

With checksums, a run is copied to a private buffer first (guarded: the source may be truncated at any moment), and what
is written is what was hashed.

A claimed cluster can't be written by anybody, so what SEEK_DATA says of it stays true while we hold the claim; where
hole reporting lies (`image.HONEST_HOLES`), nothing is taken for a hole.
"""

from __future__ import annotations

import array
import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from shmcbw import _core
from shmcbw.bitmap import SKIPPED, ZERO
from shmcbw.clusters import byte_range
from shmcbw.image import HONEST_HOLES, ImageFile, file_size, next_data

from .manifest import checksum, put_words

#: What is hashed and written at once.
PIECE_BYTES = 1 << 20


@dataclass(slots=True)
class Copied:
    """What became of a run: (first, end, state) in order; the error that ended it, and at which cluster."""

    runs: list[tuple[int, int, int]] = field(default_factory=list)
    written_bytes: int = 0
    error: OSError | None = None
    failed_cluster: int = -1
    #: The error is one of reading the source, not of writing the target.
    from_source: bool = True

    def add(self, first: int, end: int, state: int) -> None:
        if self.runs and self.runs[-1][1] == first and self.runs[-1][2] == state:
            self.runs[-1] = (self.runs[-1][0], end, state)
        else:
            self.runs.append((first, end, state))


class CopyRange:
    """copy_file_range from the source to one target, until it fails once: not supported, other file systems, whatever.

    It shares the data where the file system can.  A claimed cluster does not change, so what it copies is what was
    looked at, and hashed, before.
    """

    def __init__(self) -> None:
        self.works = True
        self.copied_bytes = 0

    def copy(self, source_fd: int, target_fd: int, offset: int, length: int) -> bool:
        """Copy a range to the same place; False if that can't be done, or not all of it: then it is to be written."""
        done = 0
        try:
            while self.works and done < length:
                count = os.copy_file_range(source_fd, target_fd, length - done, offset + done, offset + done)
                self.works = count > 0
                done += count
        except OSError:
            # What is wrong with the source or the target will be said by the next call on it.
            self.works = False
        self.copied_bytes += done
        return done == length


class Source:
    """The image as a worker reads it: a descriptor and a read-only mapping."""

    def __init__(self, path: str) -> None:
        self.file = ImageFile.open(path, writable=False)
        self.size_bytes = self.file.size_bytes
        self.memory: mmap.mmap = self.file.map()
        self.view = memoryview(self.memory)
        self.honest_holes = _core.file_system(self.file.fd) in HONEST_HOLES
        self.private = memoryview(bytearray())

    def data_from(self, offset: int) -> int:
        """The first byte from ``offset`` on that may be data."""
        return next_data(self.file.fd, offset, self.size_bytes) if self.honest_holes else offset

    def private_copy(self, offset: int, length: int) -> memoryview:
        """The bytes as they are now, in a buffer that nobody else changes; good until the next call."""
        if len(self.private) < length:
            self.private = memoryview(bytearray(length))
        _core.copy(self.private, 0, self.memory, offset, length)
        return self.private[:length]


def copy_run(
    source: Source,
    target_fd: int,
    first: int,
    end: int,
    *,
    cluster_size: int,
    copied_state: int,
    skip_holes: bool,
    before_write: Callable[[], None],
    manifest_fd: int = -1,
    in_place: bool = False,
    copy_range: CopyRange | None = None,
) -> Copied:
    """Copy the claimed clusters first..end; the caller publishes them.  An OSError ends up in the result.

    ``manifest_fd``: where checksums go.  ``in_place``: the target is not fresh.  ``copy_range``: tried first.
    """
    result = Copied()
    hole_state = SKIPPED if skip_holes else ZERO
    cluster = first
    writing = False
    try:
        # Here and at the end (`TargetFile.sync`): what follows would make a truncated target as long as before.
        check_target(target_fd, source.size_bytes)
        while cluster < end:
            writing = False
            offset = cluster * cluster_size
            data = source.data_from(offset)
            if data > offset:
                # Whole clusters before the data; the last one of the image is whole when the hole reaches its end.
                hole_end = end if data >= source.size_bytes else min(end, data // cluster_size)
                if hole_end > cluster:
                    if in_place and hole_state == ZERO:
                        writing = True
                        before_write()
                        make_zero(target_fd, *byte_range(cluster, hole_end, cluster_size, source.size_bytes))
                    result.add(cluster, hole_end, hole_state)
                    cluster = hole_end
                    continue
            run_end = cluster + 1
            zero = _is_zero(source, cluster, cluster_size)
            limit = min(end, cluster + max(1, PIECE_BYTES // cluster_size)) if manifest_fd >= 0 else end
            while run_end < limit and not zero and not _is_zero(source, run_end, cluster_size):
                run_end += 1
            offset, length = byte_range(cluster, run_end, cluster_size, source.size_bytes)
            if zero:
                if in_place:
                    writing = True
                    before_write()
                    make_zero(target_fd, offset, length)
                result.add(cluster, run_end, ZERO)
            else:
                held = source.private_copy(offset, length) if manifest_fd >= 0 else None
                writing = True
                before_write()
                shared = copy_range is not None and copy_range.copy(source.file.fd, target_fd, offset, length)
                if held is not None:
                    if not shared:
                        write_fully(target_fd, held, offset)
                    pieces = [held[start : start + cluster_size] for start in range(0, length, cluster_size)]
                    # After the data: a word that is there is right for what the target holds.
                    put_words(manifest_fd, cluster, array.array("Q", map(checksum, pieces)))
                elif not shared:
                    write_fully(target_fd, source.view[offset : offset + length], offset)
                result.written_bytes += length
                result.add(cluster, run_end, copied_state)
            cluster = run_end
        writing = False
        _check_size(source)
    except OSError as error:
        size = _size_now(source)
        result.error = _explain(error, source, size)
        result.failed_cluster = cluster
        # A write from a mapping that can't be read says EFAULT.
        result.from_source = not writing or error.errno == errno.EFAULT
        if size < source.size_bytes:
            # What was read may have been beyond its end: nothing of this run counts.
            result.runs.clear()
            result.failed_cluster = first
            result.from_source = True
    return result


def check_target(target_fd: int, size_bytes: int) -> None:
    """OSError if a target, which is made as large as the image, has been truncated: what was copied is lost.

    Believed only where holes are too: FUSE and network file systems answer from caches that may be older than the file.
    """
    size = os.fstat(target_fd).st_size
    if size < size_bytes and _core.file_system(target_fd) in HONEST_HOLES:
        raise OSError(errno.EIO, f"the target was truncated to {size} bytes by somebody else")


def _check_size(source: Source) -> None:
    """After the reads: beyond the end of a truncated file everything looks like a hole, or like zeroes."""
    size = file_size(source.file.fd)
    if size < source.size_bytes:
        raise OSError(errno.EIO, f"the source was truncated to {size} bytes")


def _is_zero(source: Source, cluster: int, cluster_size: int) -> bool:
    offset, length = byte_range(cluster, cluster + 1, cluster_size, source.size_bytes)
    return _core.is_zero(source.memory, offset, length)


def make_zero(fd: int, offset: int, length: int) -> None:
    """Have a range read as zeroes, as a hole where the file system can make one; OSError."""
    try:
        _core.punch_hole(fd, offset, length)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
    nothing = memoryview(bytes(min(length, PIECE_BYTES)))
    while length:
        piece = nothing[:length]
        write_fully(fd, piece, offset)
        offset += len(piece)
        length -= len(piece)


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """pwrite all of it; OSError with the errno of the call that failed."""
    while data:
        written = os.pwrite(fd, data, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, "the target takes no more bytes")
        data = data[written:]
        offset += written


def _size_now(source: Source) -> int:
    """Bytes; -1 if nobody can say."""
    try:
        return file_size(source.file.fd)
    except OSError:
        return -1


def _explain(error: OSError, source: Source, size: int) -> OSError:
    """A source that was truncated shows as EFAULT of a write from its mapping, or as a SIGBUS of the zero test."""
    if error.errno in (errno.EFAULT, errno.EIO) and 0 <= size < source.size_bytes:
        return OSError(errno.EIO, f"the source was truncated to {size} bytes")
    if error.errno == errno.EFAULT:
        return OSError(errno.EIO, "the source can't be read")
    return error
