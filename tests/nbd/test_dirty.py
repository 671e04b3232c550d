"""Dirty bitmaps over NBD: what an incremental backup that a client pulls needs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.errors import BitmapError
from shmcbw.layout import Header
from shmcbw.workers import Coordinator
from shmcbw.workers.nbd import wire
from shmcbw.workers.nbd.address import listen_unix
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec
from tests.conftest import wait_for
from tests.nbd.client import Client

SIZE = 8 << 20
CLUSTER = 65_536
Runs = list[tuple[int, int]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    path = str(tmp_path / "nbd.sock")
    with Server(listen_unix(path), path=path, processes=1) as server:
        yield server


def dirty_runs(server: Server, export: str, bitmap: str) -> Runs:
    """The dirty (offset, length) as nbdinfo has them."""
    uri = f"nbd+unix:///{export}?socket={server.address}"
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert sum(each["length"] for each in found) == SIZE
    assert {each["description"] for each in found} <= {"dirty", "clean"}
    return [(each["offset"], each["length"]) for each in found if each["description"] == "dirty"]


def test_an_increment_that_is_pulled_is_the_source_at_the_cut(
    coordinator: Coordinator, server: Server, image: Path, tmp_path: Path
) -> None:
    """Two rounds: only what nbdinfo calls dirty is read, and laid over the last backup, while others write."""
    backup = bytearray(image.read_bytes())
    coordinator.bitmaps.add("b0")
    with shmcbw.open(image) as disk:
        for number in range(2):
            for cluster in (1, 2, 3, 50 + number):
                disk.pwrite(os.urandom(100), cluster * CLUSTER + 7)
            disk.pwrite_zeroes(3 * CLUSTER, (70 + 10 * number) * CLUSTER)
            # In this order: the next bitmap begins before the cut, and this one ends after it.
            coordinator.bitmaps.add(f"b{number + 1}")
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                at_the_cut = image.read_bytes()
                disk.pwrite(os.urandom(CLUSTER), 20 * CLUSTER)
                bitmap = coordinator.bitmaps.export(f"b{number}", "export", live=False)
                disk.pwrite(os.urandom(CLUSTER), (110 + 5 * number) * CLUSTER)
                server.add(ExportSpec("snapshot", str(image), snapshot.serial, bitmaps=(bitmap,)))
                runs = dirty_runs(server, "snapshot", f"b{number}")
                assert ((110 + 5 * number) * CLUSTER, CLUSTER) not in runs, "frozen when it was exported"
                assert sum(length for _, length in runs) < SIZE // 8
                with Client(str(server.address), "snapshot") as client:
                    for offset, length in runs:
                        error, data = client.ask(wire.READ, offset, length)
                        assert error == 0
                        backup[offset : offset + length] = data
                assert backup == at_the_cut
                with pytest.raises(BitmapError, match="in use"):
                    coordinator.bitmaps.clear(f"b{number}")
                server.remove("snapshot", hard=True)
                coordinator.bitmaps.end_export("export")
            coordinator.bitmaps.remove(f"b{number}")


def test_a_bitmap_that_records_is_shown_as_it_is_now_beside_an_image(
    coordinator: Coordinator, server: Server, image: Path
) -> None:
    coordinator.bitmaps.add("now", granularity=2 * CLUSTER)
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", CLUSTER)
        coordinator.bitmaps.merge("now", ["now"])
        bitmap = coordinator.bitmaps.export("now", "export", live=True)
        server.add(ExportSpec("disk", str(image), writable=True, bitmaps=(bitmap,)))
        assert dirty_runs(server, "disk", "now") == [(0, 2 * CLUSTER)]
        disk.pwrite(b"x", SIZE - 1)
        assert dirty_runs(server, "disk", "now") == [(0, 2 * CLUSTER), (SIZE - 2 * CLUSTER, 2 * CLUSTER)]
    server.remove("disk", hard=True)
    coordinator.bitmaps.end_export("export")


def test_a_process_that_takes_a_dead_ones_place_shows_the_same(
    coordinator: Coordinator, server: Server, image: Path, tmp_path: Path
) -> None:
    coordinator.bitmaps.add("b")
    with shmcbw.open(image) as disk, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        disk.pwrite(b"x", 5 * CLUSTER)
        bitmap = coordinator.bitmaps.export("b", "export", live=False)
        server.add(ExportSpec("snapshot", str(image), snapshot.serial, bitmaps=(bitmap,)))
        disk.pwrite(b"x", 9 * CLUSTER)
        (pid,) = server.pids
        os.kill(pid, 9)
        wait_for(lambda: server.pids != [pid], "another process serves")
        assert dirty_runs(server, "snapshot", "b") == [(5 * CLUSTER, CLUSTER)]
        server.remove("snapshot", hard=True)
        coordinator.bitmaps.end_export("export")


def test_a_bitmap_that_may_have_missed_writes_is_an_error_and_not_clean(
    coordinator: Coordinator, server: Server, image: Path
) -> None:
    coordinator.bitmaps.add("b")
    bitmap = coordinator.bitmaps.export("b", "export", live=True)
    server.add(ExportSpec("disk", str(image), bitmaps=(bitmap,)))
    assert dirty_runs(server, "disk", "b") == []
    # Somebody scribbles on the epoch: nobody knows any more what was marked.
    coordinator.segment.set_header(Header.epoch, 1000)
    wait_for(lambda: coordinator.bitmaps["b"].inconsistent, "the coordinator has seen it")
    uri = f"nbd+unix:///disk?socket={server.address}"
    done = subprocess.run(["nbdinfo", "--map=qemu:dirty-bitmap:b", uri], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert os.strerror(errno.EIO) in done.stderr
    server.remove("disk", hard=True)
    coordinator.bitmaps.end_export("export")


def test_both_contexts_are_listed_and_served_on_one_connection(
    coordinator: Coordinator, server: Server, image: Path
) -> None:
    coordinator.bitmaps.add("b")
    bitmap = coordinator.bitmaps.export("b", "export", live=True)
    server.add(ExportSpec("disk", str(image), bitmaps=(bitmap,)))
    uri = f"nbd+unix:///disk?socket={server.address}"
    found = subprocess.run(["nbdinfo", uri], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "base:allocation" in found and "qemu:dirty-bitmap:b" in found
    # QEMU's driver asks for both; a dirty part is what its map calls no data.
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", CLUSTER)
    options = f"driver=nbd,server.type=unix,server.path={server.address},export=disk,x-dirty-bitmap=qemu:dirty-bitmap:b"
    command = ["qemu-img", "map", "--output=json", "--image-opts", options]
    extents = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert [(each["start"], each["length"]) for each in extents if not each["data"]] == [(CLUSTER, CLUSTER)]
    server.remove("disk", hard=True)
    coordinator.bitmaps.end_export("export")
