"""A SQLite database in an shmcbw image: several processes write it, and a backup at any instant is right.

A backup of a database needs its rollback journal of the same instant: a cut in the middle of a commit finds some pages
old and some new, and only the journal knows which.  So the main database and its journal are two regions of one image,
and one cut covers both.  What a backup holds is what a process would leave that was killed at the cut; SQLite has
always been able to roll that back.  Nobody has to be stopped, and no checkpoint is needed.

    create("bank.img", database_capacity=1 << 30)              once
    with Coordinator("bank.img"): ...                          some process serves the image and takes backups
    vfs = ImageVfs(); connection = vfs.connect("bank.img")     each process that uses the database
    coordinator.backup("backup.img", quiesce=at_rest(connection))    optional: between two transactions
    extract("backup.img", "bank.db")                           bank.db and bank.db-journal, for any SQLite

The image, all numbers u64, little-endian; a size word is 0 for a file that does not exist, else its size plus 1:

    offset  name               written by
         0  magic              create
        16  database_offset    create
        24  database_capacity  create
        32  journal_offset     create
        40  journal_capacity   create
        48  database_size      who holds SQLite's EXCLUSIVE lock on the database
        56  journal_size       who holds RESERVED, or EXCLUSIVE while it rolls back for a dead process

Each size word is one aligned 8-byte store, for readers look at it without a lock.  A file grows by data first, size
next, and a gap is filled with zeroes before: a cut, like a death, in between finds the file as it was.

Locks are SQLite's own, on an ordinary empty file beside the image (``bank.img-lock``): POSIX locks are lost when the
process closes any descriptor of their file, and the filter opens and closes the image itself.  Nothing else in the
process may ever open the lock file.  Never fork with an open connection.

Refused, because a backup could not undo it: a commit without a journal in the image (journal_mode WAL, MEMORY, OFF)
and one over several databases (its super-journal is a file of its own).
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

import apsw

import shmcbw

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC: Final = b"shmcbw-sqlite-1\0"
LOCK_SUFFIX: Final = "-lock"
JOURNAL_SUFFIX: Final = "-journal"
#: Of regions: the default cluster size, so that a write to one does not have a piece of the other copied.
ALIGNMENT_BYTES: Final = 64 << 10
_HEADER_BYTES: Final = 64
_DATABASE_WORD: Final = 48
_JOURNAL_WORD: Final = 56
_PIECE_BYTES: Final = 1 << 20


class ImageFormatError(ValueError):
    """The file is no image made by `create`, or its header is damaged."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a region is in the image, and where its size word is: bytes."""

    offset: int
    capacity: int
    word: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The two regions of an image."""

    database: Place
    journal: Place


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def create(path: str | os.PathLike[str], *, database_capacity: int, journal_capacity: int | None = None) -> None:
    """Create an image for a database of at most ``database_capacity`` bytes; the file is sparse.

    ``journal_capacity`` bounds what one transaction may change; by default it may be the whole database (VACUUM).
    FileExistsError if the path is taken.
    """
    if journal_capacity is None:
        # The smallest pages have 512 bytes, and 8 more in the journal.
        journal_capacity = database_capacity + database_capacity // 32 + (1 << 20)
    database_capacity, journal_capacity = _aligned(database_capacity), _aligned(journal_capacity)
    numbers = (ALIGNMENT_BYTES, database_capacity, ALIGNMENT_BYTES + database_capacity, journal_capacity)
    # The database exists and is empty, the journal does not exist.
    header = MAGIC + b"".join(number.to_bytes(8, "little") for number in (*numbers, 1, 0))
    with open(path, "xb") as file:
        file.truncate(sum(numbers[2:]))
        file.write(header)


def parse_layout(header: bytes, image_bytes: int, path: str) -> Layout:
    """The layout from the first 64 bytes of an image; ImageFormatError."""
    if len(header) < _HEADER_BYTES or header[: len(MAGIC)] != MAGIC:
        raise ImageFormatError(f"{path}: no database image")
    numbers = [int.from_bytes(header[at : at + 8], "little") for at in range(16, _HEADER_BYTES, 8)]
    layout = Layout(Place(numbers[0], numbers[1], _DATABASE_WORD), Place(numbers[2], numbers[3], _JOURNAL_WORD))
    for place, word in ((layout.database, numbers[4]), (layout.journal, numbers[5])):
        if place.offset < _HEADER_BYTES or place.offset + place.capacity > image_bytes or word > place.capacity + 1:
            raise ImageFormatError(
                f"{path}: a region of {place.capacity} bytes at {place.offset} with size word {word} "
                f"does not fit into the image of {image_bytes} bytes"
            )
    if numbers[4] == 0:
        raise ImageFormatError(f"{path}: the size word of the database is 0")
    return layout


class Region:
    """A file inside the image, through the filter."""

    def __init__(self, disk: shmcbw.Disk, place: Place, name: str) -> None:
        self._disk = disk
        self._place = place
        self._name = name

    @property
    def size(self) -> int | None:
        """Bytes; None if the file does not exist."""
        word = int.from_bytes(self._disk.pread(8, self._place.word), "little")
        return word - 1 if word else None

    def resize(self, size: int | None) -> None:
        """Set size or existence, nothing else: bytes beyond the size mean nothing."""
        self._disk.pwrite((0 if size is None else size + 1).to_bytes(8, "little"), self._place.word)

    def read(self, amount: int, offset: int) -> bytes:
        """Fewer bytes at the end of the file."""
        amount = min(amount, (self.size or 0) - offset)
        return self._disk.pread(amount, self._place.offset + offset) if amount > 0 else b""

    def write(self, data: bytes, offset: int) -> None:
        size, end = self.size or 0, offset + len(data)
        if end > self._place.capacity:
            raise apsw.FullError(f"{self._name}: the {self._place.capacity} bytes of its region are full")
        if offset > size:
            self._disk.pwrite_zeroes(offset - size, self._place.offset + size)
        self._disk.pwrite(data, self._place.offset + offset)
        if end > size:
            self.resize(end)

    def truncate(self, size: int) -> None:
        """Size first: what is beyond it is no part of the file any more when it is given back."""
        old = self.size or 0
        if size > old:
            raise apsw.IOError(f"{self._name}: can't be truncated from {old} to {size} bytes")
        self.resize(size)
        if old > size:
            self._disk.pdiscard(old - size, self._place.offset + size)

    def flush(self) -> None:
        self._disk.flush()


class Image:
    """An open image with its two files; all connections of a process share it."""

    def __init__(self, path: str, region: type[Region]) -> None:
        self.disk = shmcbw.open(path)
        try:
            layout = parse_layout(self.disk.pread(_HEADER_BYTES, 0), self.disk.size_bytes, path)
        except BaseException:
            self.disk.close()
            raise
        self.database = region(self.disk, layout.database, path)
        self.journal = region(self.disk, layout.journal, path + JOURNAL_SUFFIX)
        self.users = 0


class RegionFile(apsw.VFSFile):
    """What both files have in common: data, size and sync are the region's."""

    region: Region

    def xRead(self, amount: int, offset: int) -> bytes:
        return self.region.read(amount, offset)

    def xWrite(self, data: Buffer, offset: int) -> None:
        self.region.write(bytes(data), offset)

    def xTruncate(self, newsize: int) -> None:
        self.region.truncate(newsize)

    def xFileSize(self) -> int:
        return self.region.size or 0

    def xSync(self, flags: int) -> None:
        self.region.flush()

    def xSectorSize(self) -> int:
        return 4096

    def xDeviceCharacteristics(self) -> int:
        # Not the lock file's: on F2FS that would promise atomic writes.
        return apsw.SQLITE_IOCAP_POWERSAFE_OVERWRITE


