"""An errno at any point: a worker's copy fails by the policy, a coordinator's call leaves nothing behind."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.errors import JobFailedError, ShmcbwError, SnapshotBrokenError, TargetRefusedError
from shmcbw.failpoints import POINTS
from shmcbw.invariants import check
from shmcbw.layout import SNAPSHOT_COUNT, Header
from shmcbw.workers import Coordinator
from tests.conftest import SEED, segment_file, wait_for

SIZE = 4 << 20
CLUSTER = 65536

#: Nothing of a copy counts; what comes after it only tells somebody.
COPY = ("copying", "copied")
TELLING = ["acknowledged", "published", "woke", "failed", "delivered"]
ALL = os.environ.get("SHMCBW_MATRIX") == "all"
CHANCE = random.Random(SEED)


def part(rounds: list[Any], count: int) -> list[Any]:
    return rounds if ALL else sorted(CHANCE.sample(rounds, count), key=rounds.index)


@pytest.fixture
def coordinator(make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(make_image(SIZE), workers=1) as coordinator:
        yield coordinator
        assert coordinator.segment.header(Header.workers_replaced) == 0


def arm(coordinator: Coordinator, point: str, specification: str) -> None:
    failpoints.arm(coordinator.segment.memory, point, specification)


@pytest.mark.parametrize("step", part(["background", *COPY], 1))
def test_a_background_copy_that_fails_is_the_jobs_to_act_on(
    coordinator: Coordinator, tmp_path: Path, step: str
) -> None:
    arm(coordinator, f"worker.{step}", "errno:ENOSPC@1*3")
    job = coordinator.backup(tmp_path / "reported")
    with pytest.raises(JobFailedError) as caught:
        job.wait(30)
    assert caught.value.errno == errno.ENOSPC
    expected = Path(coordinator.path).read_bytes()
    job = coordinator.backup(tmp_path / "ignored", on_target_error="ignore")
    job.wait(30)
    assert (tmp_path / "ignored").read_bytes() == expected
    arm(coordinator, f"worker.{step}", "errno:EIO@1*1")
    job = coordinator.backup(tmp_path / "stopped", on_target_error="stop")
    wait_for(lambda: job.paused, "it is stopped", 20)
    job.resume()
    job.wait(30)
    assert (tmp_path / "stopped").read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "ignored", "stopped"]


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
@pytest.mark.parametrize("step", part(["claimed", *COPY], 1))
def test_a_copy_that_a_writer_waits_for_fails_by_the_policy(
    coordinator: Coordinator, tmp_path: Path, step: str, policy: str
) -> None:
    image = Path(coordinator.path)
    expected = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch", on_cbw_error=policy) as snapshot, shmcbw.open(image) as disk:
        arm(coordinator, f"worker.{step}", "errno:ENOSPC*1")
        if policy == "break-snapshot":
            disk.pwrite(b"new", CLUSTER)
            with pytest.raises(SnapshotBrokenError) as broken:
                snapshot.pread(1, 0)
            assert (broken.value.errno, broken.value.cluster) == (errno.ENOSPC, 1)
        else:
            with pytest.raises(OSError) as refused:
                disk.pwrite(b"new", CLUSTER)
            assert refused.value.errno == errno.ENOSPC
            assert image.read_bytes() == expected
            disk.pwrite(b"new", CLUSTER)
            assert snapshot.pread(SIZE, 0) == expected


@pytest.mark.parametrize("step", part(TELLING, 2))
def test_who_is_not_told_looks_again(coordinator: Coordinator, tmp_path: Path, step: str) -> None:
    image = Path(coordinator.path)
    expected = image.read_bytes()
    arm(coordinator, f"worker.{step}", "errno:EIO*3")
    if step in ("failed", "delivered"):
        arm(coordinator, "worker.copying", "errno:ENOSPC*1")
    with coordinator.snapshot(tmp_path / "scratch", on_cbw_error="break-guest-write") as snapshot:
        with shmcbw.open(image) as disk:
            with suppress(OSError):
                disk.pwrite(b"new", CLUSTER)
            disk.pwrite(b"new", CLUSTER)
        assert snapshot.pread(SIZE, 0) == expected
    now = image.read_bytes()
    coordinator.backup(tmp_path / "out").wait(30)
    assert (tmp_path / "out").read_bytes() == now


def test_a_target_that_a_worker_can_not_open_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    arm(coordinator, "worker.opened", "errno:EMFILE*1")
    with pytest.raises(TargetRefusedError) as refused:
        coordinator.backup(tmp_path / "out")
    assert refused.value.errno == errno.EMFILE
    coordinator.backup(tmp_path / "out").wait(30)


#: What a coordinator does while it serves, for somebody who can be told.
SERVING = [
    point.name
    for point in POINTS
    if point.protocol in ("prepare", "cut", "gate", "break", "finish", "drop", "increment", "journal")
    and not point.name.startswith("worker.")
]
#: Backups that end well, forget what the bitmap had, and are cancelled.
KINDS: list[dict[str, Any]] = [{}, {"bitmap": "b", "sync": "incremental"}, {"speed": 1, "job_id": "kept"}]
#: These two left something, once.
FOUND = [("coordinator.removed", "always"), ("coordinator.freed", "always")]
ROUNDS = [(point, how) for point in SERVING for how in ("once", "always") if (point, how) not in FOUND]


@pytest.mark.parametrize(("point", "how"), [*FOUND, *part(ROUNDS, 3)])
def test_an_errno_in_the_coordinator_leaves_nothing_behind(
    coordinator: Coordinator, tmp_path: Path, point: str, how: str
) -> None:
    """No entry of the table, no file, no name in /dev/shm; and afterwards all works."""
    image = Path(coordinator.path)
    names = of_image(image)
    coordinator.bitmaps.add("b")
    coordinator.backup(tmp_path / "base", bitmap="b", bitmap_mode="on-success").wait(30)
    arm(coordinator, point, "errno:EIO*1" if how == "once" else "errno:EIO")
    for number, options in enumerate(KINDS):
        with suppress(OSError, ShmcbwError):
            job = coordinator.backup(tmp_path / f"out{number}", **options)
            if "speed" in options:
                job.cancel()
            job.wait(30)
    with suppress(OSError, ShmcbwError):
        coordinator.snapshot(tmp_path / "scratch").close()
    arm(coordinator, point, "")
    assert [job for job in coordinator.jobs if not job.ended] == []
    assert coordinator.snapshots == []
    assert coordinator.status()["snapshots"] == []
    coordinator.bitmaps.remove("b")
    wait_for(lambda: of_image(image) <= names, f"no name is left: {of_image(image) - names}")
    expected = image.read_bytes()
    with shmcbw.open(image) as disk:
        jobs = [coordinator.backup(tmp_path / f"again{number}", speed=1) for number in range(SNAPSHOT_COUNT)]
        disk.pwrite(b"new", CLUSTER)
    for job in jobs:
        job.set_speed(0)
        job.wait(30)
    assert (tmp_path / "again0").read_bytes() == expected
    assert check(coordinator.segment) == []
    assert not list(tmp_path.glob("*partial*"))


def of_image(image: Path) -> set[str]:
    control = segment_file(image)
    return {path.name for path in control.parent.glob(f"*{control.name}*")}
