"""Dirty bitmaps over QMP, with QEMU's rules and texts (the differential test compares them with QEMU's own)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw.cli import main
from tests.monitor import Connection, Monitored

MakeImage = Callable[..., Path]
SIZE = 1 << 20
CLUSTER = 65536


@pytest.fixture
def served(tmp_path: Path, make_image: MakeImage) -> Iterator[tuple[Monitored, Connection, Path]]:
    image = make_image(SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        yield daemon, daemon.connect(), image


def bitmaps(client: Connection) -> dict[str, dict[str, Any]]:
    (node,) = client.execute("query-named-block-nodes")
    return {each.pop("name"): each for each in node.get("dirty-bitmaps", [])}


def test_bitmaps_follow_writes_and_are_there_again_after_a_kill(served: tuple[Monitored, Connection, Path]) -> None:
    daemon, client, image = served
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    client.execute("block-dirty-bitmap-add", node="n", name="coarse", granularity=4 * CLUSTER)
    client.execute("block-dirty-bitmap-add", node="n", name="off", disabled=True)
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", 5 * CLUSTER)
        before = bitmaps(client)
        daemon.kill()
        disk.pwrite(b"x", 9 * CLUSTER)
    daemon.start()
    client = daemon.connect()
    after = bitmaps(client)
    assert before["b"] == {
        "count": CLUSTER, "granularity": CLUSTER, "recording": True, "busy": False, "persistent": False
    }  # fmt: skip
    assert before["coarse"]["count"] == 4 * CLUSTER and before["off"]["count"] == 0
    assert after["b"]["count"] == 2 * CLUSTER and after["coarse"]["count"] == 8 * CLUSTER and after["off"]["count"] == 0


def test_merging_nothing_changes_nothing(served: tuple[Monitored, Connection, Path]) -> None:
    """D13: QEMU 7.2 ends over it."""
    _, client, _ = served
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    client.execute("block-dirty-bitmap-merge", node="n", target="b", bitmaps=[])
    assert bitmaps(client)["b"]["count"] == 0


def test_bitmaps_of_another_image_are_not_merged(
    served: tuple[Monitored, Connection, Path], make_image: MakeImage
) -> None:
    """D14."""
    _, client, _ = served
    other = make_image(SIZE, "other.img")
    client.execute("blockdev-add", driver="file", node_name="other", filename=str(other))
    client.execute("block-dirty-bitmap-add", node="other", name="a")
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    refused = client.refusal("block-dirty-bitmap-merge", node="n", target="b", bitmaps=[{"node": "other", "name": "a"}])
    assert "of another image" in refused
    client.execute("blockdev-del", node_name="other")


def test_persistent_bitmaps_need_a_state_directory_and_outlive_the_daemon(
    tmp_path: Path, make_image: MakeImage
) -> None:
    """D15."""
    image, state = make_image(SIZE), tmp_path / "state"
    state.mkdir(mode=0o700)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n", "--state-dir", str(state)) as daemon:
        client = daemon.connect()
        client.execute("block-dirty-bitmap-add", node="n", name="kept", persistent=True)
        client.execute("block-dirty-bitmap-add", node="n", name="lost")
        with shmcbw.open(image) as disk:
            disk.pwrite(b"x", 5 * CLUSTER)
        daemon.stop()
        daemon.start()
        assert {name: each["count"] for name, each in bitmaps(daemon.connect()).items()} == {"kept": CLUSTER}


def test_the_command_line_changes_the_bitmaps_of_the_daemon_that_serves_the_image(
    served: tuple[Monitored, Connection, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, client, image = served

    def bitmap(verb: str, *arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["bitmap", "--json", verb, str(image), *arguments]) == 0
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["bitmaps"]
        return found

    bitmap("add", "b", "--granularity", "4K")
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
    bitmap("add", "copy", "--disabled")
    assert {each["name"]: each["count"] for each in bitmap("merge", "copy", "b")} == {"b": CLUSTER, "copy": CLUSTER}
    bitmap("clear", "b")
    bitmap("disable", "b")
    assert bitmaps(client)["b"] == {
        "count": 0, "granularity": 4096, "recording": False, "busy": False, "persistent": False
    }  # fmt: skip
    assert [each["name"] for each in bitmap("remove", "copy")] == ["b"]
    assert main(["bitmap", "remove", str(image), "copy"]) != 0
    assert "Dirty bitmap 'copy' not found" in capsys.readouterr().err