class DatabaseFile(RegionFile):
    """The main database.  Its locks are inherited: they are the default VFS's on the lock file."""

    #: What the default VFS may be asked about the lock file.  All else (size hints, mmap, atomic writes) is not for it.
    _ABOUT_LOCKS = frozenset(
        {apsw.SQLITE_FCNTL_LOCKSTATE, apsw.SQLITE_FCNTL_HAS_MOVED, apsw.SQLITE_FCNTL_LAST_ERRNO}
    )  # fmt: skip

    def __init__(self, vfs: ImageVfs, path: str, flags: list[int]) -> None:
        self._vfs = vfs
        self._path = path
        lock_flags = [apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE, 0]
        image = vfs.take(path)
        try:
            super().__init__("", path + LOCK_SUFFIX, lock_flags)
        except BaseException:
            vfs.give_back(path)
            raise
        self.region = image.database
        self._journal = image.journal
        self._open = True
        flags[1] = flags[0]

    def xWrite(self, data: Buffer, offset: int) -> None:
        # SQLite's own test for a journal that undoes something.
        if self._journal.read(1, 0) in (b"", b"\0"):
            raise apsw.IOError(
                f"{self._path}: a change without a journal in the image (journal_mode WAL, MEMORY or OFF) is refused: "
                "no backup could undo it"
            )
        super().xWrite(data, offset)

    def xFileControl(self, op: int, ptr: int) -> bool:
        return super().xFileControl(op, ptr) if op in self._ABOUT_LOCKS else False

    def xClose(self) -> None:
        super().xClose()
        if self._open:
            self._open = False
            self._vfs.give_back(self._path)


