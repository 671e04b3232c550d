"""The coordinator's role: random cuts, backups, reads and discards of snapshots, cancels, resizes, until it is killed.

An incarnation that comes after a killed one finds the jobs and snapshots of that one and goes on with them.  Everything
is told to the log of events, what begins before it begins, what has ended after that; nothing is judged here but what
only this process can see: errors that no caller should meet, jobs that hang, violated invariants.

The main thread acts; a second one reads snapshots meanwhile, as readers in processes of their own do.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shmcbw import invariants
from shmcbw.errors import (
    ClosedError,
    CoordinatorRunningError,
    CutAbandonedError,
    ResizeRefusedError,
    ShmcbwError,
    SnapshotBrokenError,
)
from shmcbw.workers import Coordinator, CoordinatorSnapshot, Job
from tools.torturing.place import (
    AWAY,
    CLOSING,
    CUTTING,
    DROPPING,
    IDLE,
    RESIZING,
    STARTING,
    EventWriter,
    Place,
    SharedByte,
)
from tools.torturing.plan import COORDINATOR, ImagePlan
from tools.torturing.reader import COPIES_MAX, copy_snapshot

T = TypeVar("T")

JOBS_MAX = 2
SNAPSHOTS_MAX = 2
#: A job without a rate limit must be done by then, whoever dies.
JOB_LIMIT_S = 12.0
#: A sync takes what the disk takes.
SYNC_LIMIT_S = 30.0
TRIES_S = 2.0
#: For jobs that are cancelled, before a resize.
CANCEL_LIMIT_S = 2.0

ACTS = ("backup", "snapshot", "drop", "discard", "cancel", "speed", "status", "check", "resize", "rest")
WEIGHTS = (5, 4, 2, 3, 0.7, 3, 1, 0.3, 0.2, 6)


class Role:
    """One image in one incarnation."""

    def __init__(self, place: Place, incarnation: int) -> None:
        self.plan = ImagePlan.load(place.plan)
        self.place = place
        self.incarnation = incarnation
        self.chance = random.Random(f"{self.plan.seed} coordinator {incarnation}")
        self.events = EventWriter(place.events(COORDINATOR, 0, incarnation))
        self.stage = SharedByte(place.stage)
        self.orders = SharedByte(place.orders)
        self.wish = SharedByte(place.wish)
        self.count = 0
        self.reads = 0
        self.copies = len(os.listdir(place.targets)) + place.count_reads("read")
        self.running: dict[str, Job] = {}
        self.unlimited: set[str] = set()
        self.unlimited_s: dict[str, float] = {}
        self.hanging: set[str] = set()
        self.snapshots: dict[str, CoordinatorSnapshot] = {}
        self.broken: set[str] = set()
        # Held while a snapshot is read, and while the set of snapshots changes.
        self.reading = threading.Lock()
        self.ended = threading.Event()
        self.reader = threading.Thread(target=self._read_on, name="reader", daemon=True)

    # -- the life of an incarnation --------------------------------------------------------------------------------

    def open(self) -> None:
        self.stage.value = STARTING
        coordinator = self._start()
        if coordinator is None:
            raise SystemExit(2)
        self.coordinator = coordinator
        self._adopt()
        self.stage.value = IDLE

    def begin_reading(self) -> None:
        self.reader.start()

    def turn(self) -> None:
        with self.told():
            self._act()
        with self.told():
            self._follow_jobs()

    def end(self, *, finish: bool) -> None:
        self.ended.set()
        self.reader.join()
        if finish:
            self._finish()
        self.stage.value = CLOSING
        self.events.write("closing", jobs=list(self.running), snapshots=list(self.snapshots))
        self.coordinator.close()
        self.stage.value = AWAY
        self.events.write("closed")

    def _start(self) -> Coordinator | None:
        """The coordinator, or None if it could not start."""
        plan = self.plan

        def start() -> Coordinator:
            return Coordinator(self.place.image, workers=plan.workers, cluster_size=plan.cluster_size, slots=plan.slots)

        return started(start, self.events)

    def _adopt(self) -> None:
        self.running = {os.path.basename(job.target): job for job in self.coordinator.jobs}
        self.snapshots = self._find_snapshots()
        self.unlimited_s = {}
        size = os.stat(self.place.image).st_size
        self.events.write("ready", jobs=list(self.running), snapshots=list(self.snapshots), size=size)

    def _find_snapshots(self) -> dict[str, CoordinatorSnapshot]:
        return {os.path.basename(snapshot._entry.target.path): snapshot for snapshot in self.coordinator.snapshots}

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """What no caller should meet goes to the log of events; the role goes on."""
        try:
            yield
        except Exception as error:
            self.events.write("error", error=f"{type(error).__name__}: {error}", trace=traceback.format_exc())

    # -- acts ------------------------------------------------------------------------------------------------------

    def _act(self) -> None:
        getattr(self, f"_{self.chance.choices(ACTS, WEIGHTS)[0]}")()

    def _resize(self) -> None:
        self.resize()

    def _rest(self) -> None:
        pass

    def choose(self, kind: str, name: str, group: str | None = None) -> dict[str, Any]:
        """Say that a cut begins, and of what it is to be."""
        chance = self.chance
        policy = chance.choice(("break-snapshot", "break-snapshot", "break-snapshot", "break-guest-write"))
        sync = chance.choice(("full", "full", "top", "none")) if kind == "backup" else "none"
        speed = chance.choice((0, 0, 1 << 20, 8 << 20, 32 << 20))
        if speed == 0 and sync != "none":
            self.unlimited.add(name)
        asked = {"policy": policy, "sync": sync, "speed": speed}
        self.events.write("call", kind=kind, name=name, group=group, **asked)
        return asked

    def took(self, name: str, taken: Any) -> None:
        """A cut was taken: its Job or CoordinatorSnapshot."""
        self.events.write("cut", name=name, drained_ns=taken.drained_ns)
        if name.startswith("backup"):
            self.copies += 1
            self.running[name] = taken
            if name in self.unlimited:
                self.unlimited_s[name] = time.monotonic()
        else:
            with self.reading:
                self.snapshots[name] = taken

    def _take(self, kind: str) -> None:
        """A cut, for a backup or a snapshot."""
        name = self.new_name(kind)
        asked, path, timeout_s = self.choose(kind, name), self.place.targets / name, self.plan.cbw_timeout_s
        sync, speed, policy = asked["sync"], asked["speed"], asked["policy"]
        self.stage.value = CUTTING
        try:
            taken: Any
            if kind == "backup":
                taken = self.coordinator.backup(
                    path, sync=sync, speed=speed, on_cbw_error=policy, cbw_timeout=timeout_s
                )
            else:
                taken = self.coordinator.snapshot(path, on_cbw_error=policy, cbw_timeout=timeout_s)
            self.took(name, taken)
        except CutAbandonedError as error:
            self.events.write("abandoned", name=name, error=str(error))
        except Exception as error:
            self.events.write("untaken", name=name, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.stage.value = IDLE

    def new_name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.incarnation}-{self.count}"

    def _backup(self) -> None:
        if len(self.running) < JOBS_MAX and self.copies < COPIES_MAX:
            self._take("backup")

    def _snapshot(self) -> None:
        if len(self.snapshots) < SNAPSHOTS_MAX:
            self._take("snapshot")

    def _drop(self) -> None:
        if self.snapshots:
            self._drop_one(self.chance.choice(list(self.snapshots)))

    def _drop_one(self, name: str) -> None:
        with self.reading:
            snapshot = self.snapshots.pop(name)
            self.events.write("drop", name=name)
            self.stage.value = DROPPING
            snapshot.close()
            self.stage.value = IDLE
            self.events.write("dropped", name=name)

    def _discard(self) -> None:
        if not self.snapshots:
            return
        name = self.chance.choice(list(self.snapshots))
        snapshot = self.snapshots[name]
        length = int(snapshot.size_bytes * self.chance.random() ** 3) + 1
        offset = self.chance.randrange(snapshot.size_bytes - length + 1)
        self.events.write("discard", name=name, offset=offset, length=length, size=snapshot.size_bytes)
        try:
            snapshot.discard(length, offset)
        except SnapshotBrokenError as error:
            self._say_broken(name, error)

    def _cancel(self) -> None:
        if self.running:
            name = self.chance.choice(list(self.running))
            self.events.write("cancel", name=name)
            self.stage.value = DROPPING
            self.running[name].cancel()
            self.stage.value = IDLE

    def _speed(self) -> None:
        if self.running:
            name = self.chance.choice(list(self.running))
            job = self.running[name]
            if job.sync == "none":
                self.events.write("cancel", name=name)
                job.cancel()
                return
            job.set_speed(0)
            self.unlimited_s.setdefault(name, time.monotonic())

    def _status(self) -> None:
        self.coordinator.status()

    def _check(self) -> None:
        for violation in invariants.check(self.coordinator._segment):
            self.events.write("violation", invariant=violation.invariant, found=violation.found)

    # -- growing ---------------------------------------------------------------------------------------------------

    def resize(self) -> None:
        """To the next size.  A resize is refused beside snapshots: so they end before."""
        now = os.stat(self.place.image).st_size
        size = min((size for size in self.plan.sizes if size > now), default=0)
        if size == 0:
            return
        for name in list(self.snapshots):
            self._drop_one(name)
        for name, job in list(self.running.items()):
            self.events.write("cancel", name=name)
            job.cancel()
        deadline = time.monotonic() + CANCEL_LIMIT_S
        while self.running and time.monotonic() < deadline:
            self._follow_jobs()
            time.sleep(0.002)
        self.events.write("resize", size=size)
        self.stage.value = RESIZING
        try:
            self.coordinator.resize(size)
            self.events.write("resized", size=size)
        except ResizeRefusedError as error:
            self.events.write("unresized", size=size, error=str(error))
        finally:
            self.stage.value = IDLE

    # -- jobs ------------------------------------------------------------------------------------------------------

    def _follow_jobs(self) -> None:
        for name, job in list(self.running.items()):
            if job.status == "concluded":
                self._conclude(name, job)
            elif time.monotonic() - self.unlimited_s.get(name, time.monotonic()) > _limit_s(job):
                self._say_hanging(name, job)

    def _conclude(self, name: str, job: Job) -> None:
        del self.running[name]
        error = job.error
        number = error.errno if isinstance(error, OSError) else None
        self.events.write(
            "concluded",
            name=name,
            error=type(error).__name__ if error is not None else None,
            errno=number,
            message=str(error or ""),
        )
        job.dismiss()

    def _say_hanging(self, name: str, job: Job) -> None:
        if name in self.hanging:
            return
        self.hanging.add(name)
        # It may end at this moment.
        if job._entry is None:
            return
        counts = job._entry.bitmap.counts()
        owners = sorted(set(job._entry.bitmap.memory[:]) - {0, 240, 241, 242, 243})
        workers = [(worker["id"], worker["pid"]) for worker in self.coordinator.status()["workers"]]
        self.events.write("hang", name=name, job=repr(job), clusters=vars(counts), claimed_by=owners, workers=workers)

    def _finish(self) -> None:
        """Everything that is under way comes to its end."""
        for name, job in list(self.running.items()):
            with self.told():
                if job.sync == "none":
                    self.events.write("cancel", name=name)
                    job.cancel()
                job.set_speed(0)
        started = time.monotonic()
        for name, job in list(self.running.items()):
            while job.status != "concluded" and time.monotonic() - started < _limit_s(job):
                time.sleep(0.005)
            with self.told():
                if job.status == "concluded":
                    self._conclude(name, job)
                else:
                    self._say_hanging(name, job)
        for name in list(self.snapshots):
            with self.told():
                self._read(name, self.snapshots[name])
        with self.told():
            self._check()
        for name in list(self.snapshots):
            with self.told():
                self._drop_one(name)

    # -- reads -----------------------------------------------------------------------------------------------------

    def _read_on(self) -> None:
        """The second thread: reads whole snapshots until the end."""
        chance = random.Random(f"{self.plan.seed} reader {self.incarnation}")
        while not self.ended.wait(chance.random() * 0.3):
            if self.copies >= COPIES_MAX:
                continue
            with self.reading, self.told():
                names = [name for name in self.snapshots if name not in self.broken]
                if names:
                    name = chance.choice(names)
                    self._read(name, self.snapshots[name])

    def _read(self, name: str, snapshot: CoordinatorSnapshot) -> None:
        """Read a whole snapshot into a file."""
        self.reads += 1
        copy = f"{name}.read-{self.incarnation}-{self.reads}"
        try:
            copy_snapshot(self.place, self.plan, self.events, snapshot, name, copy)
        except SnapshotBrokenError as error:
            self._say_broken(name, error)
        except ClosedError:
            raise AssertionError(f"{name} is closed, and nobody has closed it") from None
        else:
            self.copies += 1

    def _say_broken(self, name: str, error: SnapshotBrokenError) -> None:
        if name not in self.broken:
            self.broken.add(name)
            self.events.write("broken", name=name, errno=error.errno, cluster=error.cluster)


def _limit_s(job: Job) -> float:
    return JOB_LIMIT_S if job.status == "running" else SYNC_LIMIT_S


def started(start: Callable[[], T], events: EventWriter) -> T | None:
    """What ``start`` returns, or None if it fails; a lock that is held on for a moment is tried again."""
    deadline = time.monotonic() + TRIES_S
    while True:
        try:
            return start()
        except CoordinatorRunningError as error:
            events.write("busy", error=str(error))
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        except (ShmcbwError, OSError) as error:
            events.write("failed_start", error=f"{type(error).__name__}: {error}")
            traceback.print_exc()
            return None
