"""A raw disk image: its identity, its size, its mapping, and what can be known of its holes.

An image is a regular file, a block device or a memfd (by its path under /proc).  It is mapped ``MAP_SHARED`` as a
whole; the address space is spent, not memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from contextlib import ExitStack

from . import _core
from .errors import ImageError, ReadOnlyImageError

#: File systems whose SEEK_DATA also reports pages that are dirty in a mapping (statfs magic numbers): ext2/3/4,
#: XFS, btrfs, tmpfs.  ZFS and FUSE have been seen to report a hole where a mapping held data; there, nothing is a hole.
HONEST_HOLES = {0xEF53, 0x58465342, 0x9123683E, 0x01021994}
#: NFS, SMB, CIFS, FUSE, Ceph, 9p, AFS: mappings of other machines are not coherent with ours.
NETWORK = {0x6969, 0x517B, 0xFF534D42, 0xFE534D42, 0x65735546, 0x00C36400, 0x01021997, 0x5346414F}


_TMPFS = 0x01021994


class Identity:
    """What names an image on this machine: (st_dev, st_ino), or (st_rdev, 0) for a block device."""

    __slots__ = ("device", "inode")

    def __init__(self, device: int, inode: int) -> None:
        self.device = device
        self.inode = inode

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and (self.device, self.inode) == (other.device, other.inode)

    def __hash__(self) -> int:
        return hash((self.device, self.inode))

    def __repr__(self) -> str:
        return f"Identity({self.device:#x}, {self.inode:#x})"

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity of a file; ImageError if it is no regular file or block device."""
        if stat.S_ISREG(status.st_mode):
            return cls(status.st_dev, status.st_ino)
        if stat.S_ISBLK(status.st_mode):
            return cls(status.st_rdev, 0)
        raise ImageError(errno.EINVAL, "an image must be a regular file or a block device")


def close_descriptor(fd: int) -> None:
    """Close a descriptor for good; what the file system has to say at that is not an error of ours.

    The kernel has freed the descriptor whatever close() answers, so nobody may try again.  What was written through it
    was synced before, or does not count; and an exception here would keep everything behind it from being let go.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


class ImageFile:
    """An open image.  ``close()`` gives the descriptor back; mappings live on."""

    def __init__(self, path: str, fd: int, identity: Identity, size_bytes: int, *, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.identity = identity
        self.size_bytes = size_bytes
        self.writable = writable
        status = os.fstat(fd)
        self.owner = status.st_uid
        #: A block device has several nodes, made at different times; its number is its identity.
        self.birth_ns = 0 if stat.S_ISBLK(status.st_mode) else _core.birth_ns(fd)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool) -> ImageFile:
        """Open an image; OSError if that fails, ReadOnlyImageError if it can't be written, ImageError if it is none."""
        name = os.fspath(path)
        flags = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(name, flags | os.O_CLOEXEC)
        except OSError as error:
            if writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                raise ReadOnlyImageError(error.errno, f"{name}: the image can't be opened for writing") from None
            raise
        with ExitStack() as undo:
            undo.callback(close_descriptor, fd)
            status = os.fstat(fd)
            try:
                identity = Identity.of(status)
            except ImageError as error:
                raise ImageError(error.errno, f"{name}: {error.strerror}") from None
            size_bytes = file_size(fd)
            if size_bytes == 0:
                raise ImageError(errno.EINVAL, f"{name}: the image is empty (0 bytes)")
            image = cls(name, fd, identity, size_bytes, writable=writable)
            undo.pop_all()
        return image

    def map(self, size_bytes: int | None = None) -> mmap.mmap:
        """Map the image MAP_SHARED, writable if the image is: the whole of it, or its first bytes."""
        access = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        return mmap.mmap(self.fd, self.size_bytes if size_bytes is None else size_bytes, mmap.MAP_SHARED, access)

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_descriptor(fd)


def file_size(fd: int) -> int:
    """Bytes of a regular file or a block device."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else os.lseek(fd, 0, os.SEEK_END)


def read_fully(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes, in however many reads: one may give less than there is.  Fewer: the file ends there."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def next_data(fd: int, offset: int, size_bytes: int) -> int:
    """The first byte from ``offset`` on that is not in a hole, or ``size_bytes``."""
    try:
        return min(os.lseek(fd, offset, os.SEEK_DATA), size_bytes)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size_bytes
        if error.errno == errno.EINVAL:
            return offset
        raise


def flags_without_waiting(fd: int) -> int | None:
    """Flags for preadv with which reads of this file are BlockingIOError and never a wait for a disk, or None.

    tmpfs knows no such flag, and needs none.
    """
    if _core.file_system(fd) == _TMPFS:
        return 0
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        return None
    return os.RWF_NOWAIT
