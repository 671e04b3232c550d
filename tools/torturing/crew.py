"""The crew of one image: its coordinator, writers and readers, kept alive by the driver, and what it sees of them.

Whoever dies is started again at once, as a supervisor like systemd would, and nothing else is ever done for them.
A writer hangs when it has logged nothing for longer than its deadline and 2 s, its own stops not counted; before its
first write only while a coordinator serves.  A reader hangs when it has told nothing for 5 s and these 2 s.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict

from shmcbw.workers.stamps import make_image
from tools.torturing import watch
from tools.torturing.evidence import Fate
from tools.torturing.figures import Figures
from tools.torturing.nursery import Child, Nursery
from tools.torturing.place import EventReader, Place, SharedByte
from tools.torturing.plan import COORDINATOR, READER, WRITER, ImagePlan
from tools.torturing.stalls import Stalls
from tools.torturing.watch import Death, Watch

HANG_SLACK_S = 2.0
READ_LIMIT_S = 5.0
#: A coordinator must serve by then, if it is not killed.
START_LIMIT_S = 15.0
FAILED_STARTS_MAX = 8
REAP_LIMIT_NS = 1_000_000_000


class Crew:
    """The coordinator, the writers and the readers of one image."""

    def __init__(self, place: Place, image_plan: ImagePlan, nursery: Nursery, figures: Figures, stalls: Stalls) -> None:
        self.place = place
        self.plan = image_plan
        self.nursery = nursery
        self.figures = figures
        self.stalls = stalls
        place.make()
        image_plan.save(place.plan)
        make_image(place.image, image_plan.layout)
        os.truncate(place.image, image_plan.sizes[0])
        self.stage = SharedByte(place.stage)
        self.orders = SharedByte(place.orders)
        self.wish = SharedByte(place.wish)
        self.stop = SharedByte(place.stop)
        self.watch = Watch(place)
        self.children: list[Child] = []
        self.coordinator: Child | None = None
        self.ready_ns: int | None = None
        self.unready_since_ns = time.monotonic_ns()
        self.failed_starts = 0
        self.events: EventReader | None = None
        self.writers: dict[int, Child] = {}
        self.readers: dict[int, Child] = {}
        self.sizes: dict[int, int] = {}
        self.progress_ns: dict[int, int] = {}
        self.wrote: dict[int, bool] = {}
        #: Numbers of writers, pids of readers.
        self.hung: set[int] = set()
        self.deaths: list[Death] = []
        self.kept_up = True

    def fail(self, kind: str, what: str) -> None:
        self.figures.fail(kind, self.place.directory.name, what)

    # -- starting --------------------------------------------------------------------------------------------------

    def coordinator_started(self, child: Child) -> None:
        """It may be another crew's too."""
        self.coordinator = child
        self.events = EventReader(self.place.events(COORDINATOR, 0, child.incarnation))
        self.children.append(child)

    def start_writer(self, number: int) -> None:
        incarnation = sum(child.role == WRITER and child.number == number for child in self.children)
        child = self.nursery.start(WRITER, self.place, number, incarnation)
        self.writers[number] = child
        self.children.append(child)
        self.progress_ns[number] = time.monotonic_ns()
        self.wrote[number] = False
        self.hung.discard(number)

    def start_reader(self, number: int) -> None:
        incarnation = sum(child.role == READER and child.number == number for child in self.children)
        self.readers[number] = self.nursery.start(READER, self.place, number, incarnation)
        self.children.append(self.readers[number])

    # -- looking ---------------------------------------------------------------------------------------------------

    def keep_up(self) -> None:
        """Start writers and readers again that died; whoever died by himself has failed."""
        for number, child in list(self.writers.items()):
            if self.nursery.died(child):
                if child.killed_ns is None:
                    if child.status != 0 or not self.stop.value:
                        self.fail("error", f"{child} ended, status {child.status}: {self.said(child)}")
                else:
                    self._expect_reaping(WRITER, child.pid, child.dead_ns or 0)
                if self.kept_up:
                    self.start_writer(number)
                else:
                    del self.writers[number]
        for number, child in list(self.readers.items()):
            if self.nursery.died(child):
                if child.killed_ns is None and (child.status != 0 or not self.stop.value):
                    self.fail("error", f"{child} ended, status {child.status}: {self.said(child)}")
                if self.kept_up:
                    self.start_reader(number)
                else:
                    del self.readers[number]

    def coordinator_died(self, child: Child) -> None:
        if child.killed_ns is None and child.status != 0:
            # A start that failed is in the events.
            self.failed_starts += 1
            if self.ready_ns is not None or "Traceback" not in self.said(child):
                self.fail("error", f"{child} ended, status {child.status}: {self.said(child)}")
        self.follow_events()
        self.coordinator, self.events = None, None
        self.deaths.clear()
        if self.ready_ns is not None:
            self.ready_ns = None
            self.unready_since_ns = time.monotonic_ns()

    def said(self, child: Child) -> str:
        path = child.place.said(child.role, child.number, child.incarnation)
        return path.read_text(errors="replace")[-3000:].strip() if path.exists() else ""

    def follow_events(self) -> None:
        for event in self.events.read() if self.events is not None else []:
            if event["event"] == "ready":
                self.ready_ns = event["ns"]
                self.failed_starts = 0

    def look(self) -> None:
        """Progress, deaths, the coordinator's start."""
        now_ns = time.monotonic_ns()
        self.follow_events()
        self.watch.follow()
        for number, child in self.writers.items():
            self._look_at_writer(number, child, now_ns)
        for child in self.readers.values():
            self._look_at_reader(child, now_ns)
        if self.ready_ns is None and self.coordinator is not None:
            since = max(self.unready_since_ns, self.coordinator.started_ns)
            late = self._waited_ns(self.coordinator, since, now_ns) > START_LIMIT_S * 1e9
            if late or self.failed_starts > FAILED_STARTS_MAX:
                what = f"not ready after {(now_ns - since) / 1e9:.1f} s and {self.failed_starts} failed starts"
                self.tell_hang(self.coordinator, what)
                self.failed_starts = 0
                self.kill(self.coordinator)
        if self.coordinator is not None and self.coordinator.stopped_ns is None and self.ready_ns is not None:
            self._look_at_deaths(now_ns)

    def _look_at_writer(self, number: int, child: Child, now_ns: int) -> None:
        path = self.place.log(number)
        size = path.stat().st_size if path.exists() else 0
        if size != self.sizes.get(number, 0):
            self.sizes[number] = size
            self.progress_ns[number] = now_ns
            self.wrote[number] = True
        since = self.progress_ns[number]
        if not self.wrote[number]:
            # It waits for a coordinator.
            if self.ready_ns is None:
                return
            since = max(since, self.ready_ns)
        waits_ns = self._waited_ns(child, since, now_ns)
        if waits_ns > (self.plan.cbw_timeout_s + HANG_SLACK_S) * 1e9 and number not in self.hung and child.alive:
            self.hung.add(number)
            self.tell_hang(child, f"no progress for {waits_ns / 1e9:.1f} s")

    def _look_at_reader(self, child: Child, now_ns: int) -> None:
        path = self.place.events(READER, child.number, child.incarnation)
        # The clock of file times is another one.
        silent_ns = int((time.time() - path.stat().st_mtime) * 1e9) if path.exists() else now_ns - child.started_ns
        waits_ns = self._waited_ns(child, now_ns - silent_ns, now_ns)
        if child.alive and child.pid not in self.hung and waits_ns > (READ_LIMIT_S + HANG_SLACK_S) * 1e9:
            self.hung.add(child.pid)
            self.tell_hang(child, f"has told nothing for {waits_ns / 1e9:.1f} s")

    def _waited_ns(self, child: Child, since_ns: int, now_ns: int) -> int:
        """How long a child had, without its stops and without the time in which the machine stood still."""
        return now_ns - since_ns - child.stopped_within(since_ns, now_ns) - self.stalls.within(since_ns, now_ns)

    def tell_hang(self, child: Child, what: str) -> None:
        child.signal(signal.SIGUSR1)
        time.sleep(0.2)
        self.fail("hang", f"{child}: {what}: {self.said(child)}")

    def tell_stuck(self, what: str) -> None:
        """A phase that all crews must end has not ended here."""
        state = {
            "ready": self.ready_ns is not None,
            "wrote": self.wrote,
            "workers": self.watch.worker_pids(),
            "alive": [str(child) for child in self.children if child.alive],
            "stage": self.stage.value,
        }
        self.fail("hang", f"{what}: {state}")
        if self.coordinator is not None:
            self.tell_hang(self.coordinator, what)

    def _expect_reaping(self, role: str, pid: int, dead_ns: int) -> None:
        if self.ready_ns is not None and self.coordinator is not None and self.coordinator.stopped_ns is None:
            self.deaths.append(Death(role, pid, dead_ns))

    def _look_at_deaths(self, now_ns: int) -> None:
        for death in list(self.deaths):
            took_ns = now_ns - death.dead_ns - self.stalls.within(death.dead_ns, now_ns)
            reaped = self.watch.reaped(death)
            if reaped or took_ns > 5 * REAP_LIMIT_NS:
                self.deaths.remove(death)
                self.figures.counts["reaps.in time" if took_ns <= REAP_LIMIT_NS else "reaps.late"] += 1
                self.figures.at_least(f"reap_{death.role}", took_ns)
                self.figures.at_least("reap_raw", now_ns - death.dead_ns)
                if not reaped:
                    what = self.watch.describe(death)
                    self.fail("leak", f"pid {death.pid}, {what}, is not reaped after {took_ns / 1e9:.1f} s")

    # -- killing ---------------------------------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        if child.alive and child.killed_ns is None:
            child.kill()
            self.figures.counts[f"kills.{child.role}"] += 1
            self.figures.counts["cycles"] += 1

    def kill_worker(self, pid: int) -> None:
        if self.watch.is_worker(pid) and watch.kill_pid(pid):
            self.figures.counts["kills.worker"] += 1
            self.figures.counts["cycles"] += 1
            self._expect_reaping("worker", pid, time.monotonic_ns())

    @property
    def recovered(self) -> bool:
        """Whether everybody who should be there serves or writes; a death that is not noticed yet is one."""
        crew = [*self.writers.values(), *self.readers.values(), self.coordinator]
        return (
            self.ready_ns is not None
            and all(child is not None and child.killed_ns is None for child in crew)
            and all(self.wrote.values())
            and self.watch.generation_is_whole(self.plan.workers)
        )

    def save_fates(self) -> None:
        fates = []
        for child in self.children:
            dead_ns = child.dead_ns or time.monotonic_ns()
            fates.append(
                Fate(
                    child.role, child.number, child.incarnation, child.started_ns, child.killed_ns, dead_ns, child.stops
                )
            )
        found = {"processes": [asdict(fate) for fate in fates], "stalls": self.stalls.intervals}
        self.place.fates.write_text(json.dumps(found))

    def close(self) -> None:
        self.watch.close()
        for byte in (self.stage, self.orders, self.wish, self.stop):
            byte.close()
