"""``shmcbw export``: over NBD and as a stream, beside a coordinator and as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator

SIZE = 4 << 20
COMMAND = [sys.executable, "-m", "shmcbw", "export"]


@contextmanager
def exporting(*arguments: str) -> Iterator[str]:
    """The URI that a running command serves; it ends well, by SIGTERM."""
    command = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    assert command.stderr is not None
    try:
        line = command.stderr.readline()
        assert "serving " in line, line + command.stderr.read()
        yield line.split()[-1]
        command.send_signal(signal.SIGTERM)
        assert command.wait(20) == 0
    finally:
        command.kill()
        command.wait()
        command.stderr.close()


def copy(uri: str, to: Path) -> bytes:
    subprocess.run(["nbdcopy", uri, str(to)], check=True, timeout=60)
    return to.read_bytes()


def test_an_image_is_served_by_a_coordinator_of_its_own_and_written_through_the_filter(
    image: Path, tmp_path: Path
) -> None:
    with exporting(str(image)) as uri:
        assert uri == f"nbd+unix:///?socket={image}.nbd"
        with shmcbw.open(image) as disk:
            subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 1M 4k", uri], check=True, timeout=60)
            assert disk.pread(4096, 1 << 20) == b"\7" * 4096
        assert copy(uri, tmp_path / "out") == image.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "out"]


def test_a_snapshot_is_taken_and_served_while_others_write(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with exporting(str(image), "--scratch", str(tmp_path / "scratch"), "--listen", "tcp::0", "--name", "old") as uri:
        with shmcbw.open(image) as disk:
            disk.pwrite(os.urandom(SIZE), 0)
        assert copy(uri, tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "out"]


def test_a_snapshot_that_is_there_is_streamed_for_an_archiver(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        with shmcbw.open(image) as disk:
            disk.pwrite(b"later" * 1000, 100)
        for name in (str(snapshot.serial), str(tmp_path / "scratch")):
            done = subprocess.run(
                [*COMMAND, str(image), "--snapshot", name, "--stdout"], stdout=subprocess.PIPE, timeout=60, check=True
            )
            assert done.stdout == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stdout"], "needs --snapshot or --scratch"),
        (["--listen", "carrier-pigeon"], "neither unix:PATH nor tcp:HOST:PORT"),
        (["--snapshot", "99"], "snapshot"),
        (["--tls", "gone", "gone"], "gone"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(image: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run([*COMMAND, str(image), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(f"{image}.nbd").exists()


def test_a_file_that_is_no_socket_is_not_replaced_by_one(image: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"data")
    command = [*COMMAND, str(image), "--listen", f"unix:{precious}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"{precious}: is there and is not a socket" in done.stderr
    assert precious.read_bytes() == b"data"
