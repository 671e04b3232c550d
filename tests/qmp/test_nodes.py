"""Nodes over QMP: snapshots and their readers, what stands on what, and all of it again after a kill."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from tests.monitor import Connection, Monitored

MakeImage = Callable[..., Path]
SIZE = 1 << 20
CLUSTER = 65536


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    path = tmp_path / "scratch.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def add_snapshot(client: Connection, scratch: Path, **options: object) -> None:
    client.execute("blockdev-add", driver="file", node_name="scratch", filename=str(scratch))
    client.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target="scratch", **options)
    client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")


def read(client: Connection, offset: int, length: int) -> bytes:
    found = client.execute("x-shmcbw-snapshot-read", node_name="access", offset=offset, length=length)
    return base64.b64decode(found["data"])


def test_a_snapshot_node_shows_the_image_as_it_was_when_it_was_added(
    tmp_path: Path, make_image: MakeImage, scratch: Path
) -> None:
    image = make_image(SIZE)
    before = image.read_bytes()
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        client = daemon.connect()
        add_snapshot(client, scratch)
        with shmcbw.open(image) as disk:
            disk.pwrite(b"new" * 1000, CLUSTER - 500)
            disk.pwrite_zeroes(CLUSTER, 5 * CLUSTER)
        assert b"".join(read(client, offset, 1 << 18) for offset in range(0, SIZE, 1 << 18)) == before
        status = client.execute("x-shmcbw-snapshot-status", node_name="access", offset=0, length=SIZE)
        assert status == [{"offset": 0, "length": SIZE, "status": "data"}], "never today's zeroes (D12, L13)"
        assert client.execute("x-shmcbw-query-waits", node_name="n")["count"] >= 0
        client.execute("blockdev-del", node_name="access")
        client.execute("blockdev-del", node_name="cbw")
        assert not scratch.with_name("scratch.img.shmcbw-partial").exists()


def test_what_something_stands_on_stays(tmp_path: Path, make_image: MakeImage, scratch: Path) -> None:
    with Monitored(tmp_path, "--image", f"filename={make_image(SIZE)},node-name=n") as daemon:
        client = daemon.connect()
        add_snapshot(client, scratch)
        for name in ("cbw", "scratch", "n"):
            assert client.refusal("blockdev-del", node_name=name) == f"Block device {name} is in use"
        for name in ("access", "cbw", "scratch", "n"):
            client.execute("blockdev-del", node_name=name)
        assert client.execute("query-named-block-nodes") == []
        assert client.execute("query-block") == []


def test_a_small_or_aliased_scratch_is_refused_when_it_is_added(
    tmp_path: Path, make_image: MakeImage, scratch: Path
) -> None:
    """D6, L3: QEMU takes the small one and ends at the first write behind its end."""
    image = make_image(SIZE)
    small = make_image(SIZE // 2, "small.img")
    link = tmp_path / "link.img"
    link.hardlink_to(image)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        client = daemon.connect()
        for path, text in (
            (small, "Source and target image have different sizes"),
            (link, "Source and target cannot be the same"),
        ):
            target = {"driver": "file", "filename": str(path)}
            refused = client.refusal(
                "blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target=target
            )
            assert refused == text
        assert [each["node-name"] for each in client.execute("query-named-block-nodes")] == ["n"]
        assert client.execute("x-shmcbw-query-snapshots", node_name="n") == []


def test_a_discard_inside_a_cluster_is_harmless(tmp_path: Path, make_image: MakeImage, scratch: Path) -> None:
    """D13, L4: in QEMU a 4 KiB TRIM of a snapshot ends the daemon.  L6: what straddles it is answered in part."""
    image = make_image(SIZE)
    before = image.read_bytes()
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        client = daemon.connect()
        add_snapshot(client, scratch)
        client.execute("x-shmcbw-snapshot-discard", node_name="access", offset=4096, length=4096)
        assert read(client, 0, CLUSTER) == before[:CLUSTER]
        client.execute("x-shmcbw-snapshot-discard", node_name="access", offset=4096, length=2 * CLUSTER)
        assert client.execute("x-shmcbw-snapshot-status", node_name="access", offset=0, length=3 * CLUSTER) == [
            {"offset": 0, "length": CLUSTER, "status": "data"},
            {"offset": CLUSTER, "length": CLUSTER, "status": "inaccessible"},
            {"offset": 2 * CLUSTER, "length": CLUSTER, "status": "data"},
        ]
        assert "part of the snapshot" in client.refusal(
            "x-shmcbw-snapshot-read", node_name="access", offset=CLUSTER, length=10
        )


@pytest.mark.parametrize("own", [True, False], ids=["named on the command line", "added over QMP"])
def test_nodes_and_snapshots_are_there_again_after_a_kill(
    tmp_path: Path, make_image: MakeImage, scratch: Path, own: bool
) -> None:
    image = make_image(SIZE)
    before = image.read_bytes()
    with Monitored(tmp_path, *(["--image", f"filename={image},node-name=n"] if own else [])) as daemon:
        client = daemon.connect()
        if not own:
            client.execute("blockdev-add", driver="raw", node_name="n", file={"driver": "file", "filename": str(image)})
        add_snapshot(client, scratch)
        with shmcbw.open(image) as disk:
            disk.pwrite(b"new" * 1000, 0)
            nodes = [each["node-name"] for each in client.execute("query-named-block-nodes")]
            daemon.kill()
            disk.pwrite(b"meanwhile", 8 * CLUSTER)
        daemon.start()
        client = daemon.connect()
        assert [each["node-name"] for each in client.execute("query-named-block-nodes")] == nodes
        assert read(client, 0, SIZE) == before
        assert client.refusal("blockdev-del", node_name="scratch") == "Block device scratch is in use"
        client.execute("blockdev-del", node_name="access")
        client.execute("blockdev-del", node_name="cbw")
        assert client.execute("x-shmcbw-query-snapshots", node_name="n") == []


def test_nothing_is_left_of_an_idle_daemon_that_was_killed(tmp_path: Path, make_image: MakeImage) -> None:
    image = make_image(SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        daemon.kill()
        daemon.start()
        assert daemon.connect().execute("x-shmcbw-query-snapshots", node_name="n") == []


def test_a_journal_that_lies_about_nodes_is_survived(tmp_path: Path, make_image: MakeImage, scratch: Path) -> None:
    image = make_image(SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        add_snapshot(daemon.connect(), scratch)
        daemon.kill()
        status = image.stat()
        journal = Path(f"/dev/shm/shmcbw-{status.st_dev:x}-{status.st_ino:x}.state")
        text = journal.read_text()
        for old, new in (('"children": ["cbw"]', '"children": [17]'), ('"driver": "file"', '"driver": "fire"')):
            assert old in text
            text = text.replace(old, new, 1)
        journal.write_text(text)
        daemon.start()
        client = daemon.connect()
        assert "is dropped" in daemon.log.read_text()
        assert client.execute("query-block")[0]["device"] == "n"
