"""A block device as an image: found by its number, under any of its nodes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import needs_root

SIZE = 4 << 20


@pytest.fixture
def device(make_image: Callable[..., Path]) -> Iterator[Path]:
    needs_root("a loop device")
    image = make_image(SIZE, "backing")
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True)
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_a_block_device_is_backed_up_while_it_is_written(device: Path, tmp_path: Path) -> None:
    expected = device.read_bytes()
    node = tmp_path / "node"
    os.mknod(node, 0o600 | 0o060000, os.stat(device).st_rdev)
    with Coordinator(device, workers=1) as coordinator, shmcbw.open(node) as disk:
        assert disk.size_bytes == SIZE
        job = coordinator.backup(tmp_path / "out", speed=1)
        disk.pwrite(b"x" * 100_000, 1_000_000)
        disk.pwrite_zeroes(8192, 8192)
        disk.pdiscard(1000, 70_001)
        assert disk.pread(8192, 8192) == bytes(8192)
        disk.flush()
        job.set_speed(0)
        job.wait(10)
        with pytest.raises(shmcbw.TargetRefusedError, match="is the source"):
            coordinator.backup(device, overwrite=True)
    assert (tmp_path / "out").read_bytes() == expected


def test_a_block_device_is_refused_as_a_target(device: Path, make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    before = device.read_bytes()
    with Coordinator(image, workers=1) as coordinator:
        with pytest.raises(shmcbw.TargetRefusedError, match="block device"):
            coordinator.backup(device, overwrite=True)
    assert device.read_bytes() == before
