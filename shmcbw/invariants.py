"""The executable check: what of the invariants can be seen from outside, on a live segment.

It reads only, so it may run at any time beside everything else.  What is allowed for a moment (a dead process that is
not reaped yet) counts as a violation only if it is still there after `SETTLE_S`.

    I1  a cluster marked after a snapshot's cut has its byte >= COPIED in that snapshot
    I2  an active snapshot's target is there, is the file it was, and is as large as the image
    I3  a byte in 1..239 names a living worker
    I4  bytes, states, and in-flight marks have values that their writers store
    I5  the epoch is not odd beyond the drained section's deadline
    I6  no cluster is marked with a later epoch than the current one
    I7  is about what readers do with what they read: nothing of it can be seen in the segment
    I8  somebody owns the segment, and every used slot and worker entry has a living owner
    I9  the group of an active or complete snapshot is decided: it counts
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import _core, states
from .bitmap import COPIED, ZERO, Bitmap
from .epochs import epoch
from .groups import counts
from .image import Identity
from .layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Worker
from .segment import COORDINATOR, Segment, slot_byte, worker_byte
from .snapshots import state_of, target_path

SETTLE_S = 1.5


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant ("I1".."I9") and what was found."""

    invariant: str
    found: str


def check(segment: Segment, settle_s: float = SETTLE_S) -> list[Violation]:
    """The violations that are there for ``settle_s`` seconds; an empty list is good.  Blocks that long at most."""
    deadline = time.monotonic() + settle_s
    found = _look(segment)
    while found and time.monotonic() < deadline:
        time.sleep(0.05)
        again = _look(segment)
        found = [violation for violation in found if violation in again]
    return found


def _look(segment: Segment) -> list[Violation]:
    rules: list[Callable[[Segment], Iterator[Violation]]] = [_epoch, _owners, _snapshots]
    return [violation for rule in rules for violation in rule(segment)]


def _epoch(segment: Segment) -> Iterator[Violation]:
    now = epoch(segment)
    deadline = segment.header(Header.drain_deadline_ns)
    if now % 2 and time.monotonic_ns() > deadline and epoch(segment) == now:
        yield Violation("I5", f"epoch {now} is odd, its drained section is over")
    geometry = segment.geometry
    # With every byte PENDING, "uncopied after epoch e" is "marked after epoch e".
    nothing_copied = bytearray(geometry.clusters)
    later = _core.find_uncopied(segment.memory, geometry.epoch_map_offset, nothing_copied, geometry.clusters, now | 1)
    if later is not None and epoch(segment) | 1 == now | 1:
        yield Violation("I6", f"cluster {later} is marked later than the epoch {now}")


def _owners(segment: Segment) -> Iterator[Violation]:
    geometry = segment.geometry
    if not segment.locked(COORDINATOR) and segment.header(Header.coordinator_pid) != os.getpid():
        yield Violation("I8", "no coordinator owns the segment")
    for slot in range(geometry.slot_count):
        pid, in_flight = segment.slot(slot, Slot.pid), segment.slot(slot, Slot.in_flight)
        if in_flight > 1:
            yield Violation("I4", f"slot {slot}: in-flight mark {in_flight}")
        if (pid or in_flight) and not segment.locked(slot_byte(slot)):
            yield Violation("I8", f"slot {slot} of pid {pid} has no living owner")
    for worker_id in range(1, geometry.worker_count + 1):
        pid = segment.worker(worker_id, Worker.pid)
        if segment.worker(worker_id, Worker.state) > 3:
            yield Violation("I4", f"worker {worker_id}: unknown state")
        if pid and not segment.locked(worker_byte(worker_id)):
            yield Violation("I8", f"worker {worker_id} of pid {pid} is dead")


def _snapshots(segment: Segment) -> Iterator[Violation]:
    for index in range(SNAPSHOT_COUNT):
        state = state_of(segment, index)
        if state not in states.NAMES:
            yield Violation("I4", f"snapshot {index}: unknown state {state}")
        elif state in states.LIVE:
            yield from _live(segment, index)
        if state in (states.ACTIVE, states.COMPLETE) and not counts(segment, index):
            yield Violation("I9", f"snapshot {index}: its group is not committed")


def _live(segment: Segment, index: int) -> Iterator[Violation]:
    geometry = segment.geometry
    serial = segment.snapshot(index, Snapshot.serial)
    try:
        bitmap = Bitmap.attach(segment, serial)
    except OSError as error:
        yield Violation("I2", f"snapshot {index}: no bitmap ({error.strerror})")
        return
    try:
        cut = segment.snapshot(index, Snapshot.cut_epoch)
        lost = _core.find_uncopied(segment.memory, geometry.epoch_map_offset, bitmap.memory, geometry.clusters, cut)
        if lost is not None and state_of(segment, index) == states.ACTIVE:
            # Of one that follows, what is not copied yet is in the snapshot that it follows.
            yield Violation("I1", f"snapshot {index}: cluster {lost} was written and not copied")
        histogram = _core.histogram(bitmap.memory, 0, geometry.clusters)
        for value in range(1, COPIED):
            dead = value > geometry.worker_count or not segment.locked(worker_byte(value))
            if histogram[value] and dead:
                yield Violation("I3", f"snapshot {index}: {histogram[value]} clusters claimed by dead worker {value}")
        if sum(histogram[ZERO + 1 :]):
            yield Violation("I4", f"snapshot {index}: {sum(histogram[ZERO + 1 :])} bytes of no known state")
    finally:
        bitmap.close()
    yield from _target(segment, index)


def _target(segment: Segment, index: int) -> Iterator[Violation]:
    path = target_path(segment, index)
    expected = Identity(segment.snapshot(index, Snapshot.target_device), segment.snapshot(index, Snapshot.target_inode))
    try:
        status = os.stat(path)
    except OSError as error:
        if state_of(segment, index) in states.LIVE:
            yield Violation("I2", f"snapshot {index}: target {path}: {error.strerror}")
        return
    if not stat.S_ISREG(status.st_mode) or Identity.of(status) != expected:
        yield Violation("I2", f"snapshot {index}: target {path} is another file now")
    elif status.st_size != segment.geometry.image_size:
        yield Violation("I2", f"snapshot {index}: target {path} has {status.st_size} bytes")