class JournalFile(RegionFile):
    """The rollback journal.  SQLite never locks it."""

    def __init__(self, region: Region, flags: list[int]) -> None:
        # No base class: there is no such file.
        self.region = region
        if region.size is None:
            if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                raise apsw.CantOpenError("there is no journal")
            region.resize(0)
        flags[1] = flags[0]

    def xTruncate(self, newsize: int) -> None:
        # The next transaction fills it again: keep the space.
        self.region.resize(newsize)

    def xLock(self, level: int) -> None:
        pass

    def xUnlock(self, level: int) -> None:
        pass

    def xCheckReservedLock(self) -> bool:
        return False

    def xFileControl(self, op: int, ptr: int) -> bool:
        return False

    def xClose(self) -> None:
        pass


class ImageVfs(apsw.VFS):
    """The VFS.  Keep a reference as long as connections are open; one a process is enough."""

    region: type[Region] = Region

    def __init__(self, name: str = "shmcbw") -> None:
        self._name = name
        self._images: dict[str, Image] = {}
        self._lock = threading.Lock()
        super().__init__(name, "")

    def connect(self, path: str | os.PathLike[str], *, timeout_s: float = 30.0) -> apsw.Connection:
        """Open the database of an image, which needs a running coordinator.

        While others write, statements wait up to ``timeout_s``, then apsw.BusyError.  Begin writing transactions with
        BEGIN IMMEDIATE: one that read first and then meets another writer can't wait.
        """
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        connection = apsw.Connection(os.fspath(path), flags=flags, vfs=self._name)
        connection.set_busy_handler(_patience(timeout_s))
        return connection

    # -- the images in use -----------------------------------------------------------------------------------------

    def take(self, path: str) -> Image:
        with self._lock:
            image = self._images.get(path)
            if image is None:
                image = self._images[path] = Image(path, self.region)
            image.users += 1
            return image

    def give_back(self, path: str) -> None:
        with self._lock:
            image = self._images[path]
            image.users -= 1
            if image.users == 0:
                del self._images[path]
                image.disk.close()

    def _journal(self, path: str) -> Region | None:
        """The region of a journal; None if it is not the journal of an open image."""
        image = self._images.get(path.removesuffix(JOURNAL_SUFFIX)) if path.endswith(JOURNAL_SUFFIX) else None
        return None if image is None else image.journal

    # -- what SQLite asks ------------------------------------------------------------------------------------------

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is not None and flags[0] & apsw.SQLITE_OPEN_MAIN_DB:
            return DatabaseFile(self, path, flags)
        if path is not None and flags[0] & apsw.SQLITE_OPEN_MAIN_JOURNAL and (journal := self._journal(path)):
            return JournalFile(journal, flags)
        if flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_SUPER_JOURNAL):
            raise apsw.CantOpenError(f"{path}: WAL and commits over several databases have no place in an image")
        return super().xOpen(name, flags)

    def xAccess(self, pathname: str, flags: int) -> bool:
        journal = self._journal(pathname)
        return super().xAccess(pathname, flags) if journal is None else journal.size is not None

    def xDelete(self, filename: str, syncdir: bool) -> None:
        journal = self._journal(filename)
        if journal is None:
            super().xDelete(filename, syncdir)
            return
        # This word is the commit: from here on nothing is rolled back.
        journal.resize(None)
        if syncdir:
            journal.flush()


