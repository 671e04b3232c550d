"""A served image gets larger while writers write: no write is lost, and every backup shows one instant."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw import _core, failpoints
from shmcbw.errors import ImageInUseError, ResizeRefusedError
from shmcbw.layout import Header
from shmcbw.segment import SHM, StaleSegmentError, segment_name
from shmcbw.status import describe_segment
from shmcbw.workers import Coordinator
from shmcbw.workers.restore import restore
from tests.conftest import wait_for
from tests.owner import Owner
from tests.process.test_permissions import locked_bytes, storage_daemon
from tests.processes import CONTEXT, running, stop_all, write_pairs_forever

#: The last cluster is a partial one, and so is its last page.
SIZE = (1 << 20) + 5000
K64 = 65_536
LAST = 1 << 20
SEED = int(os.environ.get("SHMCBW_SEED", random.randrange(1 << 32)))


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def chance() -> random.Random:
    print(f"seed {SEED}")
    return random.Random(SEED)


def marks(coordinator: Coordinator, first: int) -> set[int]:
    """The epochs that the clusters from `first` on are marked with."""
    segment = coordinator._segment
    base = segment.geometry.epoch_map_offset
    return {_core.load_u32(segment.memory, base + 4 * cluster) for cluster in range(first, segment.geometry.clusters)}


def test_a_writer_that_notices_nothing_goes_on_and_backups_of_each_size_show_one_instant(
    image: Path, tmp_path: Path
) -> None:
    """Its pairs are in what was the last, partial cluster: a worker of the old size would copy only a part of that."""
    first, second = LAST + 100, LAST + 4900
    with image.open("r+b") as file:
        for offset in (first, second):
            file.seek(offset)
            file.write(bytes(8))
    with Coordinator(image, workers=2, drain_limit=2.0) as coordinator:
        with running(write_pairs_forever, str(image), first, second):
            wait_for(lambda: _writes(coordinator), "the writer writes", 20)
            for turn, size in enumerate((SIZE + 1, 2 << 20, (3 << 20) + 77)):
                coordinator.resize(size)
                assert os.stat(image).st_size == size
                with shmcbw.open(image) as disk:
                    assert disk.size_bytes == size
                    disk.pwrite(b"before", size - 6)
                    job = coordinator.backup(tmp_path / f"out{turn}", speed=1)
                    disk.pwrite(b"later!", size - 6)
                    written = _writes(coordinator)
                    wait_for(lambda: _writes(coordinator) > written + 10, "the old writer goes on", 20)  # noqa: B023
                    job.set_speed(0)
                    job.wait(20)
                data = (tmp_path / f"out{turn}").read_bytes()
                pair = [int.from_bytes(data[offset : offset + 8], "little") for offset in (first, second)]
                assert pair[0] in (pair[1], pair[1] + 1)
                assert len(data) == size and data.endswith(b"before")


def _writes(coordinator: Coordinator) -> int:
    return int(sum(slot["writes"] for slot in coordinator.status()["slots"]))


def test_a_handle_is_as_large_when_it_is_asked(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk, shmcbw.open(image) as other:
        with shmcbw.open(image, read_only=True) as reader:
            coordinator.resize(2 << 20)
            disk.pwrite(b"here", (2 << 20) - 4)
            assert reader.pread(4, (2 << 20) - 4) == b"here"
            buffer = bytearray(4)
            coordinator.resize(3 << 20)
            assert reader.pread_into(buffer, (3 << 20) - 4) == 4
            assert disk.size_bytes == other.size_bytes == reader.size_bytes == 3 << 20
            assert other.pread(4, (2 << 20) - 4) == b"here"
            for call in (lambda: disk.pwrite(b"x", 3 << 20), lambda: reader.pread(1 << 40, 0)):
                with pytest.raises(shmcbw.OutOfRangeError, match=f"the image has {3 << 20} bytes"):
                    call()
            assert other.pread((3 << 20) - SIZE - 4, SIZE)[: (2 << 20) - SIZE - 4].strip(b"\0") == b""


def test_threads_of_one_handle_write_long_pieces_through_resizes(image: Path, chance: random.Random) -> None:
    final = 8 << 20
    parts = [range(start, start + (2 << 20)) for start in range(0, final, 2 << 20)]
    ends = [*sorted(chance.sample(range(SIZE + 1, final), 3)), final]
    failures: list[BaseException] = []
    expected = bytearray(image.read_bytes() + bytes(final - SIZE))
    done = threading.Event()

    def write(disk: shmcbw.Disk, part: range, seed: int) -> None:
        """Long pieces, which are stored without the interpreter's lock, up to wherever the image ends by now."""
        mine = random.Random(seed)
        try:
            while not done.is_set():
                size = disk.size_bytes
                offset = mine.randrange(part.start, part.stop)
                length = min(mine.randrange(1, 300_000), part.stop - offset, size - offset)
                if length <= 0:
                    continue
                if mine.random() < 0.3:
                    disk.pwrite_zeroes(length, offset)
                    expected[offset : offset + length] = bytes(length)
                else:
                    data = mine.randbytes(1) * length
                    disk.pwrite(data, offset)
                    expected[offset : offset + length] = data
        except BaseException as error:
            failures.append(error)
            raise

    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        threads = [threading.Thread(target=write, args=(disk, part, chance.random() * 1e9)) for part in parts]
        for thread in threads:
            thread.start()
        try:
            for size in ends:
                coordinator.resize(size)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not failures
        assert disk.pread(final, 0) == expected


