"""A snapshot over QMP: limited by a bitmap, and as the source of a backup."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import shmcbw
from tests.conftest import wait_for
from tests.monitor import Connection, Monitored

MakeImage = Callable[..., Path]
SIZE = 1 << 20
CLUSTER = 65536


def test_a_snapshot_shows_what_was_written_since_a_bitmap_began(tmp_path: Path, make_image: MakeImage) -> None:
    image = make_image(SIZE)
    scratch = tmp_path / "scratch.img"
    scratch.touch()
    os.truncate(scratch, SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon, shmcbw.open(image) as disk:
        client = daemon.connect()
        client.execute("blockdev-add", driver="file", node_name="scratch", filename=str(scratch))
        client.execute("block-dirty-bitmap-add", node="n", name="b")
        disk.pwrite(b"changed", 3 * CLUSTER)
        disk.pwrite(b"changed", SIZE - 7)
        options = {"driver": "copy-before-write", "node_name": "cbw", "file": "n", "target": "scratch"}
        place = {"node": "n", "name": "nope"}
        assert client.refusal("blockdev-add", **options, bitmap=place) == "Dirty bitmap 'nope' not found"
        client.execute("blockdev-add", **options, bitmap={"node": "n", "name": "b"})
        client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        disk.pwrite(b"later!!" * 1000, 3 * CLUSTER - 100)
        disk.pwrite(b"later!!", SIZE - 7)
        status = client.execute("x-shmcbw-snapshot-status", node_name="access", offset=0, length=SIZE)
        shown = [(each["offset"], each["length"]) for each in status if each["status"] == "data"]
        assert shown == [(3 * CLUSTER, CLUSTER), (SIZE - CLUSTER, CLUSTER)]
        for offset in (3 * CLUSTER, SIZE - 7):
            found = client.execute("x-shmcbw-snapshot-read", node_name="access", offset=offset, length=7)
            assert base64.b64decode(found["data"]) == b"changed"
        assert f"bytes 0..{3 * CLUSTER} are not part of the snapshot" in client.refusal(
            "x-shmcbw-snapshot-read", node_name="access", offset=0, length=SIZE
        )
        with shmcbw.open_snapshot(image) as reader:
            assert reader.pread_some(SIZE - 3 * CLUSTER, 3 * CLUSTER)[:7] == b"changed"


def add_nodes(client: Connection, directory: Path) -> None:
    """A snapshot ``access`` of the image ``n``, and a target ``t``."""
    for name in ("scratch", "t"):
        path = directory / f"{name}.img"
        path.touch()
        os.truncate(path, SIZE)
        client.execute("blockdev-add", driver="file", node_name=name, filename=str(path))
    client.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target="scratch")
    client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")


def test_a_snapshot_is_backed_up_and_let_go_of_also_over_a_kill(tmp_path: Path, make_image: MakeImage) -> None:
    """Push with fleecing: blockdev-backup of a snapshot-access node with discard-source."""
    image = make_image(SIZE)
    before = image.read_bytes()
    backup = {"job_id": "j", "device": "access", "target": "t", "sync": "full", "discard_source": True}
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        client = daemon.connect()
        add_nodes(client, tmp_path)
        with shmcbw.open(image) as disk:
            disk.pwrite(b"later" * 20_000, 3 * CLUSTER - 100)
            client.execute("blockdev-backup", **backup, speed=1, auto_dismiss=False)
            client.wait_status("j", "running")
            for node in ("access", "cbw", "t"):
                assert "is in use" in client.refusal("blockdev-del", node_name=node) or node == "t"
            daemon.kill()
            disk.pwrite(b"orphaned" * 2000, 9 * CLUSTER)
            daemon.start()
            client = daemon.connect()
            (job,) = client.execute("query-block-jobs")
            assert (job["device"], job["status"], job["speed"]) == ("j", "running", 1)
            disk.pwrite(b"again" * 2000, 12 * CLUSTER)
            client.execute("block-job-set-speed", device="j", speed=0)
            wait_for(lambda: client.execute("query-jobs")[0]["status"] == "concluded", "it goes on to its end")
        assert "error" not in client.execute("query-jobs")[0]
        client.execute("job-dismiss", id="j")
        assert (tmp_path / "t.img").read_bytes() == before
        status = client.execute("x-shmcbw-snapshot-status", node_name="access", offset=0, length=SIZE)
        assert [each["status"] for each in status] == ["inaccessible"]
        for node in ("access", "cbw"):
            client.execute("blockdev-del", node_name=node)


def test_a_snapshot_has_no_bitmaps(tmp_path: Path, make_image: MakeImage) -> None:
    """D21."""
    with Monitored(tmp_path, "--image", f"filename={make_image(SIZE)},node-name=n") as daemon:
        client = daemon.connect()
        add_nodes(client, tmp_path)
        client.execute("block-dirty-bitmap-add", node="n", name="b")
        options = {"device": "access", "target": "t", "job_id": "j", "sync": "incremental", "bitmap": "b"}
        assert client.refusal("blockdev-backup", **options) == "Bitmap 'b' could not be found"
        action = {"type": "blockdev-backup", "data": {key.replace("_", "-"): value for key, value in options.items()}}
        assert client.refusal("transaction", actions=[action]) == "Bitmap 'b' could not be found"
        assert "is no image" in client.refusal("block-dirty-bitmap-add", node="access", name="c")
        options = {"device": "cbw", "target": "t", "job_id": "j", "sync": "full"}
        assert "is no image that can be backed up" in client.refusal("blockdev-backup", **options)
