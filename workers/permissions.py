"""QEMU's image lock: qemu-img and friends don't write behind our back, and we serve no image that they write.

QEMU tells other processes on bytes of the image itself what it does and what it bears.  Both are shared locks of an
open file description, so any number of processes may say the same; a conflict is found by asking, as one who wants an
exclusive lock, whether anybody else holds the partner byte:

    permission         does it   does not bear that others do it
    consistent read    100       200
    write              101       201
    write unchanged    102       202
    resize             103       203

We say what a QEMU says that has the image for one device: 100, 101, 201, 203 (for a moment 103, to resize).  So with a
served image exactly that works which works with the image of a running virtual machine: `qemu-img info`, `map`,
`compare` and other readers that bear a writer do, whatever writes or resizes doesn't, and `qemu-img convert`, which
bears no writer, only with `-U` (its copy then is of no one instant: take a backup).

One open file description carries the locks of coordinator and workers: workers inherit it.  The kernel drops the locks
when the last of them is gone, so they outlive a coordinator as long as anybody copies for its snapshots.  Locks that
each process took for itself would leave a moment in which nobody holds them.  A byte of our own among them, 300, tells
a next coordinator that its predecessor's workers hold them and not a QEMU: such locks carry no pid, and a worker that
is still starting shows nowhere else.  Writers hold none.  When coordinator and workers are dead,
nothing keeps a QEMU from the image; the next coordinator looks, and refuses while it is there.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
import weakref

from shmcbw.errors import ImageInUseError
from shmcbw.image import ImageFile, close_descriptor

log = logging.getLogger("shmcbw")

CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
NAMES = ("consistent read", "write", "write unchanged", "resize")
DOES, BEARS_NOT = 100, 200
OURS = (CONSISTENT_READ, WRITE)
#: What of others we don't bear.
UNSHARED = (WRITE, RESIZE)
#: Locked by whoever of us holds the others, from when nobody stood in the way.  QEMU does not look there.
MARK = 300

LOCKING = ("auto", "on", "off")
CONFLICT_S = 1.0
_LOOK_S = 0.02
#: What file systems answer that have no such locks.
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

_locks: weakref.WeakSet[ImageLock] = weakref.WeakSet()


class ImageLock:
    """The locks of one served image.  ``locking``: "auto" (not where the file system has none), "on", "off"."""

    def __init__(self, image: ImageFile, locking: str = "auto") -> None:
        if locking not in LOCKING:
            raise ValueError(f"locking: {locking!r} is none of {', '.join(LOCKING)}")
        self._image = image
        self._locking = locking
        self.fd = -1
        _locks.add(self)

    @property
    def held(self) -> bool:
        return self.fd >= 0

    def take(self) -> None:
        """Take the locks; ImageInUseError with nothing taken if another process writes the image, or bears no writer.

        Blocks for at most a second in a conflict: who holds the locks may be dying.  Workers of a dead coordinator are
        no conflict: they hold the locks and had them all the time, so nobody else can.
        """
        if self._locking == "off" or self.held:
            return
        # The same file whatever became of its name; an open file of its own, so closing others drops nothing.
        self.fd = os.open(f"/proc/self/fd/{self._image.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for byte in (*(DOES + bit for bit in OURS), *(BEARS_NOT + bit for bit in UNSHARED)):
                self._set(byte, fcntl.F_RDLCK)
            # Our own locks are set: whoever is seen to bear the mark leaves no moment without any to somebody else.
            self._wait_for_others(OURS, UNSHARED, "can't be served", but_ours=True)
            self._set(MARK, fcntl.F_RDLCK)
        except OSError as error:
            self.close()
            if isinstance(error, ImageInUseError):
                raise
            if self._locking == "on" or error.errno not in _UNSUPPORTED:
                raise OSError(error.errno, f"{self._image.path}: no image lock: {error.strerror}") from error
            log.warning("%s: its file system has no locks, so QEMU is not kept from writing it", self._image.path)
        except BaseException:
            self.close()
            raise

    def hold_resize(self) -> None:
        """Say that we resize; ImageInUseError if another process (a read-only export, say) counts on the size.

        Blocks for at most a second, as `take` does.
        """
        if not self.held:
            return
        self._set(DOES + RESIZE, fcntl.F_RDLCK)
        try:
            self._wait_for_others((RESIZE,), (), "can't be resized", but_ours=False)
        except BaseException:
            self.drop_resize()
            raise

    def drop_resize(self) -> None:
        if self.held:
            self._set(DOES + RESIZE, fcntl.F_UNLCK)

    def _set(self, byte: int, kind: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(kind, byte))

    def _wait_for_others(self, does: tuple[int, ...], unshared: tuple[int, ...], what: str, *, but_ours: bool) -> None:
        """Who stands in the way may be dying, or be a tool that is done in a moment: a second, then ImageInUseError."""
        deadline = time.monotonic() + CONFLICT_S
        while (
            not (but_ours and self._held_elsewhere(MARK)) and (conflict := self._conflict(does, unshared)) is not None
        ):
            if time.monotonic() > deadline:
                raise self._in_use(conflict, what)
            time.sleep(_LOOK_S)

    def _conflict(self, does: tuple[int, ...], unshared: tuple[int, ...]) -> int | None:
        """The first byte of somebody else's that forbids what we do, or does what we don't bear."""
        for byte in (*(BEARS_NOT + bit for bit in does), *(DOES + bit for bit in unshared)):
            if self._held_elsewhere(byte):
                return byte
        return None

    def _held_elsewhere(self, byte: int) -> bool:
        answer = fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)

    def _in_use(self, byte: int, what: str) -> ImageInUseError:
        bit = byte % 100
        why = f"has the right to {NAMES[bit]}" if byte < BEARS_NOT else f"bears no other that may {NAMES[bit]}"
        holder = _holder(self.fd, byte) or "another process (QEMU?)"
        return ImageInUseError(
            errno.EBUSY, f"{self._image.path}: {what}: {holder} has it open and {why} (image lock, byte {byte})"
        )

    def close(self) -> None:
        """Let go; what workers inherited holds on until they end."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_descriptor(fd)


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _holder(fd: int, byte: int) -> str:
    """Who holds a byte of the file, for the message: "pid 12 (qemu-img)".  Empty if it is not ours to see.

    The kernel names no pid for locks of an open file description, but each process's descriptors show their locks.
    """
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for other in os.listdir(f"/proc/{pid}/fdinfo"):
                if int(pid) == os.getpid() or not os.path.samestat(os.stat(f"/proc/{pid}/fd/{other}"), os.fstat(fd)):
                    continue
                with open(f"/proc/{pid}/fdinfo/{other}") as file:
                    ranges = [line.split()[-2:] for line in file if line.startswith("lock:") and "OFDLCK" in line]
                if any(int(first) <= byte and (last == "EOF" or byte <= int(last)) for first, last in ranges):
                    with open(f"/proc/{pid}/comm") as file:
                        return f"pid {pid} ({file.read().strip()})"
        except (OSError, ValueError):
            # Ended meanwhile, or somebody else's.
            continue
    return ""


def _close_in_child() -> None:
    """A forked child must not keep its parent's image locked."""
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)
