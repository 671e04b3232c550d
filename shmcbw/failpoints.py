"""Failpoints: named places in every protocol where a test can kill, stop, delay, or make a call fail.

Off, a point costs one load and a branch that is always predicted (on the write path: one load a write).  A process
looks at failpoints only if its environment says so, so nobody who can write the segment can stop a process that runs
for real:

    SHMCBW_FAILPOINTS=segment      armed by `arm`, in the segment, for all such processes of an image
    SHMCBW_FAILPOINTS="worker.claimed=kill,writer.stored=delay:50,worker.copying=errno:ENOSPC@3"    for this one

``@N`` skips the first N times; ``*N`` acts N times only (kill and stop: once is enough).  ``delay`` is in
milliseconds.  Names are "process.step": the step just done.  DESIGN.md's protocol tables show them in place.

A word: action 8 bits | argument 24 | skip 16 | times 16 (0: always).  Whoever arms writes it; whoever reaches the point
counts it down, by compare-and-swap.
"""

from __future__ import annotations

import errno
import os

from . import _core
from .layout import FAILPOINT_COUNT, Header

# typing takes as long to import as all the rest of what a writer imports; type checkers take this name for True.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    Table = tuple[Buffer, int]

KILL, STOP, DELAY, ERRNO = 1, 2, 3, 4
ACTIONS = {"kill": KILL, "stop": STOP, "delay": DELAY, "errno": ERRNO}
ENVIRONMENT = "SHMCBW_FAILPOINTS"


class Failpoint:
    """A name, the protocol it belongs to, and what has just happened when it is reached."""

    def __init__(self, name: str, protocol: str, step: str) -> None:
        self.name = name
        self.protocol = protocol
        self.step = step


