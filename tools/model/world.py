"""What the steps of all processes share: the state's layout, the gate, what a snapshot lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tools.model.state import (
    COPIED,
    ENTRY_ODD,
    EPOCH,
    FAULT,
    Entry,
    Layout,
    Scenario,
)

Step = tuple[str, int, bytes]
"""Name, number of the process among its kind (from 0), state afterwards."""

PUBLISHED: Final = (Entry.ACTIVE, Entry.BROKEN, Entry.DROPPED, Entry.COMPLETE, Entry.NAMED)
"""The states of an entry whose cut has been published."""


class World:
    """One scenario.

    ``judge_means``: a step records a breach of I1 or I5, too. Off, only what a user could notice
    counts; that is how mutations are judged (``properties.py``).
    ``every_kill``: kill processes also where it can make no difference (``Protocol.kills``).
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        judge_means: bool = True,
        every_kill: bool = False,
    ) -> None:
        self.scenario = scenario
        self.layout = Layout(scenario)
        self.entry = self.layout.entry
        self.judge_means = judge_means
        self.every_kill = every_kill

    def nothing(self, _state: bytes, _number: int = 0) -> list[Step]:
        """The steps of a process that is through."""
        return []

    def with_fault(self, state: bytes, fault: int) -> bytes:
        new = bytearray(state)
        new[FAULT] = fault
        return bytes(new)

    def uncopied(self, state: bytes, clusters: Iterable[int]) -> list[int]:
        """The ACTIVE snapshots that lack one of the clusters."""
        return [
            snapshot
            for snapshot in self.layout.snapshots
            if state[self.entry[snapshot]] == Entry.ACTIVE
            and any(state[self.layout.cluster_byte[snapshot][c]] < COPIED for c in clusters)
        ]

    def source_is_right(self, state: bytes, snapshot: int, cluster: int) -> bool:
        """Whether the source, read now, shows the content at the snapshot's cut."""
        at = self.layout.source[cluster]
        return state[at] < snapshot and state[at + 1] < snapshot

    def abandon(self, state: bytes, odd: int, new: bytearray) -> None:
        """Compare-and-swap: PREPARED for this odd epoch -> ABANDONED."""
        for entry in self.entry[1:]:
            if state[entry] == Entry.PREPARED and state[entry + ENTRY_ODD] == odd:
                new[entry] = Entry.ABANDONED

    def open_gate(self, state: bytes, odd: int, new: bytearray) -> None:
        """Compare-and-swap: this odd epoch -> the next even one."""
        if state[EPOCH] == odd:
            new[EPOCH] = self.next_even(odd)

    def next_even(self, odd: int) -> int:
        return odd + 1
