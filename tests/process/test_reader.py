"""Snapshots read by processes other than the coordinator, in parts, by several threads, beside everything else."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing.connection
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw import _core, failpoints
from shmcbw.failpoints import POINTS, Failpoint
from shmcbw.image import next_data
from shmcbw.layout import Header, Snapshot, Word
from shmcbw.reader import Extent
from shmcbw.segment import Segment
from shmcbw.snapshots import break_snapshot
from shmcbw.workers import Coordinator
from shmcbw.workers.groups import Backup, Scratch, take_group
from shmcbw.workers.jobs import Job
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import CONTEXT, running, write_forever

SIZE = 4 << 20
K64 = 65_536
SEED = int(os.environ.get("SHMCBW_SEED", random.randrange(1 << 32)))


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def chance() -> random.Random:
    print(f"seed {SEED}")
    return random.Random(SEED)


def digest_all(path: str, snapshot: int | str, times: int, pipe: multiprocessing.connection.Connection) -> None:
    """The digests of so many reads of the whole snapshot, in pieces of odd sizes."""
    with shmcbw.open_snapshot(path, snapshot) as reader:
        for turn in range(times):
            whole = hashlib.sha256()
            for offset in range(0, reader.size_bytes, 77_777 + turn):
                whole.update(reader.pread(min(77_777 + turn, reader.size_bytes - offset), offset))
            pipe.send(whole.hexdigest())


def discard_all(path: str, snapshot: int | str, times: int, pipe: multiprocessing.connection.Connection) -> None:
    """Let every fourth cluster of the second half go, so many times."""
    with shmcbw.open_snapshot(path, snapshot) as reader:
        for offset in range(SIZE // 2, SIZE, 4 * K64):
            reader.discard(K64, offset)


def zero_forever(path: str, seed: int) -> None:
    """Zero and discard pieces of 4 KiB and whole clusters until killed; ends when its parent does."""
    parent, chance = os.getppid(), random.Random(seed)
    with shmcbw.open(path) as disk:
        while os.getppid() == parent:
            length = chance.choice([4096, K64, 3 * K64])
            offset = chance.randrange(0, disk.size_bytes - length + 1, 4096)
            (disk.pwrite_zeroes if chance.random() < 0.5 else disk.pdiscard)(length, offset)


def test_readers_in_other_processes_see_the_cut_while_writers_write(image: Path, tmp_path: Path) -> None:
    """One cut, taken twice: by the copy workers into a backup, and read through a snapshot."""
    with Coordinator(image, cluster_size=4096, drain_limit=2.0) as coordinator:
        with running(write_forever, str(image), 1), running(zero_forever, str(image), 2):
            wait_for(lambda: all(slot["writes"] for slot in coordinator.status()["slots"]), "the writers write")
            scratch, job = take_group([Scratch(coordinator, tmp_path / "s"), Backup(coordinator, tmp_path / "out")])
            assert isinstance(scratch, shmcbw.SnapshotReader) and isinstance(job, Job)
            readers = []
            for name in (scratch.serial, str(tmp_path / "s")):
                ours, theirs = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(target=digest_all, args=(str(image), name, 3, theirs))
                process.start()
                theirs.close()
                readers.append((process, ours))
            job.wait(30)
            expected = hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest()
            for process, pipe in readers:
                assert [pipe.recv() for _ in range(3)] == [expected] * 3
                pipe.close()
                process.join()
            assert hashlib.sha256(scratch.pread(SIZE, 0)).hexdigest() == expected
            scratch.close()


def test_a_copy_by_block_status_is_the_cut_while_writers_zero_and_discard(tmp_path: Path) -> None:
    """What is told to be zero is left out, as nbdcopy and qemu-img convert do.  QEMU 7.2 fails this."""
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.write(os.urandom(SIZE // 2))
        file.truncate(SIZE)
    before = image.read_bytes()
    with Coordinator(image) as coordinator:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            with running(zero_forever, str(image), 1), running(write_forever, str(image), 2):
                while len(coordinator.status()["slots"]) < 2 or snapshot.block_status(SIZE, 0) == []:
                    time.sleep(0.001)
                deadline = time.monotonic() + 1.0
                while time.monotonic() < deadline:
                    found = bytearray(SIZE)
                    extents = snapshot.block_status(SIZE, 0)
                    assert sum(extent.length for extent in extents) == SIZE
                    for extent in extents:
                        if extent.status == "data":
                            end = extent.offset + extent.length
                            found[extent.offset : end] = snapshot.pread(extent.length, extent.offset)
                    assert found == before


READ_POINTS = [point for point in POINTS if point.name.startswith("reader.")]


@pytest.mark.parametrize("point", READ_POINTS, ids=lambda point: point.name)
def test_a_reader_that_dies_anywhere_holds_nobody(
    image: Path, tmp_path: Path, point: Failpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=20) as snapshot:
            expected = disk.pread(SIZE, 0)
            ours, theirs = CONTEXT.Pipe(duplex=False)
            monkeypatch.setenv(failpoints.ENVIRONMENT, f"{point.name}=kill@7")
            what = discard_all if point.protocol == "discard" else digest_all
            reader = CONTEXT.Process(target=what, args=(str(image), snapshot.serial, 1, theirs))
            reader.start()
            monkeypatch.delenv(failpoints.ENVIRONMENT)
            reader.join()
            assert reader.exitcode == -signal.SIGKILL
            ours.close()
            theirs.close()
            disk.pwrite(b"n" * SIZE, 0)
            let_go = range(SIZE // 2, SIZE, 4 * K64) if point.protocol == "discard" else range(0)
            for offset in set(range(0, SIZE, K64)) - set(let_go[:7]):
                assert snapshot.pread(K64, offset) == expected[offset : offset + K64]
            with shmcbw.open_snapshot(image) as other:
                assert other.pread(100, 0) == expected[:100]


def test_a_reader_goes_on_when_the_coordinator_dies_and_another_takes_over(image: Path, tmp_path: Path) -> None:
    owner = Owner(image)
    assert owner.answer() is not None
    try:
        with shmcbw.open(image) as disk:
            expected = disk.pread(SIZE, 0)
            assert owner.ask(do="snapshot", scratch=str(tmp_path / "scratch")) == {"ok": None}
            with shmcbw.open_snapshot(image, tmp_path / "scratch") as reader:
                disk.pwrite(b"new" * 100_000, 0)
                owner.end()
                disk.pwrite(b"new" * 100_000, 1 << 20)
                assert reader.pread(SIZE, 0) == expected
                owner = Owner(image)
                assert owner.answer() is not None
                disk.pwrite(b"new" * 100_000, 2 << 20)
                assert reader.pread(SIZE, 0) == expected
                assert owner.ask(do="drop") == {"ok": None}
                with pytest.raises(shmcbw.ClosedError):
                    reader.pread(1, 0)
        assert owner.ask(do="close") == {"ok": None}
        owner.process.wait(20)
    finally:
        owner.end()


def test_where_a_range_straddles_a_border_the_part_before_it_is_answered(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            assert snapshot.discard(2 * K64, 4 * K64) == 2 * K64
            assert snapshot.pread_some(6 * K64, K64 + 7) == expected[K64 + 7 : 4 * K64]
            assert snapshot.pread_some(100, 0) == expected[:100]
            assert snapshot.pread_some(0, 4 * K64) == b""
            buffer = bytearray(b"?" * 100)
            assert snapshot.pread_into(buffer, 4 * K64 - 40, partial=True) == 40
            assert buffer == expected[4 * K64 - 40 : 4 * K64] + b"?" * 60
            assert snapshot.block_status_some(SIZE - K64, K64) == [Extent(K64, 3 * K64, "data")]
            assert snapshot.block_status_some(SIZE - 6 * K64, 6 * K64) == [Extent(6 * K64, SIZE - 6 * K64, "data")]
            whole = [(0, "data"), (4 * K64, "inaccessible"), (6 * K64, "data")]
            assert [(extent.offset, extent.status) for extent in snapshot.block_status(SIZE, 0)] == whole
            assert [extent.offset for extent in snapshot.block_status(SIZE, 0, limit=2)] == [0, 4 * K64]
            for call in (
                lambda: snapshot.pread(6 * K64, K64),
                lambda: snapshot.pread_into(bytearray(100), 4 * K64 - 40),
                lambda: snapshot.pread_some(100, 4 * K64),
                lambda: snapshot.block_status_some(100, 5 * K64),
            ):
                with pytest.raises(shmcbw.SnapshotInaccessibleError) as caught:
                    call()
                assert caught.value.errno == errno.EACCES


def test_a_snapshot_limited_to_a_part_neither_copies_nor_shows_the_rest(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        parts = [(10, 5), (3 * K64 - 1, 2), (3 * K64 + 5, 1), (8 * K64, 0), (SIZE - 1, 1)]
        with coordinator.snapshot(tmp_path / "scratch", access=parts) as snapshot:
            accessible = [(e.offset, e.length) for e in snapshot.block_status(SIZE, 0) if e.status != "inaccessible"]
            assert accessible == [(0, K64), (2 * K64, 2 * K64), (SIZE - K64, K64)]
            disk.pwrite(b"n" * SIZE, 0)
            counts = coordinator.status()["snapshots"][0]["clusters"]
            assert (counts["copied_for_writer"], counts["skipped"]) == (4, SIZE // K64 - 4)
            for offset, length in accessible:
                assert snapshot.pread(length, offset) == expected[offset : offset + length]
        for wrong in ([(SIZE, 1)], [(5 * K64, 1), (0, 1)], [(-1, 5)]):
            with pytest.raises(shmcbw.OutOfRangeError):
                coordinator.snapshot(tmp_path / "wrong", access=wrong)
        assert coordinator.snapshots == []


def holes(path: Path) -> set[int]:
    """The clusters of a file that are wholly holes."""
    with path.open("rb") as file:
        return {c for c in range(SIZE // K64) if next_data(file.fileno(), c * K64, SIZE) >= (c + 1) * K64}


def test_discards_race_with_workers_writers_and_readers(
    image: Path, tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not let go stays right, what is let go has no space, and a reader never gets a punched zero as data."""
    monkeypatch.setenv(failpoints.ENVIRONMENT, "worker.copying=delay:1,reader.looked=delay:1")
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=20) as snapshot:
            let_go: set[int] = set()
            failures: list[str] = []
            stop = threading.Event()

            def write() -> None:
                order = list(range(SIZE // K64))
                random.Random(SEED).shuffle(order)
                for cluster in order:
                    disk.pwrite(b"new", cluster * K64 + 100)

            def read() -> None:
                mine = random.Random(SEED + 1)
                while not stop.is_set():
                    offset = mine.randrange(SIZE)
                    count = min(mine.randrange(200_000), SIZE - offset)
                    try:
                        found = snapshot.pread_some(count, offset)
                    except shmcbw.SnapshotInaccessibleError:
                        continue
                    if found != expected[offset : offset + len(found)]:
                        failures.append(f"{len(found)} bytes at {offset}")

            with shmcbw.open_snapshot(image) as other:
                threads = [threading.Thread(target=each) for each in (write, read, read)]
                for thread in threads:
                    thread.start()
                total = 0
                for cluster in chance.sample(range(SIZE // K64), SIZE // K64 // 2):
                    total += chance.choice([snapshot, other]).discard(K64, cluster * K64)
                    let_go.add(cluster)
                threads[0].join()
                stop.set()
                for thread in threads:
                    thread.join()
            assert failures == []
            assert total == len(let_go) * K64
            extents = snapshot.block_status(SIZE, 0)
            inaccessible = {
                cluster
                for e in extents
                if e.status == "inaccessible"
                for cluster in range(e.offset // K64, (e.offset + e.length) // K64)
            }
            assert inaccessible == let_go
            for cluster in set(range(SIZE // K64)) - let_go:
                assert snapshot.pread(K64, cluster * K64) == expected[cluster * K64 : (cluster + 1) * K64]
            assert let_go <= holes(tmp_path / "scratch.shmcbw-partial")


def reached(coordinator: Coordinator, point: str) -> bool:
    """Whether a point that was armed to act once has acted."""
    word = Header.failpoints.offset + 8 * (1 + failpoints.index_of(point))
    return _core.load_u64(coordinator.segment.memory, word) == 0


def test_a_reader_that_looked_before_a_discard_does_not_take_its_hole_for_data(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(b"new", 0)
            failpoints.arm(coordinator.segment.memory, "reader.looked", "delay:300*1")
            failures: list[BaseException] = []

            def read() -> None:
                try:
                    snapshot.pread(K64, 0)
                except shmcbw.SnapshotInaccessibleError as error:
                    failures.append(error)

            thread = threading.Thread(target=read)
            thread.start()
            wait_for(lambda: reached(coordinator, "reader.looked"), "the reader has looked")
            assert snapshot.discard(K64, 0) == K64
            thread.join()
            assert len(failures) == 1


class BreaksAtFirstLookAtState:
    """A segment as the reader sees it when its snapshot breaks just after it looked for a sticky error."""

    def __init__(self, segment: Segment, index: int, serial: int) -> None:
        self._segment, self._index, self._serial = segment, index, serial
        self.broke = False

    def snapshot(self, index: int, word: Word) -> int:
        if word == Snapshot.state and not self.broke:
            self.broke = True
            break_snapshot(self._segment, self._index, self._serial, errno.EIO, 3)
        return self._segment.snapshot(index, word)

    def __getattr__(self, name: str) -> object:
        return getattr(self._segment, name)


def test_a_snapshot_that_breaks_under_the_readers_eyes_is_broken_and_not_closed(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        with shmcbw.open_snapshot(image) as reader:
            seen = BreaksAtFirstLookAtState(coordinator.segment, reader._index, snapshot.serial)
            mine, reader._segment = reader._segment, seen  # type: ignore[assignment]
            try:
                with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
                    reader.pread(4096, 0)
            finally:
                reader._segment = mine
            assert seen.broke
            assert (caught.value.errno, caught.value.cluster) == (errno.EIO, 3)


@pytest.mark.parametrize("zero", ["pwrite_zeroes", "pdiscard"])
def test_status_that_looked_before_a_writer_zeroed_does_not_take_its_hole_for_the_snapshots(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: str
) -> None:
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            failpoints.arm(coordinator.segment.memory, "reader.looked", "delay:300*1")
            found: list[Extent] = []
            thread = threading.Thread(target=lambda: found.extend(snapshot.block_status(2 * K64, 0)))
            thread.start()
            wait_for(lambda: reached(coordinator, "reader.looked"), "the reader has looked")
            getattr(disk, zero)(4096, 0)
            getattr(disk, zero)(K64, K64)
            thread.join()
            assert found == [Extent(0, 2 * K64, "data")]


def test_a_discard_leaves_a_cluster_alone_that_a_worker_claims_under_its_eyes(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has written the cluster and is slow to publish it; what the discard does not wait for, it keeps."""
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    monkeypatch.setattr(shmcbw.reader, "_DISCARD_WAIT_S", 0.01)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        expected = disk.pread(SIZE, 0)
        with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=20) as snapshot:
            memory = coordinator.segment.memory
            failpoints.arm(memory, "reader.discard", "delay:400*1")
            failpoints.arm(memory, "worker.copied", "delay:800*1")
            let_go: list[int] = []
            discard = threading.Thread(target=lambda: let_go.append(snapshot.discard(2 * K64, 0)))
            discard.start()
            wait_for(lambda: reached(coordinator, "reader.discard"), "the discard has looked")
            writer = threading.Thread(target=disk.pwrite, args=(b"new", K64))
            writer.start()
            discard.join()
            writer.join()
            if let_go == [K64]:
                assert snapshot.pread(K64, K64) == expected[K64 : 2 * K64]
            else:
                # The machine was slow: it came before the worker, or after it had published.
                assert let_go == [2 * K64]
                with pytest.raises(shmcbw.SnapshotInaccessibleError):
                    snapshot.pread(K64, K64)


def test_a_discard_frees_what_a_dead_worker_had_half_copied(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    with Coordinator(image, workers=1) as coordinator:
        memory = coordinator.segment.memory
        with coordinator.snapshot(tmp_path / "scratch") as snapshot, shmcbw.open(image) as disk:
            failpoints.arm(memory, "worker.copied", "kill*1")
            failpoints.arm(memory, "worker.claimed", "stop@1*1")
            writer = threading.Thread(target=disk.pwrite, args=(b"new", 0))
            writer.start()
            wait_for(lambda: reached(coordinator, "worker.claimed"), "the next worker has claimed", 20)
            assert 0 not in holes(tmp_path / "scratch.shmcbw-partial")
            # It is stopped with its claim: the cluster stays, and a discard says so.
            assert snapshot.discard(K64, 0) == 0
            for pid in coordinator._pool.pids.values():
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda: snapshot.discard(K64, 0) or not writer.is_alive(), "its claim is returned", 20)
            writer.join()
            assert snapshot.discard(K64, 0) == 0
            assert 0 in holes(tmp_path / "scratch.shmcbw-partial")


def test_nothing_is_discarded_from_a_backup(image: Path, tmp_path: Path) -> None:
    """It would finish under its name, with holes that are not the image's."""
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with shmcbw.open_snapshot(image, tmp_path / "out") as reader:
            assert reader.pread(SIZE, 0) == expected
            with pytest.raises(shmcbw.SnapshotInaccessibleError, match="backup") as caught:
                reader.discard(SIZE, 0)
            assert caught.value.errno == errno.EPERM
            with pytest.raises(shmcbw.SnapshotInaccessibleError, match="backup"):
                reader.limit([])
            job.set_speed(0)
            job.wait(20)
            with coordinator.snapshot(tmp_path / "scratch"):
                # The entry is another snapshot's now, from which one may discard.
                with pytest.raises(shmcbw.ClosedError):
                    reader.discard(SIZE, 0)
                with pytest.raises(shmcbw.ClosedError):
                    reader.pread(1, 0)
    assert (tmp_path / "out").read_bytes() == expected


def test_reads_of_several_threads_run_beside_each_other(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        failpoints.arm(coordinator.segment.memory, "reader.read", "delay:1000*1")
        slow = threading.Thread(target=snapshot.pread, args=(SIZE, 0))
        slow.start()
        wait_for(lambda: reached(coordinator, "reader.read"), "one thread is in the middle of a read")
        assert len(snapshot.pread(2 * K64, K64)) == 2 * K64
        assert slow.is_alive()
        slow.join()


def test_closing_waits_for_reads_so_that_none_meets_another_file(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(failpoints.ENVIRONMENT, "segment")
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch"):
        reader = shmcbw.open_snapshot(image)
        failpoints.arm(coordinator.segment.memory, "reader.looked", "delay:100*1")
        failures: list[BaseException] = []

        def read() -> None:
            try:
                reader.pread(SIZE, 0)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        wait_for(lambda: reader._inside or not thread.is_alive(), "the read has begun")
        reader.close()
        thread.join()
        assert [type(error) for error in failures] in ([shmcbw.ClosedError], [])
        with pytest.raises(shmcbw.ClosedError):
            reader.discard(1, 0)


def test_what_is_not_there_is_named_and_so_is_what_is(image: Path, tmp_path: Path) -> None:
    with pytest.raises(shmcbw.NoCoordinatorError):
        shmcbw.open_snapshot(image)
    with Coordinator(image, workers=1) as coordinator:
        with pytest.raises(shmcbw.NoSnapshotError, match="its snapshots: none"):
            shmcbw.open_snapshot(image)
        with coordinator.snapshot(tmp_path / "one") as one, coordinator.snapshot(tmp_path / "two") as two:
            for wanted in (None, 5, tmp_path / "three"):
                with pytest.raises(shmcbw.NoSnapshotError, match=rf"{one.serial} \(.*/one\), {two.serial} \(.*/two\)"):
                    shmcbw.open_snapshot(image, wanted)
            break_snapshot(coordinator.segment, 1, two.serial, errno.ENOSPC, 3)
            with pytest.raises(shmcbw.SnapshotBrokenError, match=r"No space left .* cluster 3"):
                shmcbw.open_snapshot(image, two.serial)
            assert two.broken is not None and two.broken.cluster == 3
            assert one.broken is None
            scratch = tmp_path / "one.shmcbw-partial"
            scratch.rename(tmp_path / "kept")
            scratch.touch()
            with pytest.raises(OSError, match="another file") as caught:
                shmcbw.open_snapshot(image, "one" if os.getcwd() == str(tmp_path) else one.serial)
            assert caught.value.errno == errno.ESTALE
            scratch.unlink()
            (tmp_path / "kept").rename(scratch)
            with shmcbw.open_snapshot(image, one.serial) as reader:
                assert repr(reader) == f"<_OpenedReader {one.serial} of {image}>"
