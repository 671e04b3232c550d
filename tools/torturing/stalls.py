"""When the machine stood still: intervals in which even the driver did not come round.

The driver does nothing that takes long, but appends to a file and stores into a mapping beside the images, as
everybody does.  When that takes a second, because a disk is busy or there are many more processes than CPUs, then
nobody else is to blame for a second either.  Instants and durations are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from tools.torturing.place import SharedByte

#: What a turn of the driver may take: aiming spins for 40 ms, a hang is told in 200 ms.
STALL_NS = 300_000_000


class Stalls:
    """The intervals of one round, and the witness of them."""

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self.intervals = [(begin, end) for begin, end in intervals]
        self._seen_ns: int | None = None

    def look(self) -> None:
        """Called in each turn of the driver."""
        now_ns = time.monotonic_ns()
        if self._seen_ns is not None and now_ns - self._seen_ns > STALL_NS:
            self.intervals.append((self._seen_ns, now_ns))
        self._seen_ns = now_ns

    def within(self, begin_ns: int, end_ns: int) -> int:
        """For how long the machine stood still between two instants."""
        return sum(max(0, min(end, end_ns) - max(begin, begin_ns)) for begin, end in self.intervals)

    @property
    def longest_ns(self) -> int:
        return max((end - begin for begin, end in self.intervals), default=0)


class Witness:
    """Does to the images' file system what writers do to it."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"\0")
        self._byte = SharedByte(path)
        self._fd = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def touch(self) -> None:
        self._byte.value = self._byte.value ^ 1
        os.write(self._fd, b".")

    def close(self) -> None:
        self._byte.close()
        os.close(self._fd)
