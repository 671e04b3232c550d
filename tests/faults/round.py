"""One round with a fault in it, and its judge.

A coordinator with two workers, a writer with two threads; first touches, a snapshot that is read and discarded from, a
backup that is slow until writers have met it, its end, and everybody leaves.  The first operation that fails must have
been made to: then the fault is lifted, it must have changed nothing, and what is refused is asked for again and must
work.  At the end everything that was read or backed up is one instant, or says that it is broken, and nothing is left.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from shmcbw.image import Identity
from shmcbw.segment import segment_name
from shmcbw.workers.stamps import Log, check, make_image
from tests.conftest import wait_for
from tests.faults.actor import COMMANDED, FREE, TIMEOUT_S, Actor, Answer, layout_of
from tests.faults.layer import Fault, Kind, Layer

SHM = Path("/dev/shm")
WRITES = 12
#: A write waits for a copy for at most its timeout; the rest is what a loaded machine may add.
LONGEST_S = TIMEOUT_S + 10
#: Calls that it takes to remove a name: where they fail it stays, until the next coordinator comes.
REMOVALS = {"unlink", "shm_unlink", "sem_unlink", "opendir", "stat"}


class Stage:
    """The processes that play rounds of one scenario.

    plain: from the first coordinator to the last.  adopting: the first one was killed with a snapshot and a backup
    under way.  dying: so is each worker, again and again.  chain: a bitmap, a full backup, increments (`chain.py`).
    """

    def __init__(self, directory: Path, layer: Layer, scenario: str, kind: type[Round]) -> None:
        self.directory = directory
        self.layer = layer
        self.scenario = scenario
        self._kind = kind
        self.log = directory / "stderr"
        #: What a process keeps once it has played a round that nothing went wrong in.
        self.holdings: dict[str, list[str]] = {}
        self._rounds = 0
        self._begin()

    def _begin(self) -> None:
        # Slow enough for writers to come to the gate, and to sleep for a copy.
        points = "coordinator.quiet=delay:15,worker.claimed=delay:1"
        if self.scenario == "dying":
            points += ",worker.copied=kill@4*1"
        self.coordinator = Actor(self.log, **self.layer.environment("coordinator"), SHMCBW_FAILPOINTS=points)
        self.writer = Actor(self.log, **self.layer.environment("writer"), SHMCBW_FAILPOINTS="")
        self.holdings = {}

    def play(self, fault: Fault | None, seed: int) -> Round:
        """One round, judged; AssertionError says what is wrong with it, and then the stage has new processes."""
        if fault is not None and not self.holdings:
            self.play(None, seed)
        self._rounds += 1
        directory = self.directory / f"round{self._rounds}"
        round_ = self._kind(self, directory, fault, seed)
        try:
            round_.play()
        except AssertionError:
            self.end()
            round_.clear()
            self._begin()
            raise
        finally:
            shutil.rmtree(directory)
        return round_

    def said(self) -> str:
        """The last of what processes and their workers said on stderr."""
        return self.log.read_text()[-2000:]

    def end(self) -> None:
        self.layer.disarm()
        for actor in (self.coordinator, self.writer):
            actor.end()


class Round:
    """One image, from its first coordinator to its last."""

    def __init__(self, stage: Stage, directory: Path, fault: Fault | None, seed: int) -> None:
        self.stage = stage
        self.layer = stage.layer
        self.fault = fault
        self.seed = seed
        self.directory = directory
        self.image = directory / "disk.img"
        self.targets = directory / "targets"
        self.logs = directory / "logs"
        self.state = directory / "state"
        for path in (directory, self.targets, self.logs, self.state):
            path.mkdir()
        self.layout = layout_of(seed)
        make_image(self.image, self.layout)
        self.refusals: list[str] = []
        self.counts: dict[Kind, int] = {}
        self.fired = 0
        self.disturbed = False
        self._cuts: dict[str, list[int]] = {}
        #: What may be in the targets' directory at the end.
        self._kept = {"out"}

    # -- the play --------------------------------------------------------------------------------------------------

    def play(self) -> None:
        adopting = self.stage.scenario == "adopting"
        first = self._begin_with_another_coordinator() if adopting else None
        self.layer.watch(self.image, self.targets, self.state)
        if self.fault is not None:
            self.layer.arm(self.fault)
        coordinator, writer = self.stage.coordinator, self.stage.writer
        had = self._start()
        if adopting:
            assert had["jobs"] == 1, "the dead coordinator's job goes on, or is told to have failed"
        else:
            self._do(writer, "open", **self._opening())
            self._do(writer, "write", count=WRITES)
            self._do(writer, "go")
            self._cut("scratch", "snapshot", scratch=str(self.targets / "scratch"))
            had["snapshots"] = 1
        self._do(writer, "write", count=WRITES)
        if had["snapshots"]:
            self._read("scratch")
            self._do(coordinator, "extents", broken=True)
            self._do(coordinator, "discard", broken=True)
        if not adopting:
            self._cut("out", "backup", target=str(self.targets / "out"), speed=1)
            had["jobs"] = 1
            self._do(writer, "write", count=WRITES)
        if had["jobs"]:
            self._do(coordinator, "speed", speed=0)
        self._do(writer, "write", count=WRITES)
        if had["jobs"]:
            self._finish()
        self._do(coordinator, "drop")
        self._do(writer, "halt")
        self._do(writer, "flush")
        assert self._value(writer, "longest_s") < LONGEST_S, "a write waited for longer than its timeout"
        violations = self._value(coordinator, "violations")
        assert violations == [], violations
        self._do(writer, "leave")
        self._do(coordinator, "close")
        self.counts = self.layer.counts()
        self._lift()
        self._judge()
        if self.disturbed or (self.fired and not self._may_tidy()):
            self._play_again()
        self._look_for_leftovers()
        if first is not None:
            first.end()

    def _begin_with_another_coordinator(self) -> Actor:
        """It has a snapshot and a backup under way, and is killed; the writer stays."""
        first = Actor(self.stage.log)
        try:
            good(first.play("start", image=str(self.image)))
            writer = self.stage.writer
            good(writer.play("open", **self._opening()))
            good(writer.play("write", count=WRITES))
            good(writer.play("go"))
            self._cuts["scratch"] = good(first.play("snapshot", scratch=str(self.targets / "scratch")))
            self._cuts["out"] = good(first.play("backup", target=str(self.targets / "out"), speed=1))
            good(writer.play("write", count=WRITES))
        finally:
            first.process.kill()
            first.process.wait()
        return first

    def _opening(self) -> dict[str, Any]:
        return {"image": str(self.image), "logs": str(self.logs), "seed": self.seed}

    def _start(self) -> dict[str, Any]:
        return dict(self._do(self.stage.coordinator, "start", image=str(self.image)).value or {})

    def _cut(self, name: str, do: str, **parameters: Any) -> None:
        before = self._listing()
        self._cuts[name] = list(self._do(self.stage.coordinator, do, unchanged=before, **parameters).value or [])

    def _finish(self) -> None:
        """Wait for the job.  It may fail, and then there is no target."""
        if self.stage.scenario == "dying" and not self.stage.coordinator.play("wait", timeout=3).good:
            # Where no worker can be started nothing goes on, until one can.
            self._lift()
        answer = self._do(self.stage.coordinator, "wait", broken=True, timeout=40)
        if answer.good != (self.targets / "out").exists():
            assert "it is complete" in answer.message or not self._may_tidy(), f"{answer}, and {self._listing()}"
        assert not (self.targets / "out.shmcbw-partial").exists() or not self._may_tidy(), (
            "an unfinished target is left"
        )

    def _read(self, name: str) -> None:
        to = self.directory / f"{name}.read"
        self._do(self.stage.coordinator, "read", broken=True, to=str(to))

    def _play_again(self) -> None:
        """A fresh coordinator, without faults, works; what was left is its to clear."""
        actor = self.stage.coordinator
        good(actor.play("close"))
        good(actor.play("start", image=str(self.image)))
        good(self.stage.writer.play("open", **self._opening()))
        good(self.stage.writer.play("write", count=WRITES))
        (self.targets / "out").unlink(missing_ok=True)
        good(actor.play("snapshot", scratch=str(self.targets / "scratch")))
        self._cuts["out"] = good(actor.play("backup", target=str(self.targets / "out"), speed=0))
        good(self.stage.writer.play("write", count=WRITES))
        good(actor.play("wait", timeout=40))
        good(actor.play("drop"))
        violations = good(actor.play("violations"))
        assert violations == [], violations
        good(self.stage.writer.play("leave"))
        good(actor.play("close"))
        self._judge_copy(self.targets / "out", self._cuts["out"])

    # -- one operation ---------------------------------------------------------------------------------------------

    def _do(
        self, actor: Actor, do: str, *, broken: bool = False, unchanged: list[str] | None = None, **parameters: Any
    ) -> Answer:
        """Have it done.  If it is refused the fault is lifted, and it is asked for again.

        broken: it may go on failing, since what it is about is broken.  unchanged: what the targets' directory still
        must look like after a refusal.
        """
        answer = actor.play(do, **parameters)
        if answer.good:
            return answer
        assert self.fault is not None and self.layer.fired, f"{do} failed without a fault: {answer}"
        self.disturbed = True
        self._check_refusal(actor, do, answer)
        self._lift()
        if unchanged is not None and self._may_tidy():
            assert self._listing() == unchanged, f"{do} was refused and left {self._listing()}"
        if do == "close":
            return answer
        again = actor.play(do, **parameters)
        if not again.good and broken:
            assert set(again.kinds) & {"SnapshotBrokenError", "JobFailedError", "ClosedError"}, f"{do}, again: {again}"
            return again
        assert again.good, f"{do}, after a refusal ({answer}), without a fault: {again}"
        return again

    def _check_refusal(self, actor: Actor, do: str, answer: Answer) -> None:
        assert self.fault is not None
        self.refusals.append(f"{do}: {answer}")
        assert {"ShmcbwError", "OSError"} & set(answer.kinds), f"{do}: not an error for users: {answer}"
        assert do != "wait" or "TimeoutError" not in answer.kinds, f"the job does not end: {answer}"
        named = (str(self.directory), str(SHM), "/shmcbw-", "the snapshot is broken")
        assert any(name in answer.message for name in named), f"{do}: the error does not say what failed: {answer}"
        if {"JobFailedError", "SnapshotBrokenError"} & set(answer.kinds):
            number = errno.EIO if self.fault.what == "short" else getattr(errno, self.fault.what)
            legal = {number, errno.EIO} | ({errno.ETIMEDOUT} if self.stage.scenario == "dying" else set())
            assert answer.errno in legal, f"{do}: not the first error: {answer}"
        if actor is self.stage.writer:
            # A backup's failures never become a writer's.  Its own calls may fail where it comes, goes, or syncs its
            # source; a write only where it needs a slot: the first one of a thread, which `halt` tells of.
            assert self.fault.kind.role == "writer", f"a writer's {do} failed: {answer}"
            assert do in ("open", "halt", "flush", "leave"), f"{do} failed: {answer}"

    def _value(self, actor: Actor, do: str) -> Any:
        """Ask for something that needs no fault: the fault rests."""
        self._lift()
        return good(actor.play(do))

    def _lift(self) -> None:
        self.layer.disarm()
        self.fired = max(self.fired, self.layer.fired)

    def _may_tidy(self) -> bool:
        """Whether what is removed can be removed."""
        return self.fault is None or self.fault.kind.call not in REMOVALS

    def _listing(self) -> list[str]:
        return sorted(path.name for path in self.targets.iterdir())

    # -- the judge -------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """What there is to read is one instant, and that of its cut."""
        for name, copy in (("scratch", self.directory / "scratch.read"), ("out", self.targets / "out")):
            if copy.exists():
                self._judge_copy(copy, self._cuts[name])

    def _judge_copy(self, copy: Path, cut: list[int]) -> None:
        logs = [Log.read(self.logs / str(writer), self.layout) for writer in (COMMANDED, FREE)]
        verdict = check(copy, logs, self.layout)
        assert verdict.right, f"{copy.name} is no instant: {verdict}"
        begin, end = cut
        low, high = verdict.window
        assert low <= end and begin <= high, f"{copy.name} is of {verdict.windows}, its cut was in {cut}"

    def _look_for_leftovers(self) -> None:
        wait_for(lambda: not self._names(), f"nothing of {self.image} is left in {SHM}")
        assert set(self._listing()) <= self._kept, f"left: {self._listing()}"
        for role, actor in (("coordinator", self.stage.coordinator), ("writer", self.stage.writer)):
            holdings = good(actor.play("holdings"))
            if self.fault is None:
                self.stage.holdings.setdefault(role, holdings)
            before = self.stage.holdings[role]
            assert holdings == before, f"the {role} still has {sorted(set(holdings) ^ set(before))}"

    def _names(self) -> list[str]:
        status = os.stat(self.image)
        name = segment_name(Identity(status.st_dev, status.st_ino)).strip("/")
        return [file for file in os.listdir(SHM) if file == name or file.startswith((f"{name}.", f"sem.{name}."))]

    def clear(self) -> None:
        """After a round that went wrong, whose processes are dead."""
        for name in self._names():
            (SHM / name).unlink(missing_ok=True)


def good(answer: Answer) -> Any:
    """What an operation gives that nothing makes fail."""
    assert answer.good, f"without a fault: {answer}"
    return answer.value
