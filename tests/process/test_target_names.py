"""How a finished backup gets its name: never over another file, also where a file system can't say that."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import needs_root, wait_for

SIZE = 1 << 20


@pytest.fixture
def coordinator(make_image: Callable[..., Path]) -> Iterator[Coordinator]:
    with Coordinator(make_image(SIZE), workers=1) as coordinator:
        yield coordinator


def _mount(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def exfat(tmp_path: Path) -> Iterator[Path]:
    """exFAT, mounted as a user does on a kernel without it: knows no links and no flags of rename."""
    needs_root("mounting")
    directory, disk = tmp_path / "exfat", tmp_path / "exfat.img"
    directory.mkdir()
    disk.touch()
    os.truncate(disk, 64 << 20)
    _mount("mkfs.exfat", disk)
    find = ["losetup", "--find", "--show", str(disk)]
    device = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    try:
        _mount("mount.exfat-fuse", device, directory)
        yield directory
        _mount("umount", directory)
    finally:
        _mount("losetup", "-d", device)


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """A FUSE file system that knows links and no flags of rename, as NFS does."""
    needs_root("mounting")
    directory, below = tmp_path / "bound", tmp_path / "below"
    directory.mkdir()
    below.mkdir()
    _mount("bindfs", below, directory)
    yield directory
    _mount("umount", "-l", directory)


def holds_only_out(directory: Path) -> None:
    """FUSE keeps what was unlinked under a hidden name until the last worker has closed it."""
    wait_for(lambda: [path.name for path in directory.iterdir()] == ["out"], f"only the target is in {directory}")


def test_a_file_system_that_can_not_give_a_name_safely_is_refused_before_the_cut(
    coordinator: Coordinator, exfat: Path
) -> None:
    before = coordinator.status()["epoch"]
    with pytest.raises(shmcbw.TargetRefusedError, match=r"overwrite") as caught:
        coordinator.backup(exfat / "out")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert coordinator.status()["epoch"] == before
    assert list(exfat.iterdir()) == []


def test_such_a_file_system_takes_a_backup_that_may_overwrite_and_scratch(
    coordinator: Coordinator, exfat: Path
) -> None:
    coordinator.snapshot(exfat / "scratch").close()
    for _ in range(2):
        coordinator.backup(exfat / "out", overwrite=True).wait(20)
    assert (exfat / "out").read_bytes() == Path(coordinator.path).read_bytes()
    holds_only_out(exfat)


def test_where_rename_replaces_always_a_link_gives_the_name(coordinator: Coordinator, bound: Path) -> None:
    coordinator.backup(bound / "out").wait(20)
    assert (bound / "out").read_bytes() == Path(coordinator.path).read_bytes()
    holds_only_out(bound)


@pytest.mark.parametrize("kind", ["plain", "bound"])
def test_a_file_that_appeared_meanwhile_is_not_replaced(
    coordinator: Coordinator, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    directory: Path = request.getfixturevalue("bound") if kind == "bound" else tmp_path
    job = coordinator.backup(directory / "out", speed=1)
    (directory / "out").write_bytes(b"precious")
    job.set_speed(0)
    with pytest.raises(shmcbw.JobFailedError) as caught:
        job.wait(20)
    assert caught.value.errno == errno.EEXIST
    assert (directory / "out").read_bytes() == b"precious"
    assert not (directory / "out.shmcbw-partial").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_what_a_death_while_a_target_was_made_left_is_removed(
    coordinator: Coordinator, tmp_path: Path, linked: bool
) -> None:
    """Killed before the file had its working name, or between that and losing the other one."""
    (tmp_path / "out.shmcbw-probing").write_bytes(b"rest")
    if linked:
        os.link(tmp_path / "out.shmcbw-probing", tmp_path / "out.shmcbw-partial")
    coordinator.backup(tmp_path / "out").wait(20)
    assert (tmp_path / "out").read_bytes() == Path(coordinator.path).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "out"]
