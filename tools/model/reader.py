"""The snapshot reader: two looks around a read of the source, one after a read of the target."""

from __future__ import annotations

from collections.abc import Callable

from tools.model.state import (
    COPIED,
    FAULT,
    READER,
    READER_CLUSTER,
    READER_SNAPSHOT,
    Copy,
    Entry,
    Fault,
    Reader,
    Scenario,
)
from tools.model.world import Step, World


class ReaderSteps(World):
    """What the reader does next, for each place it can be at."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        judge_means: bool = True,
        every_kill: bool = False,
    ) -> None:
        super().__init__(scenario, judge_means=judge_means, every_kill=every_kill)
        self.reader_step: dict[int, Callable[[bytes], list[Step]]] = {
            Reader.LOOK: self.reader_look,
            Reader.READ_SOURCE: self.reader_read_source,
            Reader.LOOK_AGAIN: self.reader_look_again,
            Reader.READ_TARGET: self.reader_read_target,
            Reader.DEAD: self.nothing,
            Reader.LATE: self.reader_late,
        }

    def reader_look(self, state: bytes) -> list[Step]:
        """A reader that has its result starts again: it reads as often as it likes."""
        steps: list[Step] = []
        for snapshot in self.layout.snapshots:
            if state[self.entry[snapshot]] == Entry.ACTIVE:
                for cluster, at in enumerate(self.layout.cluster_byte[snapshot]):
                    new = bytearray(state)
                    new[READER] = Reader.READ_SOURCE if state[at] < COPIED else Reader.READ_TARGET
                    new[READER_SNAPSHOT] = snapshot
                    new[READER_CLUSTER] = cluster
                    steps.append(("reader.look", 0, bytes(new)))
        return steps

    def reader_read_source(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        if self.source_is_right(state, state[READER_SNAPSHOT], state[READER_CLUSTER]):
            self.end_read(new)
        else:
            new[READER] = Reader.LOOK_AGAIN
        return [("reader.read_source", 0, bytes(new))]

    def reader_look_again(self, state: bytes) -> list[Step]:
        """I7. What the reader holds is wrong, so it had better notice."""
        new = bytearray(state)
        snapshot = state[READER_SNAPSHOT]
        if state[self.layout.cluster_byte[snapshot][state[READER_CLUSTER]]] >= COPIED:
            new[READER] = Reader.READ_TARGET
        else:
            self.end_read(new)
            if self.is_good(state, snapshot):
                new[FAULT] = Fault.SOURCE_READ
        return [("reader.look_again", 0, bytes(new))]

    def reader_read_target(self, state: bytes) -> list[Step]:
        """The state is looked at after the byte: a worker may publish late into a broken one."""
        new = bytearray(state)
        self.end_read(new)
        snapshot = state[READER_SNAPSHOT]
        copy = state[self.layout.target[snapshot][state[READER_CLUSTER]]]
        if self.is_good(state, snapshot) and copy != Copy.RIGHT:
            new[FAULT] = Fault.TARGET_READ
        return [("reader.read_target", 0, bytes(new))]

    def is_good(self, state: bytes, snapshot: int) -> bool:
        """What the reader looks at before it returns data: neither broken nor dropped."""
        return state[self.entry[snapshot]] == Entry.ACTIVE

    def end_read(self, new: bytearray) -> None:
        new[READER] = new[READER_SNAPSHOT] = new[READER_CLUSTER] = 0

    def reader_late(self, state: bytes) -> list[Step]:
        raise NotImplementedError("only a mutation is ever late")
