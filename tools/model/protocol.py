"""The protocol: what each process does, one atomic step after the other.

A state goes in, the states that may follow come out. ``STEPS`` names every step;
a step is what one process does to words that others see. Read it together with
the write, cut, copy, read and break protocols of ``shmcbw/DESIGN.md``, whose
numbered steps are quoted below.

What is one step and what is not
--------------------------------
Steps are as small as the protocol needs and no smaller. Where two actions are one
step here, one of these holds:

(a) *The mark is cleared together with the action before it* (odd epoch read, copy
    needed, last half stored). Nobody but the coordinator reads a mark, and a set
    mark only makes it wait; a run where the mark is cleared later is a run where
    the coordinator looks later. Killed in between: as if killed before.
(b) *Waking up is one step with the mark that follows.* What is waited for
    (another epoch; copied, broken or dropped) never becomes untrue again, so a
    run that wakes up first and marks later is a run that wakes up later.
(c) *Loads of words that only move one way are one step* (the bytes of all active
    snapshots in step 4: no snapshot becomes active while the writer is in flight,
    and no byte leaves COPIED).
(d) *A table walk is one step where one entry can match*: one cut is under way at
    a time, so one entry is PREPARED.
(e) *Source to target is one step* (``worker.copy``): see "stamps only grow" in
    ``state.py``. The same goes for the reader's copy into its private buffer.
(f) *The second look at data that is right is left out*: whatever it sees, data
    that is right may be returned, and going to the target is a run of its own.

(g) *The sticky error and the state are one step* (``writer.break``): the error comes first and the
    write goes on after the state has changed. Killed in between: an ACTIVE snapshot whose reads
    fail and which nobody has written past; as if the break had not begun, until somebody ends it.

A failed copy (byte back to PENDING, an error for the waiting slots) has no step:
for others it is ``coordinator.return_claims`` followed by ``writer.break``.
Semaphores have no step: they only wake, and a process that waits may look again
at any time. So wanted ranges have no word either; the worker copies anything.
"""

from __future__ import annotations

from typing import ClassVar, Final

from tools.model.coordinator import CoordinatorSteps
from tools.model.reader import ReaderSteps
from tools.model.state import (
    COORDINATOR,
    COORDINATOR_CUT,
    EPOCH,
    KILLS,
    READER,
    WORKER_BYTES,
    WRITER_BYTES,
    WRITER_MARK,
    WRITER_SEEN,
    Coordinator,
    Entry,
    Fault,
    Reader,
    Worker,
    Writer,
)
from tools.model.worker import WorkerSteps
from tools.model.world import Step
from tools.model.writer import WriterSteps

STEPS: Final[dict[str, str]] = {
    "writer.mark": "step 1: mark the slot in flight",
    "writer.read_epoch": "step 2: read the epoch; odd: clear the mark and wait at the gate",
    "writer.give_up": "gated, deadline passed: entry PREPARED for that epoch -> ABANDONED (CAS)",
    "writer.open": "then: epoch from that odd value to the next even one (CAS); start over",
    "writer.look": "steps 3, 4: map says this epoch, or copied for all; else clear the mark, wait",
    "writer.break": "waiting, deadline passed: snapshot ACTIVE -> BROKEN (CAS); start over",
    "writer.mark_map": "step 5: epoch into the epoch map",
    "writer.store_first": "step 6: store the first half",
    "writer.store_second": "step 6: store the second half, clear the mark",
    "writer.attach": "a new process takes a dead writer's slot and clears it",
    "coordinator.prepare": "cut: entry FREE -> PREPARED for the next odd epoch",
    "coordinator.close": "cut: epoch := odd",
    "coordinator.see_slot": "cut: a slot's mark is clear: that slot is drained",
    "coordinator.reap_slot": "cut: a slot's mark is set and its lock free: hold the lock, clear it",
    "coordinator.publish": "cut: entry PREPARED -> ACTIVE (CAS), once all slots are drained",
    "coordinator.abandon": "cut, deadline passed: entry PREPARED -> ABANDONED (CAS)",
    "coordinator.open": "cut: epoch from the odd value to the next even one (CAS)",
    "coordinator.drop": "a snapshot is no longer needed: ACTIVE -> DROPPED (CAS)",
    "coordinator.complete": "every byte of a backup is COPIED: ACTIVE -> COMPLETE (CAS)",
    "coordinator.name": "COMPLETE: the target is synced and gets its name",
    "coordinator.adopt": "a new coordinator: entries PREPARED -> ABANDONED (CAS)",
    "coordinator.adopt_open": "then: an odd epoch to the next even one (CAS)",
    "coordinator.return_claims": "a worker's lock is free: its claims -> PENDING, start a new one",
    "worker.claim": "byte PENDING -> own id (CAS)",
    "worker.copy": "copy the cluster from source to target",
    "worker.publish": "byte := COPIED",
    "reader.look": "look at the snapshot's state and the cluster's byte",
    "reader.read_source": "byte below COPIED: copy from the source into a private buffer",
    "reader.look_again": "look at byte and state again: still PENDING or COPYING, and ACTIVE: good",
    "reader.read_target": "byte COPIED: read the target, then look at the state: ACTIVE: good",
    "kill.writer": "SIGKILL",
    "kill.coordinator": "SIGKILL",
    "kill.worker": "SIGKILL",
    "kill.reader": "SIGKILL",
}


