"""Disks that really are full, gone or read-only, files that really are truncated or replaced, limits that really bite.

What the kernel does then is not what an errno in a test does: pages vanish under mappings, a file system changes its
mind, a signal comes.  Nobody dies of it, writers go on, and what can't be right says so.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw.invariants import check
from shmcbw.workers import Coordinator, Job
from tests.conftest import needs_root, wait_for
from tests.owner import Owner
from tests.processes import running, write_forever

SIZE = 2 << 20
CLUSTER = 65_536


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def worker_pids(coordinator: Coordinator) -> list[int]:
    return sorted(worker["pid"] for worker in coordinator.status()["workers"])


def failure_of(job: Job) -> OSError:
    """Why it failed: its snapshot is broken, or a background copy or the end of the target went wrong."""
    with pytest.raises(OSError, match=r".") as failed:
        job.wait(20)
    assert isinstance(failed.value, (shmcbw.SnapshotBrokenError, shmcbw.JobFailedError))
    return failed.value


def fill(directory: Path) -> Path:
    """Leave no byte free; removing the file that this returns gives the space back."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return ballast


# -- no space ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_a_backup_whose_disk_fills_up_in_the_middle_fails_and_the_next_one_works(
    image: Path, make_tmpfs: Callable[[str], Path], policy: str
) -> None:
    disk_of_targets = make_tmpfs("3m")
    expected = image.read_bytes()
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        pids = worker_pids(coordinator)
        job = coordinator.backup(disk_of_targets / "out", speed=1, on_cbw_error=policy)
        disk.pwrite(b"x" * 100, 0)
        ballast = fill(disk_of_targets)
        if policy == "break-snapshot":
            disk.pwrite(b"y" * 100, 5 * CLUSTER)
            assert disk.pread(100, 5 * CLUSTER) == b"y" * 100
        else:
            with pytest.raises(shmcbw.CopyFailedError, match="nothing written") as refused:
                disk.pwrite(b"y" * 100, 5 * CLUSTER)
            assert refused.value.errno == errno.ENOSPC
            assert disk.pread(CLUSTER, 5 * CLUSTER) == expected[5 * CLUSTER : 6 * CLUSTER]
            job.set_speed(0)
        assert failure_of(job).errno == errno.ENOSPC
        assert [path.name for path in disk_of_targets.iterdir()] == ["ballast"]
        disk.pwrite(b"z" * 100, 7 * CLUSTER)
        assert check(coordinator._segment) == []

        ballast.unlink()
        now = disk.pread(SIZE, 0)
        again = coordinator.backup(disk_of_targets / "out", speed=1, on_cbw_error=policy)
        disk.pwrite(b"later", 9 * CLUSTER)
        again.set_speed(0)
        again.wait(20)
        assert (disk_of_targets / "out").read_bytes() == now
        assert worker_pids(coordinator) == pids


