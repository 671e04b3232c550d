"""What the tests of increments share: writes from a seed, and what is true of a chain of backups at any moment."""

from __future__ import annotations

import random
from pathlib import Path

import shmcbw
from shmcbw.cli import main
from shmcbw.errors import ManifestError
from shmcbw.workers.manifest import PARTIAL_SUFFIX
from shmcbw.workers.verify import verify


def change(disk: shmcbw.Disk, chance: random.Random, count: int) -> None:
    """Random writes, zeroes and discards, of any alignment."""
    for _ in range(count):
        length = chance.choice((1, 512, 4096, 70_000, 200_000))
        offset = chance.randrange(disk.size_bytes - length)
        action = chance.randrange(4)
        if action == 0:
            disk.pwrite_zeroes(length, offset)
        elif action == 1:
            disk.pdiscard(length, offset)
        else:
            disk.pwrite(chance.randbytes(length), offset)


def restored(chain: list[Path], out: Path) -> bytes:
    """What the command line restores from a chain."""
    assert main(["restore", *map(str, chain), str(out)]) == 0
    content = out.read_bytes()
    out.unlink()
    return content


def assert_never_wrong(directory: Path) -> None:
    """Whatever has died: what has a manifest that can be used is, to the last byte, what that says."""
    for target in directory.iterdir():
        if target.name.endswith((".shmcbw", PARTIAL_SUFFIX)) or target.suffix == ".img":
            continue
        try:
            assert verify(str(target)).differing_bytes == 0
        except ManifestError:
            # Unfinished, and said so.
            assert (directory / (target.name + ".shmcbw")).exists()


def exit_status(*arguments: str | Path) -> int:
    """Of a command that must fail."""
    status = main([str(argument) for argument in arguments])
    assert status != 0
    return status
