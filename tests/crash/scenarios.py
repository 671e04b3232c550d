"""What goes on while somebody is killed or stopped, and which failpoints are reached by it, by whom.

A scenario prepares, then the points are armed, then it acts.  `REACHED` says for each what is reached in its act; a run
of each with every point recording holds the table against the truth, so what is not in it can't be reached there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from typing import ClassVar

from tests.conftest import wait_for
from tests.crash import wave
from tests.crash.world import COORDINATOR, DRAIN_LIMIT_S, PATIENCE_S, READER, WORKER, WRITER, World

KILL, STOP = "kill", "stop"


class Trial:
    """One scenario in one round: what was asked for, and what must have become of it."""

    def __init__(self, world: World, number: int, action: str, kind: str = "") -> None:
        """``kind``: whoever is going to be killed or stopped."""
        self.world = world
        #: A stopped worker's claim is waited for until the deadline; whoever else stops has nothing that a write needs.
        late = action == STOP and kind == WORKER
        self.target = world.directory / f"backup-{number}"
        self.scratch = world.directory / f"scratch-{number}"
        self.read = world.directory / f"read-{number}"
        #: A stopped worker is waited for in vain when it stands still for longer than this.
        self.cbw_timeout_s = DRAIN_LIMIT_S if late else 20.0
        #: The image at the cut, where it was taken while nobody wrote.
        self.expected: bytes | None = None
        self.has_job = False
        self.has_snapshot = False
        #: Whether what was begun may end without a result (broken, refused, cancelled), by the scenario itself.
        self.may_fail = late
        #: What a job's error may be then, and whether its result may have died with the coordinator that knew it.
        self.reasons = {"SnapshotBrokenError"}
        self.may_be_forgotten = action == KILL and kind == COORDINATOR
        #: What an order may be refused with.
        self.refusals: set[str] = set()
        #: Discarded clusters can't be read any more.
        self.discarded = False

    def calm(self) -> None:
        """All writers stand still; the image as it is now is what a cut must show."""
        self.world.pause()
        self.expected = self.world.image.read_bytes()

    def begin_job(self) -> None:
        """A backup whose cut is taken and whose background copying has hardly begun."""
        self.calm()
        self.world.ask(do="backup", target=str(self.target), speed=1, cbw_timeout=self.cbw_timeout_s)
        self.has_job = True

    def begin_snapshot(self) -> None:
        self.calm()
        self.world.ask(do="snapshot", scratch=str(self.scratch), cbw_timeout=self.cbw_timeout_s)
        self.has_snapshot = True

    def stand_still(self, kind: str) -> int:
        """Wait until a process of this kind has stopped where the scenario wants it: its pid."""
        world = self.world
        wait_for(lambda: world.find_stopped(kind), f"a {kind} stands still", PATIENCE_S)
        pid = world.find_stopped(kind)
        assert pid is not None
        world.stopped.append(pid)
        return pid

    def wait_reached(self, point: str) -> None:
        """Wait until a point was reached since `World.record`."""
        wait_for(lambda: self.world.was_reached(point), f"{point} is reached", PATIENCE_S)

    def error(self, message: str = "") -> str | None:
        """Wait for the coordinator's answer: the kind of its error."""
        answer = self.world.hear()
        assert answer is not None
        assert message in answer.get("message", ""), answer
        kind: str | None = answer.get("error")
        return kind


class Scenario:
    """Idle: everybody is there, nobody does anything."""

    #: Armed beside the point, so that what depends on luck happens always; not the point itself.
    beside: ClassVar[dict[str, str]] = {}

    def prepare(self, trial: Trial) -> None:
        trial.calm()

    def act(self, trial: Trial) -> None:
        """Does not wait: somebody may die or stand still over it."""
        # Or a second may pass until a worker looks around.
        trial.world.wake_workers()

    def nudge(self, trial: Trial) -> None:
        """Called again and again until the point is reached."""

    def complete(self, trial: Trial) -> None:
        """Wait until the act is done, where nobody dies: all that it reaches is reached."""
        wait_for(lambda: trial.world.was_reached("worker.asleep"), "a worker goes to sleep again")


