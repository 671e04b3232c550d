"""Fixtures that every test gets: nothing may be left behind, also by a test that failed."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from shmcbw.image import Identity
from shmcbw.layout import Header
from shmcbw.segment import COORDINATOR, _locked, segment_name

# How long one example takes on a busy machine says nothing; pytest has a limit for each test.
settings.register_profile("shmcbw", deadline=None)
settings.load_profile("shmcbw")

SHM = Path("/dev/shm")


#: Of random tests; again the same with the same value in the environment, where all processes of a run find it.
SEED = int(os.environ.setdefault("SHMCBW_SEED", str(random.SystemRandom().randrange(1, 2**31))))


def pytest_report_header() -> str:
    return f"SHMCBW_SEED={SEED}"


def _names() -> set[str]:
    return {name for name in os.listdir(SHM) if "shmcbw" in name}


def _of_others(name: str, base: Path) -> bool:
    """Whether the segment is another test run's on this machine, of whatever layout version: its image lies in that
    one's directory, or a living process outside this run owns it."""
    control = SHM / name.removeprefix("sem.").partition(".")[0]
    try:
        with control.open("rb") as file:
            header = file.read(Header.SIZE)
            owned = _locked(file.fileno(), COORDINATOR)
    except OSError:
        return False
    if len(header) < Header.SIZE:
        return False
    start = Header.image_path.offset
    image = Path(os.fsdecode(header[start : start + Header.image_path.size].partition(b"\0")[0]))
    if "pytest-of-" in str(image):
        return base not in image.parents
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    start = Header.coordinator_pid.offset
    return owned and int.from_bytes(header[start : start + 4], "little") not in ours


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if not _is_helper(child)}


def _is_helper(process: psutil.Process) -> bool:
    """multiprocessing's own resource tracker lives as long as the test run."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return True


def _new(names: set[str], base: Path) -> set[str]:
    return {name for name in _names() - names if not _of_others(name, base)}


@contextmanager
def leaving_nothing_behind(base: Path) -> Iterator[None]:
    """Fail if afterwards a segment, a semaphore or a process of ours is left; remove it for the next one.

    base: the directory of this test run.
    """
    names, children = _names(), _children()
    yield
    gc.collect()
    deadline = time.monotonic() + 10
    left_names, left_children = _new(names, base), _children() - children
    while (left_names or left_children) and time.monotonic() < deadline:
        time.sleep(0.02)
        # What was there all the time: names of other test runs on this machine come and go.
        left_names, left_children = left_names & _new(names, base), left_children & _children()
    for pid in left_children:
        try:
            psutil.Process(pid).kill()
        except psutil.Error:
            pass
    for name in left_names:
        (SHM / name).unlink(missing_ok=True)
    assert not left_names, f"left in {SHM}: {sorted(left_names)}"
    assert not left_children, f"left running: {sorted(left_children)}"


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves anything.  Those of the fault matrix share a world, which is watched as a whole."""
    if "lasting_world" in request.fixturenames:
        yield
        return
    with leaving_nothing_behind(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    """make_image(size_bytes, name="disk.img") -> path of an image of random bytes (reproducible)."""

    def make(size_bytes: int, name: str = "disk.img") -> Path:
        path = tmp_path / name
        block = os.urandom(1 << 16)
        with path.open("wb") as file:
            for offset in range(0, size_bytes, len(block)):
                stamp = offset.to_bytes(8, "little")
                file.write((stamp + block[8:])[: size_bytes - offset])
        return path

    return make


def needs_root(what: str) -> None:
    """Skip a test that an ordinary user can't run; in CI that is a failure."""
    if os.geteuid() != 0:
        assert not os.environ.get("CI"), "CI must run as root"
        pytest.skip(f"NOT TESTED: {what} needs root")


@pytest.fixture
def make_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """make_tmpfs(size) -> the directory of a file system of its own; size as in mount(8): "512k"."""
    made: list[Path] = []

    def make(size: str) -> Path:
        needs_root("mounting a small file system")
        directory = tmp_path / f"tmpfs{len(made)}"
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)], check=True)
        made.append(directory)
        return directory

    yield make
    for directory in made:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def wait_for(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Wait for a condition with a deadline; the assertion names what did not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.002)


def segment_file(image: Path) -> Path:
    """Where the control segment of an image is, or would be."""
    return SHM / segment_name(Identity.of(os.stat(image)))[1:]
