"""block_resize over QMP, beside QEMU's."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw.cli import main
from tests.monitor import Connection, Monitored, StorageDaemon

MakeImage = Callable[..., Path]
SIZE = 1 << 20


def test_a_served_image_grows_and_its_writers_follow(tmp_path: Path, make_image: MakeImage) -> None:
    image = make_image(SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon, shmcbw.open(image) as disk:
        client = daemon.connect()
        client.execute("block_resize", node_name="n", size=2 * SIZE)
        disk.pwrite(b"x", 2 * SIZE - 1)
        assert disk.size_bytes == 2 * SIZE
        [node] = client.execute("query-named-block-nodes")
        assert node["image"]["virtual-size"] == 2 * SIZE
        client.execute("block_resize", device="n", size=3 * SIZE)
        assert "does not shrink" in client.refusal("block_resize", node_name="n", size=SIZE)
        (tmp_path / "scratch").touch()
        os.truncate(tmp_path / "scratch", 3 * SIZE)
        client.execute("blockdev-add", driver="file", node_name="scratch", filename=str(tmp_path / "scratch"))
        client.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target="scratch")
        assert "1 snapshots or jobs are active" in client.refusal("block_resize", node_name="n", size=4 * SIZE)
        assert "is no image" in client.refusal("block_resize", node_name="cbw", size=4 * SIZE)
        client.execute("blockdev-del", node_name="cbw")
        client.execute("block_resize", node_name="n", size=4 * SIZE)
        assert disk.pread(1, 2 * SIZE - 1) == b"x"


def what_is_refused(client: Connection, other: Path) -> list[str]:
    client.execute("blockdev-add", driver="file", node_name="other", filename=str(other))
    sizes = []
    for size in (SIZE + 5, 4096, SIZE):
        client.execute("block_resize", node_name="other", size=size)
        sizes.append(str(other.stat().st_size))
    return [
        *sizes,
        client.refusal("block_resize", node_name="nope", size=1),
        client.refusal("block_resize", device="nope", size=1),
        client.refusal("block_resize", size=1),
        client.refusal("block_resize", node_name="other", size=-1),
        client.refusal("block_resize", node_name="other"),
    ]


def test_a_file_that_is_not_served_and_what_is_wrong_are_as_in_qemu(tmp_path: Path, make_image: MakeImage) -> None:
    other = make_image(SIZE, "other.img")
    answers = []
    for side in (Monitored, StorageDaemon):
        directory = tmp_path / side.__name__
        directory.mkdir()
        with side(directory) as daemon:
            answers.append(what_is_refused(daemon.connect(), other))
    assert answers[0] == answers[1]


def test_a_file_that_a_qemu_has_is_not_resized(tmp_path: Path, make_image: MakeImage) -> None:
    other = make_image(SIZE, "other.img")
    with Monitored(tmp_path) as daemon:
        client = daemon.connect()
        client.execute("blockdev-add", driver="file", node_name="other", filename=str(other))
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", str(other)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as qemu:
            assert qemu.stdin is not None and qemu.stdout is not None
            qemu.stdin.write(b"length\n")
            qemu.stdin.flush()
            assert b"MiB" in qemu.stdout.readline()
            assert f"pid {qemu.pid} (qemu-io)" in client.refusal("block_resize", node_name="other", size=2 * SIZE)
            qemu.stdin.close()
            qemu.wait()
        assert other.stat().st_size == SIZE
        client.execute("block_resize", node_name="other", size=2 * SIZE)


def test_the_command_line_makes_an_image_larger_served_or_not(
    tmp_path: Path, make_image: MakeImage, capsys: pytest.CaptureFixture[str]
) -> None:
    image = make_image(SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon, shmcbw.open(image) as disk:
        assert main(["resize", str(image), "+1M"]) == 0
        assert image.stat().st_size == SIZE + (1 << 20)
        disk.pwrite(b"new", SIZE + 500_000)
        client = daemon.connect()
        assert client.execute("query-block")[0]["inserted"]["image"]["virtual-size"] == SIZE + (1 << 20)
        assert main(["resize", str(image), str(SIZE)]) == 1
        assert "does not shrink" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["resize", str(image), "8M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == image.stat().st_size == 8 << 20
