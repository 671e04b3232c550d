"""One cut for several images: one instant, or nothing has changed on any of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import shmcbw
from shmcbw.image import ImageFile
from shmcbw.invariants import check
from shmcbw.layout import Snapshot
from shmcbw.reader import SnapshotReader
from shmcbw.workers import Backup, Coordinator, CoordinatorSnapshot, Scratch, backup_group, snapshot_group, take_group
from shmcbw.workers.bitmaps import BitmapAction
from tests.conftest import wait_for
from tests.processes import CONTEXT, hold_in_flight, running, sweep_pairs, write_pairs_across_forever

SIZE = 1 << 20
#: Where each pair is, and whether it is written to the first image first.
PAIRS = {0: True, 300_000: True, 600_000: False, 900_000: False}


@pytest.fixture
def images(make_image: Callable[..., Path]) -> list[Path]:
    found = [make_image(SIZE, "data.img"), make_image(SIZE, "log.img")]
    for image in found:
        with image.open("r+b") as file:
            for offset in PAIRS:
                file.seek(offset)
                file.write(bytes(8))
    return found


@pytest.fixture
def coordinators(images: list[Path]) -> Iterator[list[Coordinator]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Coordinator(image, workers=1, drain_limit=5)) for image in images]


@contextmanager
def pair_writers(images: list[Path], coordinators: list[Coordinator]) -> Iterator[None]:
    with ExitStack() as stack:
        for offset, forwards in PAIRS.items():
            first, second = images if forwards else images[::-1]
            stack.enter_context(running(write_pairs_across_forever, str(first), str(second), offset))
        wait_for(lambda: all(_writers_of(each) == len(PAIRS) for each in coordinators), "the writers write", 20)
        yield


def _writers_of(coordinator: Coordinator) -> int:
    return len([slot for slot in coordinator.status()["slots"] if slot["writes"]])


def torn(read: list[Callable[[int, int], bytes]]) -> list[str]:
    """What of the pairs can't have been at any one instant."""
    found = []
    for offset, forwards in PAIRS.items():
        values = [int.from_bytes(pread(8, offset), "little") for pread in read]
        first, second = values if forwards else values[::-1]
        if first not in (second, second + 1):
            found.append(f"pair at {offset}: {first}, then {second}")
    return found


def test_pairs_written_across_two_images_are_never_torn(
    images: list[Path], coordinators: list[Coordinator], tmp_path: Path
) -> None:
    with pair_writers(images, coordinators):
        for turn in range(100):
            scratches = [Scratch(each, tmp_path / f"{turn}.{number}") for number, each in enumerate(coordinators)]
            first, second = snapshot_group(scratches)
            with first, second:
                assert torn([first.pread, second.pread]) == [], f"cut {turn}"
                assert first.drained_ns == second.drained_ns > 0
        assert [each.status()["counters"]["cuts"] for each in coordinators] == [100, 100]


def test_two_cuts_one_after_the_other_are_torn(
    images: list[Path], coordinators: list[Coordinator], tmp_path: Path
) -> None:
    """Otherwise the test above would show nothing."""
    with pair_writers(images, coordinators):

        def is_torn() -> bool:
            with ExitStack() as stack:
                taken = [
                    stack.enter_context(each.snapshot(tmp_path / f"{number}"))
                    for number, each in enumerate(coordinators)
                ]
                return bool(torn([snapshot.pread for snapshot in taken]))

        wait_for(is_torn, "a torn pair", 30)


def test_a_groups_backups_are_one_instant(images: list[Path], coordinators: list[Coordinator], tmp_path: Path) -> None:
    targets = [tmp_path / "data.bak", tmp_path / "log.bak"]
    with pair_writers(images, coordinators):
        jobs = backup_group([Backup(each, target) for each, target in zip(coordinators, targets, strict=True)])
        assert [job.target for job in jobs] == [str(target) for target in targets]
        for job in jobs:
            job.wait(30)
    assert torn([_reader_of(target.read_bytes()) for target in targets]) == []


def _reader_of(data: bytes) -> Callable[[int, int], bytes]:
    def pread(count: int, offset: int) -> bytes:
        return data[offset : offset + count]

    return pread


def test_a_group_may_hold_several_snapshots_of_one_image_and_both_kinds(
    coordinators: list[Coordinator], images: list[Path], tmp_path: Path
) -> None:
    data, log = coordinators
    expected = images[0].read_bytes()
    job, scratch, other = take_group(
        [Backup(data, tmp_path / "out"), Scratch(data, tmp_path / "one"), Scratch(log, tmp_path / "two")]
    )
    assert not isinstance(job, CoordinatorSnapshot)
    assert isinstance(scratch, CoordinatorSnapshot) and isinstance(other, CoordinatorSnapshot)
    with scratch, other, shmcbw.open(images[0]) as disk:
        disk.pwrite(b"later", 0)
        job.wait(30)
        assert scratch.pread(SIZE, 0) == (tmp_path / "out").read_bytes() == expected
        assert check(data.segment) == check(log.segment) == []
        copied = [snapshot["clusters"]["copied"] for each in (data, log) for snapshot in each.status()["snapshots"]]
        assert copied == [0, 0], "a snapshot has no background copying"
    assert data.status()["counters"]["cuts"] == 1


