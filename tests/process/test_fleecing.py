"""Backups of a snapshot: its cut, whatever is written meanwhile, and nobody waits for the target."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw import failpoints, states
from shmcbw.errors import ClosedError, JobFailedError, SnapshotBrokenError, SnapshotInaccessibleError
from shmcbw.invariants import check
from shmcbw.layout import Snapshot
from shmcbw.snapshots import break_snapshot, state_of
from shmcbw.workers import Backup, Coordinator
from shmcbw.workers.coordinator import CoordinatorSnapshot
from shmcbw.workers.groups import take_group
from shmcbw.workers.manifest import Manifest, sidecar
from shmcbw.workers.verify import verify
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import running, write_forever

SIZE = 4 << 20
K64 = 65_536


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def coordinator(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(image) as coordinator:
        yield coordinator


@pytest.fixture
def snapshot(coordinator: Coordinator, tmp_path: Path) -> Iterator[CoordinatorSnapshot]:
    with coordinator.snapshot(tmp_path / "scratch") as snapshot:
        yield snapshot


def arm(coordinator: Coordinator, name: str, action: str) -> None:
    failpoints.arm(coordinator.segment.memory, name, action)


@pytest.mark.parametrize("sync", ["full", "top"])
def test_a_backup_of_a_snapshot_shows_its_cut_while_writers_write(
    image: Path, coordinator: Coordinator, tmp_path: Path, sync: str
) -> None:
    with shmcbw.open(image) as disk:
        disk.pdiscard(4 * K64, 60 * K64)
    with running(write_forever, str(image), 1), running(write_forever, str(image), 2):
        wait_for(lambda: any(slot["writes"] for slot in coordinator.status()["slots"]), "somebody writes")
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            job = coordinator.backup(tmp_path / "out", source=snapshot, sync=sync, manifest=True)
            job.wait()
            shown = hashlib.sha256(snapshot.pread(SIZE, 0)).hexdigest()
        assert check(coordinator.segment) == []
    assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == shown
    assert job.cut_time_ns == snapshot.cut_time_ns
    assert not verify(str(tmp_path / "out")).differing


def test_what_was_overwritten_is_taken_from_the_scratch(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with shmcbw.open(image) as disk:
        disk.pwrite(b"new" * 50_000, 3 * K64 + 5)
        disk.pwrite_zeroes(5 * K64, 20 * K64)
        disk.pdiscard(5 * K64, 40 * K64)
        coordinator.backup(tmp_path / "out", source=snapshot).wait()
    assert (tmp_path / "out").read_bytes() == before


def test_no_writer_waits_for_the_target_of_such_a_backup(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    """The job can't copy anything: writers go on, the snapshot is whole, and so is what the job makes of it later."""
    before = image.read_bytes()
    job = coordinator.backup(tmp_path / "out", source=snapshot, speed=1)
    wait_for(lambda: job.status == "running", "it runs")
    job.pause()
    index = next(i for i in range(8) if state_of(coordinator.segment, i) == states.FOLLOWING)
    assert coordinator.segment.snapshot(index, Snapshot.source) == snapshot.serial
    with shmcbw.open(image) as disk:
        for offset in range(0, SIZE, K64):
            disk.pwrite(b"new", offset)
    copied = job.progress()
    assert copied.copied_for_writers_bytes == 0 and copied.current_bytes <= K64
    assert check(coordinator.segment) == []
    job.set_speed(0)
    job.resume()
    job.wait()
    assert (tmp_path / "out").read_bytes() == before


