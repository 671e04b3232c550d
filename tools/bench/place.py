"""Where is measured: a directory on disk and one on tmpfs, both empty afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TMPFS = Path("/dev/shm")
RESERVE_BYTES = 256 << 20
_BLOCK = 1 << 20
_REMOVE_TRIES = 20
_REMOVE_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Place:
    """A directory with a name for the table."""

    name: str
    directory: Path
    file_system: str

    @property
    def free_bytes(self) -> int:
        """What we may use of it."""
        space = os.statvfs(self.directory)
        return max(0, space.f_bavail * space.f_frsize - RESERVE_BYTES)


def find_places(directory: Path) -> list[Place]:
    """The place that was asked for, and tmpfs unless that is the same file system."""
    kind = file_system(directory)
    places = [Place("tmpfs" if kind == "tmpfs" else "disk", directory, kind)]
    if TMPFS.is_dir() and TMPFS.stat().st_dev != directory.stat().st_dev:
        places.append(Place("tmpfs", TMPFS, file_system(TMPFS)))
    return places


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on, as the kernel calls it."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0]
    return "unknown"


@contextmanager
def workspace(place: Place) -> Iterator[Path]:
    """A new directory there that is gone afterwards, whatever happened."""
    directory = Path(tempfile.mkdtemp(prefix="cbw-bench-", dir=place.directory))
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a directory that a process that is just ending may still write to."""
    for _ in range(_REMOVE_TRIES):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(_REMOVE_PAUSE_S)
    shutil.rmtree(directory)


def make_image(path: Path, size_bytes: int) -> None:
    """A file of bytes that no two clusters share, none of them zero, written out."""
    block = bytearray(os.urandom(_BLOCK))
    with path.open("wb") as file:
        for offset in range(0, size_bytes, _BLOCK):
            for inner in range(0, _BLOCK, 4096):
                block[inner : inner + 8] = (offset + inner + 1).to_bytes(8, "little")
            file.write(block[: size_bytes - offset])
        file.flush()
        os.fdatasync(file.fileno())


def make_sparse(path: Path, size_bytes: int) -> None:
    """An image that is one hole."""
    with path.open("wb") as file:
        file.truncate(size_bytes)


def allocated_bytes(path: Path) -> int:
    """What a file has of its file system, holes left out."""
    return path.stat().st_blocks * 512
