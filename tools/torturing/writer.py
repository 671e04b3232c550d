"""The writer: random units of its own, as data, zeroes or discards, every one stamped and logged, until it is killed.

Each incarnation goes on in its writer's log; the stamps' epoch says which one a write is from.  A write that was
refused (policy break-guest-write) must not be there: its sequence goes to a file beside the log.
"""

from __future__ import annotations

import os
import random
import time

import shmcbw
from shmcbw.errors import CopyFailedError, CopyTimeoutError, NoCoordinatorError
from shmcbw.workers.stamps import DATA, ZERO, LogWriter, Unit, make_unit
from tools.torturing.place import Place, SharedByte
from tools.torturing.plan import ImagePlan

OPEN_PAUSE_S = 0.005
PAUSE_MAX_S = 0.010


class Writer:
    """One incarnation."""

    def __init__(self, place: Place, number: int, incarnation: int) -> None:
        self.plan = ImagePlan.load(place.plan)
        self.place = place
        self.number = number
        self.incarnation = incarnation
        self.chance = random.Random(f"{self.plan.seed} writer {number} {incarnation}")
        self.layout = self.plan.layout
        self.units = self.layout.units_of(number)
        self.stop = SharedByte(place.stop)
        self.parent = os.getppid()
        self.log = LogWriter(place.log(number))
        self.size_bytes = self.layout.size_bytes
        self.latest: tuple[int, bytes] | None = None

    def wanted(self) -> bool:
        """Whether to go on: nobody said stop, and the parent lives."""
        return not self.stop.value and os.getppid() == self.parent

    def open(self) -> shmcbw.Disk | None:
        """The disk, as soon as there is a coordinator; None when told to stop before."""
        while self.wanted():
            try:
                return shmcbw.open(self.place.image)
            except NoCoordinatorError:
                time.sleep(OPEN_PAUSE_S)
        return None

    def write_on(self, disk: shmcbw.Disk) -> None:
        writes = 0
        while self.wanted():
            started = time.monotonic()
            self.follow_size(disk)
            unit = self.chance.choice(self.units)
            try:
                self.write(disk, unit)
            except (CopyFailedError, CopyTimeoutError):
                self.refuse()
            writes += 1
            if "sleep" in self.plan.sabotage and self.number == 0 and writes == 20:
                while self.wanted():
                    time.sleep(PAUSE_MAX_S)
            pause = (time.monotonic() - started) * (1 / self.plan.share - 1)
            if pause > 0:
                time.sleep(min(pause, PAUSE_MAX_S))

    def follow_size(self, disk: shmcbw.Disk) -> None:
        """An image that has grown has more units."""
        if len(self.plan.sizes) > 1 and disk.size_bytes != self.size_bytes:
            self.size_bytes = disk.size_bytes
            units = self.layout.units_of(self.number)
            self.units = [unit for unit in units if unit.offset + unit.length <= self.size_bytes]

    def write(self, disk: shmcbw.Disk, unit: Unit) -> None:
        """One random operation on a unit."""
        kind = self.chance.choices(("data", "unchanged", "again", "zeroes", "discard", "flush"), (75, 4, 6, 7, 7, 1))[0]
        if kind == "flush":
            disk.flush()
        elif kind == "again":
            # What is there already: changes nothing, so there is nothing to log.
            if self.latest is not None:
                disk.pwrite(self.latest[1], self.latest[0], unchanged=True)
        elif kind in ("zeroes", "discard"):
            self.latest = None
            self.log.begin(unit, ZERO, self.incarnation)
            if kind == "zeroes":
                disk.pwrite_zeroes(unit.length, unit.offset)
            else:
                disk.pdiscard(unit.length, unit.offset)
            self.log.end()
        else:
            data = make_unit(self.layout, unit, self.log.sequence, self.incarnation)
            self.latest = None
            self.log.begin(unit, DATA, self.incarnation)
            if "bypass" in self.plan.sabotage and self.number == 0 and self.chance.random() < 0.5:
                with self.place.image.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), data, unit.offset)
            else:
                disk.pwrite(data, unit.offset, unchanged=kind == "unchanged")
            self.log.end()
            self.latest = (unit.offset, data)

    def refuse(self) -> None:
        """The write that was begun last has not happened."""
        self.latest = None
        with self.place.refused(self.number).open("ab", buffering=0) as file:
            file.write((self.log.sequence - 1).to_bytes(8, "little"))


def run(place: Place, number: int, incarnation: int) -> None:
    """The whole life of one incarnation; returns when told to stop or when the parent is gone."""
    writer = Writer(place, number, incarnation)
    disk = writer.open()
    if disk is not None:
        with disk:
            writer.write_on(disk)
    writer.log.close()