def test_discard_source_empties_the_snapshot_as_it_is_copied(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with shmcbw.open(image) as disk:
        disk.pwrite(b"new" * 50_000, 3 * K64 + 5)
        assert (tmp_path / "scratch.shmcbw-partial").stat().st_blocks > 0
        coordinator.backup(tmp_path / "out", source=snapshot, discard_source=True).wait()
        assert (tmp_path / "out").read_bytes() == before
        assert (tmp_path / "scratch.shmcbw-partial").stat().st_blocks == 0
        assert [extent.status for extent in snapshot.block_status(SIZE, 0)] == ["inaccessible"]
        waited = disk.statistics()["wait_count"]
        disk.pwrite(b"x" * SIZE, 0)
        assert disk.statistics()["wait_count"] == waited, "nobody needs old data any more"
    with pytest.raises(SnapshotInaccessibleError):
        snapshot.pread(1, 0)


def test_a_backup_of_a_snapshot_that_was_limited_fails_at_what_it_may_not_read(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    """As in QEMU: the part that is accessible can't be told from all of it."""
    with coordinator.snapshot(tmp_path / "scratch", access=[(K64, K64)]) as snapshot:
        job = coordinator.backup(tmp_path / "out", source=snapshot)
        with pytest.raises(JobFailedError) as found:
            job.wait()
    assert found.value.errno == errno.EACCES and "read: Permission denied" in str(found.value)


def test_a_break_of_the_snapshot_breaks_its_backups(
    coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    job = coordinator.backup(tmp_path / "out", source=snapshot, speed=1)
    index = next(i for i in range(8) if state_of(coordinator.segment, i) == states.ACTIVE)
    break_snapshot(coordinator.segment, index, snapshot.serial, errno.ENOSPC, 7)
    with pytest.raises(SnapshotBrokenError) as found:
        job.wait()
    assert (found.value.errno, found.value.cluster) == (errno.ENOSPC, 7)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(SnapshotBrokenError):
        coordinator.backup(tmp_path / "again", source=snapshot)


def test_a_snapshot_that_is_closed_ends_its_backups(coordinator: Coordinator, tmp_path: Path) -> None:
    snapshot = coordinator.snapshot(tmp_path / "scratch")
    job = coordinator.backup(tmp_path / "out", source=snapshot, speed=1)
    snapshot.close()
    with pytest.raises((SnapshotBrokenError, JobFailedError), match="Stale file handle"):
        job.wait()
    with pytest.raises(ClosedError):
        coordinator.backup(tmp_path / "again", source=snapshot)
    with pytest.raises(ValueError, match="only a snapshot can be let go of"):
        coordinator.backup(tmp_path / "again", discard_source=True)


def test_errors_of_such_a_backup_stop_it_and_not_the_snapshot(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    before = image.read_bytes()
    arm(coordinator, "worker.copying", "errno:ENOSPC*1")
    job = coordinator.backup(tmp_path / "out", source=snapshot, on_target_error="stop")
    wait_for(lambda: job.status == "paused", "it stops")
    assert job.io_status == "nospace" and snapshot.broken is None
    job.resume()
    job.wait()
    assert (tmp_path / "out").read_bytes() == before


def test_a_group_of_the_image_and_of_a_snapshot_has_a_new_cut_for_the_image_only(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with shmcbw.open(image) as disk:
        disk.pwrite(b"between", 5 * K64)
    now = image.read_bytes()
    both = [Backup(coordinator, tmp_path / "old", source=snapshot), Backup(coordinator, tmp_path / "new")]
    for job in take_group(both):
        job.wait()  # type: ignore[union-attr]
    assert (tmp_path / "old").read_bytes() == before
    assert (tmp_path / "new").read_bytes() == now


@pytest.mark.parametrize("discard", [False, True])
def test_a_backup_of_a_snapshot_goes_on_after_a_kill_of_coordinator_and_workers(
    image: Path, tmp_path: Path, discard: bool
) -> None:
    before = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() == {"ok": []}
        owner.ask(do="snapshot", scratch=str(tmp_path / "scratch"))
        how = {"discard_source": discard, "job_id": "j"}
        owner.ask(do="backup", target=str(tmp_path / "out"), of_snapshot=True, speed=16 * K64, how=how)

        def copied() -> bool:
            (job,) = (owner.ask(do="jobs") or {})["ok"]
            return bool(job["progress"]["current_bytes"] > 2 * K64)

        wait_for(copied, "some is copied")
        workers = [child.pid for child in psutil.Process(owner.pid).children()]
    finally:
        owner.end()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    with Coordinator(image) as coordinator:
        (snapshot,) = coordinator.snapshots
        (job,) = coordinator.jobs
        assert job.id == "j" and job.status == "running"
        with shmcbw.open(image) as disk:
            disk.pwrite(b"later" * 10_000, 30 * K64)
        job.set_speed(0)
        job.wait()
        assert (tmp_path / "out").read_bytes() == before
        statuses = {extent.status for extent in snapshot.block_status(SIZE, 0)}
        assert ("inaccessible" in statuses) is discard
        snapshot.close()


def test_the_manifest_of_such_a_backup_names_the_cut_of_the_snapshot(
    image: Path, coordinator: Coordinator, snapshot: CoordinatorSnapshot, tmp_path: Path
) -> None:
    coordinator.backup(tmp_path / "direct", manifest=True).wait()
    coordinator.backup(tmp_path / "out", source=snapshot, manifest=True).wait()
    found = Manifest.open(sidecar(str(tmp_path / "out")), writable=False)
    direct = Manifest.open(sidecar(str(tmp_path / "direct")), writable=False)
    try:
        assert found.description.point.epoch < direct.description.point.epoch
        assert found.description.cut_time_ns == snapshot.cut_time_ns
    finally:
        found.close()
        direct.close()


def test_random_writes_and_discards_around_such_a_backup(image: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    seed = int(os.environ.get("SHMCBW_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    chance = random.Random(seed)
    with shmcbw.open(image) as disk:
        for round_ in range(3):
            before = image.read_bytes()
            with coordinator.snapshot(tmp_path / f"scratch{round_}") as snapshot:
                job = coordinator.backup(
                    tmp_path / f"out{round_}", source=snapshot, discard_source=chance.random() < 0.5, speed=SIZE * 4
                )
                while job.status == "running":
                    length, offset = chance.choice([1, 4096, K64, 3 * K64]), chance.randrange(SIZE - 3 * K64)
                    verb = chance.choice([disk.pwrite_zeroes, disk.pdiscard, None])
                    disk.pwrite(chance.randbytes(length), offset) if verb is None else verb(length, offset)
                job.wait()
            assert (tmp_path / f"out{round_}").read_bytes() == before
