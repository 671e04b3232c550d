"""Who is killed or stopped, and at which moment: acts out the schedule's decisions.

Aiming is reading: a writer's in-flight mark, a worker's state, the epoch, the coordinator's stage.  What is seen may be
over when the signal arrives; so a writer that is to be caught in a write is stopped, looked at, and let go again until
it was.
"""

from __future__ import annotations

import heapq
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tools.torturing import plan, watch
from tools.torturing.crew import Crew
from tools.torturing.nursery import Child
from tools.torturing.place import (
    A_GROUP,
    A_RESIZE,
    CLOSE_NOW,
    CLOSING,
    CUTTING,
    DROPPING,
    GROUPING,
    RESIZING,
    STARTING,
)
from tools.torturing.plan import COORDINATOR, READER, WRITER, Decision

#: For the moment aimed at; then any moment is good.
AIM_LIMIT_S = 0.4
HOLD_ODD_S = 0.5
ORPHAN_LIMIT_S = 3.0
SPIN_S = 0.010
CATCH_S = 0.040
LOOK_S = 0.0005

_STAGES = {
    plan.CUT: CUTTING,
    plan.ODD: CUTTING,
    plan.DROP: DROPPING,
    plan.CLOSE: CLOSING,
    plan.START: STARTING,
    plan.GROUP: GROUPING,
    plan.RESIZE: RESIZING,
}


