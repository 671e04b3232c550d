"""One round: start, kill and stop and restart by the schedule, let all recover, finish, look for what is left."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from tools.torturing import plan, watch
from tools.torturing.aims import Aims
from tools.torturing.chair import Chair
from tools.torturing.crew import Crew
from tools.torturing.evidence import Evidence
from tools.torturing.figures import Figures
from tools.torturing.nursery import Nursery
from tools.torturing.place import FINISH, Place
from tools.torturing.plan import ImagePlan
from tools.torturing.stalls import Stalls, Witness
from tools.torturing.together import judge_groups

#: Everything must be whole again by then after the last kill.
RECOVER_LIMIT_S = 20.0
#: Jobs get 12 s there, checks 1.5 s.
FINISH_LIMIT_S = 40.0
LEAVE_LIMIT_S = 10.0
LEAK_LIMIT_S = 8.0
LOOK_S = 0.05
TURN_S = 0.003


class Interrupted(Exception):
    """The user wants an end."""


class Stuck(Exception):
    """A phase has not come to its end; told as a hang already."""


class Storm:
    """A round.  Everything that it starts is gone when `run` returns or raises."""

    def __init__(
        self,
        directory: Path,
        seed: str,
        plans: list[ImagePlan],
        rate: float,
        cache: Path,
        interrupted: Callable[[], bool],
        tick: Callable[[Figures], None],
    ) -> None:
        self.directory = directory
        self.figures = Figures(rounds=1)
        self._interrupted = interrupted
        self._tick = tick
        self._looked_s = 0.0
        self._stalls = Stalls()
        self._witness = Witness(directory / "witness")
        self._chance = random.Random(f"{seed} end")
        self._nursery = Nursery(cache)
        self._crews: list[Crew] = []
        self._chairs: list[Chair] = []
        self._aims = Aims(self._crews, plan.decisions(seed, len(plans), rate))
        try:
            for index, image_plan in enumerate(plans):
                place = Place(directory / f"image{index}")
                self._crews.append(Crew(place, image_plan, self._nursery, self.figures, self._stalls))
            together = [self._crews] if plans[0].together else [[crew] for crew in self._crews]
            self._chairs += [Chair(crews, self._nursery) for crews in together]
            self.figures.counts["groups.rounds"] += bool(plans[0].together)
        except BaseException:
            self._nursery.close()
            raise

    def run(self, seconds: float) -> Figures:
        """The whole round, and its judgement.  Interrupted: the user's wish; nothing is judged then."""
        orderly = False
        try:
            self._start()
            self._rage(seconds)
            self._recover()
            self._finish()
            orderly = True
        except Stuck:
            pass
        finally:
            self._end(orderly)
        evidences = []
        for crew in self._crews:
            evidence = Evidence(crew.place)
            evidences.append(evidence)
            self.figures.add(evidence.judge())
            for name in evidence.leftovers() if orderly else ():
                crew.fail("leak", f"the file {name} among the targets")
        self.figures.add(judge_groups(evidences))
        return self.figures

    # -- the phases ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for chair in self._chairs:
            chair.start()
        for crew in self._crews:
            for number in range(crew.plan.writers):
                crew.start_writer(number)
            for number in range(crew.plan.readers):
                crew.start_reader(number)
        self._wait(lambda crew: crew.recovered, RECOVER_LIMIT_S, "not started")

    def _rage(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._aims.begin()
        while time.monotonic() < until:
            self._turn()

    def _recover(self) -> None:
        """No more kills: everybody who is needed comes back, without anybody's help."""
        self._aims.end()
        self._wait(lambda crew: crew.recovered, RECOVER_LIMIT_S, "not recovered")

    def _finish(self) -> None:
        """An orderly end, the coordinators first or the writers first."""
        for crew in self._crews:
            crew.figures.counts["reaps.workers replaced"] += crew.watch.workers_replaced()
            crew.kept_up = False
        steps = [self._finish_coordinators, self._finish_writers]
        self._chance.shuffle(steps)
        for step in steps:
            step()
        for crew in self._crews:
            if "litter" in crew.plan.sabotage:
                crew.watch.litter()

    def _finish_coordinators(self) -> None:
        for crew in self._crews:
            crew.orders.value = FINISH
        self._wait(lambda crew: crew.coordinator is None, FINISH_LIMIT_S, "the coordinator has not ended")

    def _finish_writers(self) -> None:
        for crew in self._crews:
            crew.stop.value = 1
        self._wait(lambda crew: not (crew.writers or crew.readers), LEAVE_LIMIT_S, "writers or readers have not left")

    def _end(self, orderly: bool) -> None:
        """What is left after an orderly end is a leak.  Then it is removed."""
        for crew in self._crews:
            crew.kept_up = False
            for child in crew.children:
                if child.alive:
                    child.kill()
        deadline = time.monotonic() + LEAVE_LIMIT_S
        for crew in self._crews:
            for child in crew.children:
                while not self._nursery.died(child) and time.monotonic() < deadline:
                    time.sleep(0.002)
        self._nursery.close()
        try:
            if orderly:
                self._find_leaks()
        finally:
            watch.kill_all(watch.processes_of(self.directory))
            for crew in self._crews:
                crew.watch.remove_names()
                crew.save_fates()
                crew.close()
            self._witness.close()
            self.figures.counts["stalls.of the machine"] += len(self._stalls.intervals)
            self.figures.at_least("stall", self._stalls.longest_ns)

    def _find_leaks(self) -> None:
        deadline = time.monotonic() + LEAK_LIMIT_S
        # Without processes nothing goes any more.
        while (processes := watch.processes_of(self.directory)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in processes:
            self.figures.fail("leak", self.directory.name, f"process {process.pid}: {process}")
        for crew in self._crews:
            for name in crew.watch.names():
                crew.fail("leak", f"/dev/shm: {name}")

    # -- the loop --------------------------------------------------------------------------------------------------

    def _wait(self, condition: Callable[[Crew], bool], limit_s: float, what: str) -> None:
        started_ns = time.monotonic_ns()
        while not all(condition(crew) for crew in self._crews):
            self._turn()
            now_ns = time.monotonic_ns()
            if now_ns - started_ns - self._stalls.within(started_ns, now_ns) > limit_s * 1e9:
                for crew in self._crews:
                    if not condition(crew):
                        crew.tell_stuck(f"{what} after {limit_s:.0f} s")
                raise Stuck

    def _turn(self) -> None:
        if self._interrupted():
            raise Interrupted
        self._stalls.look()
        due_s = self._aims.turn()
        for chair in self._chairs:
            chair.keep_up()
        for crew in self._crews:
            crew.keep_up()
        if time.monotonic() - self._looked_s >= LOOK_S:
            self._looked_s = time.monotonic()
            self._witness.touch()
            for crew in self._crews:
                crew.look()
            self._tick(self.figures)
        time.sleep(min(due_s, TURN_S))
