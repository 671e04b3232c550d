"""on_cbw_error and cbw_timeout: the 2 x 2 of (copy fails, copy is late) x (break-snapshot, break-guest-write).

A worker's target writes are made to fail by a file size limit on the worker process (EFBIG), and made late by stopping
the workers.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.processes import continue_all, stop_all

SIZE = 4 << 20


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def worker_pids(coordinator: Coordinator) -> list[int]:
    return [worker["pid"] for worker in coordinator.status()["workers"]]


@contextmanager
def failing_targets(coordinator: Coordinator) -> Iterator[None]:
    """Every write of a worker beyond the first byte of a file fails with EFBIG."""
    infinity = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    for pid in worker_pids(coordinator):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for pid in worker_pids(coordinator):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, infinity)


@contextmanager
def stopped_workers(coordinator: Coordinator) -> Iterator[None]:
    pids = worker_pids(coordinator)
    stop_all(pids)
    try:
        yield
    finally:
        continue_all(pids)


def test_break_snapshot_on_error_lets_the_write_go_on_and_the_snapshot_says_why(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot, failing_targets(coordinator):
            started = time.time_ns()
            disk.pwrite(b"x" * 100, 3 * 65_536 + 5)
            assert disk.pread(100, 3 * 65_536 + 5) == b"x" * 100
            for read in (lambda: snapshot.pread(1, 0), lambda: snapshot.block_status(1, 0)):
                with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
                    read()
                assert caught.value.errno == errno.EFBIG
                assert caught.value.cluster == 3
                assert started <= caught.value.time_ns <= time.time_ns()
            broken = coordinator.status()["snapshots"][0]
            assert broken["state"] == "broken"
            assert (broken["broken"]["errno"], broken["broken"]["cluster"]) == (errno.EFBIG, 3)
            waits = disk.statistics()["wait_count"]
            disk.pwrite(b"y" * 100, 10 * 65_536)
            assert disk.statistics()["wait_count"] == waits, "a broken snapshot costs no further wait"


def test_the_first_error_of_a_broken_snapshot_is_kept(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0.1) as snapshot:
            with failing_targets(coordinator):
                disk.pwrite(b"x", 5 * 65_536)
            with stopped_workers(coordinator):
                disk.pwrite(b"x", 7 * 65_536)
            with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
                snapshot.pread(1, 0)
            assert (caught.value.errno, caught.value.cluster) == (errno.EFBIG, 5)


def test_break_guest_write_on_error_refuses_the_write_and_keeps_the_snapshot(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", on_cbw_error="break-guest-write") as snapshot:
            with failing_targets(coordinator):
                for _ in range(3):
                    with pytest.raises(shmcbw.CopyFailedError, match="nothing written") as caught:
                        disk.pwrite(b"x" * 100, 70_000)
                    assert caught.value.errno == errno.EFBIG
                assert image.read_bytes() == expected
            disk.pwrite(b"x" * 100, 70_000)
            assert snapshot.pread(SIZE, 0) == expected
            assert disk.pread(100, 70_000) == b"x" * 100


@pytest.mark.parametrize("timeout", [0.3, 1.0])
def test_break_snapshot_on_timeout_is_exact_and_the_write_goes_on(image: Path, tmp_path: Path, timeout: float) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=timeout) as snapshot:
            with stopped_workers(coordinator):
                started = time.monotonic()
                disk.pwrite(b"x", 65_536)
                waited = time.monotonic() - started
            assert waited >= timeout, "the snapshot was given its whole time"
            assert disk.pread(1, 65_536) == b"x"
            with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
                snapshot.pread(1, 0)
            assert (caught.value.errno, caught.value.cluster) == (errno.ETIMEDOUT, 1)


def test_break_guest_write_on_timeout_refuses_the_write(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0.2, on_cbw_error="break-guest-write") as snapshot:
            with stopped_workers(coordinator):
                with pytest.raises(shmcbw.CopyTimeoutError) as caught:
                    disk.pwrite(b"x", 65_536)
                assert caught.value.errno == errno.ETIMEDOUT
            assert image.read_bytes() == expected
            assert snapshot.pread(SIZE, 0) == expected
            disk.pwrite(b"x", 65_536)


def test_no_timeout_waits_until_the_copy_is_done(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0) as snapshot:
            expected = disk.pread(SIZE, 0)
            with stopped_workers(coordinator):
                writer = threading.Thread(target=disk.pwrite, args=(b"x", 0))
                writer.start()
                writer.join(0.5)
                assert writer.is_alive()
            writer.join(10)
            assert not writer.is_alive()
            assert snapshot.pread(SIZE, 0) == expected


def test_a_timeout_of_one_snapshot_breaks_no_other(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with (
            coordinator.snapshot(tmp_path / "short", cbw_timeout=0.2) as short,
            coordinator.snapshot(tmp_path / "long", cbw_timeout=60) as long,
        ):
            with stopped_workers(coordinator):
                writer = threading.Thread(target=disk.pwrite, args=(b"x", 0))
                writer.start()
                wait_for(lambda: coordinator.status()["snapshots"][0]["broken"], "the short one breaks")
                assert writer.is_alive()
            writer.join(10)
            assert long.pread(SIZE, 0) == expected
            with pytest.raises(shmcbw.SnapshotBrokenError):
                short.pread(1, 0)


def test_a_waiter_behind_another_ones_failed_copy_asks_in_its_own_name(image: Path, tmp_path: Path) -> None:
    """Both are refused for their own copy's failure; when copies work again, both go through."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", on_cbw_error="break-guest-write"):
            results: list[object] = []

            def write() -> None:
                try:
                    results.append(disk.pwrite(b"x", 0))
                except shmcbw.CopyFailedError as error:
                    results.append(error.errno)

            with failing_targets(coordinator):
                pids = worker_pids(coordinator)
                stop_all(pids)
                threads = [threading.Thread(target=write) for _ in range(2)]
                for thread in threads:
                    thread.start()
                wait_for(lambda: sum(bool(s["wanted_clusters"]) for s in coordinator.status()["slots"]) == 2, "wants")
                continue_all(pids)
                for thread in threads:
                    thread.join(10)
            assert results == [errno.EFBIG, errno.EFBIG]
            write()
            assert results[-1] == 1


