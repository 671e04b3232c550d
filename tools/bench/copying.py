"""Ways to copy 1 MiB chunks into a fresh sparse target: why the workers use pwrite from the mapping.

Each round copies the same image with each way in turn, with the mapping's pages given back before, so that each pays
its own page faults.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

from shmcbw import _core
from tools.bench.figure import Figure, median
from tools.bench.place import make_image, workspace
from tools.bench.plan import Plan

NAME = "copying"
CHUNK = 1 << 20
MADV_POPULATE_WRITE = 23

Way = Callable[[int, int], None]


class _Source:
    def __init__(self, path: Path, size_bytes: int) -> None:
        make_image(path, size_bytes)
        self.fd = os.open(path, os.O_RDWR)
        self.size_bytes = size_bytes
        self.memory = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self.memory)
        self.buffer = memoryview(bytearray(CHUNK))

    def ways(self) -> dict[str, Way]:
        """What copies CHUNK bytes at an offset to a descriptor, by name; the first is what the workers do."""
        return {
            "pwrite from the mapping, with the zero test": self._pwrite_tested,
            "pwrite from the mapping": self._pwrite,
            "copy_file_range": self._copy_file_range,
            "pread and pwrite": self._read_write,
            "mapped stores, pages populated": self._mapped,
        }

    def _pwrite_tested(self, fd: int, offset: int) -> None:
        for cluster in range(offset, offset + CHUNK, 65536):
            _core.is_zero(self.memory, cluster, 65536)
        self._pwrite(fd, offset)

    def _pwrite(self, fd: int, offset: int) -> None:
        os.pwrite(fd, self.view[offset : offset + CHUNK], offset)

    def _copy_file_range(self, fd: int, offset: int) -> None:
        done = 0
        while done < CHUNK:
            done += os.copy_file_range(self.fd, fd, CHUNK - done, offset + done, offset + done)

    def _read_write(self, fd: int, offset: int) -> None:
        os.preadv(self.fd, [self.buffer], offset)
        os.pwrite(fd, self.buffer, offset)

    def _mapped(self, fd: int, offset: int) -> None:
        with mmap.mmap(fd, CHUNK, offset=offset) as target:
            address = ctypes.addressof(ctypes.c_char.from_buffer(target))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(CHUNK), MADV_POPULATE_WRITE)
            _core.copy(target, 0, self.memory, offset, CHUNK)


def measure(plan: Plan) -> list[Figure]:
    """Time for the whole image, each way, on disk and on tmpfs; pwrite is the measure of the others."""
    size_bytes = (64 if plan.quick else 256) << 20
    figures = []
    for place in plan.places:
        with workspace(place) as directory:
            source = _Source(directory / "source", size_bytes)
            ways = source.ways()
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(3 if plan.quick else 7):
                for name, way in ways.items():
                    times[name].append(_once(source, way, directory / "target"))
            base = next(iter(ways))
            figures += [
                Figure(NAME, f"{place.name}: {name}", "ns", median(found), other=base, other_value=median(times[base]))
                for name, found in times.items()
            ]
            os.close(source.fd)
    return figures


def _once(source: _Source, way: Way, target: Path) -> float:
    source.memory.madvise(mmap.MADV_DONTNEED)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, source.size_bytes)
    started = time.perf_counter_ns()
    for offset in range(0, source.size_bytes, CHUNK):
        way(fd, offset)
    taken = time.perf_counter_ns() - started
    os.close(fd)
    target.unlink()
    return taken
