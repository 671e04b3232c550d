"""States that behave alike are visited once: which, and why nothing is lost.

Each reduction maps a state to another from which the same properties can be
broken. ``python -m tools.model --unreduced`` searches without any of them, and
takes accordingly longer; a test does so for a small scenario.
"""

from __future__ import annotations

from typing import Final

from tools.model.protocol import Protocol
from tools.model.state import (
    COORDINATOR,
    READER_SNAPSHOT,
    WORKER_SNAPSHOT,
    WRITER_BYTES,
    WRITER_MARK,
    WRITER_SEEN,
    Coordinator,
    Entry,
    Writer,
)


class Reductions:
    """The reductions that fit one protocol."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.layout = protocol.layout
        self.attach = protocol.scenario.attach
        self.alike = len(set(protocol.scenario.writers)) == 1

    def normal(self, state: bytes) -> bytes:
        """All reductions that keep every process what it is.

        *A slot is seen clear at once.* That the coordinator has seen a slot clear is
        known to it alone, and no other process's step depends on it. So
        ``coordinator.see_slot`` can be moved forward in a run to the first moment at
        which it is possible, and the rest of the run stays the same. (A dead slot is
        reaped seen or unseen.) A run in which the coordinator never looks ends in its
        deadline or its death, to which it makes no difference what was seen.

        *A writer killed out of flight is through.* Its slot is clear; nobody waits for
        it; unless a new process takes the slot, nothing will come from it any more.

        *What is in a snapshot that nobody can read is forgotten.* ACTIVE never comes back, and
        what is COMPLETE stays until it has its name.
        Writers and workers look at ACTIVE snapshots alone, a reader looks at the state
        last and fails: the bytes, the target, a copy or a read under way have no effect.
        """
        new: bytearray | None = None
        draining = state[COORDINATOR] == Coordinator.DRAIN
        for w in self.layout.writer:
            if state[w + WRITER_MARK]:
                continue
            if state[w] == Writer.DEAD and not self.attach:
                new = new or bytearray(state)
                new[w : w + WRITER_BYTES] = THROUGH
            elif draining and not state[w + WRITER_SEEN] and state[w] != Writer.DONE:
                new = new or bytearray(state)
                new[w + WRITER_SEEN] = 1
        if self.protocol.FORGETS_UNREADABLE:
            for snapshot in self.layout.snapshots:
                if state[self.layout.entry[snapshot]] in UNREADABLE:
                    new = self._forget(snapshot, new or bytearray(state))
        return state if new is None else bytes(new)

    def _forget(self, snapshot: int, new: bytearray) -> bytearray:
        for cluster in self.layout.clusters:
            new[self.layout.cluster_byte[snapshot][cluster]] = 0
            new[self.layout.target[snapshot][cluster]] = 0
        for worker, k in enumerate(self.layout.worker):
            if new[k + WORKER_SNAPSHOT] == snapshot:
                self.protocol.end_copy(worker, new)
        if new[READER_SNAPSHOT] == snapshot:
            self.protocol.end_read(new)
        return new

    def representative(self, state: bytes) -> bytes:
        """*Writers with the same program are interchangeable*: put them in order.

        Slots are numbered, but nothing depends on the number: the coordinator sees them
        in any order. This one renames processes, so a trace is made without it.
        """
        if not self.alike:
            return state
        slots = [state[w : w + WRITER_BYTES] for w in self.layout.writer]
        ordered = sorted(slots)
        if slots == ordered:
            return state
        return state[: self.layout.writer[0]] + b"".join(ordered)


UNREADABLE: Final = (Entry.BROKEN, Entry.ABANDONED, Entry.DROPPED, Entry.NAMED)
"""States of an entry after which nobody looks at its bytes or its target."""

THROUGH: Final = bytes((Writer.DONE, 0, 0, 0, 0, 0, 0))
"""The words of a writer that has nothing left to do."""
