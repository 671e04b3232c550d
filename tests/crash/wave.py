"""A writer whose order shows every instant: ``python -m tests.crash.wave IMAGE CONTROL NUMBER``.

It writes n to its first place, then to its second, … to its last, then n + 1 to its first again.  So at any instant no
place is ahead of one before it, and the last is at most one behind the first: a *wave*.  Each place is in a cluster of
its own.  A block holds its number at its beginning and at its end, and a writer killed between the halves of a store
leaves them different; the halves are in order too.  After each wave comes a write of what is there (``unchanged``).
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import shmcbw

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = 65_536
BLOCK = 4096
WIDTH = 24
WRITERS = 2

PAUSE, RUN, LEAVE = range(3)
_MODE, _COUNT, _PAUSED = 0, 1, 1 + WRITERS


class Control:
    """Words in a file that test and writers share; each has one writer."""

    def __init__(self, path: Path | str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8 * (1 + 2 * WRITERS))
        self._words = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls, path: Path) -> Control:
        path.write_bytes(bytes(8 * (1 + 2 * WRITERS)))
        return cls(path)

    @property
    def mode(self) -> int:
        """What the writers are to do; the test writes it."""
        return self._words[_MODE] & 3

    @mode.setter
    def mode(self, mode: int) -> None:
        # With a number of its own, so that an old acknowledgement is none.
        self._words[_MODE] = (self._words[_MODE] >> 2) + 1 << 2 | mode

    def acknowledge(self, number: int) -> None:
        """The writer stands still for this order."""
        self._words[_PAUSED + number] = self._words[_MODE] >> 2

    def paused(self, number: int) -> bool:
        return self._words[_PAUSED + number] == self._words[_MODE] >> 2

    def count(self, number: int) -> int:
        """How many writes this writer has done; it writes it."""
        return self._words[_COUNT + number]

    def add(self, number: int) -> None:
        self._words[_COUNT + number] += 1

    def close(self) -> None:
        self._words.release()
        self._memory.close()


def places(number: int) -> list[int]:
    """The offsets of a writer's blocks, in order."""
    return [(number * WIDTH + index) * CLUSTER + 8192 for index in range(WIDTH)]


def halves(image: bytes, number: int) -> list[int]:
    """The numbers at the beginning and the end of each of its blocks, in the order of writing."""
    found = []
    for offset in places(number):
        for place in (offset, offset + BLOCK - 8):
            found.append(int.from_bytes(image[place : place + 8], "little"))
    return found


def is_one_instant(image: bytes) -> bool:
    """Whether the content is what it was at one instant, for all that one writer's order says."""
    for number in range(WRITERS):
        values = halves(image, number)
        if values != sorted(values, reverse=True) or values[-1] < values[0] - 1:
            return False
    return True


def start(image: Path, control: Path, number: int) -> subprocess.Popen[bytes]:
    """A writer process that looks at the segment's failpoints; a number that is nobody's comes and goes at once."""
    command = [sys.executable, "-m", "tests.crash.wave", str(image), str(control), str(number)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SHMCBW_FAILPOINTS": "segment"})


def write_on(disk: shmcbw.Disk, control: Control, number: int) -> None:
    """Until told to leave; goes on where an earlier writer of this number died."""
    parent = os.getppid()
    offsets = places(number)
    before = halves(disk.pread(disk.size_bytes, 0), number)
    # The first place that is behind, or half written, comes next.
    behind = [index for index in range(WIDTH) if before[2 * index + 1] < before[0]]
    index, value = (behind[0], before[0]) if behind else (0, before[0] + 1)
    while control.mode != LEAVE and os.getppid() == parent:
        if control.mode == PAUSE:
            control.acknowledge(number)
            time.sleep(0.001)
            continue
        disk.pwrite(value.to_bytes(8, "little") * (BLOCK // 8), offsets[index])
        control.add(number)
        index += 1
        if index == WIDTH:
            disk.pwrite(value.to_bytes(8, "little") * (BLOCK // 8), offsets[-1], unchanged=True)
            index, value = 0, value + 1


def main(image: str, control: str, number: int) -> None:
    with shmcbw.open(image) as disk:
        if number < WRITERS:
            write_on(disk, Control(control), number)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
