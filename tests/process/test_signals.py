"""Signals: a handler that runs in the middle of a call, a storm of them in every wait, and what ends a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw.epochs import advance, epoch
from shmcbw.layout import Header, Slot
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.processes import continue_all, state, stop_all

SIZE = 4 << 20


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@contextmanager
def handler(number: signal.Signals, action: Callable[[], None]) -> Iterator[None]:
    """The signal's handler, in this (the main) thread."""
    before = signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def stopped_workers(coordinator: Coordinator) -> Iterator[list[int]]:
    """The workers stand still, so a first touch waits."""
    pids = [worker["pid"] for worker in coordinator.status()["workers"]]
    stop_all(pids)
    try:
        yield pids
    finally:
        continue_all(pids)


@contextmanager
def signalled_when(condition: Callable[[], object], number: signal.Signals) -> Iterator[None]:
    """Another thread sends us the signal as soon as the condition holds."""

    def send() -> None:
        wait_for(condition, "what the signal waits for")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def waits(coordinator: Coordinator) -> bool:
    return any(slot["wanted_clusters"] for slot in coordinator.status()["slots"])


def test_a_handler_may_close_the_disk_whose_write_it_interrupted(image: Path, tmp_path: Path) -> None:
    """The write ends with nothing written; the handle lets go when it has left."""
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        before = snapshot.pread(SIZE, 0)
        disk = shmcbw.open(image)
        with stopped_workers(coordinator), handler(signal.SIGUSR1, disk.close):
            with signalled_when(lambda: waits(coordinator), signal.SIGUSR1):
                with pytest.raises(shmcbw.ClosedError):
                    disk.pwrite(b"x" * 100_000, 0)
        assert disk.closed
        assert coordinator.status()["slots"] == []
        disk.close()
        assert image.read_bytes() == before


def test_a_handler_may_write_through_the_disk_whose_write_it_interrupted(image: Path, tmp_path: Path) -> None:
    """The handler's write takes the place of the want; the interrupted one asks again."""
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        before = snapshot.pread(SIZE, 0)
        with shmcbw.open(image) as disk, stopped_workers(coordinator) as pids:
            segment = disk._attached()

            def serve_the_inner_one() -> None:
                wait_for(lambda: segment.slot(0, Slot.want_first) == 16, "the handler's write waits")
                continue_all(pids)

            def write_too() -> None:
                server = threading.Thread(target=serve_the_inner_one)
                server.start()
                disk.pwrite(b"inner", 16 * 65_536)
                server.join()

            with handler(signal.SIGUSR1, write_too):
                with signalled_when(lambda: waits(coordinator), signal.SIGUSR1):
                    disk.pwrite(b"outer", 0)
            assert disk.statistics()["wait_max_ns"] < 15e9, "served, not given up at cbw_timeout"
            assert (disk.pread(5, 0), disk.pread(5, 16 * 65_536)) == (b"outer", b"inner")
        assert snapshot.pread(SIZE, 0) == before


# -- a storm of signals ------------------------------------------------------------------------------------------------

STORM = """
import os, signal, sys, time
pid, numbers = int(sys.argv[1]), [getattr(signal, name) for name in sys.argv[2:]]
print(flush=True)
while os.getppid() == pid or len(numbers) > 1:
    for number in numbers:
        os.kill(pid, number)
    time.sleep(0.001)
"""


