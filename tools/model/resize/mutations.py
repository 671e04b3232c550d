"""A resize with one rule removed, once per rule: each must give a counter-example (``tools.model.mutations``)."""

from __future__ import annotations

from typing import Final

from tools.model.mutations import Mutation
from tools.model.resize.protocol import ResizeProtocol
from tools.model.resize.scenarios import resize_scenario
from tools.model.resize.state import (
    ANNOUNCED,
    COORDINATOR,
    FAULT,
    FILE,
    GENERATION,
    HANDLE,
    HANDLE_FILE,
    HANDLE_MAPPED,
    HANDLE_SIZE,
    HEADER,
    RESIZES,
    SEGMENT,
    WORKER_LOCKED,
    WORKER_TOLD,
    Coordinator,
    Fault,
    Handle,
    Worker,
)
from tools.model.world import Step


class WorkersNotTested(ResizeProtocol):
    """The generation is raised, and workers are believed to have left."""

    def locked(self, state: bytes) -> bool:
        return False


class TestedBeforeRaised(ResizeProtocol):
    """The locks are tested first, and the generation is raised after that."""

    def raise_generation(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[RESIZES] -= 1
        new[COORDINATOR] = Coordinator.START if self.locked(state) else Coordinator.TEST
        return [("resize.test", 0, bytes(new))]

    def test(self, state: bytes) -> list[Step]:
        return self.store(state, "resize.raise", GENERATION, state[GENERATION] + 1, Coordinator.ANNOUNCE)


class CheckedBeforeLocked(ResizeProtocol):
    """A worker looks at the generation first, and takes its lock then."""

    def attach(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        if state[w + WORKER_TOLD] != state[GENERATION]:
            return [("worker.leave", number, self.gone(state, w))]
        return super().attach(state, number)

    def check(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        return [("worker.check", number, self.with_word(state, w, Worker.LOOK))]


class NotAnnounced(ResizeProtocol):
    """The new size is not announced."""

    def coordinator(self, state: bytes) -> list[Step]:
        if state[COORDINATOR] == Coordinator.ANNOUNCE:
            return self.store(state, "resize.announce", ANNOUNCED, 0, Coordinator.ALLOCATE)
        return super().coordinator(state)


class CommittedBeforeGrown(ResizeProtocol):
    """image_size is stored before the image is larger."""

    def coordinator(self, state: bytes) -> list[Step]:
        if state[COORDINATOR] == Coordinator.GROW:
            return self.store(state, "resize.commit", HEADER, 1, Coordinator.COMMIT)
        if state[COORDINATOR] == Coordinator.COMMIT:
            return self.store(state, "resize.grow", FILE, 1, Coordinator.CLEAR)
        return super().coordinator(state)


class CommittedBeforeAllocated(ResizeProtocol):
    """image_size is stored before the segment is larger."""

    def coordinator(self, state: bytes) -> list[Step]:
        if state[COORDINATOR] == Coordinator.ALLOCATE:
            return self.store(state, "resize.grow", FILE, 1, Coordinator.GROW)
        if state[COORDINATOR] == Coordinator.GROW:
            return self.store(state, "resize.commit", HEADER, 1, Coordinator.COMMIT)
        if state[COORDINATOR] == Coordinator.COMMIT:
            return self.store(state, "resize.allocate", SEGMENT, 1, Coordinator.CLEAR)
        return super().coordinator(state)


class ClearedBeforeCommitted(ResizeProtocol):
    """resize_to goes before image_size is stored."""

    def coordinator(self, state: bytes) -> list[Step]:
        if state[COORDINATOR] == Coordinator.COMMIT:
            return self.store(state, "resize.clear", ANNOUNCED, 0, Coordinator.CLEAR)
        if state[COORDINATOR] == Coordinator.CLEAR:
            return self.store(state, "resize.commit", HEADER, 1, Coordinator.START)
        return super().coordinator(state)


class NotSettled(ResizeProtocol):
    """One that adopts leaves an unfinished resize as it is."""

    def settled(self, state: bytes) -> int:
        return Coordinator.RAISE if not state[ANNOUNCED] else Coordinator.START


class AlwaysTakenBack(ResizeProtocol):
    """One that adopts takes an unfinished resize back, however far it came."""

    def settled(self, state: bytes) -> int:
        return Coordinator.SETTLE_SHRINK if state[ANNOUNCED] and not state[HEADER] else super().settled(state)


class FileReadFirst(ResizeProtocol):
    """A handle reads the image's size when it opens it, before it reads what the segment says."""

    def handle(self, state: bytes) -> list[Step]:
        if state[HANDLE] == Handle.OPEN:
            new = bytearray(super().handle(state)[0][2])
            new[HANDLE_FILE] = state[FILE]
            return [("handle.open", 0, bytes(new))]
        if state[HANDLE] == Handle.READ_FILE:
            return [("handle.read_file", 0, self.with_word(state, HANDLE, Handle.JUDGE))]
        return super().handle(state)


class JudgedOnce(ResizeProtocol):
    """A handle that finds sizes that do not fit does not look whether they have changed meanwhile."""

    def judge(self, state: bytes) -> bytes:
        after = super().judge(state)
        return after if after[HANDLE] != Handle.OPEN else self.with_word(state, FAULT, Fault.STALE)


class SegmentJudgedOnce(ResizeProtocol):
    """A handle that finds the segment longer or shorter than its words say does not start over."""

    def check_segment(self, state: bytes) -> bytes:
        after = super().check_segment(state)
        return after if after[HANDLE] != Handle.OPEN else self.with_word(state, FAULT, Fault.FOREIGN)


class SegmentJudgedByChange(ResizeProtocol):
    """... only if it finds that one of them has changed since it looked."""

    def check_segment(self, state: bytes) -> bytes:
        changed = (state[SEGMENT], state[HEADER]) != (state[HANDLE_MAPPED], state[HANDLE_SIZE])
        after = super().check_segment(state)
        return after if after[HANDLE] != Handle.OPEN or changed else self.with_word(state, FAULT, Fault.FOREIGN)


class LockLeftAtOnce(ResizeProtocol):
    """A worker gives its lock back as soon as it has its id."""

    def check(self, state: bytes, number: int) -> list[Step]:
        w = self.layout.worker[number]
        return [
            (name, who, self.with_word(after, w + WORKER_LOCKED, 0))
            for name, who, after in super().check(state, number)
        ]


_KILLED, _QUIET = resize_scenario("resize"), resize_scenario("undisturbed")

RESIZE_MUTATIONS: Final = (
    Mutation("workers-not-tested", WorkersNotTested, "SIZE", _QUIET),
    Mutation("tested-before-raised", TestedBeforeRaised, "SIZE", _QUIET),
    Mutation("checked-before-locked", CheckedBeforeLocked, "SIZE", _QUIET),
    Mutation("lock-left-at-once", LockLeftAtOnce, "SIZE", _QUIET),
    Mutation("not-announced", NotAnnounced, "REACH", _QUIET),
    Mutation("committed-before-grown", CommittedBeforeGrown, "REACH", _QUIET),
    Mutation("committed-before-allocated", CommittedBeforeAllocated, "REACH", _QUIET),
    Mutation("cleared-before-committed", ClearedBeforeCommitted, "REACH", _QUIET),
    Mutation("file-read-first", FileReadFirst, "REACH", _QUIET),
    Mutation("judged-once", JudgedOnce, "REACH", _QUIET),
    Mutation("segment-judged-once", SegmentJudgedOnce, "REACH", _QUIET),
    Mutation("segment-judged-by-change", SegmentJudgedByChange, "REACH", _KILLED),
    Mutation("not-settled", NotSettled, "SETTLED", _KILLED),
    Mutation("always-taken-back", AlwaysTakenBack, "SETTLED", _KILLED),
)