#: The first ones are reached in the core, whose enum (filter.c) has them in this order.
POINTS = (
    Failpoint("writer.marked", "write", "1: the slot is marked in flight"),
    Failpoint("writer.epoch", "write", "2: the epoch was read and is even"),
    Failpoint("writer.looked", "write", "4: every byte was found at COPIED"),
    Failpoint("writer.left", "write", "4: out of flight, nothing wanted yet"),
    Failpoint("writer.wanted", "write", "4: the want is published"),
    Failpoint("writer.asleep", "write", "4: about to sleep"),
    Failpoint("writer.ready", "write", "4: the wait is over, the want withdrawn"),
    Failpoint("writer.map_marked", "write", "5: the epoch map is marked"),
    Failpoint("writer.compared", "write", "6: an unchanged write was compared, the mark still set"),
    Failpoint("writer.half_stored", "write", "6: half of the data is stored"),
    Failpoint("writer.stored", "write", "6: the data is stored, the mark still set"),
    Failpoint("writer.gated", "gate", "the epoch was odd, the mark is cleared"),
    Failpoint("gate.entries", "gate", "a waiter has abandoned the entries, not yet the epoch"),
    Failpoint("gate.opened", "gate", "a waiter has made the epoch even"),
    Failpoint("break.error", "break", "the sticky error is stored, not yet the state"),
    Failpoint("break.state", "break", "the state is BROKEN, the write not yet released"),
    Failpoint("slot.locked", "attach", "a slot's lock is taken, its words not yet cleared"),
    Failpoint("slot.taken", "attach", "a slot has its owner's pid"),
    Failpoint("slot.cleared", "leave", "a slot's words are cleared, its lock not yet given back"),
    Failpoint("retire.marked", "leave", "the segment is marked retired, its locks not yet looked at"),
    Failpoint("retire.names", "leave", "semaphores and bitmaps are unlinked, the control segment not yet"),
    Failpoint("create.allocated", "create", "the control segment has its name and its space, no owner yet"),
    Failpoint("create.owned", "create", "its coordinator's lock is taken"),
    Failpoint("create.semaphores", "create", "the semaphores are made"),
    Failpoint("create.header", "create", "the header is filled in, but for the magic"),
    Failpoint("worker.locked", "start", "a worker has the lock of its id, its entry is not filled in"),
    Failpoint("worker.serving", "start", "its entry is filled in, it serves"),
    Failpoint("worker.left", "start", "it has left: its entry is cleared, its lock not yet given back"),
    Failpoint("worker.opened", "prepare", "a target is open, not yet acknowledged"),
    Failpoint("worker.acknowledged", "prepare", "a target is acknowledged"),
    Failpoint("worker.claimed", "copy", "clusters are claimed for a writer"),
    Failpoint("worker.background", "copy", "clusters are claimed in the background"),
    Failpoint("worker.copying", "copy", "about to write a run to the target"),
    Failpoint("worker.copied", "copy", "a run is in the target, not yet published"),
    Failpoint("worker.published", "copy", "published, nobody woken yet"),
    Failpoint("worker.woke", "copy", "whoever waited is woken"),
    Failpoint("worker.failed", "copy", "a failed copy's claims are returned, its error not delivered"),
    Failpoint("worker.delivered", "copy", "the error is delivered, its writer not yet woken"),
    Failpoint("worker.asleep", "copy", "there is nothing to do: about to sleep"),
    Failpoint("coordinator.creating", "prepare", "the entry is CREATING: it names the target"),
    Failpoint("increment.held", "increment", "the dirty bitmap is in use, there is no target yet"),
    Failpoint("coordinator.target", "prepare", "the target is created"),
    Failpoint("coordinator.bitmap", "prepare", "the bitmap is created"),
    Failpoint("coordinator.preparing", "prepare", "the entry is PREPARING"),
    Failpoint("coordinator.prepared", "cut", "the entry is PREPARED"),
    Failpoint("coordinator.odd", "cut", "the epoch is odd"),
    Failpoint("coordinator.quiet", "cut", "no slot is in flight"),
    Failpoint("coordinator.published", "cut", "the entry is ACTIVE, the epoch odd"),
    Failpoint("coordinator.even", "cut", "the epoch is even again, the gated not woken"),
    Failpoint("coordinator.group_closed_one", "group cut", "an image is closed, the next not yet"),
    Failpoint("coordinator.group_published_one", "group cut", "a snapshot is ACTIVE, the next not yet"),
    Failpoint("coordinator.group_published", "group cut", "all snapshots are ACTIVE, the group not committed"),
    Failpoint("coordinator.group_committed", "group cut", "the leader's word says committed, no other one"),
    Failpoint("coordinator.group_told_one", "group cut", "a member's word says so too, the next not yet"),
    Failpoint("coordinator.group_opened_one", "group cut", "an image is open again, the next not yet"),
    Failpoint("coordinator.reaping", "death", "a dead worker's lock is taken, its claims not yet returned"),
    Failpoint("coordinator.reaped", "death", "a dead worker's claims are returned, not yet its id"),
    Failpoint("coordinator.spawned", "death", "a worker's process is started"),
    Failpoint(
        "increment.filtered", "increment", "what is not in the dirty bitmap is SKIPPED, no background copying yet"
    ),
    Failpoint("coordinator.complete", "finish", "the entry is COMPLETE"),
    Failpoint("increment.sealed", "increment", "the manifest is whole and synced, under its working name"),
    Failpoint("coordinator.synced", "finish", "the target is synced"),
    Failpoint("target.manifest", "increment", "the manifest has its name, the target has not"),
    Failpoint("coordinator.named", "finish", "the target has its name"),
    Failpoint("coordinator.removed", "drop", "an unfinished target is removed, its entry still there"),
    Failpoint("coordinator.freed", "finish", "the entry is FREE, its bitmap's name still there"),
    Failpoint("journal.written", "journal", "the new journal is written under its temporary name"),
    Failpoint("journal.renamed", "journal", "the new journal has taken the old one's place"),
    Failpoint("adopt.locked", "adoption", "the dead coordinator's lock is taken"),
    Failpoint("adopt.opened", "adoption", "the epoch is even"),
    Failpoint("adopt.slots", "adoption", "the slots of dead writers are cleared"),
    Failpoint("adopt.claims", "adoption", "the claims of dead workers are returned"),
    Failpoint("adopt.groups", "adoption", "leaders are asked, or members told, of committed groups"),
    Failpoint("adopt.entry", "adoption", "one snapshot is adopted"),
    Failpoint("adopt.generation", "adoption", "the pool's generation is raised"),
    Failpoint("resize.announced", "resize", "the workers are gone, the new size is announced"),
    Failpoint("resize.allocated", "resize", "the control segment is larger"),
    Failpoint("resize.grown", "resize", "the image is larger"),
    Failpoint("resize.committed", "resize", "the new size counts, it is still announced"),
    Failpoint("reader.looked", "read", "the cluster's byte was looked at"),
    Failpoint("reader.read", "read", "source or target was read, the second look not yet taken"),
    Failpoint("reader.discard", "discard", "a run of clusters was looked at, not yet let go"),
)

