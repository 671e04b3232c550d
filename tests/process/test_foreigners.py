"""Other users, and what somebody else has put under our names in /dev/shm: refused, with the reason."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw import segment as segments
from shmcbw.workers import Coordinator
from tests.conftest import needs_root, segment_file

SHM = Path(segments.SHM)
SIZE = 1 << 20
NOBODY = 65_534


@pytest.fixture(autouse=True)
def _as_root() -> None:
    needs_root("being several users")


@pytest.fixture
def image(tmp_path: Path, make_image: Callable[..., Path]) -> Path:
    """An image that everybody may read and write."""
    image = make_image(SIZE)
    image.chmod(0o666)
    directory = tmp_path
    while directory != directory.parent and directory.stat().st_uid == os.geteuid():
        # pytest's directories are private; their parent is /tmp.
        if not directory.stat().st_mode & 0o001:
            directory.chmod(0o711)
        directory = directory.parent
    tmp_path.chmod(0o777)
    return image


def as_nobody(action: Callable[[], str], groups: tuple[int, ...] = ()) -> str:
    """What an action says that runs as another user, in a forked child."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Python warns of a fork beside a coordinator's thread; the child does not use it.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.setgroups(groups)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            answer = action()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        answer = file.read().decode()
    os.waitpid(pid, 0)
    return answer


def write_to(image: Path) -> str:
    with shmcbw.open(image) as disk:
        disk.pwrite(b"nobody", 0)
        return "written"


def serve(image: Path) -> str:
    with Coordinator(image, workers=1):
        return "served"


def test_another_users_writer_is_refused(image: Path) -> None:
    before = image.read_bytes()
    with Coordinator(image, workers=1):
        answer = as_nobody(lambda: write_to(image))
    assert answer.startswith("ForeignSegmentError")
    assert "another user" in answer
    assert image.read_bytes() == before


def test_another_users_coordinator_is_refused_and_the_first_one_goes_on(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        answer = as_nobody(lambda: serve(image))
        assert answer.startswith("ForeignSegmentError")
        disk.pwrite(b"goes on", 0)
        coordinator.backup(tmp_path / "ours").wait(20)
    assert (tmp_path / "ours").read_bytes()[:7] == b"goes on"


def test_a_member_of_the_group_may_write_and_is_copied_for(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1, group=12_345) as coordinator:
        assert as_nobody(lambda: write_to(image)).startswith("ForeignSegmentError")
        before = image.read_bytes()
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            assert as_nobody(lambda: write_to(image), (12_345,)) == "written"
            assert image.read_bytes()[:6] == b"nobody"
            assert snapshot.pread(SIZE, 0) == before


def test_what_a_dead_coordinator_of_another_user_left_is_refused_and_stays(image: Path) -> None:
    """Its semaphores are in the way, and in a directory like /dev/shm only their owner may remove them."""
    semaphore = SHM / f"sem.{segment_file(image).name}.pool"
    semaphore.write_bytes(bytes(32))
    semaphore.chmod(0o600)
    try:
        answer = as_nobody(lambda: serve(image))
        assert answer.startswith("ForeignSegmentError")
        assert f"semaphore /{segment_file(image).name}.pool belongs to somebody else" in answer
        assert semaphore.exists()
        assert not segment_file(image).exists(), "nothing of the attempt is left"
    finally:
        semaphore.unlink()


@pytest.fixture(params=["a directory", "a symbolic link", "a fifo", "a socket"])
def foreign(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Path]:
    """Something else under the name of the image's control segment."""
    file = segment_file(image)
    if request.param == "a directory":
        file.mkdir()
    elif request.param == "a symbolic link":
        (tmp_path / "elsewhere").write_bytes(b"precious" * 1024)
        file.symlink_to(tmp_path / "elsewhere")
    elif request.param == "a fifo":
        os.mkfifo(file, 0o600)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(file))
    yield file
    if file.is_dir() and not file.is_symlink():
        file.rmdir()
    else:
        file.unlink()


def test_whatever_is_under_our_name_and_is_no_file_is_refused_and_stays(
    image: Path, foreign: Path, tmp_path: Path
) -> None:
    before = foreign.lstat()
    for attach in (shmcbw.open, Coordinator):
        with pytest.raises(shmcbw.ForeignSegmentError) as caught:
            attach(image)
        assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EINVAL)
        assert foreign.name in str(caught.value)
    assert os.path.samestat(foreign.lstat(), before)
    if (tmp_path / "elsewhere").exists():
        assert (tmp_path / "elsewhere").read_bytes() == b"precious" * 1024


def test_a_semaphore_that_is_none_is_refused_by_who_attaches(image: Path) -> None:
    """sem_open() maps the file without looking: a short one would be a SIGBUS."""
    with Coordinator(image, workers=1):
        (SHM / f"sem.{segment_file(image).name}.pool").write_bytes(b"short")
        with pytest.raises(shmcbw.ForeignSegmentError, match="not a semaphore"):
            shmcbw.open(image)
        (SHM / f"sem.{segment_file(image).name}.pool").write_bytes(bytes(32))
