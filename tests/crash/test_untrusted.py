"""Untrusted memory, word by word: what happens when somebody overwrites this word at the worst moment.

Whoever may write the segment can scribble on it.  Nobody crashes, hangs or touches another file; what can't be right
any more says so.  `test_fuzz.py` does the same at random; DESIGN.md, "Untrusted memory", has the table.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import _core, states
from shmcbw.bitmap import COPIED, PENDING, Bitmap, bitmap_name
from shmcbw.epochs import abandon, epoch
from shmcbw.errors import CoordinatorRunningError
from shmcbw.image import ImageFile
from shmcbw.invariants import check
from shmcbw.layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Word, Worker
from shmcbw.segment import SHM, Segment, attach, worker_byte
from shmcbw.status import describe_segment
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import continue_all, stop_all

#: All combinations take a few minutes: `make untrusted`.  Otherwise a part, the same for the same seed.
SEED = int(os.environ.get("SHMCBW_SEED", "1"))


def part(*cases: Sequence[Any]) -> list[Any]:
    """Some of all combinations of the cases, or all."""
    every = [case if len(case) > 1 else case[0] for case in itertools.product(*cases)]
    if os.environ.get("SHMCBW_MATRIX") == "all":
        return every
    return random.Random(SEED).sample(every, 2 if len(every) < 20 else 3)


SIZE = 4 << 20
CLUSTER = 65_536
ALL_ONES = {4: 2**32 - 1, 8: 2**64 - 1}


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@contextmanager
def attached(image: Path) -> Iterator[Segment]:
    """The segment as the scribbler has it: attached before it does any harm."""
    file = ImageFile.open(image, writable=False)
    segment = attach(file)
    try:
        yield segment
    finally:
        segment.close()
        file.close()


def index_of_snapshot(coordinator: Coordinator) -> int:
    (snapshot,) = coordinator.status()["snapshots"]
    index: int = snapshot["snapshot"]
    return index


def wait_broken(coordinator: Coordinator, index: int, seconds: float = 5) -> None:
    """The snapshot says that it is broken by damage (EUCLEAN)."""

    def broken() -> bool:
        found = [each["broken"] for each in coordinator.status()["snapshots"] if each["snapshot"] == index]
        return found != [] and found[0] is not None and found[0]["errno"] == errno.EUCLEAN

    wait_for(broken, "broken by damage", seconds)


def overwritten(image: Path) -> Path:
    """Where a backup of the image is to go."""
    return image.parent / "out"


# -- constant words of a snapshot ------------------------------------------------------------------------------------

CONSTANT = ["policy", "timeout_ns", "sync", "background", "speed", "target_device", "target_inode", "job", "overwrite"]


@pytest.mark.parametrize("name", part([*CONSTANT, "serial", "target_path"]))
def test_a_changed_word_that_is_constant_breaks_the_snapshot(image: Path, tmp_path: Path, name: str) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        index = index_of_snapshot(coordinator)
        with attached(image) as segment:
            word: Word = getattr(Snapshot, name)
            if name == "target_path":
                segment.memory[segment.geometry.snapshot(index, word)] ^= 1
            else:
                segment.set_snapshot(index, word, segment.snapshot(index, word) ^ 1)
            wait_broken(coordinator, index)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            snapshot.pread(1, 0)
        assert caught.value.errno == errno.EUCLEAN
        # And nobody else suffers: the next one is right.
        coordinator.backup(tmp_path / "out").wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    "word", part([0, 2**64 - 1, states.FREE, states.PREPARING, states.ABANDONED, states.CREATING, 99])
)
def test_a_changed_state_breaks_the_snapshot(image: Path, tmp_path: Path, word: int) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        index = index_of_snapshot(coordinator)
        with attached(image) as segment:
            odd = segment.snapshot(index, Snapshot.state) >> 32
            segment.set_snapshot(index, Snapshot.state, word if word > 2**32 else states.state_word(word, odd))
            wait_broken(coordinator, index)
        with pytest.raises(shmcbw.SnapshotBrokenError):
            snapshot.pread(1, 0)


def test_a_state_that_says_complete_does_not_make_a_backup_complete(image: Path, tmp_path: Path) -> None:
    """A job of which nearly all is still to be copied must not be synced, named and called a backup."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        index = index_of_snapshot(coordinator)
        with attached(image) as segment:
            odd = segment.snapshot(index, Snapshot.state) >> 32
            segment.set_snapshot(index, Snapshot.state, states.state_word(states.COMPLETE, odd))
            disk.pwrite(b"new" * 1000, SIZE // 2)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            job.wait(10)
        assert caught.value.errno == errno.EUCLEAN
    assert not (tmp_path / "out").exists()


def test_an_entry_that_nobody_made_holds_no_writer_and_stays_nowhere(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with attached(image) as segment:
            for index in range(SNAPSHOT_COUNT):
                segment.set_snapshot(index, Snapshot.policy, states.BREAK_GUEST_WRITE)
                segment.set_snapshot(index, Snapshot.serial, 77 + index)
                segment.set_snapshot(index, Snapshot.state, states.state_word(states.ACTIVE, 1))

            wait_for(lambda: coordinator.status()["snapshots"] == [], "entries are freed", 5)
            disk.pwrite(b"x" * CLUSTER, 0)
            # Also at the very end: a segment that seems to be in use is not left behind.
            segment.set_snapshot(3, Snapshot.state, states.state_word(states.BROKEN, 1))


def test_the_serial_of_another_snapshot_does_not_get_that_one_wrong_bytes(image: Path, tmp_path: Path) -> None:
    """A worker that took two entries for one bitmap would mark clusters COPIED that only the other target has."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        first, second = (coordinator.snapshot(tmp_path / name) for name in ("one", "two"))
        expected = first.pread(SIZE, 0)
        one, two = (each["snapshot"] for each in coordinator.status()["snapshots"])
        with attached(image) as segment:
            segment.set_snapshot(two, Snapshot.serial, segment.snapshot(one, Snapshot.serial))
            for cluster in range(SIZE // CLUSTER):
                disk.pwrite(b"new", cluster * CLUSTER)
        wait_broken(coordinator, two)
        try:
            assert first.pread(SIZE, 0) == expected
        except shmcbw.SnapshotBrokenError:
            pass
        first.close()
        second.close()


def test_the_next_serial_may_be_one_that_is_in_use(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            expected = snapshot.pread(SIZE, 0)
            with attached(image) as segment:
                serial = segment.snapshot(index_of_snapshot(coordinator), Snapshot.serial)
                segment.set_header(Header.next_serial, serial)
                coordinator.backup(tmp_path / "out").wait(20)
                assert Path(SHM + bitmap_name(segment, serial)).exists(), "another one's bitmap keeps its name"
            disk.pwrite(b"x" * SIZE, 0)
            assert snapshot.pread(SIZE, 0) == expected
        assert (tmp_path / "out").read_bytes() == expected


def test_an_entry_that_is_overwritten_while_it_is_prepared_is_refused_at_once(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker opens its target any more, so nobody shall wait for that."""
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(image, workers=1) as coordinator:
        monkeypatch.delenv("SHMCBW_FAILPOINTS")

        def scribble(segment: Segment) -> None:
            for index in range(SNAPSHOT_COUNT):
                segment.set_snapshot(index, Snapshot.state, 0)

        started = time.monotonic()
        raised = hold(image, "coordinator.preparing", scribble, lambda: coordinator.backup(tmp_path / "out"))
        assert isinstance(raised, shmcbw.SegmentDamagedError)
        assert time.monotonic() - started < 5
        coordinator.backup(tmp_path / "out").wait(20)


def test_a_header_that_is_overwritten_while_workers_start_is_put_right_for_them(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot is being prepared, which waits for the workers; those that come can't attach meanwhile."""
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(image, workers=1) as coordinator:
        monkeypatch.delenv("SHMCBW_FAILPOINTS")
        (worker,) = coordinator.status()["workers"]

        def scribble(segment: Segment) -> None:
            segment.set_header(Header.cluster_size, 7)
            os.kill(worker["pid"], signal.SIGKILL)

        assert hold(image, "coordinator.preparing", scribble, lambda: coordinator.backup(tmp_path / "out")) is None
        coordinator.jobs[0].wait(20)


# -- the epoch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", part([0, 2, 3, 1000, 2**31, 2**32 - 3, 2**32 - 2, 2**32 - 1]))
def test_a_changed_epoch_breaks_all_snapshots_and_stops_nobody(image: Path, tmp_path: Path, found: int) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        for _ in range(3):  # so that 2 and 3 are of the past
            coordinator.snapshot(tmp_path / "scratch").close()
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            index = index_of_snapshot(coordinator)
            with attached(image) as segment:
                segment.set_header(Header.drain_deadline_ns, 2**64 - 1)
                segment.set_header(Header.epoch, found)
            disk.pwrite(b"x" * CLUSTER, 0)
            wait_broken(coordinator, index)
            with pytest.raises(shmcbw.SnapshotBrokenError):
                snapshot.pread(1, 0)
        coordinator.backup(tmp_path / "out").wait(20)
        disk.pwrite(b"y" * CLUSTER, 0)
    assert (tmp_path / "out").read_bytes()[:CLUSTER] == b"x" * CLUSTER


def test_the_epoch_after_the_last_one_is_none_that_unwritten_clusters_have(image: Path) -> None:
    """Zero is the mark of a cluster that nobody wrote: an epoch 0 would take all of them for copied."""
    with Coordinator(image, workers=1), attached(image) as segment:
        segment.set_header(Header.epoch, 2**32 - 1)
        abandon(segment, 2**32 - 1)
        assert epoch(segment) not in (0, 2**32 - 1)


def test_a_stopped_coordinators_deadline_that_never_comes_holds_no_writer(image: Path, tmp_path: Path) -> None:
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        with attached(image) as segment, shmcbw.open(image) as disk:
            stop_all([owner.pid])
            segment.set_header(Header.drain_deadline_ns, 2**64 - 1)
            segment.set_header(Header.epoch, 3)
            started = time.monotonic()
            disk.pwrite(b"x", 0)
            assert time.monotonic() - started < 5
            continue_all([owner.pid])
        assert owner.ask(do="close") == {"ok": None}
        owner.process.wait(20)
    finally:
        owner.end()


def hold(image: Path, point: str, action: Callable[[Segment], None], do: Callable[[], object]) -> BaseException | None:
    """Run `do` with `action` in the middle of it, at a failpoint of the coordinator; what it raised."""
    from shmcbw import failpoints

    raised: list[BaseException | None] = [None]

    def run() -> None:
        try:
            do()
        except shmcbw.ShmcbwError as error:
            raised[0] = error

    with attached(image) as segment:
        failpoints.arm(segment.memory, point, "delay:300*1")
        word = Header.failpoints.offset + 8 * (1 + failpoints.index_of(point))
        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: _core.load_u64(segment.memory, word) == 0, f"{point} is reached")
        action(segment)
        thread.join()
        failpoints.disarm_all(segment.memory)
    return raised[0]


@pytest.mark.parametrize(("point", "offset"), part(["prepared", "odd", "quiet", "published"], [-2, +1, +2, +1000]))
def test_an_epoch_changed_during_a_cut_makes_no_snapshot_that_counts(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, offset: int
) -> None:
    """Writers that were let out of the drained section too early would tear the cut."""
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    with Coordinator(image, workers=1, drain_limit=5) as coordinator:
        monkeypatch.delenv("SHMCBW_FAILPOINTS")

        def change(segment: Segment) -> None:
            segment.set_header(Header.epoch, epoch(segment) + offset)

        raised = hold(image, f"coordinator.{point}", change, lambda: coordinator.snapshot(tmp_path / "scratch"))
        assert raised is not None, "a cut that somebody disturbed counts"
        assert coordinator.status()["snapshots"] == []
        coordinator.backup(tmp_path / "out").wait(20)


# -- the epoch map and the cluster bytes -----------------------------------------------------------------------------


def test_a_mark_that_no_writer_made_does_not_let_old_content_get_lost(image: Path, tmp_path: Path) -> None:
    """The writer takes a marked cluster for copied; the worker that comes later sees a mark where none may be (I1)."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with attached(image) as segment:
            last = SIZE // CLUSTER - 1
            _core.store_u32(segment.memory, segment.geometry.epoch_map_offset + 4 * last, epoch(segment))
            disk.pwrite(b"new" * 1000, last * CLUSTER)
        job.set_speed(0)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            job.wait(10)
        assert caught.value.errno == errno.EUCLEAN
    assert not (tmp_path / "out").exists()


def test_a_reader_believes_no_cluster_that_is_marked_and_not_copied(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            with attached(image) as segment:
                _core.store_u32(segment.memory, segment.geometry.epoch_map_offset + 4 * 3, epoch(segment))
                disk.pwrite(b"new" * 1000, 3 * CLUSTER)
            with pytest.raises(shmcbw.SnapshotBrokenError):
                snapshot.pread(SIZE, 0)


@pytest.mark.parametrize("value", part([244, 250, 255]))
def test_a_byte_of_no_known_state_breaks_the_snapshot(image: Path, tmp_path: Path, value: int) -> None:
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        scratch = coordinator.snapshot(tmp_path / "scratch")
        with attached(image) as segment:
            for each in coordinator.status()["snapshots"]:
                bitmap = Bitmap.attach(segment, each["serial"])
                bitmap.memory[5] = value
                bitmap.close()
        with pytest.raises(shmcbw.SnapshotBrokenError):
            scratch.pread(SIZE, 0)
        scratch.close()
        job.set_speed(0)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            job.wait(10)
        assert caught.value.errno == errno.EUCLEAN
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("claimer", "background"), part(["idle worker", "free id", "no id"], [True, False]))
def test_a_claim_that_nobody_made_holds_neither_a_job_nor_a_writer(
    image: Path, tmp_path: Path, claimer: str, background: bool
) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        if background:
            job = coordinator.backup(tmp_path / "out", speed=1, cbw_timeout=0)
        else:
            snapshot = coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0)
        (worker,) = coordinator.status()["workers"]
        with attached(image) as segment:
            free = next(i for i in range(1, 9) if i != worker["id"] and not segment.locked(worker_byte(i)))
            bitmap = Bitmap.attach(segment, coordinator.status()["snapshots"][0]["serial"])
            bitmap.memory[60] = {"idle worker": worker["id"], "free id": free, "no id": 239}[claimer]
            if background:
                job.set_speed(0)
                try:
                    job.wait(10)
                    assert (tmp_path / "out").read_bytes() == expected
                except shmcbw.SnapshotBrokenError:
                    assert not (tmp_path / "out").exists()
            started = time.monotonic()
            disk.pwrite(b"x" * CLUSTER, 60 * CLUSTER)
            assert time.monotonic() - started < 10
            if not background:
                try:
                    assert snapshot.pread(SIZE, 0) == expected
                except shmcbw.SnapshotBrokenError:
                    pass
                snapshot.close()
            bitmap.close()


def test_a_claim_that_was_taken_from_its_worker_breaks_the_snapshot(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COPIED before it is: the writer goes on, and the worker copies what the writer has stored."""
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "worker.background=delay:1000*1")
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        monkeypatch.delenv("SHMCBW_FAILPOINTS")
        job = coordinator.backup(tmp_path / "out")
        with attached(image) as segment:
            bitmap = Bitmap.attach(segment, coordinator.status()["snapshots"][0]["serial"])
            wait_for(lambda: bitmap.state(0) not in (PENDING, COPIED), "a claim")
            bitmap.memory[0] = COPIED
            disk.pwrite(b"new" * 1000, 0)
            bitmap.close()
        with pytest.raises(shmcbw.SnapshotBrokenError):
            job.wait(10)
    assert not (tmp_path / "out").exists()


def test_a_byte_that_was_put_back_to_pending_never_lets_new_content_in(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(b"new" * 1000, 0)
            with attached(image) as segment:
                bitmap = Bitmap.attach(segment, coordinator.status()["snapshots"][0]["serial"])
                bitmap.memory[0] = PENDING
                bitmap.close()
            try:
                assert snapshot.pread(SIZE, 0) == expected
            except shmcbw.SnapshotBrokenError:
                pass


def test_bytes_that_are_pending_again_are_copied_although_all_seemed_done(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        index = index_of_snapshot(coordinator)
        with attached(image) as segment:
            bitmap = Bitmap.attach(segment, segment.snapshot(index, Snapshot.serial))
            stop_all([worker["pid"] for worker in coordinator.status()["workers"]])
            kept = bytes(bitmap.memory[: bitmap.clusters])
            bitmap.memory[: bitmap.clusters] = bytes([7]) * bitmap.clusters
            continue_all([worker["pid"] for worker in coordinator.status()["workers"]])
            time.sleep(0.05)
            bitmap.memory[: bitmap.clusters] = kept
            bitmap.close()
        job.set_speed(0)
        try:
            job.wait(20)
            assert (tmp_path / "out").read_bytes() == image.read_bytes()
        except shmcbw.SnapshotBrokenError:
            assert not (tmp_path / "out").exists()


# -- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "name"), part([0, 1, 2**63, 2**64 - 1], ["cursor", "budget_ns"]))
def test_a_wrong_hint_costs_time_and_nothing_else(image: Path, tmp_path: Path, name: str, value: int) -> None:
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=16 << 20)
        with attached(image) as segment:
            segment.set_snapshot(index_of_snapshot(coordinator), getattr(Snapshot, name), value)
        job.wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_wanted_range_that_is_scribbled_over_is_wanted_again(image: Path, tmp_path: Path) -> None:
    """With no timeout a writer whose want was lost would wait for ever."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0) as snapshot:
            pids = [worker["pid"] for worker in coordinator.status()["workers"]]
            stop_all(pids)
            thread = threading.Thread(target=disk.pwrite, args=(b"x" * 1000, 17 * CLUSTER))
            thread.start()
            # The write is another thread's: it has a slot of its own.
            wait_for(lambda: any(s["wanted_clusters"] for s in coordinator.status()["slots"]), "it waits")
            with attached(image) as segment:
                for slot in range(segment.geometry.slot_count):
                    for word in (Slot.want_first, Slot.want_end, Slot.want_sequence, Slot.asleep):
                        segment.set_slot(slot, word, 0)
            continue_all(pids)
            thread.join(10)
            assert not thread.is_alive()
            snapshot.pread(SIZE, 0)


def test_an_in_flight_mark_that_vanishes_under_a_store_breaks_the_snapshots(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that does not see the writer in flight has half of its data."""
    with Coordinator(image, workers=1) as coordinator:
        monkeypatch.setenv("SHMCBW_FAILPOINTS", "writer.half_stored=delay:1500*1")
        with shmcbw.open(image) as disk, attached(image) as segment:
            monkeypatch.delenv("SHMCBW_FAILPOINTS")
            thread = threading.Thread(target=disk.pwrite, args=(b"x" * 200_000, 0))
            thread.start()
            wait_for(lambda: any(s["in_flight"] for s in coordinator.status()["slots"]), "in flight")
            for slot in range(segment.geometry.slot_count):
                segment.set_slot(slot, Slot.in_flight, 0)
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                thread.join()
                with pytest.raises(shmcbw.SnapshotBrokenError):
                    snapshot.pread(SIZE, 0)


# -- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", part([0, 2**31, 2**32 - 1]))
def test_a_changed_pool_generation_costs_new_workers_and_no_more(image: Path, tmp_path: Path, value: int) -> None:
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0) as snapshot:
            with attached(image) as segment:
                segment.set_header(Header.pool_generation, value)
            disk.pwrite(b"x" * SIZE, 0)
            assert snapshot.pread(SIZE, 0) == expected


@pytest.mark.parametrize("name", part(["ready_errno", "ready_serial", "state", "pid", "generation", "start_ticks"]))
def test_a_scribbled_worker_entry_ends_in_a_right_backup_or_a_clear_error(
    image: Path, tmp_path: Path, name: str
) -> None:
    with Coordinator(image, workers=2) as coordinator:
        stop = threading.Event()
        with attached(image) as segment:

            def scribble() -> None:
                word: Word = getattr(Worker, name)
                while not stop.wait(0.001):
                    for worker in (1, 2):
                        at = segment.geometry.worker(worker, word)
                        for place in range(at, at + word.size, 4):
                            _core.store_u32(segment.memory, place, 2**32 - 1)

            thread = threading.Thread(target=scribble)
            thread.start()
            try:
                coordinator.backup(tmp_path / "out").wait(20)
                assert (tmp_path / "out").read_bytes() == image.read_bytes()
            except (shmcbw.ShmcbwError, TimeoutError):
                assert not (tmp_path / "out").exists()
            finally:
                stop.set()
                thread.join()
        coordinator.backup(tmp_path / "again").wait(20)


def test_an_orphan_that_dies_after_the_adoption_leaves_no_claim(image: Path, tmp_path: Path) -> None:
    """It was stopped in the middle of a copy while a new coordinator came, and is killed later."""
    owner = Owner(image, SHMCBW_FAILPOINTS="worker.claimed=stop*1")
    orphans: list[int] = []
    try:
        assert owner.answer() is not None
        assert owner.ask(do="snapshot", scratch=str(tmp_path / "scratch")) == {"ok": None}
        with attached(image) as segment, shmcbw.open(image) as disk:
            expected = disk.pread(SIZE, 0)
            orphans = [worker["pid"] for worker in describe_segment(segment)["workers"]]
            thread = threading.Thread(target=disk.pwrite, args=(b"x" * SIZE, 0))
            thread.start()
            wait_for(lambda: any(map(is_stopped, orphans)), "a worker stops with its claim")
            owner.process.kill()
            owner.process.wait()
            with Coordinator(image, workers=2) as coordinator:
                (snapshot,) = coordinator.snapshots
                for pid in filter(is_stopped, orphans):
                    os.kill(pid, signal.SIGKILL)
                thread.join(10)
                assert not thread.is_alive(), "its claim was given back long before cbw_timeout"
                assert snapshot.pread(SIZE, 0) == expected
    finally:
        owner.end()
        for pid in orphans:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


# -- the header ------------------------------------------------------------------------------------------------------

HEADER = ["magic", "version", "image_device", "image_inode", "image_size", "cluster_size", "slot_count", "worker_count"]


@pytest.mark.parametrize(
    ("value", "name"), part([0, 1, -1], [*HEADER, "image_birth_ns", "retired", "coordinator_pid", "pool_generation"])
)
def test_a_live_coordinator_puts_its_header_right(image: Path, tmp_path: Path, name: str, value: int) -> None:
    with Coordinator(image, workers=1) as coordinator, attached(image) as segment:
        word: Word = getattr(Header, name)
        before = segment.header(word)
        segment.set_header(word, value % (ALL_ONES[word.size] + 1))
        wait_for(lambda: segment.header(word) == before, "put right", 5)
        with shmcbw.open(image) as disk:
            disk.pwrite(b"x" * CLUSTER, 0)
        coordinator.backup(tmp_path / "out").wait(20)


def test_a_pid_that_can_not_be_is_no_reason_to_crash(image: Path) -> None:
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        with attached(image) as segment:
            stop_all([owner.pid])
            segment.set_header(Header.coordinator_pid, 2**32 - 1)
            with pytest.raises(CoordinatorRunningError):
                Coordinator(image, workers=1)
            continue_all([owner.pid])
        assert owner.ask(do="close") == {"ok": None}
        owner.process.wait(20)
    finally:
        owner.end()


# -- adoption --------------------------------------------------------------------------------------------------------


@contextmanager
def dead_coordinator(image: Path, target: Path) -> Iterator[Segment]:
    """The segment of a coordinator that was killed in the middle of a backup; its workers too."""
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        assert "ok" in (owner.ask(do="backup", target=str(target), speed=1) or {})
        with attached(image) as segment:
            pids = [worker["pid"] for worker in describe_segment(segment)["workers"]]
            owner.process.kill()
            owner.process.wait()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not any(segment.locked(worker_byte(i)) for i in (1, 2)), "the workers are dead")
            yield segment
    finally:
        owner.end()


