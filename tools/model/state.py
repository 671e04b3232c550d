"""One state of the modelled world, as a short byte string.

Owns the layout and nothing else: which byte of a state is which word, and the
numbers a word may hold. ``protocol.py`` moves from state to state,
``properties.py`` judges states, ``explorer.py`` visits all of them.

A state holds three kinds of words:

shared     what is in shared memory, in the image and in the targets;
private    where each process is and what it remembers. A private word that its
           process will not read again is 0, so that two states that behave
           alike are equal;
history    what no process sees and the properties need: the cut published
           last, what a cut's caller was told, the first fault.

Contents are stamps
-------------------
A cluster of the source has two halves, so that half a write can be seen. The
model does not keep what a half contains but its *stamp*: the number of the last
cut that had been published when the half was last stored. Cut ``k`` was
published after all stores with a stamp below ``k`` and before all others, so
what is read after cut ``k`` is the content at cut ``k`` exactly when the stamps
found are below ``k``. This loses nothing as long as a store changes what it
overwrites; the one kind of write that does not ("unchanged") leaves the stamp
alone. A copy in a target is kept as the outcome of the comparison: RIGHT, WRONG.

Stamps only grow. So a reader or worker that takes one half earlier than the other
sees nothing wrong that it would not see by taking both at the later moment, and
reading a cluster is one step although storing it is two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_EPOCH: Final = 2
"""The epoch at the start: even, and above 0, which in the epoch map says "never written"."""

PENDING: Final = 0
COPIED: Final = 240
"""A cluster byte between the two is COPYING, by the worker with that id: 1, 2."""


# The words below are classes of plain integers, not enumerations: looking up an enumeration's
# member costs as much as the rest of a comparison, and the search does little but compare.


def name_of(word: type, value: int) -> str:
    """The name of a value of one of the words below."""
    return next(name for name, number in vars(word).items() if number == value and name.isupper())


class Entry:
    """State word of a snapshot table entry. The arrows are all there are (``properties.py``).

    FREE -> PREPARED -> ACTIVE -> BROKEN | DROPPED | COMPLETE, PREPARED -> ABANDONED, COMPLETE -> NAMED.
    """

    FREE: Final = 0
    PREPARED: Final = 1
    ACTIVE: Final = 2
    BROKEN: Final = 3
    ABANDONED: Final = 4
    DROPPED: Final = 5
    COMPLETE: Final = 6
    NAMED: Final = 7
    """The target has its name: a finished backup, whoever looks. In the product the entry is FREE then."""


class Told:
    """History: what the caller of a cut may have heard."""

    NOTHING: Final = 0
    SUCCESS: Final = 1
    FAILURE: Final = 2


class Copy:
    """History: how what a target holds for a cluster compares with the content at the cut."""

    NONE: Final = 0
    RIGHT: Final = 1
    WRONG: Final = 2


class Kind:
    """The write a writer is busy with."""

    NONE: Final = 0
    PLAIN: Final = 1
    UNCHANGED: Final = 2
    PLAIN_AFTER_WAIT: Final = 3
    """Mutations only: a plain write that remembers that it has been through a wait."""


class Coordinator:
    """The step the coordinator does next."""

    PREPARE: Final = 0
    CLOSE: Final = 1
    DRAIN: Final = 2
    OPEN: Final = 3
    DONE: Final = 4
    DEAD: Final = 5
    ADOPTED: Final = 6
    LATE: Final = 7
    """Mutations only: the second part of a step that should have been one."""


class Writer:
    """The step a writer does next."""

    MARK: Final = 0
    READ_EPOCH: Final = 1
    GATE: Final = 2
    OPEN: Final = 3
    LOOK: Final = 4
    WAIT: Final = 5
    MARK_MAP: Final = 6
    STORE_FIRST: Final = 7
    STORE_SECOND: Final = 8
    DONE: Final = 9
    DEAD: Final = 10
    LATE: Final = 11
    """Mutations only: what should have been done before, or together with, the last step."""


class Worker:
    """The step a copy worker does next."""

    CLAIM: Final = 0
    COPY: Final = 1
    PUBLISH: Final = 2
    DEAD: Final = 3


class Reader:
    """The step the snapshot reader does next."""

    LOOK: Final = 0
    READ_SOURCE: Final = 1
    LOOK_AGAIN: Final = 2
    """It holds source data that is not the content at the cut, which it can't know."""
    READ_TARGET: Final = 3
    DEAD: Final = 4
    LATE: Final = 5
    """Mutations only: it has looked at the state word and not yet at the byte."""


