"""The bitmaps of a coordinator: QEMU's rules and texts, boundaries against writers, and what a job does to one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import shmcbw
from shmcbw.bitmap import COPIED, SKIPPED, Bitmap
from shmcbw.errors import BitmapError
from shmcbw.segment import Segment
from shmcbw.workers import Backup, Coordinator, backup_group, bitmaps, journal
from shmcbw.workers.completion import JobTransaction
from tests.conftest import wait_for
from tests.processes import continue_all, running, stop_all, write_forever

CLUSTER = 65536
SIZE = 32 * CLUSTER


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=1) as coordinator:
        yield coordinator


@pytest.fixture
def disk(coordinator: Coordinator, image: Path) -> Iterator[shmcbw.Disk]:
    with shmcbw.open(image) as disk:
        yield disk


def dirty(coordinator: Coordinator, name: str = "b") -> set[int]:
    """The dirty clusters."""
    return {
        cluster
        for offset, length in coordinator.bitmaps.extents(name)
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))
    }


def has_first(coordinator: Coordinator, name: str) -> bool:
    return 0 in dirty(coordinator, name)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(BitmapError) as caught:
        call()
    return str(caught.value)


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_bitmap_has_what_was_written_since_it_was_made(coordinator: Coordinator, disk: shmcbw.Disk) -> None:
    disk.pwrite(b"before", 0)
    coordinator.bitmaps.add("b")
    assert coordinator.bitmaps.query() == [
        {"name": "b", "recording": True, "persistent": False, "busy": False, "granularity": 65536, "count": 0}
    ]
    disk.pwrite(b"x" * 2, 5 * CLUSTER - 1)
    disk.pwrite_zeroes(CLUSTER, 9 * CLUSTER)
    disk.pdiscard(1, 11 * CLUSTER)
    disk.pwrite(disk.pread(9, 20 * CLUSTER), 20 * CLUSTER, unchanged=True)
    assert dirty(coordinator) == {4, 5, 9, 11}
    assert coordinator.bitmaps.query()[0]["count"] == 4 * CLUSTER


def test_a_write_that_was_made_just_before_is_not_in_a_new_bitmap(coordinator: Coordinator, disk: shmcbw.Disk) -> None:
    """Also in the same epoch: add, clear and enable make a boundary."""
    for number, name in enumerate("abc"):
        disk.pwrite(b"x", 2 * number * CLUSTER)
        coordinator.bitmaps.add(name, disabled=name == "c")
        disk.pwrite(b"x", (2 * number + 1) * CLUSTER)
    coordinator.bitmaps.enable("c")
    assert [dirty(coordinator, name) for name in "abc"] == [{1, 2, 3, 4, 5}, {3, 4, 5}, set()]
    coordinator.bitmaps.clear("a")
    assert dirty(coordinator, "a") == set()


def test_a_stopped_writer_makes_a_new_bitmap_hold_more_and_never_less(image: Path) -> None:
    with Coordinator(image, workers=1, drain_limit=0.05) as coordinator:
        with running(write_forever, str(image), 1, 4096, CLUSTER) as writer:
            wait_for(lambda: any(s["writes"] for s in coordinator.status()["slots"]), "a writer", 20)
            assert writer.pid is not None
            held = 0
            for _ in range(200):
                stop_all([writer.pid])
                if any(s["in_flight"] for s in coordinator.status()["slots"]):
                    coordinator.bitmaps.add(f"b{held}")
                    held += 1
                continue_all([writer.pid])
                if held == 2:
                    break
            for number in range(held):
                wait_for(partial(has_first, coordinator, f"b{number}"), "its writes are seen")


def test_names_and_granularities_are_refused_with_qemus_texts(coordinator: Coordinator) -> None:
    bitmaps = coordinator.bitmaps
    bitmaps.add("b0")
    assert refusal(lambda: bitmaps.add("b0")) == "Bitmap already exists: b0"
    assert refusal(lambda: bitmaps.add("")) == "Bitmap name cannot be empty"
    assert refusal(lambda: bitmaps.add("x" * 1024)) == "Bitmap name too long: " + "x" * 1024
    assert refusal(lambda: bitmaps.add("b1", granularity=1000)) == "Granularity must be power of 2 and at least 512"
    missing = "Dirty bitmap 'nope' not found"
    for call in (bitmaps.remove, bitmaps.clear, bitmaps.enable, bitmaps.disable, bitmaps.sha256, bitmaps.extents):
        assert refusal(partial(call, "nope")) == missing
    assert refusal(lambda: bitmaps.merge("nope", ["b0"])) == missing
    assert refusal(lambda: bitmaps.merge("b0", ["b0", "nope"])) == missing
    assert "no state directory" in refusal(lambda: bitmaps.add("p", persistent=True))
    assert list(bitmaps) == ["b0"]


def test_a_disabled_bitmap_keeps_what_it_has_and_merges_take_other_granularities(
    coordinator: Coordinator, disk: shmcbw.Disk
) -> None:
    bitmaps = coordinator.bitmaps
    bitmaps.add("coarse", granularity=4 * CLUSTER)
    bitmaps.add("fine", granularity=512)
    disk.pwrite(b"x", 5 * CLUSTER)
    bitmaps.disable("fine")
    disk.pwrite(b"x", 20 * CLUSTER)
    assert {each["name"]: (each["recording"], each["count"]) for each in bitmaps.query()} == {
        "coarse": (True, 8 * CLUSTER),
        "fine": (False, CLUSTER),
    }
    bitmaps.add("both", disabled=True)
    bitmaps.merge("both", ["fine", "coarse"])
    assert dirty(coordinator, "both") == {4, 5, 6, 7, 20, 21, 22, 23}
    bitmaps.add("again", disabled=True)
    assert bitmaps.sha256("again") != bitmaps.sha256("both")
    bitmaps.merge("again", ["both"])
    assert bitmaps.sha256("again") == bitmaps.sha256("both")


def test_a_full_shared_memory_refuses_a_change_and_changes_nothing(
    coordinator: Coordinator, disk: shmcbw.Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(segment: Segment, suffix: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    coordinator.bitmaps.add("b")
    disk.pwrite(b"x", 0)
    monkeypatch.setattr(bitmaps, "replace_file", full)
    monkeypatch.setattr(journal, "replace_file", full)
    calls: list[Callable[[], None]] = [lambda: coordinator.bitmaps.disable("b"), lambda: coordinator.bitmaps.add("c")]
    for call in calls:
        with pytest.raises(OSError, match="full"):
            call()
    monkeypatch.undo()
    assert [(each["name"], each["recording"]) for each in coordinator.bitmaps.query()] == [("b", True)]
    assert dirty(coordinator) == {0}


# -- jobs: sync mode x bitmap-mode -------------------------------------------------------------------------------------


REFUSED = [
    ("bitmap", None, None, "must provide a valid bitmap name for 'bitmap' sync mode"),
    ("incremental", None, "always", "must provide a valid bitmap name for 'incremental' sync mode"),
    ("incremental", "nope", "always", "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"),
    ("incremental", "nope", None, "Bitmap 'nope' could not be found"),
    ("full", "nope", "never", "Bitmap 'nope' could not be found"),
    ("none", "nope", "always", "Bitmap 'nope' could not be found"),
    ("bitmap", "b", None, "Bitmap sync mode must be given when providing a bitmap"),
    ("none", "b", None, "Bitmap sync mode must be given when providing a bitmap"),
    ("none", "b", "always", "sync mode 'none' does not produce meaningful bitmap outputs"),
    (
        "full",
        "b",
        "never",
        "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
    ),
    ("top", "b", "never", "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'top'"),
    ("full", None, "on-success", "Cannot specify bitmap sync mode without a bitmap"),
]


def test_what_does_not_go_together_is_refused_with_qemus_texts(coordinator: Coordinator, tmp_path: Path) -> None:
    coordinator.bitmaps.add("b")
    before = coordinator.status()["epoch"]
    for sync, bitmap, mode, text in REFUSED:
        call = partial(coordinator.backup, tmp_path / "out", sync=sync, bitmap=bitmap, bitmap_mode=mode)
        assert refusal(call) == text
    assert coordinator.status()["epoch"] == before
    assert not list(tmp_path.glob("out*"))


#: Before the job the bitmap holds OLD; after its cut SINCE is written.  A job that fails has copied a part of OLD.
OLD, SINCE = {1, 2, 6}, {2, 3}
OUTCOMES = [
    ("on-success", True, "nothing"),
    ("on-success", False, "old"),
    ("never", True, "old"),
    ("never", False, "old"),
    ("always", True, "nothing"),
    ("always", False, "uncopied"),
]


@pytest.mark.parametrize(("mode", "success", "keeps"), OUTCOMES)
@pytest.mark.parametrize("recording", [True, False])
def test_the_end_of_a_job_leaves_the_bitmap_as_in_qemus_table(
    coordinator: Coordinator, disk: shmcbw.Disk, tmp_path: Path, mode: str, success: bool, keeps: str, recording: bool
) -> None:
    """What it keeps, and what was written since the cut if it is recording."""
    coordinator.bitmaps.add("b")
    for cluster in OLD:
        disk.pwrite(b"old", cluster * CLUSTER)
    if not recording:
        coordinator.bitmaps.disable("b")
    # So slow that nothing comes by itself.
    job = coordinator.backup(tmp_path / "out", sync="bitmap", bitmap="b", bitmap_mode=mode, speed=1)
    assert coordinator.bitmaps.query()[0]["busy"]
    texts = {
        refusal(lambda: coordinator.bitmaps.clear("b")),
        refusal(lambda: coordinator.bitmaps.remove("b")),
        refusal(lambda: coordinator.bitmaps.merge("b", [])),
        refusal(lambda: coordinator.backup(tmp_path / "other", sync="bitmap", bitmap="b", bitmap_mode="never")),
    }
    assert texts == {"Bitmap 'b' is currently in use by another operation and cannot be used"}
    for cluster in SINCE:
        disk.pwrite(b"new", cluster * CLUSTER)
    left = {"nothing": set(), "old": OLD}.get(keeps, OLD - copied(coordinator))
    if success:
        job.set_speed(0)
        job.wait(20)
    else:
        assert copied(coordinator) >= {2}, "for the writer"
        job.cancel()
        with pytest.raises(shmcbw.JobCancelledError):
            job.wait(20)
    assert not coordinator.bitmaps.query()[0]["busy"]
    assert dirty(coordinator) == left | (SINCE if recording else set())


def copied(coordinator: Coordinator) -> set[int]:
    """The clusters that the only snapshot has copied."""
    bitmap = Bitmap.attach(coordinator.segment, coordinator.status()["snapshots"][0]["serial"])
    try:
        states = [bitmap.state(cluster) for cluster in range(SIZE // CLUSTER)]
    finally:
        bitmap.close()
    return {cluster for cluster, state in enumerate(states) if state >= COPIED and state != SKIPPED}


def test_a_full_backup_with_a_bitmap_copies_all_and_begins_it_anew(
    coordinator: Coordinator, disk: shmcbw.Disk, image: Path, tmp_path: Path
) -> None:
    coordinator.bitmaps.add("b")
    disk.pwrite(b"x", 3 * CLUSTER)
    coordinator.backup(tmp_path / "out", sync="full", bitmap="b", bitmap_mode="on-success").wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert dirty(coordinator) == set()


def test_writes_while_a_job_is_about_to_end_survive_it(
    coordinator: Coordinator, disk: shmcbw.Disk, tmp_path: Path
) -> None:
    """Many short jobs beside a writer: each write is in an increment or in the bitmap."""
    coordinator.bitmaps.add("b")
    for number in range(12):
        job = coordinator.backup(tmp_path / f"out{number}", sync="incremental", bitmap="b")
        disk.pwrite(number.to_bytes(2, "little"), number * CLUSTER)
        job.wait(20)
        assert number in dirty(coordinator)


@pytest.mark.parametrize("success", [True, False])
def test_the_bitmaps_of_grouped_jobs_share_the_outcome_of_all(
    make_image: Callable[..., Path], tmp_path: Path, success: bool
) -> None:
    images = [make_image(SIZE, f"{number}.img") for number in range(2)]
    with Coordinator(images[0], workers=1) as first, Coordinator(images[1], workers=1) as second:
        coordinators = (first, second)
        for coordinator in coordinators:
            coordinator.bitmaps.add("b")
            with shmcbw.open(coordinator.path) as disk:
                disk.pwrite(b"old", CLUSTER)
        transaction = JobTransaction()
        jobs = backup_group(
            [
                Backup(
                    coordinator,
                    f"{coordinator.path}.bak",
                    sync="incremental",
                    bitmap="b",
                    speed=speed,
                    transaction=transaction,
                )
                for coordinator, speed in zip(coordinators, (0, 1), strict=True)
            ]
        )
        for coordinator in coordinators:
            with shmcbw.open(coordinator.path) as disk:
                disk.pwrite(b"since", 2 * CLUSTER)
        wait_for(lambda: jobs[0].status == "waiting", "the first one waits for the other")
        assert dirty(first) == {1, 2}
        if success:
            jobs[1].set_speed(0)
        else:
            jobs[1].cancel()
        for job in jobs:
            if success:
                job.wait(20)
            else:
                with pytest.raises(shmcbw.JobCancelledError):
                    job.wait(20)
        assert [dirty(coordinator) for coordinator in coordinators] == [{2} if success else {1, 2}] * 2