@contextmanager
def storm(pid: int, *names: str) -> Iterator[None]:
    """Signals every millisecond, from another process."""
    command = [sys.executable, "-c", STORM, str(pid), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


@contextmanager
def handled_storm() -> Iterator[list[int]]:
    """Of signals that this process handles: the list of those that came."""
    came: list[int] = []
    with handler(signal.SIGUSR2, lambda: came.append(1)), storm(os.getpid(), "SIGUSR2"):
        yield came
        assert len(came) > 3, "there was a storm"


@contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def test_a_storm_of_signals_does_not_disturb_a_write_that_waits(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = snapshot.pread(SIZE, 0)
            with stopped_workers(coordinator) as pids, handled_storm(), after(0.4, lambda: continue_all(pids)):
                disk.pwrite(b"x" * 100_000, 0)
            assert 0.3e9 < disk.statistics()["wait_max_ns"] < 15e9
            assert snapshot.pread(SIZE, 0) == before


def test_a_storm_of_signals_does_not_disturb_a_write_at_the_gate(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        segment = coordinator.segment
        even = epoch(segment)
        segment.set_header(Header.drain_deadline_ns, time.monotonic_ns() + 60_000_000_000)
        advance(segment, even)
        started = time.monotonic()
        with handled_storm(), after(0.4, lambda: advance(segment, even + 1)):
            disk.pwrite(b"x", 0)
        assert 0.3 < time.monotonic() - started < 15
        assert epoch(segment) == even + 2


def test_a_storm_of_signals_does_not_disturb_a_cut_that_waits_for_a_writer(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1, drain_limit=20) as coordinator, shmcbw.open(image) as disk:
        (slot,) = disk._slots
        coordinator.segment.set_slot(slot, Slot.in_flight, 1)
        with handled_storm(), after(0.4, lambda: coordinator.segment.set_slot(slot, Slot.in_flight, 0)):
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                assert 0.3e9 < snapshot.drained_ns < 15e9


def test_a_storm_of_signals_does_not_disturb_who_waits_for_a_job(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with handled_storm(), after(0.4, lambda: job.set_speed(0)):
            job.wait(30)
            with pytest.raises(TimeoutError):
                coordinator.backup(tmp_path / "out2", speed=1).wait(0.3)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_storm_of_signals_does_not_disturb_reads_and_discards_of_a_snapshot(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = snapshot.pread(SIZE, 0)
            disk.pwrite(b"x" * (SIZE // 2), 0)
            with handled_storm():
                end = time.monotonic() + 0.4
                while time.monotonic() < end:
                    assert snapshot.pread(SIZE, 0) == before
                    snapshot.block_status(SIZE, 0)
            with handled_storm(), stopped_workers(coordinator), after(0.2, lambda: None):
                snapshot.discard(SIZE // 2, SIZE // 2)
                time.sleep(0.1)
            assert snapshot.pread(SIZE // 2, 0) == before[: SIZE // 2]


def test_a_worker_in_a_storm_of_signals_sleeps_wakes_and_copies(image: Path, tmp_path: Path) -> None:
    """What a terminal may send (SIGINT, SIGTSTP's like): it is interrupted in its sleep, its copies and its opens."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = image.read_bytes()
        (worker,) = [worker["pid"] for worker in coordinator.status()["workers"]]
        with storm(worker, "SIGINT", "SIGSTOP", "SIGCONT"):
            job = coordinator.backup(tmp_path / "out", speed=SIZE)
            for offset in range(0, SIZE, SIZE // 8):
                disk.pwrite(b"x", offset)
            job.wait(60)
        os.kill(worker, signal.SIGCONT)
        assert [worker["pid"] for worker in coordinator.status()["workers"]] == [worker]
    assert (tmp_path / "out").read_bytes() == expected


# -- SIGTERM and SIGINT ------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])

PROGRAM = """
import sys, time
from shmcbw.workers import Coordinator
with Coordinator(sys.argv[1], workers=1) as coordinator:
    job = coordinator.backup(sys.argv[2], speed=1)
    print("ready", flush=True)
    job.wait()
"""

WRITER = """
import sys, shmcbw
with shmcbw.open(sys.argv[1]) as disk:
    print("ready", flush=True)
    disk.pwrite(b"x" * 100_000, 0)
"""


@contextmanager
def program(script: str, *arguments: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has said that it is ready."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_a_coordinator_program_that_is_interrupted_cancels_and_leaves_nothing(image: Path, tmp_path: Path) -> None:
    with program(PROGRAM, image, tmp_path / "out") as owner:
        owner.send_signal(signal.SIGINT)
        assert owner.wait(30) == -signal.SIGINT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]
    with pytest.raises(shmcbw.NoCoordinatorError):
        shmcbw.open(image)


def test_a_coordinator_program_that_does_not_handle_sigterm_is_adopted(image: Path, tmp_path: Path) -> None:
    """As after a kill: what its signal's default is, is the program's affair."""
    with program(PROGRAM, image, tmp_path / "out") as owner:
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(30) == -signal.SIGTERM
    with Coordinator(image, workers=1) as coordinator:
        (job,) = coordinator.jobs
        job.set_speed(0)
        job.wait(30)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_worker_that_is_terminated_is_replaced_and_one_that_is_interrupted_goes_on(
    image: Path, tmp_path: Path
) -> None:
    with Coordinator(image, workers=1) as coordinator:
        (before,) = [worker["pid"] for worker in coordinator.status()["workers"]]
        os.kill(before, signal.SIGINT)
        coordinator.backup(tmp_path / "out").wait(30)
        assert [worker["pid"] for worker in coordinator.status()["workers"]] == [before]
        os.kill(before, signal.SIGTERM)
        wait_for(lambda: coordinator.status()["counters"]["workers_replaced"], "it is replaced")
        coordinator.backup(tmp_path / "out2").wait(30)
    assert (tmp_path / "out2").read_bytes() == image.read_bytes()


@BOTH
def test_a_writer_that_is_ended_while_it_waits_has_written_nothing(
    image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        before = snapshot.pread(SIZE, 0)
        with stopped_workers(coordinator), program(WRITER, image) as writer:
            wait_for(lambda: waits(coordinator), "it waits")
            writer.send_signal(number)
            assert writer.wait(30) == -number
            wait_for(lambda: coordinator.status()["slots"] == [], "its slot is free")
        assert image.read_bytes() == before
        assert snapshot.pread(SIZE, 0) == before


# -- a writer that stands still ----------------------------------------------------------------------------------------


def test_a_writer_stopped_in_the_middle_of_a_write_makes_a_cut_fail_with_nothing_changed(
    image: Path, tmp_path: Path
) -> None:
    """Half of its data is stored; the cut is given up at its limit and says which pid held it."""
    script = WRITER.replace("100_000", "4096").replace("pwrite(", "pwrite(", 1)
    os.environ["SHMCBW_FAILPOINTS"] = "writer.half_stored=stop*1"
    try:
        stack = ExitStack()
        coordinator = stack.enter_context(Coordinator(image, workers=1, drain_limit=0.2))
        writer = stack.enter_context(program(script, image))
    finally:
        del os.environ["SHMCBW_FAILPOINTS"]
    with stack:
        wait_for(lambda: state(writer.pid) == "T", "it stands still")
        before, data = coordinator.status(), image.read_bytes()
        assert data[:2049] == b"x" * 2048 + data[2048:2049]
        for take in (coordinator.backup, coordinator.snapshot):
            with pytest.raises(shmcbw.CutAbandonedError, match=f"pid {writer.pid} ") as caught:
                take(tmp_path / "out")
            assert caught.value.pids == (writer.pid,)
        status = coordinator.status()
        assert (status["snapshots"], status["jobs"]) == ([], [])
        assert status["counters"]["cuts"] == before["counters"]["cuts"]
        assert status["counters"]["cuts_abandoned"] == before["counters"]["cuts_abandoned"] + 2
        assert status["epoch"] % 2 == 0
        assert image.read_bytes() == data
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]
        with shmcbw.open(image) as disk:
            disk.pwrite(b"others go on", 1 << 20)
        os.kill(writer.pid, signal.SIGCONT)
        assert writer.wait(30) == 0
        coordinator.backup(tmp_path / "out").wait(30)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert image.read_bytes()[:4096] == b"x" * 4096
