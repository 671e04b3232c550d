"""A coordinator dies: who goes on, who leaves, what the next one finds, and what is reported as lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw.bitmap import Bitmap
from shmcbw.image import Identity
from shmcbw.invariants import check
from shmcbw.segment import SHM, segment_name
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import stop_all

SIZE = 4 << 20
GRACE_S = 5.0


def workers_of(image: Path) -> list[int]:
    """The copy workers of an image, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "shmcbw.workers.copy_worker" in command and str(image) in command:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_gone(pids: list[int]) -> None:
    """Wait until these orphans have left by themselves."""
    assert pids
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), "the orphans leave", 4 * GRACE_S)


def segment_file(image: Path) -> Path:
    return Path(SHM) / segment_name(Identity.of(os.stat(image)))[1:]


def kill_owner(image: Path, *commands: dict[str, str]) -> list[int]:
    """Have a coordinator do these and kill it; its orphans."""
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        for command in commands:
            answer = owner.ask(**command)
            assert answer is not None
            assert "ok" in answer, answer
        return workers_of(image)
    finally:
        owner.end()


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


# -- orphaned workers --------------------------------------------------------------------------------------------------


def test_orphans_serve_writers_while_a_snapshot_needs_them_and_leave_when_the_last_writer_has_gone(
    image: Path, tmp_path: Path
) -> None:
    expected = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        owner.ask(do="snapshot", scratch=str(tmp_path / "scratch"))
        with shmcbw.open(image) as disk:
            orphans = workers_of(image)
            assert len(orphans) == 2
            owner.end()
            end = time.monotonic() + GRACE_S + 2
            while time.monotonic() < end:
                # A first touch every now and then; each needs a worker, for no copying ahead meets every other cluster.
                disk.pwrite(b"later", disk.statistics()["writes"] * 131_072)
                time.sleep(0.25)
            assert all(map(psutil.pid_exists, orphans))
            assert disk.statistics()["wait_count"] == disk.statistics()["writes"]
        wait_gone(orphans)
        assert segment_file(image).exists(), "a coordinator may come back for the snapshot"
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        (snapshot,) = coordinator.snapshots
        assert snapshot.pread(SIZE, 0) == expected


def test_orphans_leave_when_their_backup_is_copied_although_no_coordinator_returns(image: Path, tmp_path: Path) -> None:
    wait_gone(kill_owner(image, {"do": "backup", "target": str(tmp_path / "out")}))
    with Coordinator(image, workers=1) as coordinator:
        for job in coordinator.jobs:
            job.wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_orphans_of_a_coordinator_that_died_before_its_cut_leave(image: Path, tmp_path: Path) -> None:
    owner = Owner(image, SHMCBW_FAILPOINTS="coordinator.prepared=kill")
    try:
        assert owner.answer() is not None
        assert owner.ask(do="backup", target=str(tmp_path / "out")) is None
        owner.process.wait()
        wait_gone(workers_of(image))
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.jobs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_dead_coordinators_worker_that_dies_after_the_adoption_gives_its_claims_back(
    image: Path, tmp_path: Path
) -> None:
    """It was stopped with clusters claimed, so it could neither leave nor be told from one that copies."""
    expected = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        owner.ask(do="snapshot", scratch=str(tmp_path / "scratch"))
        orphans = workers_of(image)
        stop_all(orphans)
        owner.end()
        with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
            (entry,) = coordinator.status()["snapshots"]
            (stranger, *_) = [w for w in coordinator.status()["workers"] if w["pid"] in orphans]
            bitmap = Bitmap.attach(coordinator._segment, entry["serial"])
            bitmap.memory[3:6] = bytes([stranger["id"]]) * 3
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            disk.pwrite(b"x" * 65_536, 4 * 65_536)
            assert time.monotonic() - started < 15, "served long before cbw_timeout"
            assert [bitmap.state(cluster) for cluster in (3, 5)] == [0, 0]
            bitmap.close()
            wait_for(lambda: check(coordinator._segment) == [], "the dead are reaped")
            (snapshot,) = coordinator.snapshots
            assert snapshot.pread(len(expected), 0) == expected
    finally:
        owner.end()