def active_index(segment: Segment) -> int:
    return next(i for i in range(SNAPSHOT_COUNT) if segment.snapshot(i, Snapshot.state) & 0xFFFFFFFF == states.ACTIVE)


@pytest.mark.parametrize(
    ("name", "value"), part([*CONSTANT, "serial", "target_path", "state", "cut_epoch", "broken", "cursor"], [0, 1, -1])
)
def test_a_scribbled_entry_is_adopted_right_or_dropped(image: Path, tmp_path: Path, name: str, value: int) -> None:
    expected = image.read_bytes()
    with dead_coordinator(image, tmp_path / "out") as segment:
        index = active_index(segment)
        word: Word = getattr(Snapshot, name)
        if name == "target_path":
            segment.memory[segment.geometry.snapshot(index, word)] = value % 256
        else:
            segment.set_snapshot(index, word, value % (ALL_ONES[word.size] + 1))
        with Coordinator(image, workers=1) as coordinator:
            for job in coordinator.jobs:
                job.set_speed(0)
                try:
                    job.wait(20)
                except shmcbw.ShmcbwError:
                    continue
            coordinator.backup(tmp_path / "again").wait(20)
    assert (tmp_path / "again").read_bytes() == expected
    if (tmp_path / "out").exists():
        assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.parametrize(
    ("state", "suffix", "whose"),
    part(
        [states.ACTIVE, states.CREATING, states.COMPLETE, states.BROKEN],
        ["", ".shmcbw-partial"],
        ["other", "link", "two names", "other size"],
    ),
)
def test_no_path_in_the_segment_makes_anybody_touch_another_file(
    image: Path, tmp_path: Path, state: int, suffix: str, whose: str
) -> None:
    """The scribbler knows what it does: path and identity are those of the victim."""
    with dead_coordinator(image, tmp_path / "out") as segment:
        victim = tmp_path / ("victim" + suffix)
        content = os.urandom(SIZE if whose != "other size" else SIZE - 1)
        (tmp_path / "real").write_bytes(content)
        if whose == "link":
            victim.symlink_to(tmp_path / "real")
        elif whose == "two names":
            os.link(tmp_path / "real", victim)
        else:
            os.rename(tmp_path / "real", victim)
            if whose == "other" and suffix:
                # As any file that is not ours: it may have our suffix by chance, and then it is somebody else's.
                os.chown(victim, 12345, 12345)
        before = os.stat(victim)
        index = active_index(segment)
        place = segment.geometry.snapshot(index, Snapshot.target_path)
        segment.set_text(place, Snapshot.target_path, str(victim))
        segment.set_snapshot(index, Snapshot.target_device, before.st_dev)
        segment.set_snapshot(index, Snapshot.target_inode, before.st_ino)
        segment.set_snapshot(index, Snapshot.overwrite, 1)
        reseal(segment, index)
        odd = segment.snapshot(index, Snapshot.state) >> 32
        segment.set_snapshot(index, Snapshot.state, states.state_word(state, odd))
        with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
            disk.pwrite(b"x" * SIZE, 0)
            for job in coordinator.jobs:
                job.set_speed(0)
                try:
                    job.wait(20)
                except (shmcbw.ShmcbwError, OSError):
                    continue
        assert victim.read_bytes() == content
        after = os.stat(victim)
        assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def reseal(segment: Segment, index: int) -> None:
    """What a scribbler does that knows the layout."""
    from shmcbw.seals import entry_seal

    segment.set_snapshot(index, Snapshot.seal, entry_seal(segment.memory, segment.geometry, index))


