"""Shared memory, named semaphores and ownership: create, attach, own, unlink.

Names are made from the image's identity, so whoever may open an image finds its control segment by ``stat``:

    /shmcbw-<device>-<inode>            control segment (layout.py)
    /shmcbw-<device>-<inode>.<serial>   cluster bytes of one snapshot (bitmap.py)
    /shmcbw-<device>-<inode>.pool       semaphore: there is work
    /shmcbw-<device>-<inode>.s<slot>    semaphore: slot, look again
    /shmcbw-<device>-<inode>.c          semaphore: coordinator, look again
    /shmcbw-<device>-<inode>.state      the coordinator's journal (workers/journal.py)

Ownership is an open-file-description lock on one byte of the control segment: byte 0 the coordinator, byte w worker w,
byte 256 + s slot s.  The kernel drops it when the last descriptor of that open file is closed, also at SIGKILL, so
"is it alive?" has an answer and no heartbeat.  A lock is never inherited into a working handle: a forked child closes
its copy of the descriptor (filter.py).

posix_ipc creates and unlinks; it never resizes (attach with size 0) and never locks.  multiprocessing.shared_memory
was rejected: its resource tracker unlinks segments that others use.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import mmap
import os
import stat
import struct
import time
import weakref

import posix_ipc

from . import _core, failpoints, seals
from .errors import ForeignSegmentError, LayoutVersionError, NoCoordinatorError, ShmcbwError
from .image import Identity, ImageFile, close_descriptor, file_size
from .layout import MAGIC, SNAPSHOT_COUNT, VERSION, WORKER_ID_MAX, Geometry, Header, Snapshot, Word
from .states import CREATING

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from collections.abc import Callable

SHM = "/dev/shm"
COORDINATOR = 0
JOURNAL_SUFFIX = ".state"
UNFINISHED_S = 10.0
_ALLOCATED, _OWNED, _SEMAPHORES, _HEADER = (
    failpoints.index_of(f"create.{step}") for step in ("allocated", "owned", "semaphores", "header")
)
_MARKED, _NAMES = failpoints.index_of("retire.marked"), failpoints.index_of("retire.names")
_SEMAPHORE_FILE_BYTES = 32
_RESIZE_TRIES = 20
#: Orphans that are told to leave, and dying processes, are gone by then.
_LEAVE_LIMIT_S = 7.0
_RESIZE_PAUSE_S = 0.001


def worker_byte(worker_id: int) -> int:
    """The lock byte of a worker."""
    return worker_id


def slot_byte(slot: int) -> int:
    """The lock byte of a slot."""
    return 256 + slot


def segment_name(identity: Identity) -> str:
    """The control segment's name, with the leading slash."""
    return f"/shmcbw-{identity.device:x}-{identity.inode:x}"


def identities() -> list[Identity]:
    """The images that have a control segment on this machine, by its name."""
    found = []
    for file in sorted(os.listdir(SHM)):
        if file.startswith("shmcbw-") and "." not in file:
            try:
                device, inode = (int(part, 16) for part in file.split("-")[1:])
            except ValueError:
                continue
            found.append(Identity(device, inode))
    return found


def boot_id() -> bytes:
    """16 bytes that change with every boot (a uuid)."""
    return bytes.fromhex(_kernel_says("/proc/sys/kernel/random/boot_id").strip().replace("-", ""))


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/PID/stat: with the pid it names a process for good.  0 if there is none."""
    try:
        return int(_kernel_says(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def _kernel_says(path: str) -> str:
    """A short file of /proc: one read has all of it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode(errors="replace")
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        close_descriptor(fd)


class Access:
    """Who may attach: file mode and group of all named objects of an image."""

    def __init__(self, mode: int = 0o600, group: int = -1) -> None:
        self.mode = mode
        self.group = group

    @classmethod
    def for_group(cls, group: str | int | None) -> Access:
        """0600, or 0660 with an explicit group (name or gid)."""
        if group is None:
            return cls()
        return cls(0o660, grp.getgrnam(group).gr_gid if isinstance(group, str) else group)

    def apply(self, file: int | str) -> None:
        """Set mode and group of a new object, past the umask."""
        if self.group != -1:
            os.chown(file, -1, self.group)
        os.chmod(file, self.mode)