def test_a_failed_background_copy_fails_the_job_and_leaves_no_target(image: Path, tmp_path: Path) -> None:
    with Coordinator(image) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with failing_targets(coordinator):
            job.set_speed(0)
            with pytest.raises(shmcbw.JobFailedError, match="background copy") as caught:
                job.wait(10)
        assert caught.value.errno == errno.EFBIG
        assert job.status == "concluded"
        again = coordinator.backup(tmp_path / "out")
        again.wait(10)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_broken_snapshot_fails_its_job_with_the_first_error(image: Path, tmp_path: Path) -> None:
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1, cbw_timeout=0.2)
        with stopped_workers(coordinator):
            disk.pwrite(b"x", 2 * 65_536)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            job.wait(10)
        assert (caught.value.errno, caught.value.cluster) == (errno.ETIMEDOUT, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_keyboard_interrupt_ends_a_wait_and_that_write_has_not_happened(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        before = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0) as snapshot:
            with stopped_workers(coordinator):
                interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
                interrupt.start()
                with pytest.raises(KeyboardInterrupt):
                    disk.pwrite(b"x" * 100, 0)
                interrupt.join()
            assert disk.pread(SIZE, 0) == before
            assert all(not slot["in_flight"] and not slot["wanted_clusters"] for slot in coordinator.status()["slots"])
            disk.pwrite(b"x" * 100, 0)
            assert snapshot.pread(SIZE, 0) == before


def test_an_exception_of_a_signal_handler_comes_out_of_a_wait(image: Path, tmp_path: Path) -> None:
    class AlarmError(Exception):
        pass

    def on_alarm(*_: object) -> None:
        raise AlarmError

    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0), stopped_workers(coordinator):
            previous = signal.signal(signal.SIGUSR1, on_alarm)
            try:
                timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
                timer.start()
                with pytest.raises(AlarmError):
                    disk.pwrite(b"x", 0)
                timer.join()
            finally:
                signal.signal(signal.SIGUSR1, previous)


def test_an_impatient_write_gives_up_with_nothing_done_and_breaks_nothing(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = disk.pread(100, 0)
            with stopped_workers(coordinator):
                assert disk.try_pwrite(b"x" * 100, 0, 1_000_000) is False
                assert disk.pread(100, 0) == before
                with pytest.raises(ValueError, match="patience_ns"):
                    disk.try_pwrite(b"x", 0, 0)
            assert disk.try_pwrite(b"x" * 100, 0, 10_000_000_000) is True
            assert disk.try_pwrite(b"y" * 100, 50, 1) is True, "a hot cluster needs no patience"
            assert disk.pread(150, 0) == b"x" * 50 + b"y" * 100
            assert snapshot.pread(100, 0) == before