class Fault:
    """History: the first wrong thing that a step did, as opposed to a state being wrong."""

    NONE: Final = 0
    SOURCE_READ: Final = 1
    TARGET_READ: Final = 2
    UNCOPIED_STORE: Final = 3
    HALF_STORE: Final = 4
    DRAINED_STORE: Final = 5
    BLOCKED: Final = 6
    UNFINISHED: Final = 7
    WRONG_BACKUP: Final = 8


# Header: offsets from the start of the state.
EPOCH: Final = 0
CUT: Final = 1
KILLS: Final = 2
FAULT: Final = 3
COORDINATOR: Final = 4
COORDINATOR_CUT: Final = 5
READER: Final = 6
READER_SNAPSHOT: Final = 7
READER_CLUSTER: Final = 8
HEADER_BYTES: Final = 9

# Snapshot table entry: offsets from the start of the entry, whose first word is its state.
ENTRY_ODD: Final = 1
ENTRY_TOLD: Final = 2
ENTRY_BYTES: Final = 3

# Worker: offsets from its start, the first word is what it does next.
WORKER_SNAPSHOT: Final = 1
WORKER_CLUSTER: Final = 2
WORKER_OWED: Final = 3
WORKER_BYTES: Final = 4

# Writer and its slot: offsets from its start, the first word is what it does next.
WRITER_EPOCH: Final = 1
WRITER_MARK: Final = 2
WRITER_SEEN: Final = 3
WRITER_KIND: Final = 4
WRITER_WRITES: Final = 5
WRITER_WANTED: Final = 6
WRITER_BYTES: Final = 7

Write = tuple[int, ...]
"""The clusters a write touches: one, stored as two halves, or two, stored one after the other."""


@dataclass(frozen=True)
class Scenario:
    """Who takes part and how much each of them does.

    ``writers`` has, for each writer, its writes. Snapshots are numbered like their
    cuts, from 1. ``kills`` is how many processes may be killed, each at any step.
    ``unchanged``: each write may be plain or unchanged. ``attach``: a dead writer's
    slot is taken by a new process, which does one more write. ``drop``: the
    coordinator may drop snapshot 1 at any time. ``finish``: snapshots are backups, which
    end with a target that has its name.
    """

    name: str
    writers: tuple[tuple[Write, ...], ...]
    workers: int = 1
    reader: bool = True
    cuts: int = 2
    kills: int = 1
    clusters: int = 1
    unchanged: bool = True
    attach: bool = False
    drop: bool = False
    finish: bool = False

    @property
    def size(self) -> str:
        """The numbers that make it exhaustive for something, in words."""
        counts = {
            "writer": len(self.writers),
            "worker": self.workers,
            "reader": int(self.reader),
            "cut": self.cuts,
            "kill": self.kills,
            "cluster": self.clusters,
        }
        return ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())


class Layout:
    """Where the words are in the states of one scenario.

    ``entry``, ``cluster_byte`` and ``target`` are indexed by snapshot number, so
    their index 0 is never used.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._end = HEADER_BYTES
        self._kills = scenario.kills
        self.snapshots = range(1, scenario.cuts + 1)
        self.clusters = range(scenario.clusters)
        self.entry = [0] + [self._take(ENTRY_BYTES) for _ in self.snapshots]
        self.epoch_map = [self._take(1) for _ in self.clusters]
        self.source = [self._take(2) for _ in self.clusters]
        self.cluster_byte = [[0]] + [[self._take(1) for _ in self.clusters] for _ in self.snapshots]
        self.target = [[0]] + [[self._take(1) for _ in self.clusters] for _ in self.snapshots]
        self.worker = [self._take(WORKER_BYTES) for _ in range(scenario.workers)]
        self.writer = [self._take(WRITER_BYTES) for _ in scenario.writers]
        self.size_bytes = self._end

    def _take(self, length: int) -> int:
        offset, self._end = self._end, self._end + length
        return offset

    def first_state(self) -> bytes:
        """Nothing written, no snapshot, all processes alive and idle."""
        state = bytearray(self.size_bytes)
        state[EPOCH] = FIRST_EPOCH
        state[KILLS] = self._kills
        state[COORDINATOR_CUT] = 1
        return bytes(state)