def create_shared_memory(name: str, size_bytes: int, access: Access) -> int:
    """A new segment of zeroes with its space allocated, so that no later store meets a full /dev/shm: its descriptor.

    FileExistsError if the name is taken, OSError(ENOSPC) with nothing left behind if there is no room.
    """
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError:
        raise FileExistsError(errno.EEXIST, "shared memory exists", name) from None
    except posix_ipc.Error as error:
        raise PermissionError(errno.EACCES, f"can't make shared memory: {error}", name) from None
    except OSError as error:
        raise _with_errno(error, name) from None
    try:
        os.ftruncate(memory.fd, size_bytes)
        os.posix_fallocate(memory.fd, 0, size_bytes)
        access.apply(memory.fd)
    except OSError as error:
        unlink_shared_memory(name)
        close_descriptor(memory.fd)
        raise OSError(error.errno, f"can't allocate {size_bytes} bytes of shared memory in {SHM}", name) from error
    return memory.fd


def open_shared_memory(name: str) -> int:
    """The descriptor of an existing segment; FileNotFoundError or PermissionError."""
    try:
        return posix_ipc.SharedMemory(name).fd
    except posix_ipc.ExistentialError:
        raise FileNotFoundError(errno.ENOENT, "no such shared memory", name) from None
    except posix_ipc.PermissionsError:
        raise PermissionError(errno.EACCES, "shared memory of another user", name) from None
    except (ValueError, OSError) as error:
        # shm_open() follows no link, and posix_ipc has words of its own for a directory.
        if os.path.lexists(f"{SHM}{name}") and not stat.S_ISREG(os.lstat(f"{SHM}{name}").st_mode):
            raise PermissionError(errno.EINVAL, "is there, and is no shared memory", name) from None
        if isinstance(error, ValueError):
            raise
        raise _with_errno(error, name) from None


def _with_errno(error: OSError, name: str) -> OSError:
    """posix_ipc tells of too many open files in words only."""
    number = error.errno or errno.EMFILE
    return OSError(number, os.strerror(number), f"{SHM}{name}")