def test_a_write_into_a_hole_of_an_image_on_a_full_disk_is_an_error_and_the_snapshot_stays_right(
    make_tmpfs: Callable[[str], Path], tmp_path: Path
) -> None:
    """The store meets a page that can't be had: SIGBUS."""
    disk_of_images = make_tmpfs("1m")
    image = disk_of_images / "disk.img"
    with image.open("wb") as file:
        file.write(b"d" * CLUSTER)
        file.truncate(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            ballast = fill(disk_of_images)
            with pytest.raises(OSError, match="no space left to fill a hole") as caught:
                disk.pwrite(b"x" * 100, 10 * CLUSTER)
            assert caught.value.errno == errno.ENOSPC
            disk.pwrite(b"x" * 100, 0)
            ballast.unlink()
            disk.pwrite(b"x" * 100, 10 * CLUSTER)
            assert snapshot.pread(SIZE, 0) == b"d" * CLUSTER + bytes(SIZE - CLUSTER)
        assert check(coordinator._segment) == []


IN_SMALL_SHM = """
    import os, subprocess, sys
    from pathlib import Path
    import shmcbw
    from shmcbw.workers import Coordinator

    SHM = Path("/dev/shm")

    def resize(pages):
        subprocess.run(["mount", "-o", f"remount,size={pages * 4}k", "/dev/shm"], check=True)

    def refused(action):
        try:
            action().close()
        except OSError as error:
            assert error.errno == 28, error
            assert sys.argv[1] in str(error), error
            return True
        return False
"""


def in_small_shm(script: str, *arguments: Path) -> str:
    """Run a script with a small /dev/shm of its own, in a mount namespace of its own: what it prints."""
    needs_root("a small /dev/shm")
    command = f'mount -t tmpfs -o size=4k none /dev/shm && exec {sys.executable} -c "$SCRIPT" "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, "sh", *map(str, arguments)],
        env={**os.environ, "SCRIPT": textwrap.dedent(IN_SMALL_SHM) + textwrap.dedent(script)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dev_shm_with_room_for_any_number_of_pages_is_enough_or_refused_with_nothing_left(
    image: Path, tmp_path: Path
) -> None:
    """Too small for the segment, for a semaphore, for the bitmap, or for none of them."""
    script = """
        starts = snapshots = 0
        for pages in range(1, 100):
            resize(pages)
            def start():
                return Coordinator(sys.argv[1], workers=1, slots=2)
            if refused(start):
                assert not starts, pages
                assert os.listdir(SHM) == [], pages
                continue
            starts += 1
            with start() as coordinator, shmcbw.open(sys.argv[1]) as disk:
                disk.pwrite(b"x", 0)
                epoch = coordinator.status()["epoch"]
                before = sorted(os.listdir(SHM))
                if refused(lambda: coordinator.snapshot(sys.argv[2] + "/scratch")):
                    assert not snapshots, pages
                    assert coordinator.status()["epoch"] == epoch
                    assert coordinator.status()["snapshots"] == []
                    assert sorted(os.listdir(SHM)) == before
                    assert os.listdir(sys.argv[2]) == []
                    disk.pwrite(b"y", 70000)
                else:
                    snapshots += 1
            assert os.listdir(SHM) == [], pages
            if snapshots == 2:
                break
        print(starts, snapshots)
    """
    (tmp_path / "targets").mkdir()
    starts, snapshots = map(int, in_small_shm(script, image, tmp_path / "targets").split())
    assert snapshots == 2
    assert starts > snapshots, "there is a size that is enough for the segment, and not for a bitmap"


# -- truncated and replaced --------------------------------------------------------------------------------------------


def test_a_source_that_is_truncated_under_live_mappings_kills_nobody(image: Path, tmp_path: Path) -> None:
    """A writer process, the workers, and a reader: each meets pages that are gone."""
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        pids = worker_pids(coordinator)
        snapshot = coordinator.snapshot(tmp_path / "scratch")
        with running(write_forever, str(image), 1, 4096, CLUSTER) as writer:
            wait_for(lambda: len(coordinator.status()["slots"]) == 2, "a writer", 20)
            job = coordinator.backup(tmp_path / "out", speed=1)
            os.truncate(image, SIZE // 2)
            for action in (
                lambda: snapshot.pread(100, SIZE - 100),
                lambda: disk.pread(100, SIZE - 100),
                lambda: disk.pwrite(b"x" * 100, SIZE - 100),
                lambda: disk.pwrite(b"x" * 100_000, SIZE // 2 - 50_000),
            ):
                with pytest.raises(OSError, match=r"truncated|broken") as caught:
                    action()
                assert caught.value.errno == errno.EIO
            job.set_speed(0)
            assert failure_of(job).errno == errno.EIO
            disk.pwrite(b"still", 100)
            before = sum(slot["writes"] for slot in coordinator.status()["slots"])
            wait_for(lambda: sum(s["writes"] for s in coordinator.status()["slots"]) > before, "the writer goes on")
            assert writer.is_alive()
        assert worker_pids(coordinator) == pids
        snapshot.close()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copied", [SIZE // 2, SIZE])
@pytest.mark.parametrize("size", [0, SIZE // 4, SIZE - 1])
def test_a_target_that_is_truncated_in_the_middle_fails_the_job(
    image: Path, tmp_path: Path, copied: int, size: int
) -> None:
    """What was copied is lost, and copies that follow would make the file as long again."""
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with coordinator._lock:  # it does not finish before the truncation
            disk.pwrite(b"x" * copied, 0)
            os.truncate(tmp_path / "out.shmcbw-partial", size)
        job.set_speed(0)
        assert failure_of(job).errno == errno.EIO
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_scratch_that_is_truncated_breaks_its_snapshot_at_the_next_copy(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            disk.pwrite(b"x", 0)
            os.truncate(tmp_path / "scratch.shmcbw-partial", 0)
            with pytest.raises(OSError, match="truncated") as caught:
                snapshot.pread(1, 0)
            assert caught.value.errno == errno.EIO
            disk.pwrite(b"x", SIZE - 1)
            with pytest.raises(shmcbw.SnapshotBrokenError):
                snapshot.pread(1, 0)


def test_a_target_that_is_replaced_by_another_file_fails_the_job_and_that_file_stays(
    image: Path, tmp_path: Path
) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        (tmp_path / "other").write_bytes(b"precious")
        os.rename(tmp_path / "other", tmp_path / "out.shmcbw-partial")
        disk.pwrite(b"x", 0)
        job.set_speed(0)
        with pytest.raises(shmcbw.JobFailedError, match="replaced") as failed:
            job.wait(20)
        assert failed.value.errno == errno.ESTALE
        assert (tmp_path / "out.shmcbw-partial").read_bytes() == b"precious"
        assert not (tmp_path / "out").exists()


# -- limits, and disks that change their mind --------------------------------------------------------------------------


def test_a_file_size_limit_is_an_error_of_the_backup_and_kills_nobody(image: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE of coordinator and workers: SIGXFSZ kills a process that does not see to it."""
    infinity = resource.RLIM_INFINITY
    owner = Owner(image)
    try:
        assert owner.answer() == {"ok": []}
        family = [owner.pid, *(child.pid for child in psutil.Process(owner.pid).children())]
        with shmcbw.open(image) as disk:
            # In the coordinator, before the cut.
            resource.prlimit(owner.pid, resource.RLIMIT_FSIZE, (SIZE // 2, infinity))
            answer = owner.ask(do="backup", target=str(tmp_path / "out")) or {}
            assert answer["error"] == "TargetRefusedError"
            assert "File too large" in answer["message"]
            assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]
            resource.prlimit(owner.pid, resource.RLIMIT_FSIZE, (infinity, infinity))
            # In a worker, in the middle.
            assert "ok" in (owner.ask(do="backup", target=str(tmp_path / "out"), speed=1) or {})
            for pid in family:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (SIZE // 2, infinity))
            disk.pwrite(b"x", SIZE - 1)
            assert owner.ask(do="results") == {"ok": {str(tmp_path / "out"): "SnapshotBrokenError"}}
            assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]
            for pid in family:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (infinity, infinity))
            assert "ok" in (owner.ask(do="backup", target=str(tmp_path / "out")) or {})
            wait_for((tmp_path / "out").exists, "a backup without a limit", 20)
        assert [pid for pid in family if not psutil.pid_exists(pid)] == []
        assert owner.ask(do="close") == {"ok": None}
        owner.process.wait(20)
    finally:
        owner.end()


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An ext4 of its own, and what makes it go read-only as it does at an error that it finds."""
    needs_root("mounting a file system")
    directory, backing = tmp_path / "failing", tmp_path / "backing"
    directory.mkdir()
    with backing.open("wb") as file:
        file.truncate(32 << 20)
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(backing)], check=True, env={**os.environ, "PATH": path})
    subprocess.run(["mount", "-o", "loop,errors=remount-ro", str(backing), str(directory)], check=True)
    try:
        device = next(part.device for part in psutil.disk_partitions(all=True) if part.mountpoint == str(directory))
        trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")

        def fail() -> None:
            trigger.write_text("a test of shmcbw")

        yield directory, fail
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_target_file_system_that_goes_read_only_fails_the_job_and_writers_go_on(
    image: Path, failing_disk: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    directory, fail = failing_disk
    with Coordinator(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        pids = worker_pids(coordinator)
        job = coordinator.backup(directory / "out", speed=1)
        snapshot = coordinator.snapshot(directory / "scratch")
        disk.pwrite(b"x" * 100, 0)
        fail()
        disk.pwrite(b"y" * 100, 5 * CLUSTER)
        assert disk.pread(100, 5 * CLUSTER) == b"y" * 100
        with pytest.raises(shmcbw.SnapshotBrokenError) as broken:
            job.wait(20)
        assert broken.value.errno == errno.EROFS
        with pytest.raises(shmcbw.SnapshotBrokenError):
            snapshot.pread(1, 0)
        snapshot.close()
        # It can't be removed either; it never gets the name of a backup.
        assert not (directory / "out").exists()
        with pytest.raises(shmcbw.TargetRefusedError) as refused:
            coordinator.backup(directory / "next")
        assert refused.value.errno == errno.EROFS
        now = disk.pread(SIZE, 0)
        coordinator.backup(tmp_path / "elsewhere").wait(20)
        assert (tmp_path / "elsewhere").read_bytes() == now
        assert worker_pids(coordinator) == pids
        assert check(coordinator._segment) == []


def test_an_image_whose_file_system_goes_read_only_stays_readable_and_its_backup_ends_right(
    make_image: Callable[..., Path], failing_disk: tuple[Path, Callable[[], None]], tmp_path: Path
) -> None:
    _, fail = failing_disk
    image = make_image(SIZE, "failing/disk.img")
    expected = image.read_bytes()
    os.sync()
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        fail()
        reader = threading.Thread(target=disk.pread, args=(SIZE, 0))
        reader.start()
        reader.join(20)
        disk.pwrite(b"x", 0)
        with pytest.raises(OSError, match=r"disk\.img.*can't be synced") as caught:
            disk.flush()
        assert caught.value.errno in (errno.EROFS, errno.EIO)
        job.set_speed(0)
        job.wait(20)
        assert (tmp_path / "out").read_bytes() == expected
