"""Snapshot reads, block status and discard: they answer for the cut, whatever writers do."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmcbw
from shmcbw.layout import Snapshot
from shmcbw.reader import Extent
from shmcbw.snapshots import break_snapshot, store_first_error
from shmcbw.workers import Coordinator
from tests.processes import running, write_forever

SIZE = 4 << 20
K64 = 65_536


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def test_reads_show_one_instant_while_writers_write(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, cluster_size=4096) as coordinator:
        with running(write_forever, str(image), 1), running(write_forever, str(image), 2):
            for turn in range(3):
                with coordinator.snapshot(tmp_path / f"scratch{turn}") as snapshot:
                    first = snapshot.pread(SIZE, 0)
                    for _ in range(200):
                        offset = random.randrange(SIZE)
                        length = random.randrange(min(100_000, SIZE - offset) + 1)
                        assert snapshot.pread(length, offset) == first[offset : offset + length]
                    assert snapshot.pread(SIZE, 0) == first


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("wzd"), st.integers(0, SIZE - 1), st.integers(1, 300_000)), max_size=8))
def test_after_any_writes_the_snapshot_is_what_the_image_was(
    image: Path, tmp_path: Path, operations: list[tuple[str, int, int]]
) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        before = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            for kind, offset, length in operations:
                length = min(length, SIZE - offset)
                if kind == "w":
                    disk.pwrite(b"n" * length, offset)
                else:
                    (disk.pwrite_zeroes if kind == "z" else disk.pdiscard)(length, offset)
            assert snapshot.pread(SIZE, 0) == before


def test_block_status_answers_for_the_cut_and_not_for_todays_source(tmp_path: Path) -> None:
    """The fault of QEMU 7.2: after a writer's zero write its snapshot said hole where the old data still was."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.write(os.urandom(1 << 20))
        file.truncate(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = [Extent(0, 1 << 20, "data"), Extent(1 << 20, 3 << 20, "zero")]
            assert snapshot.block_status(SIZE, 0) == before
            disk.pwrite_zeroes(4096, 3 * K64)
            disk.pwrite_zeroes(K64, 5 * K64)
            disk.pdiscard(K64, 7 * K64)
            disk.pwrite(b"data", 2 << 20)
            assert snapshot.block_status(SIZE, 0) == before
            assert snapshot.block_status(10, 5 * K64) == [Extent(5 * K64, 10, "data")]


def test_discard_lets_whole_clusters_go(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            expected = disk.pread(SIZE, 0)
            disk.pwrite(b"x", 2 * K64)
            snapshot.discard(3 * K64 + 10, K64 - 5)
            counts = coordinator.status()["snapshots"][0]["clusters"]
            assert counts["skipped"] == 3
            with pytest.raises(shmcbw.SnapshotInaccessibleError) as caught:
                snapshot.pread(1, 2 * K64)
            assert caught.value.errno == errno.EACCES
            assert snapshot.pread(K64, 0) == expected[:K64]
            assert snapshot.block_status(5 * K64, 0)[1] == Extent(K64, 3 * K64, "inaccessible")
            waits = disk.statistics()["wait_count"]
            disk.pwrite(b"y", 3 * K64)
            assert disk.statistics()["wait_count"] == waits, "what was let go is not copied"


def test_a_discard_of_less_than_a_cluster_is_a_harmless_success(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            expected = disk.pread(SIZE, 0)
            disk.pwrite(b"x", 0)
            for offset, count in ((0, 4096), (1, K64 - 1), (K64 - 1, 2), (0, 0)):
                snapshot.discard(count, offset)
            assert snapshot.pread(SIZE, 0) == expected


def test_a_discard_gives_the_scratch_space_back(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(b"x" * SIZE, 0)
            os.sync()
            scratch = tmp_path / "scratch.shmcbw-partial"
            before = os.stat(scratch).st_blocks
            snapshot.discard(SIZE, 0)
            assert os.stat(scratch).st_blocks < before // 10


@pytest.mark.parametrize(("count", "offset"), [(1, SIZE), (SIZE + 1, 0), (-1, 0), (1, -1)])
def test_out_of_range_is_refused(image: Path, tmp_path: Path, count: int, offset: int) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        for call in (snapshot.pread, snapshot.block_status, snapshot.discard):
            with pytest.raises(shmcbw.OutOfRangeError):
                call(count, offset)


def test_a_closed_snapshot_says_so_and_its_scratch_is_gone(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        snapshot = coordinator.snapshot(tmp_path / "scratch")
        snapshot.close()
        snapshot.close()
        with pytest.raises(shmcbw.ClosedError):
            snapshot.pread(1, 0)
        assert not (tmp_path / "scratch").exists()
        assert coordinator.status()["snapshots"] == []


def test_a_source_truncated_under_the_snapshot_is_an_error(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        os.truncate(image, 4096)
        with pytest.raises(OSError, match="truncated"):
            snapshot.pread(100, 1 << 20)
        assert len(snapshot.pread(100, 0)) == 100


def test_an_error_for_the_entrys_last_snapshot_does_not_break_the_next_one(image: Path, tmp_path: Path) -> None:
    """Whoever breaks a snapshot may sleep between its look and its store, while the entry is used again."""
    with Coordinator(image, workers=1) as coordinator:
        segment = coordinator._segment
        with coordinator.snapshot(tmp_path / "first"):
            odd = segment.snapshot(0, Snapshot.state) >> 32
        with coordinator.snapshot(tmp_path / "second") as snapshot:
            assert store_first_error(segment, 0, Snapshot.broken, odd, errno.EIO, 1)
            expected = snapshot.pread(SIZE, 0)
            serial = segment.snapshot(0, Snapshot.serial)
            break_snapshot(segment, 0, serial - 1, errno.EIO, 1)
            assert snapshot.pread(SIZE, 0) == expected
            break_snapshot(segment, 0, serial, errno.ENOSPC, 2)
            break_snapshot(segment, 0, serial, errno.EIO, 3)
            with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
                snapshot.pread(1, 0)
            assert (caught.value.errno, caught.value.cluster) == (errno.ENOSPC, 2)


def test_a_reader_of_a_dropped_snapshot_does_not_read_the_next_one(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        first = coordinator.snapshot(tmp_path / "first")
        coordinator.drop_snapshot(first._entry)
        with coordinator.snapshot(tmp_path / "second"), pytest.raises(shmcbw.ClosedError):
            first.pread(1, 0)
        first.close()
