"""A resize, one atomic step after the other: a state goes in, the states that may follow come out.

Read it together with ``workers/resize.py`` and with `attach` in ``shmcbw/segment.py``.
"""

from __future__ import annotations

from typing import Final

from tools.model.resize.state import (
    ANNOUNCED,
    CLUSTER,
    COORDINATOR,
    FAULT,
    FILE,
    GENERATION,
    HANDLE,
    HANDLE_ANNOUNCED,
    HANDLE_FILE,
    HANDLE_MAPPED,
    HANDLE_SIZE,
    HEADER,
    KILLS,
    RESIZES,
    SEGMENT,
    SNAPSHOT,
    WORKER_LOCKED,
    WORKER_SIZE,
    WORKER_TOLD,
    Cluster,
    Coordinator,
    Fault,
    Handle,
    ResizeLayout,
    ResizeScenario,
    Worker,
)
from tools.model.world import Step

RESIZE_STEPS: Final[dict[str, str]] = {
    "resize.raise": "the pool's generation is raised: workers of an earlier one leave",
    "resize.test": "no worker's lock is held",
    "resize.refuse": "one is: no resize",
    "resize.announce": "resize_to := the new size",
    "resize.allocate": "the segment grows",
    "resize.grow": "the image grows",
    "resize.commit": "image_size := the new size",
    "resize.clear": "resize_to := 0",
    "resize.start": "the generation is raised again, a worker is started",
    "resize.cut": "the new worker is ready: a snapshot",
    "resize.done": "its cluster is copied",
    "adopt.settle": "a new coordinator: does the image have the announced size?",
    "adopt.commit": "it has: image_size := the new size",
    "adopt.shrink": "it has not: the segment shrinks",
    "adopt.clear": "resize_to := 0",
    "worker.open": "the image is opened: its size",
    "worker.attach": "the segment is attached, its size looked at",
    "worker.lock": "the lock of an id is taken",
    "worker.check": "the generation is still ours",
    "worker.leave": "it is not, or the sizes differ: the lock is free",
    "worker.claim": "a snapshot: its cluster is claimed",
    "worker.publish": "it is copied and published",
    "handle.open": "the segment is opened and mapped as long as it is",
    "handle.read_size": "image_size is read",
    "handle.read_announced": "resize_to is read",
    "handle.check_segment": "the segment is as long as these say, or it starts over",
    "handle.read_announced_again": "resize_to is read again",
    "handle.read_file": "the image's size is read",
    "handle.judge": "it is one of these, or they have changed and it starts over, or the segment is stale",
    "handle.map": "the image is mapped",
    "handle.follow": "image_size is larger: mapped anew",
    "kill.coordinator": "SIGKILL of the coordinator",
}


