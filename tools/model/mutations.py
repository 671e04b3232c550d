"""The protocol with one rule removed, once per rule: each must give a counter-example.

A model that finds nothing proves nothing until it is seen to find something. A
mutation is the protocol with one step changed, as small a change as a programmer
could make by mistake: a compare-and-swap becomes a load and a store, an order is
turned round, a step is left out. Each is judged by the promises alone
(``properties.py``) and runs in the scenario named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from tools.model.group.protocol import GroupProtocol
from tools.model.group.state import GroupScenario
from tools.model.protocol import Protocol
from tools.model.resize.protocol import ResizeProtocol
from tools.model.resize.state import ResizeScenario
from tools.model.scenarios import scenario
from tools.model.state import (
    COORDINATOR,
    COORDINATOR_CUT,
    COPIED,
    ENTRY_ODD,
    EPOCH,
    FAULT,
    PENDING,
    READER,
    READER_CLUSTER,
    READER_SNAPSHOT,
    WORKER_CLUSTER,
    WORKER_OWED,
    WORKER_SNAPSHOT,
    WRITER_EPOCH,
    WRITER_KIND,
    WRITER_MARK,
    WRITER_SEEN,
    WRITER_WANTED,
    Coordinator,
    Copy,
    Entry,
    Fault,
    Kind,
    Reader,
    Scenario,
    Worker,
    Writer,
)
from tools.model.world import Step

# -- the drained section and the mark ----------------------------------------------------------


class NoDrain(Protocol):
    """The coordinator publishes without waiting for the slots."""

    def coordinator_drain(self, state: bytes) -> list[Step]:
        return self.coordinator_publish(state) + self.coordinator_abandon(state)


class NoGate(Protocol):
    """The epoch is never odd: the coordinator waits for the slots, but nobody is kept out."""

    def coordinator_close(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.DRAIN
        return [("coordinator.close", 0, bytes(new))]

    def open_gate(self, state: bytes, odd: int, new: bytearray) -> None:
        new[EPOCH] = self.next_even(odd)


class NoMark(Protocol):
    """A writer does not mark its slot in flight."""

    IN_FLIGHT: ClassVar[int] = 0


class OpenBeforePublish(Protocol):
    """The coordinator ends the drained section first and publishes then."""

    def coordinator_publish(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.open_gate(state, state[self.own_entry(state) + ENTRY_ODD], new)
        new[COORDINATOR] = Coordinator.LATE
        return [("coordinator.open", 0, bytes(new))]

    def coordinator_late(self, state: bytes) -> list[Step]:
        return super().coordinator_publish(state)


class NoNewEpoch(Protocol):
    """After a cut the epoch is what it was before."""

    def next_even(self, odd: int) -> int:
        return odd - 1


# -- the write ---------------------------------------------------------------------------------


class UnchangedMarksMap(Protocol):
    """An unchanged write skips step 4 but does step 5."""

    def unchanged_write(self, state: bytes, slot: int, new: bytearray) -> None:
        new[self.layout.writer[slot]] = Writer.MARK_MAP

    def writer_mark_map(self, state: bytes, slot: int) -> list[Step]:
        steps = super().writer_mark_map(state, slot)
        if state[self.layout.writer[slot] + WRITER_KIND] != Kind.UNCHANGED:
            return steps
        new = bytearray(steps[0][2])
        self.end_write(state, slot, new)
        return [("writer.mark_map", slot, bytes(new))]


class UnchangedByHearsay(Protocol):
    """That a write is unchanged was found out before the write, and others wrote since.

    ``WRITER_WANTED`` says so: somebody stored since this write was called.
    """

    def store(self, state: bytes, slot: int, part: int, new: bytearray) -> None:
        super().store(state, slot, part, new)
        for w in self.layout.writer:
            if state[w + WRITER_KIND] == Kind.UNCHANGED:
                new[w + WRITER_WANTED] = 1

    def unchanged_write(self, state: bytes, slot: int, new: bytearray) -> None:
        if state[self.layout.writer[slot] + WRITER_WANTED]:
            new[self.layout.writer[slot]] = Writer.STORE_FIRST
        else:
            super().unchanged_write(state, slot, new)

    def writer_mark(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[w + WRITER_KIND] != Kind.UNCHANGED:
            return super().writer_mark(state, slot)
        new = bytearray(super().writer_mark(state, slot)[0][2])
        new[w + WRITER_WANTED] = state[w + WRITER_WANTED]
        return [("writer.mark", slot, bytes(new))]


class NoStartingOver(Protocol):
    """When its copy has come, a writer marks and passes the gate again, but does not look again."""

    def writer_wait(self, state: bytes, slot: int) -> list[Step]:
        if self.still_wanted(state, slot):
            return super().writer_wait(state, slot)
        new = bytearray(state)
        new[self.layout.writer[slot] + WRITER_KIND] = Kind.PLAIN_AFTER_WAIT
        return self.writer_mark(bytes(new), slot)

    def writer_look(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[w + WRITER_KIND] != Kind.PLAIN_AFTER_WAIT:
            return super().writer_look(state, slot)
        new = bytearray(state)
        new[w] = Writer.MARK_MAP
        return [("writer.look", slot, bytes(new))]


class WriteBeforeBreak(Protocol):
    """At its deadline a writer goes on, and breaks the snapshot after its data."""

    def writer_wait(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(state)
        if self.still_wanted(state, slot):
            new[self.layout.writer[slot] + WRITER_KIND] = Kind.PLAIN_AFTER_WAIT
        return self.writer_mark(bytes(new), slot)

    def writer_look(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[w + WRITER_KIND] != Kind.PLAIN_AFTER_WAIT:
            return super().writer_look(state, slot)
        new = bytearray(state)
        new[w] = Writer.MARK_MAP
        return [("writer.look", slot, bytes(new))]

    def writer_store_second(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[w + WRITER_KIND] != Kind.PLAIN_AFTER_WAIT:
            return super().writer_store_second(state, slot)
        new = bytearray(state)
        self.store(state, slot, 1, new)
        new[w] = Writer.LATE
        return [("writer.store_second", slot, bytes(new))]

    def writer_late(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(state)
        for snapshot in self.uncopied(state, self.touched(state, slot)):
            new[self.entry[snapshot]] = Entry.BROKEN
        self.end_write(state, slot, new)
        return [("writer.break", slot, bytes(new))]


class MapAfterData(Protocol):
    """Step 5 comes after step 6."""

    def writer_look(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(super().writer_look(state, slot)[0][2])
        if new[w] == Writer.MARK_MAP:
            new[w] = Writer.STORE_FIRST
        return [("writer.look", slot, bytes(new))]

    def writer_store_second(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if not state[w + WRITER_EPOCH]:
            return super().writer_store_second(state, slot)
        new = bytearray(state)
        self.store(state, slot, 1, new)
        new[w] = Writer.MARK_MAP
        return [("writer.store_second", slot, bytes(new))]

    def writer_mark_map(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(super().writer_mark_map(state, slot)[0][2])
        self.end_write(state, slot, new)
        return [("writer.mark_map", slot, bytes(new))]


# -- the abandoned cut -------------------------------------------------------------------------


class NotAbandoned(Protocol):
    """A gated writer advances the epoch and leaves the entry PREPARED."""

    def writer_gate(self, state: bytes, slot: int) -> list[Step]:
        steps = super().writer_gate(state, slot)[:-1]
        new = bytearray(state)
        new[self.layout.writer[slot]] = Writer.OPEN
        return [*steps, ("writer.give_up", slot, bytes(new))]


class OpenBeforeAbandon(Protocol):
    """A gated writer advances the epoch first and abandons the entry then."""

    def writer_gate(self, state: bytes, slot: int) -> list[Step]:
        steps = super().writer_gate(state, slot)[:-1]
        new = bytearray(state)
        self.open_gate(state, state[self.layout.writer[slot] + WRITER_EPOCH], new)
        new[self.layout.writer[slot]] = Writer.LATE
        return [*steps, ("writer.open", slot, bytes(new))]

    def writer_late(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(state)
        self.abandon(state, state[w + WRITER_EPOCH], new)
        new[w] = Writer.MARK
        new[w + WRITER_EPOCH] = 0
        return [("writer.give_up", slot, bytes(new))]


class AbandonedByStore(Protocol):
    """A gated writer finds the entry PREPARED and stores ABANDONED: no compare-and-swap."""

    def writer_gate(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        steps = super().writer_gate(state, slot)[:-1]
        new = bytearray(state)
        new[w] = Writer.OPEN
        for snapshot in self.layout.snapshots:
            entry = self.entry[snapshot]
            odd = state[entry + ENTRY_ODD]
            if state[entry] == Entry.PREPARED and odd == state[w + WRITER_EPOCH]:
                new[w] = Writer.LATE
                new[w + WRITER_WANTED] = snapshot
        return [*steps, ("writer.find_prepared", slot, bytes(new))]

    def writer_late(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[self.entry[state[w + WRITER_WANTED]]] = Entry.ABANDONED
        new[w] = Writer.OPEN
        new[w + WRITER_WANTED] = 0
        return [("writer.give_up", slot, bytes(new))]


class PublishedByStore(Protocol):
    """The coordinator finds its entry PREPARED and stores ACTIVE: no compare-and-swap."""

    def coordinator_publish(self, state: bytes) -> list[Step]:
        if state[self.own_entry(state)] != Entry.PREPARED:
            return super().coordinator_publish(state)
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.LATE
        return [("coordinator.find_prepared", 0, bytes(new))]

    def coordinator_late(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.set_active(state, new)
        self.go_open(new)
        return [("coordinator.publish", 0, bytes(new))]


class OpenedByStore(Protocol):
    """A gated writer finds the epoch odd and stores the next even one: no compare-and-swap."""

    def writer_open(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[EPOCH] != state[w + WRITER_EPOCH]:
            return super().writer_open(state, slot)
        new = bytearray(state)
        new[w] = Writer.LATE
        return [("writer.find_odd", slot, bytes(new))]

    def writer_late(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[EPOCH] = self.next_even(state[w + WRITER_EPOCH])
        new[w] = Writer.MARK
        new[w + WRITER_EPOCH] = 0
        return [("writer.open", slot, bytes(new))]


class PatientGate(Protocol):
    """A gated writer has no deadline: it waits for the coordinator, dead or alive."""

    def writer_gate(self, state: bytes, slot: int) -> list[Step]:
        return super().writer_gate(state, slot)[:-1]


class AdopterLeavesGate(Protocol):
    """A new coordinator abandons the dead one's cut and leaves the epoch to the gated writers."""

    def coordinator_adopted(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.next_cut(new)
        return [("coordinator.adopt_open", 0, bytes(new))]


class AdopterLeavesEntry(Protocol):
    """A new coordinator opens the gate and leaves the dead one's entry PREPARED."""

    def coordinator_adopt(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.ADOPTED
        return [("coordinator.adopt", 0, bytes(new))]


# -- copy, read, death -------------------------------------------------------------------------


class PublishBeforeCopy(Protocol):
    """A worker publishes COPIED first and copies then."""

    def worker_copy(self, state: bytes, worker: int) -> list[Step]:
        new = bytearray(state)
        self.set_copied(state, worker, new)
        new[self.layout.worker[worker]] = Worker.PUBLISH
        return [("worker.publish", worker, bytes(new))]

    def worker_publish(self, state: bytes, worker: int) -> list[Step]:
        new = bytearray(state)
        self.copy(state, worker, new)
        self.end_copy(worker, new)
        return [("worker.copy", worker, bytes(new))]


class NoSecondLook(Protocol):
    """A reader returns what it took from the source without looking again."""

    def reader_read_source(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        if not self.source_is_right(state, state[READER_SNAPSHOT], state[READER_CLUSTER]):
            new[FAULT] = Fault.SOURCE_READ
        self.end_read(new)
        return [("reader.read_source", 0, bytes(new))]


class StateBeforeByte(Protocol):
    """A reader looks at the state, then at the byte; COPIED: it returns what the target has."""

    FORGETS_UNREADABLE: ClassVar[bool] = False

    def reader_look(self, state: bytes) -> list[Step]:
        steps: list[Step] = []
        for name, number, after in super().reader_look(state):
            new = bytearray(after)
            new[READER] = Reader.LATE
            steps.append((name, number, bytes(new)))
        return steps

    def reader_late(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        snapshot, cluster = state[READER_SNAPSHOT], state[READER_CLUSTER]
        if state[self.layout.cluster_byte[snapshot][cluster]] < COPIED:
            new[READER] = Reader.READ_SOURCE
            return [("reader.look", 0, bytes(new))]
        if state[self.layout.target[snapshot][cluster]] != Copy.RIGHT:
            new[FAULT] = Fault.TARGET_READ
        self.end_read(new)
        return [("reader.read_target", 0, bytes(new))]


class ClaimsNotReturned(Protocol):
    """A dead worker's claims stay what they are."""

    def return_claims(self, state: bytes, worker: int, new: bytearray) -> None:
        pass


class IdBeforeClaims(Protocol):
    """A new worker gets the dead one's id at once; the claims are returned some time later."""

    def worker_dead(self, state: bytes, worker: int) -> list[Step]:
        new = bytearray(state)
        new[self.layout.worker[worker]] = Worker.CLAIM
        new[self.layout.worker[worker] + WORKER_OWED] = 1
        return [("worker.start", worker, bytes(new))]

    def steps(self, state: bytes) -> list[Step]:
        steps: list[Step] = []
        for worker, k in enumerate(self.layout.worker):
            if state[k + WORKER_OWED] and state[COORDINATOR] != Coordinator.DEAD:
                new = bytearray(state)
                self.return_claims(state, worker, new)
                new[k + WORKER_OWED] = 0
                steps.append(("coordinator.return_claims", worker, bytes(new)))
        return steps + [s for s in super().steps(state) if s[0] != "nobody" or not steps]


class ClaimsOfTheLiving(Protocol):
    """A worker that has not been heard of for a while is taken for dead, and its claims are returned."""

    def worker_copy(self, state: bytes, worker: int) -> list[Step]:
        return super().worker_copy(state, worker) + self.presumed_dead(state, worker)

    def worker_publish(self, state: bytes, worker: int) -> list[Step]:
        return super().worker_publish(state, worker) + self.presumed_dead(state, worker)

    def presumed_dead(self, state: bytes, worker: int) -> list[Step]:
        if state[COORDINATOR] == Coordinator.DEAD:
            return []
        new = bytearray(state)
        self.return_claims(state, worker, new)
        return [("coordinator.return_claims", worker, bytes(new))]

    def set_copied(self, state: bytes, worker: int, new: bytearray) -> None:
        """A byte that is not its own any more it leaves alone."""
        k = self.layout.worker[worker]
        at = self.layout.cluster_byte[state[k + WORKER_SNAPSHOT]][state[k + WORKER_CLUSTER]]
        if state[at] == worker + 1:
            new[at] = COPIED


class CompleteByStore(Protocol):
    """The coordinator finds a snapshot ACTIVE, counts its bytes, and stores COMPLETE: no CAS."""

    FORGETS_UNREADABLE: ClassVar[bool] = False

    def coordinator_complete(self, state: bytes) -> list[Step]:
        steps = [step for step in super().coordinator_complete(state) if step[0] == "coordinator.name"]
        for snapshot in self.layout.snapshots:
            if state[COORDINATOR] == Coordinator.DONE and state[self.entry[snapshot]] == Entry.ACTIVE:
                new = bytearray(state)
                new[COORDINATOR] = Coordinator.LATE
                new[COORDINATOR_CUT] = snapshot
                steps.append(("coordinator.find_active", 0, bytes(new)))
        return steps

    def coordinator_late(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        if self.is_copied(state, state[COORDINATOR_CUT]):
            new[self.own_entry(state)] = Entry.COMPLETE
        new[COORDINATOR], new[COORDINATOR_CUT] = Coordinator.DONE, 0
        return [("coordinator.complete", 0, bytes(new))]


class ClaimsAreCopies(Protocol):
    """The coordinator takes a backup for complete when no byte is PENDING: a claim counts as done."""

    def is_copied(self, state: bytes, snapshot: int) -> bool:
        return all(state[at] != PENDING for at in self.layout.cluster_byte[snapshot])


class ReapWithoutLock(Protocol):
    """The coordinator finds a slot's lock free and clears the slot later, without holding it."""

    FOUND_DEAD: ClassVar[int] = 2

    def reap_slot(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.LATE
        new[self.layout.writer[slot] + WRITER_SEEN] = self.FOUND_DEAD
        return [("coordinator.test_lock", slot, bytes(new))]

    def coordinator_late(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.DRAIN
        reaped = 0
        for slot, w in enumerate(self.layout.writer):
            if state[w + WRITER_SEEN] == self.FOUND_DEAD:
                new[w + WRITER_SEEN] = 1
                new[w + WRITER_MARK] = 0
                reaped = slot
        return [("coordinator.reap_slot", reaped, bytes(new))]


class DropUnseen(Protocol):
    """A reader looks whether its snapshot is broken, but not whether it was dropped."""

    FORGETS_UNREADABLE: ClassVar[bool] = False

    def is_good(self, state: bytes, snapshot: int) -> bool:
        return state[self.entry[snapshot]] in (Entry.ACTIVE, Entry.DROPPED)


class EntryReused(Protocol):
    """Snapshot 2 has the entry of snapshot 1, dropped before; a reader takes it for its own."""

    FORGETS_UNREADABLE: ClassVar[bool] = False

    def is_good(self, state: bytes, snapshot: int) -> bool:
        words = [state[entry] for entry in self.entry[snapshot:]]
        return words[0] == Entry.ACTIVE or words[:2] == [Entry.DROPPED, Entry.ACTIVE]


@dataclass(frozen=True)
class Mutation:
    """A rule removed: the protocol without it, the promise that breaks, and where."""

    name: str
    protocol: type[Protocol] | type[GroupProtocol] | type[ResizeProtocol]
    promise: str
    scenario: Scenario | GroupScenario | ResizeScenario

    @property
    def meaning(self) -> str:
        """What is different: the first line of the class's docstring."""
        return (self.protocol.__doc__ or "").splitlines()[0]


STEPS: Final[dict[str, str]] = {
    "writer.find_prepared": "at the gate, deadline passed: the entry is PREPARED for that epoch",
    "writer.find_odd": "then: the epoch still is that odd value",
    "worker.start": "a new worker gets the dead one's id",
    "coordinator.find_prepared": "cut: the entry is PREPARED",
    "coordinator.find_active": "a backup: its snapshot is ACTIVE",
    "coordinator.test_lock": "cut: a slot's mark is set and its lock free",
}
"""Steps that only mutations do."""

MUTATIONS: Final = tuple(
    Mutation(name, protocol, promise, scenario(where))
    for name, protocol, promise, where in (
        ("no-drain", NoDrain, "CONTENT", "full"),
        ("no-gate", NoGate, "CONTENT", "full"),
        ("no-mark", NoMark, "CONTENT", "full"),
        ("no-second-look", NoSecondLook, "CONTENT", "full"),
        ("publish-before-copy", PublishBeforeCopy, "CONTENT", "full"),
        ("open-before-publish", OpenBeforePublish, "CONTENT", "full"),
        ("write-before-break", WriteBeforeBreak, "CONTENT", "full"),
        ("no-new-epoch", NoNewEpoch, "CONTENT", "full"),
        ("unchanged-marks-map", UnchangedMarksMap, "CONTENT", "full"),
        ("unchanged-by-hearsay", UnchangedByHearsay, "CONTENT", "full"),
        ("no-starting-over", NoStartingOver, "CONTENT", "full"),
        ("not-abandoned", NotAbandoned, "CONTENT", "full"),
        ("abandoned-by-store", AbandonedByStore, "TOLD", "full"),
        ("published-by-store", PublishedByStore, "CONTENT", "full"),
        ("open-before-abandon", OpenBeforeAbandon, "CONTENT", "full"),
        ("opened-by-store", OpenedByStore, "CONTENT", "full"),
        ("map-after-data", MapAfterData, "CHANGED", "full"),
        ("patient-gate", PatientGate, "WRITERS", "full"),
        ("adopter-leaves-gate", AdopterLeavesGate, "END", "kills"),
        ("adopter-leaves-entry", AdopterLeavesEntry, "END", "kills"),
        ("claims-not-returned", ClaimsNotReturned, "END", "full"),
        ("state-before-byte", StateBeforeByte, "CONTENT", "full"),
        ("claims-of-the-living", ClaimsOfTheLiving, "CONTENT", "pool"),
        ("complete-by-store", CompleteByStore, "BACKUP", "backup"),
        ("claims-are-copies", ClaimsAreCopies, "BACKUP", "backup"),
        ("id-before-claims", IdBeforeClaims, "CONTENT", "pool"),
        ("reap-without-lock", ReapWithoutLock, "CONTENT", "attach"),
        ("drop-unseen", DropUnseen, "CONTENT", "drop"),
        ("entry-reused", EntryReused, "CONTENT", "drop"),
    )
)