class FirstTouch(Scenario):
    """Writers touch for the first time what a snapshot needs."""

    #: So that the writer falls asleep over it.
    beside: ClassVar[dict[str, str]] = {"worker.claimed": "delay:3*8"}

    def prepare(self, trial: Trial) -> None:
        trial.begin_snapshot()

    def act(self, trial: Trial) -> None:
        trial.world.run()

    def complete(self, trial: Trial) -> None:
        trial.world.let_write()


class Hot(Scenario):
    """Writers write what they have written in this epoch already."""

    def prepare(self, trial: Trial) -> None:
        trial.world.let_write()
        trial.calm()

    def act(self, trial: Trial) -> None:
        trial.world.run()

    def complete(self, trial: Trial) -> None:
        trial.world.let_write()


class TakeCut(Scenario):
    """A snapshot is taken while all write."""

    #: A drained section that is long enough for writers to come to its gate.
    beside: ClassVar[dict[str, str]] = {"coordinator.quiet": "delay:20*1", "worker.claimed": "delay:3*8"}

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True  # a cut may be given up; it was asked for only
        trial.refusals = {"CutAbandonedError"}
        trial.world.let_write()

    def act(self, trial: Trial) -> None:
        trial.world.order(do="snapshot", scratch=str(trial.scratch), cbw_timeout=trial.cbw_timeout_s)
        trial.has_snapshot = True

    def complete(self, trial: Trial) -> None:
        trial.world.hear()
        trial.world.let_write()


class Background(Scenario):
    """A backup is copied in the background, nobody writes; it is finished."""

    def prepare(self, trial: Trial) -> None:
        trial.begin_job()

    def act(self, trial: Trial) -> None:
        trial.world.order(do="speed", speed=0)

    def complete(self, trial: Trial) -> None:
        trial.world.hear()
        trial.world.ask(do="results")


class Finish(Background):
    """The same while all write, what they write being copied already."""

    def prepare(self, trial: Trial) -> None:
        trial.begin_job()
        trial.world.let_write()
        trial.world.pause()

    def act(self, trial: Trial) -> None:
        trial.world.run()
        trial.world.order(do="speed", speed=0)

    def complete(self, trial: Trial) -> None:
        super().complete(trial)
        trial.world.let_write()


class Read(Scenario):
    """A reader of its own reads a snapshot, of which a part is copied, and discards some of it."""

    def prepare(self, trial: Trial) -> None:
        trial.begin_snapshot()
        trial.world.let_write()
        trial.world.pause()

    def act(self, trial: Trial) -> None:
        command = [sys.executable, "-m", "tests.crash.reading", str(trial.world.image), str(trial.read)]
        environment = {**os.environ, "SHMCBW_FAILPOINTS": "segment"}
        trial.world.reader = subprocess.Popen(command, cwd=wave.ROOT, env=environment)
        trial.discarded = True

    def complete(self, trial: Trial) -> None:
        assert trial.world.reader is not None
        trial.world.reader.wait(PATIENCE_S)


class Break(Scenario):
    """Copies come too late: the workers stand still."""

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True
        trial.cbw_timeout_s = DRAIN_LIMIT_S
        trial.begin_job()
        trial.world.stop(trial.world.serving_workers())

    def act(self, trial: Trial) -> None:
        trial.world.run()

    def complete(self, trial: Trial) -> None:
        trial.world.let_write()
        trial.world.go_on()
        assert trial.world.ask(do="results")[str(trial.target)] == "SnapshotBrokenError"


class Failure(Scenario):
    """A copy that a writer waits for fails."""

    beside: ClassVar[dict[str, str]] = {"worker.copying": "errno:EIO*1", "worker.claimed": "delay:3*8"}

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True
        trial.begin_snapshot()

    def act(self, trial: Trial) -> None:
        trial.world.run()

    def complete(self, trial: Trial) -> None:
        trial.world.let_write()
        trial.world.order(do="read")
        assert trial.error() == "SnapshotBrokenError"


