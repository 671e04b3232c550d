"""Failpoints: what an armed one does, wherever it is, however it was armed; and those that a world can't live through.

The rounds at all other points are `test_matrix.py`.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.errors import CoordinatorRunningError
from shmcbw.failpoints import POINTS, Failpoint
from shmcbw.image import Identity
from shmcbw.layout import Header
from shmcbw.segment import SHM, segment_name
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.crash import doing, wave
from tests.crash.world import PATIENCE_S, attached
from tests.owner import Owner
from tests.processes import state

SIZE = 65_536


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


# -- actions -----------------------------------------------------------------------------------------------------------


class Doer:
    """A process that reaches one point once each time it is told to go on."""

    def __init__(self, what: str, image: Path, directory: Path, armed: str) -> None:
        self.what = what
        self.image = image
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.doing", what, str(image), str(directory)],
            cwd=wave.ROOT,
            env={**os.environ, "SHMCBW_FAILPOINTS": armed},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        """Its next word, "" if it died."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def once(self) -> str:
        self.go()
        return self.hear()

    def whose(self) -> list[int]:
        """Itself, and its workers."""
        return [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children())]

    def end(self) -> None:
        if self.process.poll() is None:
            for pid in self.whose():
                os.kill(pid, signal.SIGCONT)
        self.process.communicate(timeout=PATIENCE_S)
        if self.process.returncode < 0 and self.what != "filter":
            # What it has left is the next coordinator's.
            Coordinator(self.image, workers=1).close()


@contextmanager
def doer(what: str, image: Path, specification: str, *, by_environment: bool) -> Iterator[Doer]:
    """Something that reaches an armed point, once each time."""
    directory = image.parent
    with ExitStack() as stack:
        if what == "filter":
            stack.enter_context(Coordinator(image, workers=1))
        elif what == "adoption":
            # A writer stays when its coordinator closes: so there is something to adopt, every time.
            with Coordinator(image, workers=1):
                stack.enter_context(shmcbw.open(image))
        point = doing.POINTS[what]
        found = Doer(what, image, directory, f"{point}={specification}" if by_environment else "segment")
        stack.callback(found.end)
        if not by_environment:
            with attached(image) as segment:
                failpoints.arm(segment.memory, point, specification)
        yield found


everywhere = pytest.mark.parametrize("what", doing.POINTS)
armed_anyhow = pytest.mark.parametrize("by_environment", [True, False], ids=["environment", "segment"])


@everywhere
@armed_anyhow
def test_an_errno_comes_from_the_nth_call_on(image: Path, what: str, by_environment: bool) -> None:
    with doer(what, image, "errno:ENOSPC@2", by_environment=by_environment) as doing:
        assert [doing.once() for _ in range(4)] == ["ok", "ok", "ENOSPC", "ENOSPC"]


@everywhere
def test_an_errno_comes_once(image: Path, what: str) -> None:
    with doer(what, image, "errno:EIO@1*1", by_environment=False) as doing:
        assert [doing.once() for _ in range(4)] == ["ok", "EIO", "ok", "ok"]


@everywhere
def test_a_delay_delays(image: Path, what: str) -> None:
    with doer(what, image, "delay:80@1*1", by_environment=True) as doing:
        assert doing.once() == "ok"
        started = time.monotonic()
        assert doing.once() == "ok"
        assert time.monotonic() - started >= 0.08


@everywhere
def test_a_stopped_process_goes_on_when_it_is_continued(image: Path, what: str) -> None:
    with doer(what, image, "stop@1*1", by_environment=False) as doing:
        assert doing.once() == "ok"
        doing.go()
        wait_for(lambda: "T" in map(state, doing.whose()), "it is stopped")
        for pid in doing.whose():
            os.kill(pid, signal.SIGCONT)
        assert doing.hear() == "ok"
        assert doing.once() == "ok"


@everywhere
def test_a_killed_process_is_dead(image: Path, what: str) -> None:
    with doer(what, image, "kill@1*1", by_environment=True) as doing:
        before = doing.whose()
        assert doing.once() == "ok"
        if what == "worker":
            # Another one takes its place.
            assert doing.once() == "ok"
            assert doing.whose()[1:] != before[1:]
        else:
            assert doing.once() == ""
            assert doing.process.wait(PATIENCE_S) == -signal.SIGKILL


# -- at the beginning and the end of a segment -------------------------------------------------------------------------


def names_of(image: Path) -> list[str]:
    """What there is of an image in /dev/shm."""
    name = segment_name(Identity.of(os.stat(image)))[1:]
    return [file for file in os.listdir(SHM) if file.removeprefix("sem.").partition(".")[0] == name]


CREATE = [point.name for point in POINTS if point.protocol == "create"]


@pytest.mark.parametrize("point", CREATE)
def test_a_coordinator_may_die_while_it_makes_its_segment(image: Path, point: str) -> None:
    owner = Owner(image, SHMCBW_FAILPOINTS=f"{point}=kill")
    try:
        assert owner.answer() is None
        assert owner.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert names_of(image) != []
        with pytest.raises(shmcbw.NoCoordinatorError):
            shmcbw.open(image)
    finally:
        owner.end()
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
    assert names_of(image) == []