def unlink_shared_memory(name: str) -> None:
    """Remove a name; it may be gone."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.Error:
        pass


def check_owner(status: os.stat_result, image_uid: int, name: str) -> None:
    """ForeignSegmentError unless we, the image's owner or root made it, and nobody else may write it."""
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), image_uid, 0):
        raise ForeignSegmentError(
            errno.EPERM, f"{SHM}{name} belongs to uid {status.st_uid}, not to us, to the image's owner or to root"
        )
    if status.st_mode & 0o002:
        raise ForeignSegmentError(errno.EPERM, f"{SHM}{name} may be written by everybody (mode {status.st_mode:o})")


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _locked(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return int(struct.unpack("hhqqi4x", answer)[0]) != fcntl.F_UNLCK


_segments: weakref.WeakSet[Segment] = weakref.WeakSet()


class Segment:
    """An attached control segment: words, locks and semaphores of one image.

    Every number read from it is a hint of an untrusted party; `Geometry` is checked once at attach and trusted after.
    """

    def __init__(self, name: str, fd: int, memory: mmap.mmap, geometry: Geometry, identity: Identity) -> None:
        self.name = name
        self.fd = fd
        self.memory = memory
        self.geometry = geometry
        self.identity = identity
        #: The coordinator's: the even epoch that is open, or will be after the drained section.
        self.own_epoch = 0
        self._semaphores: dict[str, _core.Semaphore] = {}
        self.failpoints = failpoints.table(memory)
        #: Mappings of the size before a resize; calls that are inside use them.
        self._former: list[mmap.mmap] = []
        _segments.add(self)

    # -- words -----------------------------------------------------------------------------------------------------

    def load(self, offset: int, word: Word) -> int:
        """The value of a 4- or 8-byte word at an offset given by `Geometry`."""
        return _core.load_u32(self.memory, offset) if word.size == 4 else _core.load_u64(self.memory, offset)

    def store(self, offset: int, word: Word, value: int) -> None:
        if word.size == 4:
            _core.store_u32(self.memory, offset, value)
        else:
            _core.store_u64(self.memory, offset, value)

    def header(self, word: Word) -> int:
        return self.load(word.offset, word)

    def set_header(self, word: Word, value: int) -> None:
        self.store(word.offset, word, value)

    def count_header(self, word: Word, amount: int = 1) -> None:
        _core.add_u64(self.memory, word.offset, amount)

    def slot(self, index: int, word: Word) -> int:
        return self.load(self.geometry.slot(index, word), word)

    def set_slot(self, index: int, word: Word, value: int) -> None:
        self.store(self.geometry.slot(index, word), word, value)

    def worker(self, worker_id: int, word: Word) -> int:
        return self.load(self.geometry.worker(worker_id, word), word)

    def set_worker(self, worker_id: int, word: Word, value: int) -> None:
        self.store(self.geometry.worker(worker_id, word), word, value)

    def snapshot(self, index: int, word: Word) -> int:
        return self.load(self.geometry.snapshot(index, word), word)

    def set_snapshot(self, index: int, word: Word, value: int) -> None:
        self.store(self.geometry.snapshot(index, word), word, value)

    def exchange_snapshot(self, index: int, word: Word, expected: int, desired: int) -> bool:
        """Compare-and-swap of an 8-byte word of a snapshot entry."""
        return _core.compare_exchange_u64(self.memory, self.geometry.snapshot(index, word), expected, desired)

    def text(self, offset: int, word: Word) -> str:
        """A path in the segment, up to its NUL."""
        raw = bytes(self.memory[offset : offset + word.size])
        return os.fsdecode(raw.partition(b"\0")[0])

    def set_text(self, offset: int, word: Word, text: str) -> None:
        """Store a path, cut off where there is no room (callers that may not lose any check before)."""
        raw = os.fsencode(text)[: word.size - 1]
        self.memory[offset : offset + word.size] = raw + bytes(word.size - len(raw))

    # -- ownership -------------------------------------------------------------------------------------------------

    def try_lock(self, byte: int) -> bool:
        """Take an ownership byte; False if another handle holds it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def unlock(self, byte: int) -> None:
        fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))

    def locked(self, byte: int) -> bool:
        """Whether another handle holds an ownership byte (our own locks do not count)."""
        return _locked(self.fd, byte)

    def linked(self) -> bool:
        """Whether the name still leads to this segment."""
        return _leads_to(self.name, self.fd)

    def damaged(self) -> bool:
        """Whether somebody has overwritten the header: nobody can attach any more."""
        sealed = self.header(Header.seal) == seals.header_seal(self.memory)
        return not sealed or self.header(Header.magic) != MAGIC

    def seal(self, index: int) -> int:
        """Seal a snapshot entry whose constant words are all written: the seal."""
        value = seals.entry_seal(self.memory, self.geometry, index)
        self.set_snapshot(index, Snapshot.seal, value)
        return value

    def seal_name(self, index: int) -> None:
        """Seal what a snapshot entry says while what it names is made."""
        self.set_snapshot(index, Snapshot.seal, seals.name_seal(self.memory, self.geometry, index))

    def sealed(self, index: int) -> bool:
        """Whether the constant words of a snapshot entry are what they were when it was sealed; of one that is
        CREATING at least its name."""
        seal = self.snapshot(index, Snapshot.seal)
        if seal == seals.entry_seal(self.memory, self.geometry, index):
            return True
        creating = self.snapshot(index, Snapshot.state) & 0xFFFFFFFF == CREATING
        return creating and seal == seals.name_seal(self.memory, self.geometry, index)

    # -- resize ----------------------------------------------------------------------------------------------------

    def larger_geometry(self) -> Geometry | None:
        """The geometry after a resize that this handle has not followed, or None."""
        size_bytes = self.header(Header.image_size)
        if size_bytes == self.geometry.image_size:
            return None
        try:
            geometry = self.geometry.resized(size_bytes)
        except ValueError as error:
            raise ForeignSegmentError(errno.EINVAL, f"{SHM}{self.name}: {error}") from None
        # The segment was made larger before the size was stored.
        if size_bytes < self.geometry.image_size or os.fstat(self.fd).st_size < geometry.segment_size:
            raise ForeignSegmentError(errno.EINVAL, f"{SHM}{self.name}: its header says {size_bytes} bytes of image")
        return geometry

    def map_larger(self, geometry: Geometry) -> mmap.mmap:
        """A mapping of what a resize has made larger.  Nothing has moved: it shows the same pages as the old one."""
        fd = _lock_descriptor(self.fd)
        try:
            return mmap.mmap(fd, geometry.segment_size)
        finally:
            close_descriptor(fd)

    def follow(self, memory: mmap.mmap, geometry: Geometry) -> None:
        """Use the larger mapping from now on; the old one stays for whoever is in it."""
        self._former.append(self.memory)
        self.memory, self.geometry = memory, geometry

    # -- waking ----------------------------------------------------------------------------------------------------

    def semaphore(self, suffix: str) -> _core.Semaphore:
        """An opened semaphore of this image: "pool", "c" or "s<slot>"."""
        found = self._semaphores.get(suffix)
        if found is None:
            found = self._semaphores[suffix] = _open_semaphore(f"{self.name}.{suffix}")
        return found

    def wake_slot(self, index: int) -> None:
        """Have a slot's owner look again.  A semaphore that is gone belongs to a segment that is going: no matter."""
        try:
            self.semaphore(f"s{index}").post()
        except OSError:
            pass

    def wake_coordinator(self) -> None:
        try:
            self.semaphore("c").post()
        except OSError:
            pass

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of descriptor (and with it of all locks) and mapping.  A mapping in use elsewhere lives on."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_descriptor(fd)
        self._semaphores.clear()
        for memory in (self.memory, *self._former):
            try:
                memory.close()
            except BufferError:
                pass

    def __repr__(self) -> str:
        return f"<Segment {self.name} of {self.geometry.image_size} bytes>"


def _close_in_child() -> None:
    """A forked child shares the open file that holds its parent's locks: it must not keep them when the parent dies.

    Closing the child's copy of the descriptor leaves the parent's locks alone.
    """
    for segment in list(_segments):
        if segment.fd >= 0:
            fd, segment.fd = segment.fd, -1
            close_descriptor(fd)


os.register_at_fork(after_in_child=_close_in_child)


def create(
    image: ImageFile, geometry: Geometry, access: Access, before_visible: Callable[[], None] | None = None
) -> Segment:
    """Create a control segment and own it: the coordinator's lock is held when it becomes visible as finished.

    FileExistsError if there is one; OSError(ENOSPC) if /dev/shm is full.  ``before_visible``: called by its owner while
    nobody can attach yet; what it raises is raised, with nothing left.
    """
    identity = image.identity
    name = segment_name(identity)
    fd = create_shared_memory(name, geometry.segment_size, access)
    segment: Segment | None = None
    try:
        memory = mmap.mmap(fd, geometry.segment_size)
        segment = Segment(name, _lock_descriptor(fd), memory, geometry, identity)
        failpoints.hit(segment.failpoints, _ALLOCATED)
        if not segment.try_lock(COORDINATOR) or not segment.linked():
            raise FileExistsError(errno.EEXIST, "another coordinator was faster", name)
        failpoints.hit(segment.failpoints, _OWNED)
        for suffix in ["pool", "c", *(f"s{index}" for index in range(geometry.slot_count))]:
            _create_semaphore(f"{name}.{suffix}", access)
        failpoints.hit(segment.failpoints, _SEMAPHORES)
        segment.set_header(Header.version, VERSION)
        for word, value in ((Header.uuid, os.urandom(16)), (Header.boot_id, boot_id())):
            segment.memory[word.offset : word.offset + word.size] = value
        segment.set_header(Header.image_device, identity.device)
        segment.set_header(Header.image_inode, identity.inode)
        segment.set_header(Header.image_birth_ns, image.birth_ns)
        segment.set_header(Header.image_size, geometry.image_size)
        segment.set_header(Header.cluster_size, geometry.cluster_size)
        segment.set_header(Header.slot_count, geometry.slot_count)
        segment.set_header(Header.worker_count, geometry.worker_count)
        # A fresh epoch map is all zero: no cluster was written in epoch 2.
        segment.set_header(Header.epoch, 2)
        # Not 1: the bitmaps of a discarded generation must not be taken for ours.
        segment.set_header(Header.next_serial, 1 + int.from_bytes(os.urandom(3), "little"))
        segment.set_header(Header.started_ns, time.time_ns())
        failpoints.hit(segment.failpoints, _HEADER)
        if before_visible is not None:
            before_visible()
        segment.set_header(Header.seal, seals.header_seal(segment.memory))
        segment.set_header(Header.magic, MAGIC)
    except BaseException:
        try:
            if _leads_to(name, fd):
                unlink_all(identity)
        except OSError:
            # Then an unfinished segment stays, whose lock nobody holds: the next coordinator discards it.
            pass
        if segment is not None:
            segment.close()
        raise
    finally:
        close_descriptor(fd)
    return segment


def _leads_to(name: str, fd: int) -> bool:
    """Whether a name of shared memory is (still) that of an open file."""
    try:
        found = os.stat(f"{SHM}{name}")
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _lock_descriptor(fd: int) -> int:
    """The same file, opened again: mmap.mmap() keeps a duplicate of its descriptor, and with it locks would outlive
    `Segment.close` and live on in forked children.  So locks have an open file of their own."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _open_semaphore(name: str) -> _core.Semaphore:
    """sem_open() maps the file without looking: one that is too short would be a SIGBUS."""
    status = os.stat(f"{SHM}/sem.{name[1:]}")
    if status.st_size < _SEMAPHORE_FILE_BYTES:
        raise ForeignSegmentError(errno.EINVAL, f"{name}: not a semaphore ({status.st_size} bytes)")
    return _core.Semaphore(name)


def _create_semaphore(name: str, access: Access) -> None:
    for attempt in (1, 2):
        try:
            posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=0).close()
            break
        except posix_ipc.ExistentialError:
            # Left by a coordinator that died between two steps of this function: the control segment decides.
            try:
                if attempt == 2:
                    raise ForeignSegmentError(errno.EEXIST, f"semaphore {name} comes back again and again")
                posix_ipc.unlink_semaphore(name)
            except posix_ipc.Error as error:
                raise ForeignSegmentError(errno.EPERM, f"semaphore {name} belongs to somebody else ({error})") from None
        except posix_ipc.Error as error:
            raise ForeignSegmentError(errno.EPERM, f"semaphore {name} can't be made: {error}") from None
    access.apply(f"{SHM}/sem.{name[1:]}")


def attach(image: ImageFile) -> Segment:
    """Attach to the control segment of an open image.

    Checks owner, size, magic, layout version, boot and image identity before anything else is touched.  Raises
    NoCoordinatorError (there is none, or it is not finished), ForeignSegmentError, LayoutVersionError, and
    StaleSegmentError: another boot, or an image that was replaced, or resized by somebody else.  Sets the image's size.
    """
    while True:
        segment = attach_named(image.identity, image.owner)
        sizes = segment.geometry.image_size, segment.header(Header.resize_to)
        # After the two words: a resize stores the one, resizes the file, stores the other.
        try:
            image.size_bytes = file_size(image.fd)
        except BaseException:
            segment.close()
            raise
        resized = sizes != (segment.header(Header.image_size), segment.header(Header.resize_to))
        problem = ""
        if image.size_bytes not in (sizes[0], max(sizes)):
            problem = f"an image of {sizes[0]} bytes, the image has {image.size_bytes}"
        elif segment.header(Header.image_birth_ns) != image.birth_ns:
            problem = "another file, which had this file's inode number before"
        if not problem:
            return segment
        segment.close()
        if not resized:
            raise StaleSegmentError(f"{SHM}{segment.name} was made for {problem}")


def attach_named(identity: Identity, owner: int) -> Segment:
    """Attach to whatever image had this identity, `owner` being a uid that may own it beside us and root."""
    for _ in range(_RESIZE_TRIES):
        try:
            return _try_attach(identity, owner)
        except _SizesDifferError as error:
            different = error
            time.sleep(_RESIZE_PAUSE_S)
    # Its seal is right, so it is ours: somebody has overwritten its size.
    raise StaleSegmentError(str(different.strerror))


def _try_attach(identity: Identity, owner: int) -> Segment:
    """Attach; _SizesDifferError also if a resize was in the way, or one was taken back and another one begun."""
    name = segment_name(identity)
    try:
        fd = open_shared_memory(name)
    except FileNotFoundError:
        raise NoCoordinatorError(errno.ENOENT, "no coordinator serves this image") from None
    except PermissionError as error:
        raise ForeignSegmentError(error.errno, f"{SHM}{name}: {error.strerror}") from None
    memory: mmap.mmap | None = None
    try:
        status = os.fstat(fd)
        check_owner(status, owner, name)
        if status.st_size < Header.SIZE:
            raise NoCoordinatorError(errno.EAGAIN, f"{SHM}{name} is not finished: its coordinator is starting, or died")
        memory = mmap.mmap(fd, status.st_size)
        geometry = _check_header(memory, name, identity)
        _check_size(fd, memory, name, geometry)
        return Segment(name, _lock_descriptor(fd), memory, geometry, identity)
    except BaseException:
        if memory is not None:
            memory.close()
        raise
    finally:
        close_descriptor(fd)


def _check_header(memory: mmap.mmap, name: str, identity: Identity) -> Geometry:
    def number(word: Word) -> int:
        load = _core.load_u32 if word.size == 4 else _core.load_u64
        return load(memory, word.offset)

    magic = number(Header.magic)
    if magic == 0:
        raise NoCoordinatorError(errno.EAGAIN, f"{SHM}{name} is not finished: its coordinator is starting, or died")
    sealed = seals.header_seal(memory) == number(Header.seal)
    if magic != MAGIC and not sealed:
        raise ForeignSegmentError(errno.EINVAL, f"{SHM}{name} is not a control segment of shmcbw")
    if (version := number(Header.version)) != VERSION:
        raise LayoutVersionError(f"{SHM}{name} has layout version {version}, this shmcbw speaks {VERSION}")
    if magic != MAGIC or not sealed:
        raise StaleSegmentError(f"{SHM}{name}: somebody has overwritten its header")
    if memory[Header.boot_id.offset : Header.boot_id.offset + 16] != boot_id():
        raise StaleSegmentError(f"{SHM}{name} was made before the last boot")
    if (number(Header.image_device), number(Header.image_inode)) != (identity.device, identity.inode):
        raise StaleSegmentError(f"{SHM}{name} was made for another image")
    try:
        return Geometry(
            number(Header.image_size),
            number(Header.cluster_size),
            number(Header.slot_count),
            number(Header.worker_count),
        )
    except ValueError as error:
        raise StaleSegmentError(f"{SHM}{name}: somebody has overwritten its header: {error}") from None


class _SizesDifferError(ForeignSegmentError):
    """The segment is not as large as its header says: foreign, if it stays so."""


def _check_size(fd: int, memory: mmap.mmap, name: str, geometry: Geometry) -> None:
    """_SizesDifferError unless the segment is as large as its header says, also in the middle of a resize.

    A resize stores resize_to, makes the segment larger, stores image_size, and takes resize_to back.  At each moment
    they fit, but what was read at different ones may not (the model shows that looking once more for whether they have
    changed is not enough: they may have changed back).
    """
    expected = {geometry.segment_size}
    resize_to = _core.load_u64(memory, Header.resize_to.offset)
    if resize_to > geometry.image_size:
        try:
            expected.add(geometry.resized(resize_to).segment_size)
        except ValueError as error:
            raise StaleSegmentError(f"{SHM}{name}: somebody has overwritten its header: resize: {error}") from None
    found = os.fstat(fd).st_size
    if found not in expected or len(memory) < geometry.segment_size:
        raise _SizesDifferError(errno.EINVAL, f"{SHM}{name} has {found} bytes, its header says {geometry.segment_size}")


class StaleSegmentError(ShmcbwError):
    """The control segment is of another boot, image or image size, or damaged: the next coordinator discards it."""

    exit_status = 3


def try_retire(segment: Segment) -> bool:
    """Remove a segment that nobody uses: whether that was so.  The caller holds the coordinator's lock.

    ``retired`` first, then the locks.  A writer takes a slot's lock first and then looks at ``retired`` and at the
    name (filter.py): one of the two sees the other, so nobody writes on in a segment that cuts know nothing of.
    """
    segment.set_header(Header.retired, 1)
    failpoints.hit(segment.failpoints, _MARKED)
    try:
        used = in_use(segment)
    except OSError:
        # Nobody can say: somebody may be in it.
        segment.set_header(Header.retired, 0)
        raise
    if used:
        segment.set_header(Header.retired, 0)
        return False
    unlink_all(segment.identity, segment.failpoints)
    return True


def has_journal(segment: Segment) -> bool:
    """Whether a coordinator has left something that is not in the segment's words (`workers/journal.py`)."""
    try:
        found = os.lstat(f"{SHM}{segment.name}{JOURNAL_SUFFIX}")
    except FileNotFoundError:
        return False
    # Somebody else's file under the name keeps nothing alive.
    return found.st_uid == os.fstat(segment.fd).st_uid


def in_use(segment: Segment) -> bool:
    """Whether a slot or a worker lives, or a snapshot or a journal waits for its coordinator's return."""
    return (
        has_journal(segment)
        or any(segment.snapshot(index, Snapshot.state) & 0xFFFFFFFF for index in range(SNAPSHOT_COUNT))
        or worker_lives(segment)
        or any(segment.locked(slot_byte(slot)) for slot in range(segment.geometry.slot_count))
    )


def worker_lives(segment: Segment) -> bool:
    """Whether any copy worker lives, of whatever generation."""
    return any(segment.locked(worker_byte(worker_id)) for worker_id in range(1, segment.geometry.worker_count + 1))


def unlink_all(identity: Identity, where: failpoints.Table | None = None) -> None:
    """Remove every name of an image: semaphores and bitmaps first, the control segment last.

    The caller holds the coordinator's lock of the segment under that name.
    """
    name = segment_name(identity)
    for file in os.listdir(SHM):
        if file.startswith(f"sem.{name[1:]}."):
            try:
                posix_ipc.unlink_semaphore("/" + file.removeprefix("sem."))
            except posix_ipc.Error:
                # Gone already, or somebody else's under our name: `create` refuses that one.
                pass
        elif file.startswith(f"{name[1:]}."):
            unlink_shared_memory("/" + file)
    if where is not None:
        failpoints.hit(where, _NAMES)
    unlink_shared_memory(name)


def discard_unused(identity: Identity, image_uid: int, wait_s: float = _LEAVE_LIMIT_S) -> None:
    """Discard a segment that can't be attached (unfinished, of another boot, size or version), if nobody holds it.

    Orphaned workers are told to leave first, and dying processes get ``wait_s`` seconds to end.  ShmcbwError if any
    of its locks is still held then: lock bytes mean the same in all versions.
    """
    name = segment_name(identity)
    try:
        fd = open_shared_memory(name)
    except FileNotFoundError:
        return
    try:
        check_owner(os.fstat(fd), image_uid, name)
        _send_workers_away(fd, name)
        deadline = time.monotonic() + wait_s
        owned_since = None
        while not _try_lock_all(fd):
            # A worker that leaves last holds the coordinator's lock for a moment; a coordinator holds it on.
            owned_since = (owned_since or time.monotonic()) if _locked(fd, COORDINATOR) else None
            owned = owned_since is not None and time.monotonic() - owned_since > min(1.0, wait_s)
            if time.monotonic() > deadline or owned:
                raise ShmcbwError(f"{SHM}{name} can't be used, but live processes hold it: end them first")
            time.sleep(0.02)
        if _leads_to(name, fd):
            unlink_all(identity)
    except FileNotFoundError:
        pass
    finally:
        close_descriptor(fd)


def _try_lock_all(fd: int) -> bool:
    """Take every lock byte at once; False if anybody holds one."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _send_workers_away(fd: int, name: str) -> None:
    """Raise the pool's generation of a segment of our layout whose coordinator is dead."""
    if os.fstat(fd).st_size < Header.SIZE:
        return
    with mmap.mmap(fd, Header.SIZE) as header:
        ours = _core.load_u64(header, 0) == MAGIC and _core.load_u32(header, Header.version.offset) == VERSION
        # A header that was scribbled on: one of the two still tells.
        ours = ours or _core.load_u32(header, Header.seal.offset) == seals.header_seal(header)
        if not ours or _locked(fd, COORDINATOR):
            return
        # Beyond all that were given out: also workers of a coordinator that died over its start leave.
        last = _core.load_u32(header, Header.last_generation.offset)
        _core.store_u32(header, Header.pool_generation.offset, (last + 1) & 0xFFFFFFFF)
    try:
        pool = _open_semaphore(f"{name}.pool")
        for _ in range(WORKER_ID_MAX):
            pool.post()
    except OSError:
        pass


def sweep(
    before: Callable[[Segment], None] | None = None, spared: Identity | None = None, replaced: str = ""
) -> list[str]:
    """Remove segments of our own that nobody holds and nobody can need, but ``spared``: the names of those.

    before: called with each, while it still has its name.  replaced: path of an image that the caller is about to
    serve; orphaned workers of another image that had that path are sent away first, and waited for.

    Nobody holds it: all its locks are free.  Nobody can need it: it has no snapshot and no journal that a coordinator
    could go on with, or its image is not there any more.
    """
    removed = []
    for identity in identities():
        try:
            if identity == spared:
                continue
            segment = attach_named(identity, os.geteuid())
        except (NoCoordinatorError, StaleSegmentError):
            _sweep_unusable(identity)
            continue
        except (ShmcbwError, OSError, ValueError):
            continue
        try:
            if replaced and segment.text(Header.image_path.offset, Header.image_path) == replaced:
                _end_orphans(segment)
            if os.fstat(segment.fd).st_uid == os.geteuid() and _try_lock_all(segment.fd) and _unneeded(segment):
                # All locks are ours: a writer that wants a slot now gets none, and then finds the name gone.
                segment.set_header(Header.retired, 1)
                if before is not None:
                    before(segment)
                unlink_all(segment.identity)
                removed.append(segment.name)
        finally:
            segment.close()
    return removed


def _end_orphans(segment: Segment) -> None:
    """Have the workers of a dead coordinator leave, unless writers need them still."""
    writers = any(segment.locked(slot_byte(slot)) for slot in range(segment.geometry.slot_count))
    if writers or segment.locked(COORDINATOR):
        return
    _send_workers_away(segment.fd, segment.name)
    deadline = time.monotonic() + _LEAVE_LIMIT_S
    while worker_lives(segment) and time.monotonic() < deadline:
        time.sleep(0.02)


def _sweep_unusable(identity: Identity) -> None:
    """Remove what a coordinator left that died while it made its segment, not what one is making at this moment; and
    what nobody can attach to any more."""
    try:
        age_s = time.time() - os.stat(f"{SHM}{segment_name(identity)}").st_mtime
        if age_s > UNFINISHED_S:
            discard_unused(identity, os.geteuid(), wait_s=0.0)
    except (ShmcbwError, OSError):
        pass


def _unneeded(segment: Segment) -> bool:
    states = [segment.snapshot(index, Snapshot.state) & 0xFFFFFFFF for index in range(SNAPSHOT_COUNT)]
    if not any(states) and not has_journal(segment):
        return segment.linked()
    try:
        there = Identity.of(os.stat(segment.text(Header.image_path.offset, Header.image_path)))
    except (OSError, ShmcbwError):
        return segment.linked()
    return there != segment.identity and segment.linked()
