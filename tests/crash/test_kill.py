"""kill -9 of writers and workers at any moment: no wrong byte, no stuck writer, replaced within a second."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw.bitmap import Bitmap
from shmcbw.invariants import check
from shmcbw.layout import Slot
from shmcbw.segment import attach, slot_byte, worker_byte
from shmcbw.workers import Coordinator
from tests.conftest import SEED, wait_for
from tests.lateness import Lateness
from tests.processes import continue_all, running, stop_all, write_forever, write_once

SIZE = 8 << 20


def worker_pids(coordinator: Coordinator) -> list[int]:
    return [worker["pid"] for worker in coordinator.status()["workers"]]


def test_a_killed_worker_is_replaced_and_its_claims_come_back(make_image: Callable[..., Path], tmp_path: Path) -> None:
    """A worker that died with claims: the writer that waits for one of them is served by the next worker."""
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            (pid,) = worker_pids(coordinator)
            stop_all([pid])
            bitmap = Bitmap.attach(coordinator._segment, coordinator.status()["snapshots"][0]["serial"])
            worker_id = coordinator.status()["workers"][0]["id"]
            # What a worker has claimed when it dies between its claim and its publication.
            bitmap.memory[3:6] = bytes([worker_id]) * 3
            os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            disk.pwrite(b"x" * 65_536, 4 * 65_536)
            waited = time.monotonic() - started
            assert snapshot.pread(SIZE, 0) == expected
            assert [bitmap.state(c) for c in (3, 5)] == [0, 0]
            assert coordinator.status()["counters"]["workers_replaced"] == 1
            assert worker_pids(coordinator) != [pid]
            bitmap.close()
            assert waited < 30, "served long before cbw_timeout"


def test_a_worker_is_reaped_within_a_second_of_its_death(make_image: Callable[..., Path], tmp_path: Path) -> None:
    """Its claims are returned and another one is started; five times in a row, of which the longest counts."""
    image = make_image(SIZE)
    took = []
    with Coordinator(image, workers=2) as coordinator, Lateness() as lateness:
        with coordinator.snapshot(tmp_path / "scratch"):
            bitmap = Bitmap.attach(coordinator._segment, coordinator.status()["snapshots"][0]["serial"])
            for _ in range(5):
                wait_for(lambda: len(worker_pids(coordinator)) == 2, "two workers", 20)
                time.sleep(0.6)  # a worker that dies at its very start is replaced after a pause only
                victim = coordinator.status()["workers"][0]
                bitmap.memory[7] = victim["id"]
                replaced = coordinator.status()["counters"]["workers_replaced"]
                os.kill(victim["pid"], signal.SIGKILL)
                took.append(
                    lateness.measure(
                        lambda replaced=replaced: (  # type: ignore[misc]
                            bitmap.state(7) == 0
                            and coordinator.status()["counters"]["workers_replaced"] == replaced + 1
                        ),
                        "the worker is reaped",
                    )
                )
            bitmap.close()
    assert max(took) < 1, took


def test_a_dead_writers_slot_is_free_within_a_second(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    took = []
    with Coordinator(image, workers=1) as coordinator, Lateness() as lateness:
        for _ in range(5):
            with running(write_forever, str(image), 1) as writer:
                wait_for(lambda: any(s["writes"] for s in coordinator.status()["slots"]), "a writer", 20)
                os.kill(writer.pid or 0, signal.SIGKILL)
                took.append(lateness.measure(lambda: coordinator.status()["slots"] == [], "the slot is free"))
        assert coordinator.status()["counters"]["slots_reaped"] == 5
    assert max(took) < 1, took


def test_a_new_writer_takes_a_dead_writers_slot_at_once(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1, slots=1) as coordinator:
        with running(write_forever, str(image), 1) as writer:
            wait_for(lambda: any(s["writes"] for s in coordinator.status()["slots"]), "a writer", 20)
            with coordinator._lock:  # the coordinator can't reap now
                os.kill(writer.pid or 0, signal.SIGKILL)
                writer.join()
                with shmcbw.open(image) as disk:
                    assert disk._segment is not None
                    assert disk._segment.slot(0, Slot.in_flight) == 0
                    disk.pwrite(b"x", 0)


def test_a_worker_that_is_stopped_keeps_its_claims(make_image: Callable[..., Path], tmp_path: Path) -> None:
    """Slow is not dead: a claim of a living worker is never given to another one (it could still write)."""
    image = make_image(SIZE)
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0.6) as snapshot:
            pids = worker_pids(coordinator)
            stop_all(pids[:1])
            bitmap = Bitmap.attach(coordinator._segment, coordinator.status()["snapshots"][0]["serial"])
            worker_id = coordinator.status()["workers"][0]["id"]
            bitmap.memory[0] = worker_id
            disk.pwrite(b"x", 65_536)
            assert bitmap.state(0) == worker_id
            disk.pwrite(b"x", 0)
            with pytest.raises(shmcbw.SnapshotBrokenError):
                snapshot.pread(1, 0)
            bitmap.close()
            continue_all(pids[:1])
            assert coordinator._segment.locked(worker_byte(worker_id))


def test_kills_at_random_moments_leave_every_backup_right(make_image: Callable[..., Path], tmp_path: Path) -> None:
    """Writers and workers are killed a few times a second while backups run; bounded in time."""
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    image = make_image(SIZE)
    deadline = time.monotonic() + 12
    backups = 0
    with Coordinator(image, workers=2, drain_limit=5) as coordinator, shmcbw.open(image) as disk:
        while time.monotonic() < deadline:
            stamp = backups.to_bytes(8, "little") * 512
            disk.pwrite(stamp, 0)
            with running(write_forever, str(image), chance.randrange(1000)) as writer:
                wait_for(lambda: len(coordinator.status()["slots"]) == 2, "a writer", 20)
                target = tmp_path / f"out{backups}"
                snapshot = coordinator.snapshot(tmp_path / "scratch")
                job = coordinator.backup(target, speed=32 << 20)
                disk.pwrite(b"\xff" * 4096, 0)
                for _ in range(3):
                    time.sleep(chance.random() * 0.05)
                    victims = worker_pids(coordinator)
                    try:
                        if victims and chance.random() < 0.8:
                            os.kill(chance.choice(victims), signal.SIGKILL)
                        if chance.random() < 0.3:
                            os.kill(writer.pid or 0, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                assert snapshot.pread(4096, 0) != b"\xff" * 4096
                first = snapshot.pread(SIZE, 0)
                job.set_speed(0)
                job.wait(30)
                assert snapshot.pread(SIZE, 0) == first
                snapshot.close()
            data = target.read_bytes()
            assert data[:4096] != b"\xff" * 4096
            target.unlink()
            backups += 1
            assert check(coordinator._segment) == []
    assert backups > 0


def test_a_writer_killed_while_it_waits_leaves_nothing_behind(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        expected = snapshot.pread(SIZE, 0)
        pids = worker_pids(coordinator)
        stop_all(pids)
        with running(write_once, str(image), b"x" * 100_000, 0) as writer:
            wait_for(lambda: any(s["wanted_clusters"] for s in coordinator.status()["slots"]), "it waits", 20)
            os.kill(writer.pid or 0, signal.SIGKILL)
            wait_for(lambda: coordinator.status()["slots"] == [], "reaped", 2)
        continue_all(pids)
        assert image.read_bytes() == expected
        assert check(coordinator._segment) == []


def test_a_backup_starts_at_once_although_a_worker_has_just_died(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=2) as coordinator:
        os.kill(worker_pids(coordinator)[0], signal.SIGKILL)
        coordinator.backup(tmp_path / "out").wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_backup_starts_although_a_worker_is_stopped(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=2) as coordinator:
        stopped = worker_pids(coordinator)[:1]
        stop_all(stopped)
        coordinator.backup(tmp_path / "out").wait(20)
        continue_all(stopped)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_coordinator_starts_although_its_workers_are_killed_meanwhile(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    killed = threading.Event()

    def kill_the_first_worker() -> None:
        while not killed.is_set():
            for process in psutil.Process().children():
                try:
                    if str(image) in process.cmdline():
                        process.kill()
                        killed.set()
                        return
                except psutil.Error:
                    continue

    killer = threading.Thread(target=kill_the_first_worker)
    killer.start()
    try:
        with Coordinator(image, workers=2) as coordinator:
            assert killed.wait(10)
            wait_for(lambda: len(worker_pids(coordinator)) == 2, "both serve")
    finally:
        killed.set()
        killer.join()


def test_a_slot_that_is_just_being_reaped_is_waited_for(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1, slots=1) as coordinator:
        reaper = attach(coordinator._image)
        assert reaper.try_lock(slot_byte(0))
        threading.Timer(0.01, reaper.unlock, [slot_byte(0)]).start()
        with shmcbw.open(image) as disk:
            disk.pwrite(b"x", 0)
        reaper.close()