@pytest.mark.parametrize("point", CREATE)
def test_of_a_coordinator_that_stands_still_while_it_makes_its_segment_and_another_one_exactly_one_serves(
    image: Path, point: str
) -> None:
    owner = Owner(image, SHMCBW_FAILPOINTS=f"{point}=stop")
    served = False
    try:
        wait_for(lambda: state(owner.pid) == "T", "it stands still", PATIENCE_S)
        try:
            with Coordinator(image, workers=1), shmcbw.open(image) as disk:
                served = True
                os.kill(owner.pid, signal.SIGCONT)
                owner.process.wait(PATIENCE_S)
                disk.pwrite(b"x", 0)
        except shmcbw.ShmcbwError:
            os.kill(owner.pid, signal.SIGCONT)
        assert (owner.answer() is not None) is not served
        if not served:
            assert owner.ask(do="close") == {"ok": None}
            assert owner.process.wait(PATIENCE_S) == 0
    finally:
        owner.end()
    assert names_of(image) == []


LEAVE = ["retire.marked", "retire.names"]


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("point", LEAVE)
def test_a_coordinator_that_closes_may_die_or_stand_still_while_it_removes_its_segment(
    image: Path, point: str, action: str
) -> None:
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        with attached(image) as segment:
            failpoints.arm(segment.memory, point, f"{action}*1")
        owner.send(do="close")
        if action == "kill":
            assert owner.process.wait(PATIENCE_S) == -signal.SIGKILL
        else:
            wait_for(lambda: state(owner.pid) == "T", "it stands still", PATIENCE_S)
            with pytest.raises(CoordinatorRunningError):
                Coordinator(image)
            os.kill(owner.pid, signal.SIGCONT)
            assert owner.process.wait(PATIENCE_S) == 0
            assert names_of(image) == []
    finally:
        owner.end()
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
    assert names_of(image) == []


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("point", LEAVE)
def test_the_last_writer_may_die_or_stand_still_while_it_removes_the_segment(
    image: Path, point: str, action: str
) -> None:
    with Coordinator(image, workers=1):
        last = Doer("filter", image, image.parent, f"{point}={action}")
    assert names_of(image) != []
    assert last.process.stdin is not None
    last.process.stdin.close()
    if action == "kill":
        assert last.process.wait(PATIENCE_S) == -signal.SIGKILL
    else:
        wait_for(lambda: state(last.process.pid) == "T", "it stands still", PATIENCE_S)
        os.kill(last.process.pid, signal.SIGCONT)
        assert last.process.wait(PATIENCE_S) == 0
        assert names_of(image) == []
    assert last.process.stdout is not None
    last.process.stdout.close()
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
    assert names_of(image) == []


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_points_of_the_core_are_the_first_of_the_list() -> None:
    source = (Path(shmcbw.__file__).parent / "_core" / "filter.c").read_text()
    body = source.partition("enum failpoint {")[2].partition("}")[0]
    names = [line.strip().rstrip(",").lower() for line in body.splitlines() if line.strip()][:-1]
    assert names == [point.name.replace(".", "_", 1) for point in POINTS[: len(names)]]


def test_a_process_that_was_not_told_to_look_ignores_the_segments_failpoints(image: Path) -> None:
    """Whoever may write the segment can't stop a process that runs for real."""
    with Coordinator(image, workers=1), shmcbw.open(image) as disk, attached(image) as segment:
        for point in POINTS:
            failpoints.arm(segment.memory, point.name, "kill")
        disk.pwrite(b"x", 0)
        failpoints.disarm_all(segment.memory)


@pytest.mark.parametrize("wrong", ["explode", "errno:ENOTHING", "delay:x", "kill@70000", "delay:99999999"])
def test_a_specification_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        failpoints.encode(wrong)


def test_errnos_come_from_the_nth_call_on_or_a_number_of_times() -> None:
    memory = bytearray(Header.SIZE)
    failpoints.arm(memory, "worker.copied", "errno:ENOSPC@2*1")
    where = (memory, Header.failpoints.offset)
    point = failpoints.index_of("worker.copied")
    failpoints.hit(where, point)
    failpoints.hit(where, point)
    with pytest.raises(OSError, match=r"worker\.copied") as caught:
        failpoints.hit(where, point)
    assert caught.value.errno == 28
    failpoints.hit(where, point)


def refusal(disk: shmcbw.Disk) -> OSError | None:
    """Write, and write the same again; the error of one of them."""
    try:
        disk.pwrite(b"new" * 100, 0)
        disk.pwrite(b"new" * 100, 0, unchanged=True)
    except OSError as error:
        return error
    return None


WRITER = [point for point in POINTS if point.name.startswith("writer.")]


@pytest.mark.parametrize("point", WRITER, ids=[point.name for point in WRITER])
def test_an_errno_at_any_point_of_a_write_refuses_it_or_says_that_it_is_stored(image: Path, point: Failpoint) -> None:
    """Whatever the point, the writer's slot is out of flight afterwards, and the next write goes on."""
    with Coordinator(image, workers=1) as coordinator, ExitStack() as stack:
        os.environ["SHMCBW_FAILPOINTS"] = "segment"
        try:
            disk = stack.enter_context(shmcbw.open(image))
        finally:
            del os.environ["SHMCBW_FAILPOINTS"]
        before = image.read_bytes()
        snapshot = stack.enter_context(coordinator.snapshot(image.parent / "scratch"))
        with attached(image) as segment:
            failpoints.arm(segment.memory, "worker.claimed", "delay:20")
            failpoints.arm(segment.memory, point.name, "errno:EIO*1")
            refused = refusal(disk)
            if refused is not None:
                assert (refused.errno, point.name in str(refused)) == (errno.EIO, True)
                stored = {"writer.half_stored", "writer.stored", "writer.compared"}
                assert point.name in stored or image.read_bytes() == before
            failpoints.disarm_all(segment.memory)
            assert not any(slot["in_flight"] or slot["wanted_clusters"] for slot in coordinator.status()["slots"])
        disk.pwrite(b"later", 0)
        assert snapshot.pread(SIZE, 0) == before