@pytest.mark.parametrize(
    ("name", "value"),
    part([*HEADER, "image_birth_ns", "epoch", "next_serial", "retired", "pool_generation"], [0, 1, -1]),
)
def test_a_scribbled_header_is_adopted_or_discarded_by_rule(image: Path, tmp_path: Path, name: str, value: int) -> None:
    with dead_coordinator(image, tmp_path / "out") as segment:
        word: Word = getattr(Header, name)
        segment.set_header(word, value % (ALL_ONES[word.size] + 1))
        with Coordinator(image, workers=1) as coordinator:
            for job in coordinator.jobs:
                job.cancel()
            coordinator.backup(tmp_path / "again").wait(20)
    assert (tmp_path / "again").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("name", part(HEADER))
def test_orphans_of_a_segment_that_can_not_be_adopted_leave(image: Path, tmp_path: Path, name: str) -> None:
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        assert "ok" in (owner.ask(do="backup", target=str(tmp_path / "out"), speed=1) or {})
        with attached(image) as segment:
            owner.process.kill()
            owner.process.wait()
            segment.set_header(getattr(Header, name), 5)
            with Coordinator(image, workers=1) as coordinator:
                # Reported as failed, not adopted.
                assert all(job.status == "concluded" and job.error is not None for job in coordinator.jobs)
    finally:
        owner.end()


