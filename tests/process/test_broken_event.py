"""A snapshot that breaks says so: once, with the first errno, where and when, and for as long as it is asked."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw.snapshots import break_snapshot
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import stop_all

SIZE = 1 << 20
K64 = 65_536


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


class Heard:
    """The events of a coordinator, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def broken(self) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == "SNAPSHOT_BROKEN"]


def test_a_copy_that_comes_too_late_is_told_with_its_errno_cluster_and_time(image: Path, tmp_path: Path) -> None:
    heard = Heard()
    with Coordinator(image, workers=1, on_event=heard) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0.3) as snapshot:
            workers = list(coordinator._pool.pids.values())
            stop_all(workers)
            before = time.time()
            disk.pwrite(b"late", 3 * K64 + 5)
            after = time.time()
            wait_for(heard.broken, "the event")
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            [event] = heard.broken()
            assert (event["errno"], event["error"]) == (errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            assert (event["cluster"], event["offset"]) == (3, 3 * K64)
            assert before <= event["time"] <= after
            # Later ones are not told, and the first one stays.
            break_snapshot(coordinator.segment, 0, snapshot.serial, errno.EIO, 7)
            disk.pwrite(b"again", 5 * K64)
            [status] = coordinator.status()["snapshots"]
            assert status["state"] == "broken"
            assert (status["broken"]["errno"], status["broken"]["cluster"]) == (errno.ETIMEDOUT, 3)
            assert status["broken"]["time_ns"] == pytest.approx(event["time"] * 1e9, abs=1e3)
            assert snapshot.broken is not None and snapshot.broken.errno == errno.ETIMEDOUT
            with pytest.raises(shmcbw.SnapshotBrokenError, match="cluster 3"):
                snapshot.pread(1, 0)
    assert len(heard.broken()) == 1


def test_each_snapshot_that_breaks_is_told_and_a_backups_before_its_job_ends(image: Path, tmp_path: Path) -> None:
    heard = Heard()
    with Coordinator(image, workers=1, on_event=heard) as coordinator:
        for turn in range(2):
            job = coordinator.backup(tmp_path / f"out{turn}", speed=1)
            [entry] = coordinator.status()["snapshots"]
            break_snapshot(coordinator.segment, entry["snapshot"], entry["serial"], errno.ENOSPC, turn)
            with pytest.raises(shmcbw.SnapshotBrokenError):
                job.wait(20)
        names = [name for name, _ in heard.events]
        assert [event["cluster"] for event in heard.broken()] == [0, 1]
        assert [event["job"] for event in heard.broken()] == [each.id for each in coordinator.jobs]
        assert names.index("SNAPSHOT_BROKEN") < names.index("BLOCK_JOB_COMPLETED")


def test_a_snapshot_that_broke_while_nobody_listened_is_told_by_the_next_coordinator(
    image: Path, tmp_path: Path
) -> None:
    owner = Owner(image)
    assert owner.answer() is not None
    try:
        assert owner.ask(do="snapshot", scratch=str(tmp_path / "scratch")) == {"ok": None}
        with shmcbw.open_snapshot(image) as reader:
            owner.end()
            break_snapshot(reader._segment, 0, reader.serial, errno.EIO, 2)
            heard = Heard()
            with Coordinator(image, workers=1, on_event=heard):
                wait_for(heard.broken, "the event")
                assert [(event["errno"], event["cluster"]) for event in heard.broken()] == [(errno.EIO, 2)]
    finally:
        owner.end()


BREAKER = """
import errno, sys
import shmcbw
from shmcbw.snapshots import break_snapshot
reader = shmcbw.open_snapshot(sys.argv[1])
break_snapshot(reader._segment, 0, reader.serial, errno.EIO, 4)
"""


@pytest.mark.parametrize("step", ["break.error", "break.state"])
def test_who_broke_it_may_die_over_it(image: Path, tmp_path: Path, step: str) -> None:
    heard = Heard()
    with Coordinator(image, workers=1, on_event=heard) as coordinator, coordinator.snapshot(tmp_path / "scratch"):
        done = subprocess.run(
            [sys.executable, "-c", BREAKER, str(image)],
            env={**os.environ, "SHMCBW_FAILPOINTS": f"{step}=kill"},
        )
        assert done.returncode == -signal.SIGKILL
        wait_for(heard.broken, "the event")
        assert [(event["errno"], event["cluster"]) for event in heard.broken()] == [(errno.EIO, 4)]
        [status] = coordinator.status()["snapshots"]
        assert status["state"] == "broken"
