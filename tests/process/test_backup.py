"""A backup shows one instant: what was written before it, and nothing of what came later."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.processes import running, write_forever, write_pairs_forever

K = 1024


def test_what_was_written_before_is_in_it_and_what_comes_later_is_not(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image, target = make_image(8 << 20), tmp_path / "out.img"
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"before" * 1000, 100_000)
        expected = image.read_bytes()
        job = coordinator.backup(target, speed=1)
        disk.pwrite(b"later" * 50_000, 90_000)
        disk.pwrite_zeroes(1 << 20, 3 << 20)
        disk.pdiscard(100, 7 << 20)
        job.set_speed(0)
        job.wait(30)
        assert job.status == "concluded"
    assert target.read_bytes() == expected
    assert image.read_bytes() != expected


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65536, 65537, (1 << 20) + 1])
@pytest.mark.parametrize("cluster_size", [4 * K, 64 * K, 2048 * K])
def test_every_size_is_right_to_the_last_byte(
    make_image: Callable[..., Path], tmp_path: Path, size: int, cluster_size: int
) -> None:
    image, target = make_image(size), tmp_path / "out.img"
    expected = image.read_bytes()
    with Coordinator(image, workers=1, cluster_size=cluster_size) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(target)
        disk.pwrite(b"\xff", size - 1)
        job.wait(30)
        progress = job.progress()
    assert target.read_bytes() == expected
    assert progress.current_bytes == progress.total_bytes == size


def test_a_write_over_many_clusters_is_copied_before_any_of_it_is_stored(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(4 << 20)
    expected = image.read_bytes()
    with Coordinator(image, cluster_size=4 * K) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(b"n" * (3 << 20), 12_345)
            assert snapshot.pread(4 << 20, 0) == expected


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (65_535, 2), (65_536, 65_536), (1, 65_536), (131_071, 65_538)])
def test_a_write_is_rounded_out_to_clusters(
    make_image: Callable[..., Path], tmp_path: Path, offset: int, length: int
) -> None:
    image = make_image(1 << 20)
    first, end = offset // 65_536, (offset + length - 1) // 65_536 + 1
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch"):
            disk.pwrite(b"x" * length, offset)
            counts = coordinator.status()["snapshots"][0]["clusters"]
            assert counts["copied_for_writer"] == end - first
            assert counts["pending"] == 16 - (end - first)


def test_an_unchanged_write_copies_nothing_and_does_not_let_the_next_real_one_through(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(1 << 20)
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(expected[:100], 0, unchanged=True)
            assert coordinator.status()["snapshots"][0]["clusters"]["copied_for_writer"] == 0
            disk.pwrite(b"n" * 100, 0)
            assert coordinator.status()["snapshots"][0]["clusters"]["copied_for_writer"] == 1
            assert snapshot.pread(1 << 20, 0) == expected


def test_an_unchanged_write_that_is_not_is_copied_and_marked_like_any_other(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    """Its caller compared too early: another write, or a cut, came between."""
    image = make_image(1 << 20)
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            assert disk.pwrite(b"different", 70_000, unchanged=True) == 9
            assert disk.pread(9, 70_000) == b"different"
            assert coordinator.status()["snapshots"][0]["clusters"]["copied_for_writer"] == 1
            assert snapshot.pread(1 << 20, 0) == expected


def test_each_cluster_is_copied_once_however_many_write_it(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(1 << 20)
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch"):
            for _ in range(50):
                disk.pwrite(b"x", 0)
            chunks = sum(worker["wanted_chunks"] for worker in coordinator.status()["workers"])
            assert chunks == 1
            assert disk.statistics()["wait_count"] == 1


def test_two_backups_at_once_each_show_their_own_instant(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(4 << 20)
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        instants, jobs = [], []
        for turn in range(4):
            instants.append(image.read_bytes())
            jobs.append(coordinator.backup(tmp_path / f"out{turn}", speed=1))
            for _ in range(10):
                disk.pwrite(os.urandom(5000), random.randrange((4 << 20) - 5000))
        for job in jobs:
            job.set_speed(0)
        for job in jobs:
            job.wait(30)
    for turn, expected in enumerate(instants):
        assert (tmp_path / f"out{turn}").read_bytes() == expected


def test_eight_snapshots_at_once_and_the_ninth_is_refused(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(1 << 20)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        snapshots, instants = [], []
        for turn in range(8):
            instants.append(image.read_bytes())
            snapshots.append(coordinator.snapshot(tmp_path / f"scratch{turn}"))
            disk.pwrite(bytes([turn]) * 1000, turn * 1000)
        with pytest.raises(shmcbw.ShmcbwError, match="all 8 snapshots"):
            coordinator.snapshot(tmp_path / "ninth")
        assert not (tmp_path / "ninth").exists()
        for snapshot, expected in zip(snapshots, instants, strict=True):
            assert snapshot.pread(1 << 20, 0) == expected
        snapshots.pop(3).close()
        snapshots.append(coordinator.snapshot(tmp_path / "ninth"))
        for snapshot in snapshots:
            snapshot.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_a_pair_written_in_order_by_a_process_is_never_seen_reversed(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(8 << 20)
    first, second = 7 << 20, 5 << 20
    with Coordinator(image) as coordinator:
        with shmcbw.open(image) as disk:
            disk.pwrite(bytes(8), first)
            disk.pwrite(bytes(8), second)
        with (
            running(write_pairs_forever, str(image), first, second),
            running(write_forever, str(image), 1, 4096, 4 << 20),
        ):
            _wait_for_writes(coordinator, 2)
            for turn in range(5):
                job = coordinator.backup(tmp_path / f"out{turn}")
                job.wait(30)
                data = (tmp_path / f"out{turn}").read_bytes()
                a, b = (int.from_bytes(data[o : o + 8], "little") for o in (first, second))
                assert a in (b, b + 1), f"backup {turn}: {a} then {b}"


def _wait_for_writes(coordinator: Coordinator, writers: int) -> None:
    from tests.conftest import wait_for

    wait_for(lambda: len([s for s in coordinator.status()["slots"] if s["writes"] > 100]) >= writers, "writers", 20)


def test_progress_reaches_the_total_and_is_split(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(4 << 20)
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(1 << 20))
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        disk.pwrite(b"x", 0)
        before = job.progress()
        assert before.copied_for_writers_bytes == 65_536
        assert before.current_bytes < before.total_bytes
        job.set_speed(0)
        job.wait(30)
        after = job.progress()
    assert after.zero_bytes == 1 << 20
    assert after.copied_for_writers_bytes == 65_536
    assert after.copied_in_background_bytes == (3 << 20) - 65_536
    assert after.current_bytes == after.total_bytes == 4 << 20


def test_the_speed_limit_holds_back_the_background_and_never_a_writer(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(8 << 20)
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        for offset in range(0, 8 << 20, 1 << 20):
            disk.pwrite(b"x", offset)
        progress = job.progress()
        assert progress.copied_in_background_bytes == 0
        assert progress.copied_for_writers_bytes >= 8 * 65_536
        job.cancel()


def test_zeroes_cost_no_space_in_the_target(tmp_path: Path) -> None:
    image, target = tmp_path / "disk.img", tmp_path / "out.img"
    with image.open("wb") as file:
        file.write(bytes(4 << 20))
        file.truncate(16 << 20)
        file.seek(12 << 20)
        file.write(b"data" * 1024)
    with Coordinator(image) as coordinator:
        coordinator.backup(target).wait(30)
    assert target.read_bytes() == image.read_bytes()
    assert os.stat(target).st_blocks * 512 <= 128 * K


def test_sync_top_leaves_holes_out_and_copies_what_is_allocated(tmp_path: Path) -> None:
    image, target = tmp_path / "disk.img", tmp_path / "out.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
        file.seek(1 << 20)
        file.write(os.urandom(1 << 20))
        file.seek(6 << 20)
        file.write(bytes(1 << 20))
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        expected = image.read_bytes()
        job = coordinator.backup(target, sync="top", speed=1)
        disk.pwrite(b"new", 4 << 20)
        job.set_speed(0)
        job.wait(30)
        progress = job.progress()
    assert target.read_bytes() == expected
    assert progress.skipped_bytes == 6 << 20
    assert progress.zero_bytes == 1 << 20
    assert progress.copied_in_background_bytes == 1 << 20


def test_sync_none_copies_only_what_is_overwritten_and_ends_by_cancel(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(1 << 20)
    with Coordinator(image) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", sync="none")
        disk.pwrite(b"x", 0)
        with pytest.raises(TimeoutError):
            job.wait(0.3)
        assert job.progress().current_bytes == 65_536
        job.cancel()
        with pytest.raises(shmcbw.JobCancelledError):
            job.wait(10)
        assert job.status == "concluded"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_the_next_cut_begins_a_new_epoch(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(1 << 20)
    with Coordinator(image, workers=1) as coordinator:
        before = coordinator.status()["epoch"]
        coordinator.snapshot(tmp_path / "scratch").close()
        assert coordinator.status()["epoch"] == before + 2


def test_a_cancelled_backup_leaves_nothing(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(4 << 20)
    with Coordinator(image) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        job.cancel()
        job.cancel()
        with pytest.raises(shmcbw.JobCancelledError):
            job.wait(10)
        assert isinstance(job.error, shmcbw.JobCancelledError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_closing_the_coordinator_cancels_its_jobs(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(1 << 20)
    with Coordinator(image) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
    assert isinstance(job.error, shmcbw.JobCancelledError)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_a_sequential_writer_finds_clusters_copied_ahead(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(16 << 20)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            expected = disk.pread(16 << 20, 0)
            for offset in range(0, 16 << 20, 65_536):
                disk.pwrite(b"x" * 65_536, offset)
            assert snapshot.pread(16 << 20, 0) == expected
            assert disk.statistics()["wait_count"] < 128
            assert sum(worker["ahead_chunks"] for worker in coordinator.status()["workers"]) > 0
