"""The coordinator: cuts, supervision, adoption."""

from __future__ import annotations

from collections.abc import Callable

from tools.model.state import (
    COORDINATOR,
    COORDINATOR_CUT,
    COPIED,
    CUT,
    ENTRY_ODD,
    ENTRY_TOLD,
    EPOCH,
    FAULT,
    WRITER_MARK,
    WRITER_SEEN,
    Coordinator,
    Copy,
    Entry,
    Fault,
    Scenario,
    Told,
    Writer,
)
from tools.model.world import Step, World


class CoordinatorSteps(World):
    """What the coordinator does next, for each place it can be at."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        judge_means: bool = True,
        every_kill: bool = False,
    ) -> None:
        super().__init__(scenario, judge_means=judge_means, every_kill=every_kill)
        self.coordinator_step: dict[int, Callable[[bytes], list[Step]]] = {
            Coordinator.PREPARE: self.coordinator_prepare,
            Coordinator.CLOSE: self.coordinator_close,
            Coordinator.DRAIN: self.coordinator_drain,
            Coordinator.OPEN: self.coordinator_open,
            Coordinator.DONE: self.nothing,
            Coordinator.DEAD: self.coordinator_adopt,
            Coordinator.ADOPTED: self.coordinator_adopted,
            Coordinator.LATE: self.coordinator_late,
        }

    def own_entry(self, state: bytes) -> int:
        """Where the entry of the coordinator's cut is."""
        return self.entry[state[COORDINATOR_CUT]]

    def coordinator_prepare(self, state: bytes) -> list[Step]:
        entry = self.own_entry(state)
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.CLOSE
        new[entry] = Entry.PREPARED
        new[entry + ENTRY_ODD] = state[EPOCH] + 1
        return [("coordinator.prepare", 0, bytes(new))]

    def coordinator_close(self, state: bytes) -> list[Step]:
        """A plain store: only the one coordinator ever turns an even epoch."""
        new = bytearray(state)
        new[COORDINATOR] = Coordinator.DRAIN
        new[EPOCH] = state[self.own_entry(state) + ENTRY_ODD]
        return [("coordinator.close", 0, bytes(new))]

    def coordinator_drain(self, state: bytes) -> list[Step]:
        """See each slot clear once, in any order; then publish. Or the deadline passes."""
        steps: list[Step] = []
        drained = True
        for slot, w in enumerate(self.layout.writer):
            if state[w] == Writer.DONE:
                continue
            if not state[w + WRITER_SEEN]:
                drained = False
                if not state[w + WRITER_MARK]:
                    new = bytearray(state)
                    new[w + WRITER_SEEN] = 1
                    steps.append(("coordinator.see_slot", slot, bytes(new)))
            if state[w] == Writer.DEAD and state[w + WRITER_MARK]:
                steps += self.reap_slot(state, slot)
        if drained:
            steps += self.coordinator_publish(state)
        return steps + self.coordinator_abandon(state)

    def reap_slot(self, state: bytes, slot: int) -> list[Step]:
        """One step, because the slot's lock is held from the test to the clearing."""
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[w + WRITER_MARK] = 0
        new[w + WRITER_SEEN] = 1
        return [("coordinator.reap_slot", slot, bytes(new))]

    def coordinator_publish(self, state: bytes) -> list[Step]:
        """The cut: compare-and-swap PREPARED -> ACTIVE. It fails if somebody gave the cut up."""
        new = bytearray(state)
        self.publish(state, new)
        self.go_open(new)
        return [("coordinator.publish", 0, bytes(new))]

    def publish(self, state: bytes, new: bytearray) -> None:
        entry = self.own_entry(state)
        if state[entry] == Entry.PREPARED:
            self.set_active(state, new)
        else:
            new[entry + ENTRY_TOLD] = Told.FAILURE

    def set_active(self, state: bytes, new: bytearray) -> None:
        """This is the instant the snapshot shows. The caller hears of it at once: the earlier
        it hears, the more can prove wrong what it heard."""
        entry = self.own_entry(state)
        new[entry] = Entry.ACTIVE
        new[entry + ENTRY_TOLD] = Told.SUCCESS
        new[CUT] = state[COORDINATOR_CUT]
        if self.judge_means and any(state[w] == Writer.STORE_SECOND for w in self.layout.writer):
            new[FAULT] = Fault.HALF_STORE

    def coordinator_abandon(self, state: bytes) -> list[Step]:
        entry = self.own_entry(state)
        new = bytearray(state)
        self.abandon(state, state[entry + ENTRY_ODD], new)
        new[entry + ENTRY_TOLD] = Told.FAILURE
        self.go_open(new)
        return [("coordinator.abandon", 0, bytes(new))]

    def go_open(self, new: bytearray) -> None:
        new[COORDINATOR] = Coordinator.OPEN
        for w in self.layout.writer:
            new[w + WRITER_SEEN] = 0

    def coordinator_open(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.open_gate(state, state[self.own_entry(state) + ENTRY_ODD], new)
        self.next_cut(new)
        return [("coordinator.open", 0, bytes(new))]

    def next_cut(self, new: bytearray) -> None:
        """The first entry never used; none is left: no more cuts."""
        free = [k for k in self.layout.snapshots if new[self.entry[k]] == Entry.FREE]
        new[COORDINATOR] = Coordinator.PREPARE if free else Coordinator.DONE
        new[COORDINATOR_CUT] = free[0] if free else 0

    def coordinator_adopt(self, state: bytes) -> list[Step]:
        """The coordinator's lock is free: a new one takes it, and gives up the cut under way."""
        new = bytearray(state)
        for entry in self.entry[1:]:
            self.abandon(state, state[entry + ENTRY_ODD], new)
        new[COORDINATOR] = Coordinator.ADOPTED
        return [("coordinator.adopt", 0, bytes(new))]

    def coordinator_adopted(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        if state[EPOCH] & 1:
            self.open_gate(state, state[EPOCH], new)
        self.next_cut(new)
        return [("coordinator.adopt_open", 0, bytes(new))]

    def coordinator_drop(self, state: bytes) -> list[Step]:
        if state[COORDINATOR] == Coordinator.DEAD or state[self.entry[1]] != Entry.ACTIVE:
            return []
        new = bytearray(state)
        new[self.entry[1]] = Entry.DROPPED
        return [("coordinator.drop", 0, bytes(new))]

    def coordinator_complete(self, state: bytes) -> list[Step]:
        """Backups end, beside everything else that a coordinator does, also one that has adopted them.

        That the bytes were counted before the compare-and-swap makes no difference: no byte leaves COPIED.
        """
        if state[COORDINATOR] == Coordinator.DEAD:
            return []
        steps: list[Step] = []
        for snapshot in self.layout.snapshots:
            entry = self.entry[snapshot]
            new = bytearray(state)
            if state[entry] == Entry.ACTIVE and self.is_copied(state, snapshot):
                new[entry] = Entry.COMPLETE
                steps.append(("coordinator.complete", 0, bytes(new)))
            elif state[entry] == Entry.COMPLETE:
                new[entry] = Entry.NAMED
                if any(state[at] != Copy.RIGHT for at in self.layout.target[snapshot]):
                    new[FAULT] = Fault.WRONG_BACKUP
                steps.append(("coordinator.name", 0, bytes(new)))
        return steps

    def is_copied(self, state: bytes, snapshot: int) -> bool:
        return all(state[at] >= COPIED for at in self.layout.cluster_byte[snapshot])

    def coordinator_late(self, state: bytes) -> list[Step]:
        raise NotImplementedError("only a mutation is ever late")