def test_a_writer_stopped_in_flight_in_one_image_leaves_all_uncut_and_is_named(
    images: list[Path], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        coordinators = [stack.enter_context(Coordinator(image, workers=1, drain_limit=0.2)) for image in images]
        disks = [stack.enter_context(shmcbw.open(image)) for image in images]
        for held, image in enumerate(images):
            with running(hold_in_flight, str(image)) as stopped:
                wait_for(partial(_in_flight, coordinators[held]), "in flight")
                before = [each.status() for each in coordinators]
                with pytest.raises(shmcbw.CutAbandonedError, match=f"any of 2 images: pid {stopped.pid} ") as caught:
                    backup_group([Backup(each, tmp_path / f"out{n}") for n, each in enumerate(coordinators)])
                assert str(image) in str(caught.value)
                assert caught.value.pids == (stopped.pid,)
                for was, each in zip(before, coordinators, strict=True):
                    now = each.status()
                    assert now["snapshots"] == now["jobs"] == []
                    assert now["epoch"] % 2 == 0
                    assert now["counters"]["cuts"] == was["counters"]["cuts"]
                    assert now["counters"]["cuts_abandoned"] == was["counters"]["cuts_abandoned"] + 1
                for disk in disks:
                    disk.pwrite(b"x", 0)
                assert sorted(path.name for path in tmp_path.iterdir()) == ["data.img", "log.img"]
                os.kill(stopped.pid or 0, signal.SIGCONT)


def test_a_refused_target_leaves_nothing_of_the_others(coordinators: list[Coordinator], tmp_path: Path) -> None:
    data, log = coordinators
    (tmp_path / "taken").touch()
    with pytest.raises(shmcbw.TargetRefusedError):
        backup_group([Backup(data, tmp_path / "out"), Backup(log, tmp_path / "taken")])
    for each in coordinators:
        assert each.status()["snapshots"] == each.status()["jobs"] == []
        assert each.status()["counters"] == {**each.status()["counters"], "cuts": 0, "cuts_abandoned": 0}
    assert not (tmp_path / "out.shmcbw-partial").exists()


def test_groups_in_opposite_orders_do_not_wait_for_each_other(coordinators: list[Coordinator], tmp_path: Path) -> None:
    def take(name: str, order: list[Coordinator]) -> None:
        for turn in range(10):
            for snapshot in snapshot_group([Scratch(each, tmp_path / f"{name}{turn}{id(each)}") for each in order]):
                snapshot.close()
        done.append(name)

    done: list[str] = []
    threads = [
        threading.Thread(target=take, args=(name, order), daemon=True)
        for name, order in (("forwards", coordinators), ("backwards", coordinators[::-1]))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == ["backwards", "forwards"]


def test_an_application_is_quiet_from_before_the_cut_until_after_it(
    coordinators: list[Coordinator], tmp_path: Path
) -> None:
    seen: list[tuple[str, list[int], list[str]]] = []

    @contextmanager
    def quiet() -> Iterator[None]:
        seen.append(("before", *_state(coordinators)))
        try:
            yield
        finally:
            seen.append(("after", *_state(coordinators)))

    for snapshot in snapshot_group(_scratches(coordinators, tmp_path), quiesce=quiet()):
        snapshot.close()
    assert seen == [("before", [2, 2], ["preparing"] * 2), ("after", [4, 4], ["active"] * 2)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_application_that_can_not_come_to_rest_or_go_on_leaves_no_snapshot(
    coordinators: list[Coordinator], tmp_path: Path, when: str
) -> None:
    @contextmanager
    def restless() -> Iterator[None]:
        if when == "before":
            raise ValueError(when)
        yield
        raise ValueError(when)

    with pytest.raises(ValueError, match=when):
        snapshot_group(_scratches(coordinators, tmp_path), quiesce=restless())
    backups = [Backup(each, tmp_path / f"out{number}") for number, each in enumerate(coordinators)]
    with pytest.raises(ValueError, match=when):
        backup_group(backups, quiesce=restless())
    epoch = 2 if when == "before" else 6
    assert _state(coordinators) == ([epoch, epoch], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.img", "log.img"]


def test_an_application_goes_on_when_the_cut_failed(images: list[Path], tmp_path: Path) -> None:
    left: list[BaseException | None] = []

    @contextmanager
    def quiet() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            left.append(error)
            raise

    with Coordinator(images[0], workers=1) as coordinator, running(hold_in_flight, str(images[0])):
        wait_for(partial(_in_flight, coordinator), "in flight")
        with pytest.raises(shmcbw.CutAbandonedError):
            coordinator.snapshot(tmp_path / "scratch", quiesce=quiet())
    assert [type(error) for error in left] == [shmcbw.CutAbandonedError]


def _in_flight(coordinator: Coordinator) -> bool:
    return any(slot["in_flight"] for slot in coordinator.status()["slots"])


def _scratches(coordinators: list[Coordinator], directory: Path) -> list[Scratch]:
    return [Scratch(each, directory / f"scratch{number}") for number, each in enumerate(coordinators)]


def _state(coordinators: list[Coordinator]) -> tuple[list[int], list[str]]:
    found = [each.status() for each in coordinators]
    return [each["epoch"] for each in found], [snapshot["state"] for each in found for snapshot in each["snapshots"]]


def test_an_error_that_quiesce_swallows_is_not_taken_for_a_cut(images: list[Path], tmp_path: Path) -> None:
    with Coordinator(images[0], workers=1) as coordinator, running(hold_in_flight, str(images[0])):
        wait_for(partial(_in_flight, coordinator), "in flight")
        with pytest.raises(RuntimeError, match="swallowed"):
            coordinator.backup(tmp_path / "out", quiesce=suppress(shmcbw.CutAbandonedError))
        assert coordinator.status()["snapshots"] == coordinator.status()["jobs"] == []
        assert not list(tmp_path.glob("out*"))


def test_an_active_snapshot_of_a_group_that_is_not_committed_is_taken_as_right_by_nobody(
    images: list[Path], coordinators: list[Coordinator], tmp_path: Path
) -> None:
    """As a dead coordinator leaves it between two publications, before anybody adopts it."""
    segment = coordinators[0].segment
    with coordinators[0].snapshot(tmp_path / "scratch") as snapshot, shmcbw.open(images[0]) as disk:
        segment.set_snapshot(0, Snapshot.group, 1 << 40)
        assert [violation.invariant for violation in check(segment, settle_s=0.1)] == ["I9"]
        image = ImageFile.open(images[0], writable=False)
        with pytest.raises(shmcbw.ClosedError, match="group"):
            SnapshotReader(segment, 0, segment.snapshot(0, Snapshot.serial), image, -1)
        image.close()
        # Its clusters are copied for writers all the same: it may turn out to be committed.
        disk.pwrite(b"later", 0)
        assert disk.statistics()["wait_count"] == 1
        segment.set_snapshot(0, Snapshot.group, 1 << 40 | 1)
        assert check(segment, settle_s=0.1) == []
        assert snapshot.pread(5, 0) != b"later"


def test_closing_waits_for_a_cut_and_its_quiesce(images: list[Path], tmp_path: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    @contextmanager
    def quiet() -> Iterator[None]:
        entered.set()
        assert go_on.wait(20)
        yield

    coordinator = Coordinator(images[0], workers=1)
    errors: list[BaseException] = []

    def back_up() -> None:
        try:
            coordinator.backup(tmp_path / "out", quiesce=quiet())
        except shmcbw.ShmcbwError as error:
            errors.append(error)

    backup, close = threading.Thread(target=back_up), threading.Thread(target=coordinator.close)
    backup.start()
    assert entered.wait(20)
    close.start()
    wait_for(lambda: coordinator._closed, "closing begins")
    go_on.set()
    backup.join(20)
    close.join(20)
    assert [type(error) for error in errors] == [shmcbw.ClosedError]
    assert not list(tmp_path.glob("out*"))


def test_an_empty_group_and_a_huge_one_are_refused(coordinators: list[Coordinator]) -> None:
    with pytest.raises(ValueError, match="member"):
        take_group([])
    with pytest.raises(ValueError, match="128"):
        take_group([Backup(coordinators[0], "x")] * 129)
    with pytest.raises(ValueError, match="sync"):
        Backup(coordinators[0], "x", sync="some")


def test_bitmaps_of_several_images_begin_at_one_instant(make_image: Callable[..., Path]) -> None:
    size, cluster = 1 << 20, 4096
    images = [make_image(size, "first.img"), make_image(size, "second.img")]
    with ExitStack() as stack:
        owners = [stack.enter_context(Coordinator(image, cluster_size=cluster, drain_limit=5)) for image in images]
        go, begun = CONTEXT.Semaphore(0), CONTEXT.Semaphore(0)
        stack.enter_context(running(sweep_pairs, str(images[0]), str(images[1]), cluster, go, begun))
        for round_ in range(20):
            go.release()
            assert begun.acquire(timeout=30)
            take_group([], also=owners)
            for owner in owners:
                owner.bitmaps.run([BitmapAction("add", f"b{round_}")], at=owner.bitmaps.last_boundary)
            assert begun.acquire(timeout=30), "the sweep has ended"
            first, second = (
                {offset for run, length in owner.bitmaps.extents(f"b{round_}") for offset in range(run, run + length)}
                for owner in owners
            )
            # Written to the first image after the instant, but to the second one before it: that was no instant.
            assert first <= second
