"""One state of the world of a resize: which byte is which word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


class Cluster:
    """The byte of what was the last, partial cluster, in the snapshot."""

    PENDING: Final = 0
    COPIED: Final = 1
    COPIED_IN_PART: Final = 2
    """By a worker of the old size, for a snapshot of the new one."""


class Coordinator:
    """The step that the coordinator, or whoever adopts, does next."""

    RAISE: Final = 0
    TEST: Final = 1
    ANNOUNCE: Final = 2
    ALLOCATE: Final = 3
    GROW: Final = 4
    COMMIT: Final = 5
    CLEAR: Final = 6
    START: Final = 7
    CUT: Final = 8
    DONE: Final = 9
    DEAD: Final = 10
    SETTLE: Final = 11
    """Of one that adopts; this and what follows."""
    SETTLE_COMMIT: Final = 12
    SETTLE_CLEAR: Final = 13
    SETTLE_SHRINK: Final = 14


class Worker:
    """The step that a worker does next."""

    NONE: Final = 0
    """Not started."""
    OPEN: Final = 1
    ATTACH: Final = 2
    LOCK: Final = 3
    CHECK: Final = 4
    LOOK: Final = 5
    PUBLISH: Final = 6
    GONE: Final = 7


class Handle:
    """The step that a handle does next."""

    OPEN: Final = 0
    READ_SIZE: Final = 1
    READ_ANNOUNCED: Final = 2
    CHECK_SEGMENT: Final = 3
    READ_ANNOUNCED_AGAIN: Final = 4
    READ_FILE: Final = 5
    JUDGE: Final = 6
    MAP: Final = 7
    ATTACHED: Final = 8


class Fault:
    """History: what a step found wrong."""

    NONE: Final = 0
    STALE: Final = 1
    FOREIGN: Final = 2
    BEYOND: Final = 3
    UNFINISHED: Final = 4


# Offsets.
KILLS: Final = 0
RESIZES: Final = 1
FAULT: Final = 2
FILE: Final = 3
SEGMENT: Final = 4
HEADER: Final = 5
ANNOUNCED: Final = 6
GENERATION: Final = 7
CLUSTER: Final = 8
SNAPSHOT: Final = 9
COORDINATOR: Final = 10
HANDLE: Final = 11
HANDLE_MAPPED: Final = 12
HANDLE_SIZE: Final = 13
HANDLE_ANNOUNCED: Final = 14
HANDLE_FILE: Final = 15
FIRST_WORKER: Final = 16

# Worker: offsets from its start.
WORKER_SIZE: Final = 1
WORKER_TOLD: Final = 2
WORKER_LOCKED: Final = 3
WORKER_BYTES: Final = 4


@dataclass(frozen=True)
class ResizeScenario:
    """How often the coordinator, or one that adopts, may be killed, and how often a resize is tried."""

    name: str
    kills: int
    resizes: int

    @property
    def size(self) -> str:
        return f"a handle that attaches, an orphaned worker, {self.resizes} resizes, {self.kills} kills"


class ResizeLayout:
    """Where the words are."""

    def __init__(self, scenario: ResizeScenario) -> None:
        self._scenario = scenario
        #: One that was there before, and one for each start of the pool.
        workers = 1 + 1 + scenario.kills
        self.worker = [FIRST_WORKER + WORKER_BYTES * w for w in range(workers)]
        self.size_bytes = FIRST_WORKER + WORKER_BYTES * workers

    def first_state(self) -> bytes:
        """The old size everywhere; a worker of an earlier coordinator has just been started."""
        state = bytearray(self.size_bytes)
        state[KILLS], state[RESIZES] = self._scenario.kills, self._scenario.resizes
        state[self.worker[0]] = Worker.OPEN
        return bytes(state)
