"""The writer: the write in six steps, the gate, the break."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from tools.model.state import (
    CUT,
    ENTRY_ODD,
    EPOCH,
    FAULT,
    WRITER_BYTES,
    WRITER_EPOCH,
    WRITER_KIND,
    WRITER_MARK,
    WRITER_SEEN,
    WRITER_WANTED,
    WRITER_WRITES,
    Entry,
    Fault,
    Kind,
    Scenario,
    Write,
    Writer,
)
from tools.model.world import PUBLISHED, Step, World


class WriterSteps(World):
    """What a writer does next, for each place it can be at."""

    IN_FLIGHT: ClassVar[int] = 1
    """What ``writer.mark`` stores."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        judge_means: bool = True,
        every_kill: bool = False,
    ) -> None:
        super().__init__(scenario, judge_means=judge_means, every_kill=every_kill)
        self.writer_step: dict[int, Callable[[bytes, int], list[Step]]] = {
            Writer.MARK: self.writer_mark,
            Writer.READ_EPOCH: self.writer_read_epoch,
            Writer.GATE: self.writer_gate,
            Writer.OPEN: self.writer_open,
            Writer.LOOK: self.writer_look,
            Writer.WAIT: self.writer_wait,
            Writer.MARK_MAP: self.writer_mark_map,
            Writer.STORE_FIRST: self.writer_store_first,
            Writer.STORE_SECOND: self.writer_store_second,
            Writer.DONE: self.nothing,
            Writer.DEAD: self.writer_dead,
            Writer.LATE: self.writer_late,
        }

    def touched(self, state: bytes, slot: int) -> Write:
        """The clusters of the write that the writer is busy with."""
        return self.scenario.writers[slot][state[self.layout.writer[slot] + WRITER_WRITES]]

    def writer_mark(self, state: bytes, slot: int) -> list[Step]:
        """Step 1. A new write is plain or unchanged; one that starts over stays what it is."""
        w = self.layout.writer[slot]
        kinds = [state[w + WRITER_KIND]]
        if kinds == [Kind.NONE]:
            kinds = [Kind.PLAIN, Kind.UNCHANGED] if self.scenario.unchanged else [Kind.PLAIN]
        steps: list[Step] = []
        for kind in kinds:
            new = bytearray(state)
            new[w] = Writer.READ_EPOCH
            new[w + WRITER_MARK] = self.IN_FLIGHT
            new[w + WRITER_KIND] = kind
            new[w + WRITER_EPOCH] = new[w + WRITER_WANTED] = 0
            steps.append(("writer.mark", slot, bytes(new)))
        return steps

    def writer_read_epoch(self, state: bytes, slot: int) -> list[Step]:
        """Step 2. An unchanged write ends here: what it stores nobody can tell from nothing."""
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[w + WRITER_EPOCH] = state[EPOCH]
        if state[EPOCH] & 1:
            new[w] = Writer.GATE
            new[w + WRITER_MARK] = 0
        elif state[w + WRITER_KIND] == Kind.UNCHANGED:
            self.unchanged_write(state, slot, new)
        else:
            new[w] = Writer.LOOK
        return [("writer.read_epoch", slot, bytes(new))]

    def unchanged_write(self, state: bytes, slot: int, new: bytearray) -> None:
        """Steps 4 and 5 are not for it; step 6 stores what is there."""
        self.end_write(state, slot, new)

    def writer_gate(self, state: bytes, slot: int) -> list[Step]:
        """Wait for another epoch, or lose patience at any moment: also when it is too late.

        That the deadline was looked at while the epoch was still the odd one makes no
        difference: the writer may be stopped between that look and this step.
        """
        w = self.layout.writer[slot]
        steps: list[Step] = []
        if state[EPOCH] != state[w + WRITER_EPOCH]:
            steps += self.writer_mark(state, slot)
        new = bytearray(state)
        new[w] = Writer.OPEN
        self.abandon(state, state[w + WRITER_EPOCH], new)
        return [*steps, ("writer.give_up", slot, bytes(new))]

    def writer_open(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[w] = Writer.MARK
        new[w + WRITER_EPOCH] = 0
        self.open_gate(state, state[w + WRITER_EPOCH], new)
        return [("writer.open", slot, bytes(new))]

    def writer_look(self, state: bytes, slot: int) -> list[Step]:
        """Steps 3 and 4."""
        w = self.layout.writer[slot]
        clusters = self.touched(state, slot)
        new = bytearray(state)
        if all(state[self.layout.epoch_map[c]] == state[w + WRITER_EPOCH] for c in clusters):
            new[w] = Writer.STORE_FIRST
            new[w + WRITER_EPOCH] = 0
        elif wanted := self.uncopied(state, clusters):
            new[w] = Writer.WAIT
            new[w + WRITER_MARK] = new[w + WRITER_EPOCH] = 0
            new[w + WRITER_WANTED] = sum(1 << snapshot for snapshot in wanted)
        else:
            new[w] = Writer.MARK_MAP
        return [("writer.look", slot, bytes(new))]

    def still_wanted(self, state: bytes, slot: int) -> list[int]:
        """Of the snapshots this writer found lacking in step 4, those that still are."""
        wanted = state[self.layout.writer[slot] + WRITER_WANTED]
        clusters = self.touched(state, slot)
        return [k for k in self.uncopied(state, clusters) if wanted >> k & 1]

    def writer_wait(self, state: bytes, slot: int) -> list[Step]:
        """Wait out of flight; what was waited for is there: start over at 1. Else break."""
        w = self.layout.writer[slot]
        steps: list[Step] = []
        for snapshot in self.still_wanted(state, slot):
            new = bytearray(state)
            new[w] = Writer.MARK
            new[w + WRITER_WANTED] = 0
            new[self.entry[snapshot]] = Entry.BROKEN
            steps.append(("writer.break", slot, bytes(new)))
        return steps or self.writer_mark(state, slot)

    def writer_mark_map(self, state: bytes, slot: int) -> list[Step]:
        """Step 5. The value is the epoch read in step 2, which may be over by now."""
        w = self.layout.writer[slot]
        new = bytearray(state)
        for cluster in self.touched(state, slot):
            new[self.layout.epoch_map[cluster]] = state[w + WRITER_EPOCH]
        new[w] = Writer.STORE_FIRST
        new[w + WRITER_EPOCH] = 0
        return [("writer.mark_map", slot, bytes(new))]

    def store(self, state: bytes, slot: int, part: int, new: bytearray) -> None:
        """Half of step 6: half a cluster, or one cluster of two."""
        clusters = self.touched(state, slot)
        cluster = clusters[part % len(clusters)]
        at = self.layout.source[cluster]
        if len(clusters) == 1:
            new[at + part] = state[CUT]
        else:
            new[at] = new[at + 1] = state[CUT]
        if self.judge_means:
            if self.uncopied(state, (cluster,)):
                new[FAULT] = Fault.UNCOPIED_STORE
            now = state[EPOCH]
            for entry in self.entry[1:]:
                if state[entry + ENTRY_ODD] == now and state[entry] in PUBLISHED:
                    new[FAULT] = Fault.DRAINED_STORE

    def writer_store_first(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(state)
        self.store(state, slot, 0, new)
        new[self.layout.writer[slot]] = Writer.STORE_SECOND
        return [("writer.store_first", slot, bytes(new))]

    def writer_store_second(self, state: bytes, slot: int) -> list[Step]:
        new = bytearray(state)
        self.store(state, slot, 1, new)
        self.end_write(state, slot, new)
        return [("writer.store_second", slot, bytes(new))]

    def end_write(self, state: bytes, slot: int, new: bytearray) -> None:
        """Clear the mark; on to the next write, if there is one."""
        w = self.layout.writer[slot]
        writes = state[w + WRITER_WRITES] + 1
        seen = state[w + WRITER_SEEN]
        if writes < len(self.scenario.writers[slot]):
            new[w : w + WRITER_BYTES] = bytes((Writer.MARK, 0, 0, seen, 0, writes, 0))
        else:
            new[w : w + WRITER_BYTES] = bytes((Writer.DONE, 0, 0, 0, 0, 0, 0))

    def writer_dead(self, state: bytes, slot: int) -> list[Step]:
        """The lock of a dead writer's slot is free: who takes it clears the slot."""
        if not self.scenario.attach:
            return []
        w = self.layout.writer[slot]
        new = bytearray(state)
        last = len(self.scenario.writers[slot]) - 1
        seen = state[w + WRITER_SEEN]
        new[w : w + WRITER_BYTES] = bytes((Writer.MARK, 0, 0, seen, 0, last, 0))
        return [("writer.attach", slot, bytes(new))]

    def writer_late(self, state: bytes, slot: int) -> list[Step]:
        raise NotImplementedError("only a mutation is ever late")