def test_a_resize_beside_a_backup_or_a_snapshot_is_refused_and_says_which(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        with coordinator.snapshot(tmp_path / "scratch"):
            with pytest.raises(ResizeRefusedError, match=r"1 snapshots or jobs are active \(to .*/scratch\): end them"):
                coordinator.resize(2 << 20)
        job = coordinator.backup(tmp_path / "out", speed=1)
        with pytest.raises(ResizeRefusedError, match="/out"):
            coordinator.resize(2 << 20)
        assert os.stat(image).st_size == SIZE
        job.cancel()
        coordinator.resize(2 << 20)
        coordinator.backup(tmp_path / "out").wait(20)
    assert os.stat(tmp_path / "out").st_size == 2 << 20


def test_a_served_image_does_not_shrink_and_its_own_size_is_no_resize(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        workers = set(coordinator._pool.pids.values())
        with pytest.raises(ResizeRefusedError, match=f"from {SIZE} to 4096 bytes: .* does not shrink"):
            coordinator.resize(4096)
        with pytest.raises(ResizeRefusedError, match="not in 1"):
            coordinator.resize(1 << 63)
        coordinator.resize(SIZE)
        assert set(coordinator._pool.pids.values()) == workers


def test_a_file_that_somebody_else_resized_is_none_of_ours(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        os.truncate(image, 2 << 20)
        with pytest.raises(ResizeRefusedError, match=f"somebody else has given it {2 << 20}"):
            coordinator.resize(2 << 20)
        with pytest.raises(StaleSegmentError, match=f"{2 << 20}"):
            shmcbw.open(image)
        assert disk.size_bytes == SIZE
        disk.pwrite(b"x", 0)


def test_what_the_file_system_refuses_changes_nothing(image: Path) -> None:
    segment = Path(SHM + segment_name(shmcbw.image.Identity.of(os.stat(image))))
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        before = segment.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The segment is smaller than the limit, the image is not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
        try:
            with pytest.raises(OSError, match="not resized to") as caught:
                coordinator.resize(1 << 30)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.errno == errno.EFBIG
        assert (os.stat(image).st_size, disk.size_bytes, segment.stat().st_size) == (SIZE, SIZE, before)
        coordinator.resize(2 << 20)
        assert disk.size_bytes == 2 << 20


@pytest.mark.parametrize("step", ["announced", "allocated", "grown"])
def test_a_resize_that_fails_on_the_way_changes_nothing_or_is_done(
    image: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """No room in /dev/shm is one of these."""
    monkeypatch.setenv(failpoints.ENVIRONMENT, f"resize.{step}=errno:ENOSPC*1")
    segment = Path(SHM + segment_name(shmcbw.image.Identity.of(os.stat(image))))
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        before = segment.stat().st_size
        if step == "grown":
            coordinator.resize(2 << 20)
        else:
            with pytest.raises(OSError, match="not resized") as caught:
                coordinator.resize(2 << 20)
            assert caught.value.errno == errno.ENOSPC
            assert (os.stat(image).st_size, segment.stat().st_size, disk.size_bytes) == (SIZE, before, SIZE)
            assert _core.load_u64(coordinator.segment.memory, Header.resize_to.offset) == 0
            disk.pwrite(b"x", 0)
            coordinator.resize(2 << 20)
        assert disk.size_bytes == 2 << 20


def test_a_resize_that_could_not_be_taken_back_either_is_by_the_next_one(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        coordinator.segment.set_header(Header.resize_to, 5 << 20)
        shmcbw.open(image).close()
        coordinator.resize(2 << 20)
        assert disk.size_bytes == os.stat(image).st_size == 2 << 20


def test_a_qemu_that_counts_on_the_size_is_a_reason_to_refuse(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        with storage_daemon(
            tmp_path,
            f"--blockdev=driver=file,node-name=image,filename={image},read-only=on",
            f"--nbd-server=addr.type=unix,addr.path={tmp_path}/nbd",
            "--export=type=nbd,id=export,node-name=image",
        ) as daemon:
            with pytest.raises(ImageInUseError, match=rf"can't be resized: pid {daemon.pid} .*bears no other that may"):
                coordinator.resize(2 << 20)
        coordinator.resize(2 << 20)
        assert locked_bytes(image) == {100, 101, 201, 203}


def test_a_stopped_worker_of_a_dead_coordinator_is_waited_for(image: Path) -> None:
    """It may be past its look at the pool's generation, and would copy by the old size."""
    owner = Owner(image)
    assert owner.answer() is not None
    with shmcbw.open(image) as disk:
        workers = [worker["pid"] for worker in _status(disk)["workers"]]
        owner.end()
        stop_all(workers)
        try:
            with Coordinator(image, workers=1) as coordinator:
                with pytest.raises(ResizeRefusedError, match="worker of an earlier coordinator"):
                    coordinator.resize(2 << 20)
                for pid in workers:
                    os.kill(pid, signal.SIGCONT)
                wait_for(lambda: len(coordinator.status()["workers"]) == 1, "the old workers leave")
                coordinator.resize(2 << 20)
                assert disk.size_bytes == 2 << 20
        finally:
            for pid in workers:
                with _gone_is_fine():
                    os.kill(pid, signal.SIGKILL)


def _status(disk: shmcbw.Disk) -> dict[str, list[dict[str, int]]]:
    return describe_segment(disk._attached())


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        pass


def test_a_handle_grows_while_a_later_snapshot_needs_old_data(image: Path, tmp_path: Path) -> None:
    """It had mapped the bitmap of a snapshot before the resize, and those of later ones at its old length."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk, shmcbw.open(image) as other:
        with coordinator.snapshot(tmp_path / "one") as snapshot:
            disk.pwrite(b"1" * 100, LAST)
            assert snapshot.pread(1, LAST) != b"1"
        coordinator.resize(2 << 20)
        other.pwrite(b"2" * 4096, SIZE + 100)
        with coordinator.snapshot(tmp_path / "two") as snapshot:
            before = other.pread(2 << 20, 0)
            disk.pwrite(b"3" * 100, LAST)
            disk.pwrite(b"4" * 4096, SIZE + 100)
            disk.pwrite(b"5", (2 << 20) - 1)
            assert snapshot.pread(2 << 20, 0) == before
        assert other.pread(2 << 20, 0) == disk.pread(2 << 20, 0) != before


def _write_at_end(path: str, size: int) -> None:
    with shmcbw.open(path) as disk:
        disk.pwrite(b"child", size - 5)


def test_a_forked_child_is_as_large_as_the_image(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
        coordinator.resize(2 << 20)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                disk.pwrite(b"child", (2 << 20) - 5)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert disk.pread(5, (2 << 20) - 5) == b"child"
        process = CONTEXT.Process(target=_write_at_end, args=(str(image), 2 << 20))
        process.start()
        process.join()
        assert process.exitcode == 0


def test_bitmaps_carry_over_and_increments_across_a_resize_restore_the_image(
    image: Path, tmp_path: Path, chance: random.Random
) -> None:
    """Base of the old size, increments of the old and of two larger ones; the old last cluster was partial."""
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        coordinator.bitmaps.add("kept")
        coordinator.bitmaps.add("stopped")
        coordinator.backup(tmp_path / "base", bitmap="kept", bitmap_mode="on-success", sync="full").wait(20)
        disk.pwrite(b"before", 0)
        coordinator.bitmaps.disable("stopped")
        assert list(coordinator.bitmaps.extents("stopped")) == [(0, K64)]
        chain = [tmp_path / "base"]
        for turn, size in enumerate((SIZE, SIZE + K64, 3 << 20)):
            coordinator.resize(size)
            for _ in range(5):
                length = chance.randrange(1, 100_000)
                disk.pwrite(chance.randbytes(length), chance.randrange(size - length))
            increment = tmp_path / f"increment{turn}"
            coordinator.backup(increment, bitmap="kept", sync="incremental").wait(20)
            chain.append(increment)
            restore([str(each) for each in chain], str(tmp_path / f"restored{turn}"))
            assert (tmp_path / f"restored{turn}").read_bytes() == disk.pread(size, 0)
        # What the resize has added is clean where nobody wrote.
        assert list(coordinator.bitmaps.extents("kept")) == []
        coordinator.resize(4 << 20)
        assert list(coordinator.bitmaps.extents("kept")) == []
        assert list(coordinator.bitmaps.extents("stopped")) == [(0, K64)]
        coordinator.bitmaps.enable("stopped")
        disk.pwrite(b"x", (4 << 20) - 1)
        assert list(coordinator.bitmaps.extents("stopped"))[-1] == ((4 << 20) - K64, K64)


def test_what_a_file_has_beyond_its_old_end_is_clean_and_what_a_device_has_is_not(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        coordinator.resize(2 << 20)
        assert marks(coordinator, LAST // K64) == {0}
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    device = done.stdout.strip()
    try:
        with Coordinator(device, workers=1) as coordinator, shmcbw.open(device) as disk:
            with pytest.raises(ResizeRefusedError, match=f"the device has {2 << 20}: give the device"):
                coordinator.resize(3 << 20)
            with image.open("ab") as file:
                file.write(os.urandom(1 << 20))
            subprocess.run(["losetup", "--set-capacity", device], check=True)
            coordinator.resize(3 << 20)
            assert disk.size_bytes == 3 << 20
            epoch = coordinator.status()["epoch"]
            assert marks(coordinator, (2 << 20) // K64) == {epoch} and epoch not in marks(coordinator, 0) - {epoch}
            disk.pwrite(b"x", (3 << 20) - 1)
            disk.flush()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
