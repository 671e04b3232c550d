"""The copy worker: claim, copy, publish; and what the coordinator does about a dead one."""

from __future__ import annotations

from collections.abc import Callable

from tools.model.state import (
    COORDINATOR,
    COPIED,
    PENDING,
    WORKER_CLUSTER,
    WORKER_SNAPSHOT,
    Coordinator,
    Copy,
    Entry,
    Scenario,
    Worker,
)
from tools.model.world import Step, World


class WorkerSteps(World):
    """What a worker does next, for each place it can be at."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        judge_means: bool = True,
        every_kill: bool = False,
    ) -> None:
        super().__init__(scenario, judge_means=judge_means, every_kill=every_kill)
        self.worker_step: dict[int, Callable[[bytes, int], list[Step]]] = {
            Worker.CLAIM: self.worker_claim,
            Worker.COPY: self.worker_copy,
            Worker.PUBLISH: self.worker_publish,
            Worker.DEAD: self.worker_dead,
        }

    def worker_claim(self, state: bytes, worker: int) -> list[Step]:
        k = self.layout.worker[worker]
        steps: list[Step] = []
        for snapshot in self.layout.snapshots:
            if state[self.entry[snapshot]] != Entry.ACTIVE:
                continue
            for cluster, at in enumerate(self.layout.cluster_byte[snapshot]):
                if state[at] == PENDING:
                    new = bytearray(state)
                    new[at] = worker + 1
                    new[k] = Worker.COPY
                    new[k + WORKER_SNAPSHOT] = snapshot
                    new[k + WORKER_CLUSTER] = cluster
                    steps.append(("worker.claim", worker, bytes(new)))
        return steps

    def copy(self, state: bytes, worker: int, new: bytearray) -> None:
        k = self.layout.worker[worker]
        snapshot, cluster = state[k + WORKER_SNAPSHOT], state[k + WORKER_CLUSTER]
        right = self.source_is_right(state, snapshot, cluster)
        new[self.layout.target[snapshot][cluster]] = Copy.RIGHT if right else Copy.WRONG

    def set_copied(self, state: bytes, worker: int, new: bytearray) -> None:
        k = self.layout.worker[worker]
        snapshot, cluster = state[k + WORKER_SNAPSHOT], state[k + WORKER_CLUSTER]
        new[self.layout.cluster_byte[snapshot][cluster]] = COPIED

    def end_copy(self, worker: int, new: bytearray) -> None:
        k = self.layout.worker[worker]
        new[k] = Worker.CLAIM
        new[k + WORKER_SNAPSHOT] = new[k + WORKER_CLUSTER] = 0

    def worker_copy(self, state: bytes, worker: int) -> list[Step]:
        new = bytearray(state)
        self.copy(state, worker, new)
        new[self.layout.worker[worker]] = Worker.PUBLISH
        return [("worker.copy", worker, bytes(new))]

    def worker_publish(self, state: bytes, worker: int) -> list[Step]:
        new = bytearray(state)
        self.set_copied(state, worker, new)
        self.end_copy(worker, new)
        return [("worker.publish", worker, bytes(new))]

    def worker_dead(self, state: bytes, worker: int) -> list[Step]:
        """First its claims are returned, then a new worker may have the id."""
        if state[COORDINATOR] == Coordinator.DEAD:
            return []
        new = bytearray(state)
        self.return_claims(state, worker, new)
        new[self.layout.worker[worker]] = Worker.CLAIM
        return [("coordinator.return_claims", worker, bytes(new))]

    def return_claims(self, state: bytes, worker: int, new: bytearray) -> None:
        for row in self.layout.cluster_byte[1:]:
            for at in row:
                if state[at] == worker + 1:
                    new[at] = PENDING