class ResizeProtocol:
    """All processes of one scenario. Without one of its rules: ``mutations.py``."""

    def __init__(self, scenario: ResizeScenario, *, judge_means: bool = True, every_kill: bool = False) -> None:
        self.scenario = scenario
        self.layout = ResizeLayout(scenario)
        # All that is judged here are promises, and every kill is done: these are there because a search says them.
        self.judge_means = judge_means
        self.every_kill = every_kill

    def steps(self, state: bytes) -> list[Step]:
        """Every step that some process may do next."""
        if state[FAULT]:
            return []
        steps = self.coordinator(state) + self.handle(state)
        for number in range(len(self.layout.worker)):
            steps += self.worker(state, number)
        if not steps and not self.finished(state):
            steps.append(("nobody", 0, self.with_word(state, FAULT, Fault.UNFINISHED)))
        if state[KILLS] and state[COORDINATOR] not in (Coordinator.DEAD, Coordinator.DONE):
            new = bytearray(state)
            new[KILLS] -= 1
            new[COORDINATOR] = Coordinator.DEAD
            steps.append(("kill.coordinator", 0, bytes(new)))
        return steps

    def finished(self, state: bytes) -> bool:
        same = state[FILE] == state[SEGMENT] == state[HEADER] == state[HANDLE_SIZE]
        return (
            same
            and not state[ANNOUNCED]
            and state[COORDINATOR] == Coordinator.DONE
            and state[HANDLE] == Handle.ATTACHED
        )

    @staticmethod
    def with_word(state: bytes, offset: int, value: int) -> bytes:
        new = bytearray(state)
        new[offset] = value
        return bytes(new)

    # -- coordinator -----------------------------------------------------------------------------

    def store(self, state: bytes, name: str, offset: int, value: int, then: int) -> list[Step]:
        """One store of the coordinator."""
        new = bytearray(state)
        new[offset] = value
        new[COORDINATOR] = then
        return [(name, 0, bytes(new))]

    def coordinator(self, state: bytes) -> list[Step]:
        at = state[COORDINATOR]
        if at == Coordinator.RAISE:
            if not state[RESIZES] or state[HEADER]:
                return self.start(state)
            return self.raise_generation(state)
        if at == Coordinator.TEST:
            return self.test(state)
        if at == Coordinator.ANNOUNCE:
            return self.store(state, "resize.announce", ANNOUNCED, 1, Coordinator.ALLOCATE)
        if at == Coordinator.ALLOCATE:
            return self.store(state, "resize.allocate", SEGMENT, 1, Coordinator.GROW)
        if at == Coordinator.GROW:
            return self.store(state, "resize.grow", FILE, 1, Coordinator.COMMIT)
        if at == Coordinator.COMMIT:
            return self.store(state, "resize.commit", HEADER, 1, Coordinator.CLEAR)
        if at == Coordinator.CLEAR:
            return self.store(state, "resize.clear", ANNOUNCED, 0, Coordinator.START)
        if at == Coordinator.START:
            return self.start(state)
        if at == Coordinator.CUT:
            return self.cut(state)
        return self.adopt(state, at)

    def raise_generation(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[RESIZES] -= 1
        return self.store(bytes(new), "resize.raise", GENERATION, state[GENERATION] + 1, Coordinator.TEST)

    def locked(self, state: bytes) -> bool:
        return any(state[w + WORKER_LOCKED] for w in self.layout.worker)

    def test(self, state: bytes) -> list[Step]:
        if not self.locked(state):
            return [("resize.test", 0, self.with_word(state, COORDINATOR, Coordinator.ANNOUNCE))]
        return [("resize.refuse", 0, self.with_word(state, COORDINATOR, Coordinator.START))]

    def start(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[GENERATION] += 1
        free = next(w for w in self.layout.worker if state[w] == Worker.NONE)
        new[free], new[free + WORKER_TOLD] = Worker.OPEN, new[GENERATION]
        new[COORDINATOR] = Coordinator.CUT
        return [("resize.start", 0, bytes(new))]

    def cut(self, state: bytes) -> list[Step]:
        if state[SNAPSHOT]:
            if state[CLUSTER] == Cluster.PENDING:
                return []
            return [("resize.done", 0, self.with_word(state, COORDINATOR, Coordinator.DONE))]
        for w in self.layout.worker:
            if state[w] in (Worker.CHECK, Worker.LOOK) and state[w + WORKER_TOLD] == state[GENERATION]:
                return [("resize.cut", 0, self.with_word(state, SNAPSHOT, 1))]
        return []

    def adopt(self, state: bytes, at: int) -> list[Step]:
        """One comes that adopts, settles what is unfinished, and begins anew."""
        if at == Coordinator.DEAD:
            if state[SNAPSHOT]:
                return [("resize.start", 0, self.start(state)[0][2])]
            return [("adopt.settle", 0, self.with_word(state, COORDINATOR, self.settled(state)))]
        if at == Coordinator.SETTLE_COMMIT:
            return self.store(state, "adopt.commit", HEADER, 1, Coordinator.SETTLE_CLEAR)
        if at == Coordinator.SETTLE_SHRINK:
            return self.store(state, "adopt.shrink", SEGMENT, 0, Coordinator.SETTLE_CLEAR)
        if at == Coordinator.SETTLE_CLEAR:
            return self.store(state, "adopt.clear", ANNOUNCED, 0, Coordinator.RAISE)
        return []

    def settled(self, state: bytes) -> int:
        """Where one that adopts goes on."""
        if not state[ANNOUNCED]:
            return Coordinator.RAISE
        if state[HEADER]:
            return Coordinator.SETTLE_CLEAR
        return Coordinator.SETTLE_COMMIT if state[FILE] else Coordinator.SETTLE_SHRINK

    # -- workers ---------------------------------------------------------------------------------

    def worker(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        new = bytearray(state)
        if state[w] == Worker.OPEN:
            new[w], new[w + WORKER_SIZE] = Worker.ATTACH, state[FILE]
            return [("worker.open", number, bytes(new))]
        if state[w] == Worker.ATTACH:
            return self.attach(state, number)
        if state[w] == Worker.LOCK:
            new[w], new[w + WORKER_LOCKED] = Worker.CHECK, 1
            return [("worker.lock", number, bytes(new))]
        if state[w] == Worker.CHECK:
            return self.check(state, number)
        if state[w] == Worker.LOOK:
            if not state[SNAPSHOT] or state[CLUSTER] != Cluster.PENDING:
                # Nothing to do: it sleeps until there is, and looks at the generation first.
                if state[w + WORKER_TOLD] == state[GENERATION]:
                    return []
                return [("worker.leave", number, self.gone(state, w))]
            new[w] = Worker.PUBLISH
            return [("worker.claim", number, bytes(new))]
        if state[w] == Worker.PUBLISH:
            new[w] = Worker.CHECK
            if state[CLUSTER] == Cluster.PENDING:
                in_part = state[HEADER] > state[w + WORKER_SIZE]
                new[CLUSTER] = Cluster.COPIED_IN_PART if in_part else Cluster.COPIED
            return [("worker.publish", number, bytes(new))]
        return []

    def attach(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        if state[w + WORKER_SIZE] != state[HEADER]:
            return [("worker.leave", number, self.gone(state, w))]
        return [("worker.attach", number, self.with_word(state, w, Worker.LOCK))]

    def check(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        if state[w + WORKER_TOLD] != state[GENERATION]:
            return [("worker.leave", number, self.gone(state, w))]
        return [("worker.check", number, self.with_word(state, w, Worker.LOOK))]

    @staticmethod
    def gone(state: bytes, w: int) -> bytes:
        new = bytearray(state)
        new[w], new[w + WORKER_LOCKED] = Worker.GONE, 0
        return bytes(new)

    # -- a handle --------------------------------------------------------------------------------

    def handle(self, state: bytes) -> list[Step]:
        at = state[HANDLE]
        if at == Handle.OPEN:
            return self.look(state, "handle.open", HANDLE_MAPPED, SEGMENT, Handle.READ_SIZE)
        if at == Handle.READ_SIZE:
            return self.look(state, "handle.read_size", HANDLE_SIZE, HEADER, Handle.READ_ANNOUNCED)
        if at == Handle.READ_ANNOUNCED:
            return self.look(state, "handle.read_announced", HANDLE_ANNOUNCED, ANNOUNCED, Handle.CHECK_SEGMENT)
        if at == Handle.CHECK_SEGMENT:
            return [("handle.check_segment", 0, self.check_segment(state))]
        if at == Handle.READ_ANNOUNCED_AGAIN:
            name = "handle.read_announced_again"
            return self.look(state, name, HANDLE_ANNOUNCED, ANNOUNCED, Handle.READ_FILE)
        if at == Handle.READ_FILE:
            return self.look(state, "handle.read_file", HANDLE_FILE, FILE, Handle.JUDGE)
        if at == Handle.JUDGE:
            return [("handle.judge", 0, self.judge(state))]
        if at == Handle.MAP:
            there = state[FILE] >= state[HANDLE_SIZE] and state[SEGMENT] >= state[HANDLE_SIZE]
            new = bytearray(state)
            new[HANDLE] = Handle.ATTACHED
            new[FAULT] = Fault.NONE if there else Fault.BEYOND
            return [("handle.map", 0, bytes(new))]
        if state[HEADER] > state[HANDLE_SIZE]:
            new = bytearray(state)
            new[HANDLE_SIZE] = state[HEADER]
            new[FAULT] = Fault.NONE if state[FILE] and state[SEGMENT] else Fault.BEYOND
            return [("handle.follow", 0, bytes(new))]
        return []

    @staticmethod
    def look(state: bytes, name: str, to: int, word: int, then: int) -> list[Step]:
        new = bytearray(state)
        new[to], new[HANDLE] = state[word], then
        return [(name, 0, bytes(new))]

    def check_segment(self, state: bytes) -> bytes:
        size, announced, mapped = state[HANDLE_SIZE], state[HANDLE_ANNOUNCED], state[HANDLE_MAPPED]
        if state[SEGMENT] in (size, max(size, announced)) and mapped >= size:
            return self.with_word(state, HANDLE, Handle.READ_ANNOUNCED_AGAIN)
        return self.with_word(state, HANDLE, Handle.OPEN)

    def judge(self, state: bytes) -> bytes:
        """The two words are read again in one step: a resize that goes on between them has changed the first already,
        or changes nothing that was not seen."""
        size, announced = state[HANDLE_SIZE], state[HANDLE_ANNOUNCED]
        if state[HANDLE_FILE] in (size, max(size, announced)):
            return self.with_word(state, HANDLE, Handle.MAP)
        if (state[HEADER], state[ANNOUNCED]) != (size, announced):
            return self.with_word(state, HANDLE, Handle.OPEN)
        return self.with_word(state, FAULT, Fault.STALE)
