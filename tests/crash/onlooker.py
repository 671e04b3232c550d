"""Who only looks at the shared memory while somebody scribbles on it: status, check and the snapshots, in turn.

Each look ends in an answer or in an error that says so; what a snapshot shows is of the source or of the target.
"""

from __future__ import annotations

import io
import json
import os
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import shmcbw
from shmcbw.cli import main
from shmcbw.errors import ShmcbwError
from tests.processes import limit_address_space

BLOCK = 4096
#: What writers write begins with a number that is smaller.
COUNT_MAX = 1 << 40
PIECE_MAX = 1 << 18


def look_forever(path: str, content: str, seed: str, limit_bytes: int) -> None:
    """Look until killed; ends when its parent does.  content: a file with what the image had at first."""
    limit_address_space(limit_bytes)
    parent = os.getppid()
    before = Path(content).read_bytes()
    chance = random.Random(seed)
    while os.getppid() == parent:
        told = ask("status", path, "--json")
        for command in (("status", path), ("status",), ("status", "--json"), ("check", path)):
            ask(*command)
        serials = [each["serial"] for each in json.loads(told)["snapshots"]] if told else []
        for serial in [None, *serials]:
            try:
                with shmcbw.open_snapshot(path, serial) as snapshot:
                    read(snapshot, before, chance)
            except (ShmcbwError, OSError):
                continue


def ask(*command: str) -> str:
    """What the command line answers; empty if that is an error, which must be one that was thought of."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(command)
    assert (status == 0) <= (err.getvalue() == ""), (command, status, err.getvalue())
    return out.getvalue() if status == 0 else ""


def read(snapshot: shmcbw.SnapshotReader, before: bytes, chance: random.Random) -> None:
    """Read some of a snapshot, and where it has data."""
    offset = chance.randrange(len(before))
    count = min(chance.randrange(PIECE_MAX), len(before) - offset)
    extents = snapshot.block_status(count, offset)
    assert sum(extent.length for extent in extents) == count
    data = snapshot.pread_some(count, offset)
    assert len(data) <= count
    for place in range(-offset % BLOCK, len(data) - BLOCK + 1, BLOCK):
        assert is_of_image(data[place : place + BLOCK], before[offset + place : offset + place + BLOCK]), (
            f"bytes {offset + place}.. are neither of the source nor of the target"
        )


def is_of_image(block: bytes, before: bytes) -> bool:
    """Whether each word is what was there first, a writer's number, or a hole's zero."""
    if block in (before, bytes(BLOCK)):
        return True
    words = ((block[i : i + 8], before[i : i + 8]) for i in range(0, BLOCK, 8))
    return all(word == old or int.from_bytes(word, "little") < COUNT_MAX for word, old in words)
