"""Where a round keeps its files: one directory per image, and the logs of events in it.

plan.json            the image's plan
disk.img             the image
stage, orders        one byte each, mapped: what the coordinator is doing; what it is to do
wish                 one byte, mapped: what the coordinator is asked for
stop                 one byte, mapped: the writers are to leave
writer-N.log         stamps.LogWriter; .refused: the sequences of writes that were refused, 8 bytes each
ROLE-N-K.jsonl       what the coordinator or reader N of incarnation K did, a JSON object a line, each by one write
fates.json           who was killed and stopped when
qmp.sock             a daemon's
targets/             backups and scratch files;   reads/   what was read of snapshots
ROLE-N-K.err         what a process said on stderr
"""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

#: Bytes of `stage`.
AWAY, STARTING, IDLE, CUTTING, DROPPING, CLOSING, GROUPING, RESIZING = range(8)
#: Bytes of `orders`.
GO_ON, CLOSE_NOW, FINISH = range(3)
#: Bytes of `wish`.
NOTHING, A_GROUP, A_RESIZE = range(3)


class Place:
    """The directory of one image of a round."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = directory / "disk.img"
        self.plan = directory / "plan.json"
        self.fates = directory / "fates.json"
        self.targets = directory / "targets"
        self.reads = directory / "reads"
        self.stage = directory / "stage"
        self.orders = directory / "orders"
        self.wish = directory / "wish"
        self.stop = directory / "stop"
        self.qmp = directory / "qmp.sock"

    def make(self) -> None:
        for directory in (self.directory, self.targets, self.reads):
            directory.mkdir(parents=True)
        for path in (self.stage, self.orders, self.wish, self.stop):
            path.write_bytes(b"\0")

    def count_reads(self, by: str) -> int:
        """How many copies of snapshots there are, made by coordinators ("read") or readers ("reader")."""
        return sum(f".{by}-" in name for name in os.listdir(self.reads))

    def log(self, writer: int) -> Path:
        return self.directory / f"writer-{writer}.log"

    def refused(self, writer: int) -> Path:
        return self.directory / f"writer-{writer}.refused"

    def events(self, role: str, number: int, incarnation: int) -> Path:
        return self.directory / f"{role}-{number}-{incarnation}.jsonl"

    def said(self, role: str, number: int, incarnation: int) -> Path:
        return self.directory / f"{role}-{number}-{incarnation}.err"


class SharedByte:
    """A mapped file of one byte."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 1)

    @property
    def value(self) -> int:
        return self._memory[0]

    @value.setter
    def value(self, value: int) -> None:
        self._memory[0] = value

    def close(self) -> None:
        self._memory.close()


class EventWriter:
    """Appends to a log of events; a killed process loses nothing that it has written."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, event: str, **details: Any) -> None:
        record = {"ns": time.monotonic_ns(), "event": event, **details}
        os.write(self._fd, json.dumps(record).encode() + b"\n")


class EventReader:
    """Follows a log of events that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The events that are new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