def _patience(timeout_s: float) -> Callable[[int], bool]:
    """A busy handler with random pauses; SQLite's own lets one process win thousands of times while another starves."""
    deadline = 0.0

    def wait(calls: int) -> bool:
        nonlocal deadline
        if calls == 0:
            deadline = time.monotonic() + timeout_s
        time.sleep(random.uniform(0.0001, 0.002))
        return time.monotonic() < deadline

    return wait


# -- restoring -----------------------------------------------------------------------------------------------------


@contextmanager
def at_rest(connection: apsw.Connection) -> Iterator[None]:
    """Hold all writers between two transactions: given as `quiesce=` to a backup, that one needs no journal.

    For who wants to read a backup as it is, or to have it end with a certain transaction.  It waits for the transaction
    under way, and those that want to begin wait for the cut.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def extract(backup: str | os.PathLike[str], database: str | os.PathLike[str]) -> None:
    """Write the database in a backup, and its journal if it has one, as ordinary files for any SQLite.

    Open the database with both in place: SQLite rolls the unfinished commit back.  The database appears last and
    whole.  FileExistsError if it, or a journal or WAL of its name, exists; ImageFormatError.
    """
    source, target = os.fspath(backup), os.fspath(database)
    journal, partial = target + JOURNAL_SUFFIX, target + ".partial"
    for path in (target, journal, target + "-wal"):
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists")
    with open(source, "rb") as file:
        layout = parse_layout(file.read(_HEADER_BYTES), os.fstat(file.fileno()).st_size, source)
        try:
            _extract_file(file, layout.database, partial)
            _extract_file(file, layout.journal, journal)
            os.link(partial, target)
        except BaseException:
            _remove(journal)
            raise
        finally:
            _remove(partial)


def _extract_file(image: IO[bytes], place: Place, path: str) -> None:
    image.seek(place.word)
    left = int.from_bytes(image.read(8), "little") - 1
    if left < 0:
        return
    image.seek(place.offset)
    with open(path, "xb") as file:
        while left > 0:
            data = image.read(min(left, _PIECE_BYTES))
            if not data:
                raise ImageFormatError(f"{image.name}: ends {left} bytes before the end of {path}")
            left -= file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def main() -> None:
    """Command line: create an image, extract a database from a backup."""
    parser = argparse.ArgumentParser(description="A SQLite database in an shmcbw image.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("create", help="create an image")
    command.add_argument("image")
    command.add_argument("--database-capacity", type=int, default=1 << 30, metavar="BYTES")
    command = commands.add_parser("extract", help="get the database out of a backup")
    command.add_argument("backup")
    command.add_argument("database")
    arguments = parser.parse_args()
    if arguments.command == "create":
        create(arguments.image, database_capacity=arguments.database_capacity)
    else:
        extract(arguments.backup, arguments.database)


if __name__ == "__main__":
    main()
