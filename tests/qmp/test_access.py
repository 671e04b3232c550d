"""A snapshot over QMP that is limited by a bitmap."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import shmcbw
from tests.monitor import Monitored

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