_INDEX = {point.name: index for index, point in enumerate(POINTS)}
assert len(POINTS) <= FAILPOINT_COUNT


def index_of(name: str) -> int:
    """The number of a failpoint; ValueError if there is none of that name."""
    try:
        return _INDEX[name]
    except KeyError:
        raise ValueError(f"no failpoint is called {name!r}; `shmcbw failpoints` lists them") from None


def encode(specification: str) -> int:
    """The word of ``kill``, ``stop``, ``delay:MS`` or ``errno:NAME``, with ``@SKIP`` and ``*TIMES``."""
    text, _, times = specification.partition("*")
    text, _, skip = text.partition("@")
    action, _, argument = text.partition(":")
    if action not in ACTIONS:
        raise ValueError(f"{specification!r}: the action is none of {', '.join(ACTIONS)}")
    value = 0
    if action == "errno":
        value = getattr(errno, argument, 0)
        if not value:
            raise ValueError(f"{specification!r}: {argument!r} is not the name of an errno")
    elif action == "delay":
        value = int(argument)
    counts = [int(number or 0) for number in (skip, times)]
    if not 0 <= value < 1 << 24 or not all(0 <= count < 1 << 16 for count in counts):
        raise ValueError(f"{specification!r}: a number is out of range")
    return ACTIONS[action] | value << 8 | counts[0] << 32 | counts[1] << 48


def arm(memory: Buffer, name: str, specification: str) -> None:
    """Arm a point in a mapped control segment, for processes that look there; an empty specification disarms it."""
    word = encode(specification) if specification else 0
    base = Header.failpoints.offset
    _core.store_u64(memory, base + 8 * (1 + index_of(name)), word)
    # The first word says whether any point is armed.
    armed = any(_core.load_u64(memory, base + 8 * (1 + index)) for index in range(len(POINTS)))
    _core.store_u64(memory, base, int(armed))


def disarm_all(memory: Buffer) -> None:
    for point in POINTS:
        arm(memory, point.name, "")


_private: dict[str, bytearray] = {}


def table(memory: Buffer) -> Table:
    """Where this process looks for armed failpoints; ValueError if its environment makes no sense."""
    value = os.environ.get(ENVIRONMENT, "")
    if value == "segment":
        return memory, Header.failpoints.offset
    # One for the process, so that the Nth call is the Nth, whatever handles it comes through.
    private = _private.get(value)
    if private is None:
        private = bytearray(Header.failpoints.size)
        for item in value.split(",") if value else ():
            name, _, specification = item.strip().partition("=")
            offset = 8 * (1 + index_of(name))
            private[offset : offset + 8] = encode(specification).to_bytes(8, "little")
            private[0] = 1
        _private[value] = private
    return private, 0


def failure(point: int, number: int) -> OSError:
    """What a point raises that is armed with an errno."""
    return OSError(number, f"failpoint {POINTS[point].name}: {os.strerror(number)}")


def hit(where: Table, point: int) -> None:
    """Act as the point says, if it is armed; OSError for an errno."""
    memory, base = where
    if _core.load_u64(memory, base):
        number = _core.failpoint(memory, base + 8 * (1 + point))
        if number:
            raise failure(point, number)