class Gate(Scenario):
    """The coordinator stands still in the drained section, beyond its limit: the gated writers end it."""

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True
        trial.refusals = {"CutAbandonedError"}
        trial.calm()
        trial.world.arm("coordinator.odd", "stop*1")
        trial.world.order(do="snapshot", scratch=str(trial.scratch), cbw_timeout=trial.cbw_timeout_s)
        trial.stand_still(COORDINATOR)

    def act(self, trial: Trial) -> None:
        trial.world.run()

    def nudge(self, trial: Trial) -> None:
        if trial.world.epoch() % 2 == 0:
            trial.world.go_on()

    def complete(self, trial: Trial) -> None:
        trial.world.let_write()
        trial.world.go_on()
        assert trial.error() == "CutAbandonedError"


class Held(Scenario):
    """A writer stands still in the middle of a write: the coordinator gives the cut up at its limit.

    Nobody else writes: a gated writer could be faster.
    """

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True
        trial.refusals = {"CutAbandonedError"}
        trial.calm()
        trial.world.arm("writer.half_stored", "stop*1")
        trial.world.run()
        self.held = trial.stand_still(WRITER)
        trial.world.pause()

    def act(self, trial: Trial) -> None:
        trial.world.order(do="snapshot", scratch=str(trial.scratch), cbw_timeout=trial.cbw_timeout_s)

    def complete(self, trial: Trial) -> None:
        assert trial.error(f"pid {self.held} ") == "CutAbandonedError"


class Adopt(Scenario):
    """The coordinator was killed in the middle of a backup and a snapshot, a writer too; the next one adopts."""

    def prepare(self, trial: Trial) -> None:
        trial.begin_snapshot()
        trial.world.ask(do="backup", target=str(trial.target), speed=1, cbw_timeout=trial.cbw_timeout_s)
        trial.has_job = True
        trial.world.orphans = trial.world.serving_workers()
        trial.world.kill_by_test(trial.world.owner.pid)
        trial.world.owner.process.wait()
        trial.world.kill_by_test(trial.world.writers[1].pid)
        trial.world.writers[1].wait()

    def act(self, trial: Trial) -> None:
        trial.world.start_owner()

    def complete(self, trial: Trial) -> None:
        old = trial.world.hear()
        assert old == {"ok": [str(trial.target)]}
        for point in ("worker.left", "worker.serving"):
            trial.wait_reached(point)


class Reap(Scenario):
    """A worker and a writer were killed."""

    def prepare(self, trial: Trial) -> None:
        trial.begin_snapshot()

    def act(self, trial: Trial) -> None:
        trial.world.kill_by_test(trial.world.serving_workers()[0])
        trial.world.kill_by_test(trial.world.writers[0].pid)
        trial.world.writers[0].wait()

    def complete(self, trial: Trial) -> None:
        wait_for(lambda: len(trial.world.serving_workers()) == 2, "the worker is replaced", PATIENCE_S)
        for point in ("slot.cleared", "worker.serving"):
            trial.wait_reached(point)


class Attach(Scenario):
    """A writer comes and goes."""

    def prepare(self, trial: Trial) -> None:
        trial.calm()

    def act(self, trial: Trial) -> None:
        trial.world.start_guest()

    def complete(self, trial: Trial) -> None:
        assert trial.world.guest is not None
        assert trial.world.guest.wait(PATIENCE_S) == 0


class Cancel(Scenario):
    """A backup is cancelled."""

    def prepare(self, trial: Trial) -> None:
        trial.may_fail = True
        trial.reasons = {"JobCancelledError"}
        trial.begin_job()

    def act(self, trial: Trial) -> None:
        trial.world.order(do="cancel")

    def complete(self, trial: Trial) -> None:
        assert trial.world.hear() == {"ok": None}