class Protocol(WriterSteps, CoordinatorSteps, WorkerSteps, ReaderSteps):
    """All processes of one scenario. Without one of its rules: ``mutations.py``."""

    FORGETS_UNREADABLE: ClassVar[bool] = True
    """Whether bytes and targets of a snapshot that is not ACTIVE are never looked at again."""

    def steps(self, state: bytes) -> list[Step]:
        """Every step that some process may do next.

        A live writer that has no step of its own is blocked by somebody else (promise 2), and
        a state in which nobody has a step must be the end (promise 3): both are faults. The
        reader changes nothing that others see, so its steps do not count as progress.
        """
        steps: list[Step] = []
        for slot, w in enumerate(self.layout.writer):
            own = self.writer_step[state[w]](state, slot)
            if not own and state[w] < Writer.DONE:
                own = [("writer.blocked", slot, self.with_fault(state, Fault.BLOCKED))]
            steps += own
        steps += self.coordinator_step[state[COORDINATOR]](state)
        for worker, k in enumerate(self.layout.worker):
            steps += self.worker_step[state[k]](state, worker)
        if self.scenario.drop:
            steps += self.coordinator_drop(state)
        if self.scenario.finish:
            steps += self.coordinator_complete(state)
        if not steps and not self.finished(state):
            steps.append(("nobody", 0, self.with_fault(state, Fault.UNFINISHED)))
        if self.scenario.reader:
            steps += self.reader_step[state[READER]](state)
        if state[KILLS]:
            steps += self.kills(state)
        return steps

    def finished(self, state: bytes) -> bool:
        """Writers through, coordinator idle, gate open, no cut half taken, snapshots copied or given up."""
        return (
            all(state[w] >= Writer.DONE for w in self.layout.writer)
            and all(state[entry] != Entry.PREPARED for entry in self.entry[1:])
            and state[COORDINATOR] == Coordinator.DONE
            and not state[EPOCH] & 1
            and not self.uncopied(state, self.layout.clusters)
        )

    def kills(self, state: bytes) -> list[Step]:
        """Kill any process at any step.

        A process that holds nothing others wait for (no mark, no claim, no cut under way) and
        is killed is, for everybody else, a process that is never scheduled again: those runs
        are in the search already, with a kill left over. ``every_kill`` does them all the same.
        """
        steps: list[Step] = []
        for slot, w in enumerate(self.layout.writer):
            if state[w] < Writer.DONE and (state[w + WRITER_MARK] or self.every_kill):
                new = self.one_kill(state)
                mark, seen = state[w + WRITER_MARK], state[w + WRITER_SEEN]
                new[w : w + WRITER_BYTES] = bytes((Writer.DEAD, 0, mark, seen, 0, 0, 0))
                steps.append(("kill.writer", slot, bytes(new)))
        idle = state[COORDINATOR] in (Coordinator.PREPARE, Coordinator.DONE)
        if state[COORDINATOR] != Coordinator.DEAD and (not idle or self.every_kill):
            new = self.one_kill(state)
            self.go_open(new)
            new[COORDINATOR] = Coordinator.DEAD
            new[COORDINATOR_CUT] = 0
            steps.append(("kill.coordinator", 0, bytes(new)))
        for worker, k in enumerate(self.layout.worker):
            if state[k] != Worker.DEAD and (state[k] != Worker.CLAIM or self.every_kill):
                new = self.one_kill(state)
                new[k : k + WORKER_BYTES] = bytes((Worker.DEAD, 0, 0, 0))
                steps.append(("kill.worker", worker, bytes(new)))
        if self.every_kill and self.scenario.reader and state[READER] != Reader.DEAD:
            new = self.one_kill(state)
            self.end_read(new)
            new[READER] = Reader.DEAD
            steps.append(("kill.reader", 0, bytes(new)))
        return steps

    def one_kill(self, state: bytes) -> bytearray:
        new = bytearray(state)
        new[KILLS] -= 1
        return new