def test_a_name_in_dev_shm_that_is_almost_a_bitmaps_is_none(image: Path, tmp_path: Path) -> None:
    with dead_coordinator(image, tmp_path / "out") as segment:
        stray = Path(f"{SHM}{segment.name}.\u00b2")
        stray.write_bytes(b"")
        try:
            with Coordinator(image, workers=1) as coordinator:
                for job in coordinator.jobs:
                    job.cancel()
        finally:
            stray.unlink(missing_ok=True)


# -- who looks on ----------------------------------------------------------------------------------------------------


def test_status_and_check_print_what_is_there_and_do_not_fail_over_it(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch"), shmcbw.open(image):
        index = index_of_snapshot(coordinator)
        with attached(image) as segment, coordinator._lock:  # it can't look now
            text = os.fsencode(tmp_path) + b"\xff\x1b[2J\n"
            for place in (
                Header.image_path.offset,
                segment.geometry.snapshot(index, Snapshot.target_path),
            ):
                segment.memory[place : place + len(text)] = text
            for name in ("pid", "want_first", "want_end", "wait_max_ns", "thread_id"):
                segment.set_slot(0, getattr(Slot, name), ALL_ONES[getattr(Slot, name).size])
            segment.set_worker(1, Worker.pid, 2**32 - 1)
            segment.set_worker(1, Worker.state, 2**32 - 1)
            segment.set_snapshot(index, Snapshot.timeout_ns, 2**64 - 1)
            segment.set_snapshot(index, Snapshot.broken_time_ns, 2**64 - 1)
            segment.set_header(Header.coordinator_pid, 2**32 - 1)
            json.dumps(describe_segment(segment))
            assert check(segment, settle_s=0)
            for command in (["status", str(image)], ["status"], ["check", str(image)], ["status", "--json"]):
                done = subprocess.run(
                    [sys.executable, "-m", "shmcbw", *command],
                    capture_output=True,
                    timeout=30,
                    env={**os.environ, "PYTHONIOENCODING": "utf-8"},
                )
                assert b"Traceback" not in done.stderr
                assert b"\x1b" not in done.stdout


def test_check_says_so_when_a_target_is_no_file(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch"):
        index = index_of_snapshot(coordinator)
        with attached(image) as segment, coordinator._lock:
            place = segment.geometry.snapshot(index, Snapshot.target_path)
            segment.set_text(place, Snapshot.target_path, str(tmp_path))
            assert any(violation.invariant == "I2" for violation in check(segment, settle_s=0))