class Aims:
    """Carries out one decision after the other, each at its time."""

    def __init__(self, crews: Sequence[Crew], schedule: Iterator[Decision]) -> None:
        self._crews = crews
        self._schedule = schedule
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._held: list[Child] = []

    def begin(self) -> None:
        """Plan the first decision; each plans the next one."""
        decision = next(self._schedule)

        def act() -> None:
            self._act(decision)
            self.begin()

        self._at(decision.pause_s, act)

    def turn(self) -> float:
        """Do what is due; how long (s) until something is."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else 1.0

    def end(self) -> None:
        """No more decisions; who is stopped goes on."""
        self._timers.clear()
        self._held.clear()
        for crew in self._crews:
            for child in crew.children:
                child.proceed()
            for pid in crew.watch.worker_pids():
                if crew.watch.is_worker(pid):
                    watch.signal_pid(pid, signal.SIGCONT)

    def _at(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), act))

    # -- decisions -------------------------------------------------------------------------------------------------

    def _act(self, decision: Decision) -> None:
        crew = self._crews[decision.image]
        crew.watch.follow()
        if decision.role == WRITER:
            self._act_on_writer(crew, decision)
        elif decision.role == READER:
            child = crew.readers.get(decision.number % crew.plan.readers)
            if child is not None:
                self._strike(crew, child, decision)
        elif decision.role == plan.WORKER:
            self._act_on_worker(crew, decision)
        elif decision.role == COORDINATOR:
            self._act_on_coordinator(crew, decision)
        elif decision.act == plan.STOP:
            for pid in crew.watch.worker_pids():
                self._hold_worker(crew, pid, decision.hold_s)
        else:
            for pid in crew.watch.worker_pids():
                crew.kill_worker(pid)
            if decision.role in (plan.CREW, plan.ALL) and crew.coordinator is not None:
                crew.kill(crew.coordinator)
            if decision.role == plan.ALL:
                for child in (*crew.writers.values(), *crew.readers.values()):
                    crew.kill(child)

    def _act_on_writer(self, crew: Crew, decision: Decision) -> None:
        child = crew.writers.get(decision.number % crew.plan.writers)
        if child is None or not child.alive:
            return
        if decision.aim == plan.BUSY:
            self._catch_in_flight(crew, child)
        self._strike(crew, child, decision)

    def _act_on_worker(self, crew: Crew, decision: Decision) -> None:
        pids = crew.watch.worker_pids()
        pid = pids[decision.number % len(pids)] if pids else 0
        if not crew.watch.is_worker(pid):
            return
        if decision.aim != plan.NOW:
            self._catch_claims(crew, pid)
        if decision.aim == plan.ORPHAN and crew.coordinator is not None and watch.signal_pid(pid, signal.SIGSTOP):
            crew.kill(crew.coordinator)
            self._kill_orphan(crew, pid, crew.coordinator, time.monotonic() + ORPHAN_LIMIT_S)
        elif decision.act == plan.KILL:
            crew.kill_worker(pid)
        else:
            self._hold_worker(crew, pid, decision.hold_s)

    def _hold_worker(self, crew: Crew, pid: int, hold_s: float) -> None:
        if not crew.watch.is_worker(pid) or not watch.signal_pid(pid, signal.SIGSTOP):
            return
        crew.figures.counts["stops.worker"] += 1

        def proceed() -> None:
            if crew.watch.is_worker(pid):
                watch.signal_pid(pid, signal.SIGCONT)

        self._at(hold_s, proceed)

    def _kill_orphan(self, crew: Crew, pid: int, dead: Child, until: float) -> None:
        """Kill a stopped worker of a dead coordinator as soon as the next one serves."""
        if crew.coordinator not in (None, dead) and crew.ready_ns is not None:
            crew.kill_worker(pid)
            crew.figures.counts["aims.orphan of an adopted image"] += 1
        elif time.monotonic() < until:
            self._at(SPIN_S, lambda: self._kill_orphan(crew, pid, dead, until))
        elif crew.watch.is_worker(pid):
            watch.signal_pid(pid, signal.SIGCONT)

    def _act_on_coordinator(self, crew: Crew, decision: Decision) -> None:
        child = crew.coordinator
        if child is None or not child.alive:
            return
        if decision.aim == plan.GROUP and not crew.plan.together:
            decision = replace(decision, aim=plan.CUT)
        if decision.act == plan.RESTART:
            crew.figures.counts["starts.orderly restarts"] += 1
            crew.orders.value = CLOSE_NOW
            return
        if decision.aim == plan.START:
            crew.kill(child)
        elif decision.aim == plan.CLOSE:
            crew.orders.value = CLOSE_NOW
        elif decision.aim == plan.GROUP:
            crew.wish.value = A_GROUP
        elif decision.aim == plan.RESIZE:
            crew.wish.value = A_RESIZE
        elif decision.aim == plan.ODD:
            writer = crew.writers.get(decision.number % crew.plan.writers)
            if writer is not None and self._catch_in_flight(crew, writer):
                self._hold(crew, writer, HOLD_ODD_S)
        if decision.aim == plan.NOW:
            self._strike(crew, child, decision)
        else:
            victim = child if decision.aim != plan.START else None
            self._aim(crew, victim, decision, time.monotonic() + AIM_LIMIT_S)

    # -- moments ---------------------------------------------------------------------------------------------------

    def _aim(self, crew: Crew, victim: Child | None, decision: Decision, until: float) -> None:
        """Strike when the coordinator is at the stage aimed at, at the latest at ``until``.

        victim: this one and no other; None: whichever comes next.
        """
        now = crew.coordinator
        here = victim or (now if now is not None and now.killed_ns is None else None)
        late = time.monotonic() > until
        if (here is None and late) or (here is not None and not here.alive):
            return
        there = crew.stage.value == _STAGES[decision.aim] and (decision.aim != plan.ODD or crew.watch.drained())
        if here is not None and (there or late):
            crew.figures.counts[f"aims.coordinator at {decision.aim}"] += there
            self._at(decision.delay_s, lambda: self._strike(crew, here, decision))
        else:
            self._at(LOOK_S, lambda: self._aim(crew, victim, decision, until))

    def _strike(self, crew: Crew, child: Child, decision: Decision) -> None:
        if decision.act == plan.KILL:
            crew.kill(child)
        else:
            self._hold(crew, child, decision.hold_s)

    def _catch_claims(self, crew: Crew, pid: int) -> None:
        """Have a worker stopped, if possible while it has clusters claimed."""
        until = time.monotonic() + CATCH_S
        while time.monotonic() < until and watch.signal_pid(pid, signal.SIGSTOP):
            _spin(lambda: watch.is_at_rest(pid), until)
            if crew.watch.claims(pid):
                crew.figures.counts["aims.worker with claims"] += 1
                return
            watch.signal_pid(pid, signal.SIGCONT)
            time.sleep(LOOK_S)

    def _catch_in_flight(self, crew: Crew, child: Child) -> bool:
        """Have a writer stopped in the middle of a write: stop it when it seems to be there, and look again."""
        until = time.monotonic() + CATCH_S
        while time.monotonic() < until and child.alive and child.stopped_ns is None:
            _spin(lambda: crew.watch.in_flight(child.pid), until)
            child.stop()
            _spin(lambda: watch.is_at_rest(child.pid), until)
            if crew.watch.in_flight(child.pid):
                crew.figures.counts["aims.writer in a write"] += 1
                return True
            child.proceed()
        return False

    def _hold(self, crew: Crew, child: Child, hold_s: float) -> None:
        """Stop a child for a while; one that is held already is left alone."""
        if not child.alive or child.killed_ns is not None or child in self._held:
            return
        self._held.append(child)
        child.stop()
        crew.figures.counts[f"stops.{child.role}"] += 1

        def proceed() -> None:
            self._held.remove(child)
            child.proceed()

        self._at(hold_s, proceed)


def _spin(condition: Callable[[], bool], until: float) -> None:
    while not condition() and time.monotonic() < until:
        pass
