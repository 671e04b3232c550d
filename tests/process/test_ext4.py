"""An ext4 file system in an image: a backup passes e2fsck and has the same files, whatever is done to it meanwhile.

Three tenants share the image block by block, so that every cluster has blocks of each.  They install the file system
through the filter, then keep storing the same again (``unchanged=True``) through the cut; after the cut two of them
destroy their blocks, while the third goes on.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.processes import CONTEXT, running

SIZE_BYTES = 24 << 20
BLOCK_BYTES = 4096
TENANTS = 3
TIMEOUT_S = 20.0
SEED = 20251
TOOLS = ("mke2fs", "e2fsck", "debugfs")


def find_tool(name: str) -> str | None:
    """e2fsprogs live where a user's PATH may not look."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def require_tools() -> None:
    """Skip without e2fsprogs; in CI that is a failure."""
    missing = [name for name in TOOLS if find_tool(name) is None]
    if missing:
        message = f"NOT TESTED: {', '.join(missing)} missing; install e2fsprogs"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [find_tool(name) or name, *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


def make_files(directory: Path) -> None:
    """Files of all kinds: empty, small, large, with a hole, many, deep, a link, a name that is not ASCII."""
    rng = random.Random(SEED)
    deep = directory / "a" / "b" / "c"
    many = directory / "many"
    deep.mkdir(parents=True)
    many.mkdir()
    (directory / "empty").touch()
    (directory / "Grüße").write_text("hello\n")
    (directory / "large").write_bytes(rng.randbytes((5 << 20) + 123))
    with (deep / "hole").open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
    (deep / "link").symlink_to("../../large")
    for number in range(300):
        (many / f"file{number}").write_bytes(rng.randbytes(rng.randrange(1, 9000)))
    (many / "file0").chmod(0o640)


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a directory: mode, and content or a link's aim."""
    found = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        content = b""
        if stat.S_ISLNK(mode):
            content = os.fsencode(path.readlink())
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = (mode, content)
    return found


def dumped_tree(image: Path) -> dict[str, tuple[int, bytes]]:
    """The files of the file system in an image."""
    directory = image.with_suffix(".files")
    directory.mkdir()
    tool("debugfs", "-R", f"rdump / {directory}", image)
    return {name: entry for name, entry in tree(directory).items() if name != "lost+found"}


# -- the tenants ---------------------------------------------------------------------------------------------------


def tenant(image: str, original: str, number: int, pipe: Pipe) -> None:
    """Install own blocks; store them unchanged until told "destroy" or "end"; destroy them and wait for "end"."""
    rng = random.Random(SEED + number)
    with open(original, "rb") as file:
        content = file.read()
    offsets = [block * BLOCK_BYTES for block in range(number, SIZE_BYTES // BLOCK_BYTES, TENANTS)]
    with shmcbw.open(image) as disk:
        for offset in offsets:
            disk.pwrite(content[offset : offset + BLOCK_BYTES], offset)
        rounds = 0
        while not pipe.poll():
            for offset in rng.sample(offsets, 100):
                disk.pwrite(content[offset : offset + BLOCK_BYTES], offset, unchanged=True)
            rounds += 1
            if rounds == 1:
                pipe.send("installed")
        if pipe.recv() == "end":
            return
        rng.shuffle(offsets)
        for offset in offsets:
            kind = rng.randrange(4)
            if kind == 0:
                disk.pwrite_zeroes(BLOCK_BYTES, offset)
            elif kind == 1:
                disk.pdiscard(BLOCK_BYTES, offset)
            else:
                disk.pwrite(rng.randbytes(BLOCK_BYTES), offset)
        pipe.send("destroyed")
        pipe.recv()


def hear(pipe: Pipe, message: str) -> None:
    assert pipe.poll(TIMEOUT_S), f"no tenant says {message!r} within {TIMEOUT_S} s"
    assert pipe.recv() == message


@contextmanager
def tenants(image: Path, original: Path) -> Iterator[list[Pipe]]:
    """Running tenants that have installed the file system and are rewriting it."""
    with ExitStack() as stack:
        pipes = []
        for number in range(TENANTS):
            ours, theirs = CONTEXT.Pipe()
            stack.enter_context(ours)
            with theirs:
                stack.enter_context(running(tenant, str(image), str(original), number, theirs))
            pipes.append(ours)
        for pipe in pipes:
            hear(pipe, "installed")
        yield pipes


def test_a_backup_of_a_file_system_that_is_rewritten_and_destroyed_is_clean_and_complete(tmp_path: Path) -> None:
    require_tools()
    files, original, image = tmp_path / "files", tmp_path / "original.img", tmp_path / "disk.img"
    files.mkdir()
    make_files(files)
    options = ("-q", "-F", "-t", "ext4", "-b", str(BLOCK_BYTES), "-d", files)
    made = tool("mke2fs", *options, original, f"{SIZE_BYTES // 1024}k")
    assert made.returncode == 0, made.stderr
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    backups = [tmp_path / "held.img", tmp_path / "racing.img"]
    # A cut that waits for a writer which has no CPU.
    with Coordinator(image, drain_limit=10.0) as coordinator, tenants(image, original) as (first, second, third):
        # One that has next to nothing but what writers need first, and one whose background copying races with them.
        held, racing = coordinator.backup(backups[0], speed=1), coordinator.backup(backups[1])
        first.send("destroy")
        second.send("destroy")
        hear(first, "destroyed")
        hear(second, "destroyed")
        for job in (held, racing):
            job.wait(TIMEOUT_S)
        # No more than one chunk went before them.
        assert held.progress().copied_in_background_bytes <= 1 << 20
        for pipe in (first, second, third):
            pipe.send("end")

    expected = tree(files)
    for backup in backups:
        checked = tool("e2fsck", "-fn", backup)
        assert checked.returncode == 0, checked.stdout
        assert dumped_tree(backup) == expected
        assert backup.read_bytes() == original.read_bytes()
    # The control: there was something to be protected from.
    assert tool("e2fsck", "-fn", image).returncode != 0
    assert dumped_tree(image) != expected
