"""The reader: opens snapshots by the paths of their scratch files, from a process of its own, until it is killed.

It reads each as a whole into a file, and sometimes lets a part of it go.  Whether the coordinator lives, is stopped, is
another one by now or drops the snapshot meanwhile: what was read is of the one instant, or an error says why not.
"""

from __future__ import annotations

import os
import random
import time

import shmcbw
from shmcbw import SnapshotReader
from shmcbw.errors import (
    ClosedError,
    NoCoordinatorError,
    NoSnapshotError,
    SnapshotBrokenError,
    SnapshotInaccessibleError,
)
from shmcbw.snapshots import PARTIAL_SUFFIX
from tools.torturing.place import EventWriter, Place, SharedByte
from tools.torturing.plan import READER, ImagePlan

#: Of one image in one round, by readers and by coordinators: each is judged.
COPIES_MAX = 200
PAUSE_MAX_S = 0.3
DISCARD_CHANCE = 0.15


def copy_snapshot(
    place: Place, plan: ImagePlan, events: EventWriter, snapshot: SnapshotReader, name: str, copy: str
) -> None:
    """Read a whole snapshot into a file, piece by piece, with holes where it is inaccessible, and say so."""
    path = place.reads / copy
    inaccessible: list[tuple[int, int]] = []
    size, cluster = snapshot.size_bytes, plan.cluster_size
    chance = random.Random(f"{plan.seed} {copy}")
    started_ns = time.monotonic_ns()
    try:
        with path.open("wb", buffering=0) as file:
            file.truncate(size)
            offset = 0
            while offset < size:
                length = min(chance.randint(1, 8) * cluster, size - offset)
                _copy_piece(place, plan, snapshot, file.fileno(), offset, length, inaccessible)
                offset += length
    except BaseException:
        path.unlink()
        raise
    events.write("read", name=name, copy=copy, inaccessible=inaccessible, started_ns=started_ns)


def _copy_piece(
    place: Place,
    plan: ImagePlan,
    snapshot: SnapshotReader,
    fd: int,
    offset: int,
    length: int,
    inaccessible: list[tuple[int, int]],
) -> None:
    try:
        data = snapshot.pread(length, offset)
    except SnapshotInaccessibleError:
        cluster = plan.cluster_size
        if length > cluster:
            for at in range(offset, offset + length, cluster):
                _copy_piece(place, plan, snapshot, fd, at, min(cluster, offset + length - at), inaccessible)
        else:
            inaccessible.append((offset, offset + length))
        return
    if "blind" in plan.sabotage:
        with place.image.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
    os.pwrite(fd, data, offset)


class Reader:
    """One incarnation."""

    def __init__(self, place: Place, number: int, incarnation: int) -> None:
        self.plan = ImagePlan.load(place.plan)
        self.place = place
        self.mark = f"reader-{number}-{incarnation}"
        self.chance = random.Random(f"{self.plan.seed} {self.mark}")
        self.events = EventWriter(place.events(READER, number, incarnation))
        self.stop = SharedByte(place.stop)
        self.parent = os.getppid()
        self.copies = place.count_reads("reader")
        self.count = 0

    def read_on(self) -> None:
        while not self.stop.value and os.getppid() == self.parent:
            files = os.listdir(self.place.targets)
            names = [name.removesuffix(PARTIAL_SUFFIX) for name in files if name.startswith("snapshot-")]
            self.events.write("looked", found=len(names))
            if names and self.copies < COPIES_MAX:
                self.read(self.chance.choice(sorted(names)))
            time.sleep(self.chance.random() * PAUSE_MAX_S)

    def read(self, name: str) -> None:
        """Read one, or let a part of it go; it may be dropped at any moment."""
        self.count += 1
        try:
            with shmcbw.open_snapshot(self.place.image, self.place.targets / name) as snapshot:
                if self.chance.random() < DISCARD_CHANCE:
                    self.discard(name, snapshot)
                copy = f"{name}.{self.mark}-{self.count}"
                copy_snapshot(self.place, self.plan, self.events, snapshot, name, copy)
                self.copies += 1
        except SnapshotBrokenError as error:
            self.events.write("broken", name=name, errno=error.errno, cluster=error.cluster)
        except (NoCoordinatorError, NoSnapshotError, ClosedError, FileNotFoundError) as error:
            self.events.write("gone", name=name, error=f"{type(error).__name__}: {error}")

    def discard(self, name: str, snapshot: SnapshotReader) -> None:
        length = int(snapshot.size_bytes * self.chance.random() ** 3) + 1
        offset = self.chance.randrange(snapshot.size_bytes - length + 1)
        self.events.write("discard", name=name, offset=offset, length=length, size=snapshot.size_bytes)
        snapshot.discard(length, offset)


def run(place: Place, number: int, incarnation: int) -> None:
    """The whole life of one incarnation; returns when told to stop or when the parent is gone."""
    Reader(place, number, incarnation).read_on()
