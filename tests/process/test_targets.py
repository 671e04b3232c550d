"""Targets are refused before the cut with nothing changed, and never look finished when they are not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import needs_root

SIZE = 1 << 20


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=1) as coordinator:
        yield coordinator


def refused(coordinator: Coordinator, target: Path | str, number: int, *, overwrite: bool = False) -> str:
    """The backup is refused with this errno, and nothing has changed: no cut, no file, no entry."""
    directory = Path(target).parent
    before = sorted((p.name, p.stat().st_size) for p in directory.iterdir()) if directory.is_dir() else []
    epoch = coordinator.status()["epoch"]
    with pytest.raises(shmcbw.TargetRefusedError) as caught:
        coordinator.backup(target, overwrite=overwrite)
    assert caught.value.errno == number
    status = coordinator.status()
    assert (status["epoch"], status["snapshots"]) == (epoch, [])
    assert (sorted((p.name, p.stat().st_size) for p in directory.iterdir()) if directory.is_dir() else []) == before
    return str(caught.value)


def test_the_source_itself_is_refused(coordinator: Coordinator, image: Path) -> None:
    assert "is the source" in refused(coordinator, image, errno.EINVAL, overwrite=True)


def test_a_hard_link_of_the_source_is_refused(coordinator: Coordinator, image: Path, tmp_path: Path) -> None:
    os.link(image, tmp_path / "link")
    assert "is the source" in refused(coordinator, tmp_path / "link", errno.EINVAL, overwrite=True)


def test_a_symbolic_link_to_the_source_is_refused(coordinator: Coordinator, image: Path, tmp_path: Path) -> None:
    os.symlink(image, tmp_path / "link")
    assert "is the source" in refused(coordinator, tmp_path / "link", errno.EINVAL, overwrite=True)


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_target_of_another_size_is_refused(coordinator: Coordinator, tmp_path: Path, size: int) -> None:
    (tmp_path / "out").write_bytes(bytes(size))
    assert f"{size} bytes" in refused(coordinator, tmp_path / "out", errno.EINVAL, overwrite=True)


def test_an_existing_target_is_refused_without_overwrite(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(SIZE))
    assert "overwrite" in refused(coordinator, tmp_path / "out", errno.EEXIST)


def test_a_directory_and_a_device_are_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(coordinator, tmp_path / "out", errno.EINVAL, overwrite=True)
    with pytest.raises(shmcbw.TargetRefusedError):
        coordinator.backup("/dev/null", overwrite=True)


def test_a_missing_directory_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    refused(coordinator, tmp_path / "none" / "out", errno.ENOENT)


def test_a_target_that_is_not_writable_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(SIZE))
    (tmp_path / "out").chmod(0o400)
    if os.geteuid() == 0:
        # Root may write any file but an immutable one.
        subprocess.run(["chattr", "+i", str(tmp_path / "out")], check=True)
    try:
        refused(coordinator, tmp_path / "out", errno.EACCES, overwrite=True)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(tmp_path / "out")], check=True)


def test_a_target_on_a_full_disk_is_refused(coordinator: Coordinator, small_tmpfs: Path) -> None:
    message = refused(coordinator, small_tmpfs / "out", errno.ENOSPC)
    assert "bytes are needed" in message
    assert "are free" in message


def test_a_disk_that_fills_up_fails_the_job_and_leaves_nothing(coordinator: Coordinator, small_tmpfs: Path) -> None:
    (small_tmpfs / "ballast").write_bytes(b"")
    snapshot = coordinator.snapshot(small_tmpfs / "scratch")
    (small_tmpfs / "ballast").write_bytes(b"x" * ((512 << 10) - 8192))
    with shmcbw.open(coordinator.path) as disk:
        disk.pwrite(b"x" * 200_000, 0)
        with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
            snapshot.pread(1, 0)
        assert caught.value.errno == errno.ENOSPC
    snapshot.close()
    assert [p.name for p in small_tmpfs.iterdir()] == ["ballast"]


def test_a_read_only_file_system_is_refused(coordinator: Coordinator, small_tmpfs: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    with pytest.raises(shmcbw.TargetRefusedError) as caught:
        coordinator.snapshot(small_tmpfs / "out")
    assert caught.value.errno == errno.EROFS


@pytest.fixture
def small_tmpfs(make_tmpfs: Callable[[str], Path]) -> Path:
    """A file system of 512 KiB of its own."""
    return make_tmpfs("512k")


def test_a_backup_has_its_name_only_when_it_is_finished(coordinator: Coordinator, tmp_path: Path) -> None:
    job = coordinator.backup(tmp_path / "out", speed=1)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.shmcbw-partial").exists()
    job.set_speed(0)
    job.wait(10)
    assert (tmp_path / "out").read_bytes() == Path(coordinator.path).read_bytes()
    assert not (tmp_path / "out.shmcbw-partial").exists()


def test_overwrite_keeps_the_old_backup_until_the_new_one_is_finished(coordinator: Coordinator, tmp_path: Path) -> None:
    old = b"o" * SIZE
    (tmp_path / "out").write_bytes(old)
    (tmp_path / "out").chmod(0o640)
    cancelled = coordinator.backup(tmp_path / "out", speed=1, overwrite=True)
    assert (tmp_path / "out").read_bytes() == old
    cancelled.cancel()
    assert (tmp_path / "out").read_bytes() == old
    coordinator.backup(tmp_path / "out", overwrite=True).wait(10)
    assert (tmp_path / "out").read_bytes() == Path(coordinator.path).read_bytes()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_an_existing_target_gets_its_zeroes(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(300_000))
    (tmp_path / "out").write_bytes(b"x" * 300_000)
    with Coordinator(image, workers=1) as coordinator:
        coordinator.backup(tmp_path / "out", overwrite=True).wait(10)
    assert (tmp_path / "out").read_bytes() == bytes(300_000)


def test_a_file_that_appears_meanwhile_is_not_replaced(coordinator: Coordinator, tmp_path: Path) -> None:
    job = coordinator.backup(tmp_path / "out", speed=1)
    (tmp_path / "out").write_bytes(b"precious")
    job.set_speed(0)
    with pytest.raises(shmcbw.JobFailedError) as caught:
        job.wait(10)
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "out").read_bytes() == b"precious"
    assert not (tmp_path / "out.shmcbw-partial").exists()


def test_two_backups_into_one_target_are_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    job = coordinator.backup(tmp_path / "out", speed=1)
    with pytest.raises(shmcbw.TargetRefusedError, match="another backup"):
        coordinator.backup(tmp_path / "out")
    job.set_speed(0)
    job.wait(10)
    assert (tmp_path / "out").read_bytes() == Path(coordinator.path).read_bytes()


def test_the_rest_of_a_dead_backup_is_replaced_by_a_new_file(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "out.shmcbw-partial").write_bytes(b"rest of a backup before a reboot")
    before = (tmp_path / "out.shmcbw-partial").stat().st_ino
    with (tmp_path / "out.shmcbw-partial").open("rb") as held:
        coordinator.backup(tmp_path / "out").wait(10)
        assert held.read() == b"rest of a backup before a reboot", "who has the old one open does not see the new one"
    assert (tmp_path / "out").stat().st_ino != before
    assert (tmp_path / "out").read_bytes() == Path(coordinator.path).read_bytes()


def test_a_partial_name_that_leads_to_the_source_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    source = Path(coordinator.path)
    expected = source.read_bytes()
    os.link(source, tmp_path / "out.shmcbw-partial")
    refused(coordinator, tmp_path / "out", errno.EEXIST)
    assert source.read_bytes() == expected


def test_an_image_whose_own_name_is_the_partial_name_is_refused(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE, "rescued.shmcbw-partial")
    expected = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator:
        refused(coordinator, tmp_path / "rescued", errno.EEXIST)
    assert image.read_bytes() == expected


def test_a_partial_name_of_a_finished_backup_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    """A coordinator died between giving the backup its name and taking the other one away."""
    (tmp_path / "out").write_bytes(b"o" * SIZE)
    os.link(tmp_path / "out", tmp_path / "out.shmcbw-partial")
    refused(coordinator, tmp_path / "out", errno.EEXIST, overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"o" * SIZE


def test_somebody_elses_partial_file_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    needs_root("giving a file to another user")
    (tmp_path / "out.shmcbw-partial").write_bytes(b"theirs")
    os.chown(tmp_path / "out.shmcbw-partial", 12345, 12345)
    refused(coordinator, tmp_path / "out", errno.EEXIST)
    assert (tmp_path / "out.shmcbw-partial").read_bytes() == b"theirs"


@pytest.mark.parametrize("sync", ["full", "top"])
@pytest.mark.parametrize("size", [SIZE // 2, SIZE // 2 + 100, SIZE - 1])
def test_a_source_that_is_truncated_fails_the_job(
    coordinator: Coordinator, tmp_path: Path, sync: str, size: int
) -> None:
    """Beyond the end of a truncated file everything looks like a hole, or like zeroes."""
    job = coordinator.backup(tmp_path / "out", sync=sync, speed=1)
    os.truncate(coordinator.path, size)
    job.set_speed(0)
    with pytest.raises(shmcbw.JobFailedError) as caught:
        job.wait(10)
    assert caught.value.errno == errno.EIO
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_a_target_that_no_worker_can_open_any_more_fails_the_job(coordinator: Coordinator, tmp_path: Path) -> None:
    job = coordinator.backup(tmp_path / "out", speed=1)
    os.rename(tmp_path / "out.shmcbw-partial", tmp_path / "elsewhere")
    for worker in coordinator.status()["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)
    with pytest.raises(shmcbw.SnapshotBrokenError) as caught:
        job.wait(20)
    assert caught.value.errno == errno.ENOENT


def test_a_target_directory_that_can_not_be_written_any_more_ends_the_job_all_the_same(
    coordinator: Coordinator, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    job = coordinator.backup(tmp_path / "sub" / "out", speed=1)
    os.rename(tmp_path / "sub", tmp_path / "moved")
    (tmp_path / "sub").write_bytes(b"a file where the directory was")
    job.cancel()
    with pytest.raises(shmcbw.JobCancelledError):
        job.wait(10)


def test_the_current_directory_may_change(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(SIZE)
    (tmp_path / "elsewhere").mkdir()
    # A module of ours must not be taken from there either.
    (tmp_path / "elsewhere" / "fcntl.py").write_text("raise SystemExit('the wrong fcntl')")
    monkeypatch.chdir(tmp_path)
    with Coordinator("disk.img", workers=1) as coordinator:
        monkeypatch.chdir(tmp_path / "elsewhere")
        for worker in coordinator.status()["workers"]:
            os.kill(worker["pid"], signal.SIGKILL)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            assert snapshot.pread(10, 0) == (tmp_path / "disk.img").read_bytes()[:10]


def test_a_target_through_a_symbolic_link_ends_behind_it(coordinator: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere" / "real", tmp_path / "out")
    coordinator.backup(tmp_path / "out").wait(10)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "elsewhere" / "real").read_bytes() == Path(coordinator.path).read_bytes()


def test_bad_parameters_are_refused_before_anything_happens(coordinator: Coordinator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sync"):
        coordinator.backup(tmp_path / "out", sync="half")
    with pytest.raises(ValueError, match="speed"):
        coordinator.backup(tmp_path / "out", speed=-1)
    with pytest.raises(ValueError, match="cbw_timeout"):
        coordinator.backup(tmp_path / "out", cbw_timeout=-1)
    with pytest.raises(ValueError, match="on_cbw_error"):
        coordinator.backup(tmp_path / "out", on_cbw_error="panic")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]