SCENARIOS: dict[str, Scenario] = {
    "idle": Scenario(),
    "first touch": FirstTouch(),
    "hot": Hot(),
    "cut": TakeCut(),
    "background copy": Background(),
    "finish": Finish(),
    "read": Read(),
    "break": Break(),
    "failed copy": Failure(),
    "gate": Gate(),
    "held cut": Held(),
    "adopt": Adopt(),
    "reap": Reap(),
    "attach": Attach(),
    "cancel": Cancel(),
}


def _all(prefix: str, steps: str, kind: str) -> dict[str, str]:
    return {f"{prefix}.{step}": kind for step in steps.split()}


_HOT = _all("writer", "marked epoch half_stored stored compared", WRITER)
_TOUCH = _HOT | _all("writer", "looked map_marked", WRITER)
_WAIT = _TOUCH | _all("writer", "left wanted asleep ready", WRITER)
_BREAK = _all("break", "error state", WRITER)
_COPY = _all("worker", "copying copied published woke", WORKER)
_SERVE = _COPY | _all("worker", "claimed", WORKER)
_OPEN = _all("worker", "opened acknowledged", WORKER)
_PREPARE = _all("coordinator", "creating target bitmap preparing", COORDINATOR) | _OPEN
_CUT = _PREPARE | _all("coordinator", "prepared odd quiet published even", COORDINATOR)
_BACKGROUND = _COPY | _all("worker", "background", WORKER)
_FINISH = _all("coordinator", "complete synced named freed", COORDINATOR)
_DROP = _all("coordinator", "removed freed", COORDINATOR)
_JOURNAL = _all("journal", "written renamed", COORDINATOR)
_REPLACE = _OPEN | _all("coordinator", "reaping reaped spawned", COORDINATOR) | _all("worker", "locked serving", WORKER)

#: Point -> the kind of process that reaches it, by scenario.  What is not here can't be reached there.
REACHED: dict[str, dict[str, str]] = {
    "idle": _all("worker", "asleep", WORKER),
    "first touch": _WAIT | _SERVE,
    "hot": _HOT,
    "cut": _WAIT | _SERVE | _CUT | _all("writer", "gated", WRITER),
    "background copy": _BACKGROUND | _FINISH,
    "finish": _BACKGROUND | _FINISH | _HOT,
    "read": _all("reader", "looked read discard", READER),
    "break": _WAIT | _BREAK | _DROP | _JOURNAL,
    "failed copy": _WAIT | _SERVE | _BREAK | _all("worker", "failed delivered", WORKER),
    "gate": _TOUCH
    | _all("writer", "gated", WRITER)
    | _all("gate", "entries opened", WRITER)
    | _DROP
    | _all("coordinator", "even", COORDINATOR),
    "held cut": _PREPARE
    | _DROP
    | _all("coordinator", "prepared odd even", COORDINATOR)
    | _all("gate", "entries opened", COORDINATOR),
    "adopt": _REPLACE
    | _JOURNAL
    | _all("adopt", "locked opened slots claims groups entry generation", COORDINATOR)
    | {"slot.cleared": COORDINATOR, "retire.marked": COORDINATOR, "worker.left": WORKER},
    "reap": _REPLACE | _all("slot", "cleared", COORDINATOR),
    "attach": _all("slot", "locked taken cleared", WRITER),
    "cancel": _DROP | _JOURNAL,
}

#: Reached or not, as it happens: by whoever else is there, at its own times.
BY_CHANCE: dict[str, set[str]] = {scenario: {"worker.asleep"} for scenario in SCENARIOS}
BY_CHANCE["idle"] = set()
#: The coordinator comes back when the writers are writing again.
BY_CHANCE["gate"] = {"worker.asleep", "coordinator.quiet"}


def judge_reader(trial: Trial, status: int | None) -> None:
    """What a reader read is the cut, or it was told that the snapshot is broken, or it was killed."""
    assert status in (None, 0, 5, -signal.SIGKILL), f"the reader's exit status is {status}"
    if status == 0:
        assert trial.read.read_bytes() == trial.expected
        trial.read.unlink()
    elif status == 5:
        assert trial.may_fail, "broken, and nothing was late"


def digest(data: bytes | None) -> str:
    return hashlib.sha256(data or b"").hexdigest()
