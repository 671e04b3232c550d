"""NBD between two machines: two network namespaces with a cable between them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import needs_root, wait_for

SIZE = 8 << 20
HERE, THERE = "10.213.7.1", "10.213.7.2"


@pytest.fixture
def namespaces() -> Iterator[tuple[list[str], list[str]]]:
    """The beginnings of commands that run on the one machine, and on the other."""
    needs_root("a network namespace")
    names = [f"shmcbw-{os.getpid()}-{side}" for side in ("a", "b")]
    prefixes = [["ip", "netns", "exec", name] for name in names]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        veth = ["cable", "type", "veth", "peer", "cable", "netns", names[1]]
        subprocess.run(["ip", "-n", names[0], "link", "add", *veth], check=True)
        for name, address in zip(names, (HERE, THERE), strict=True):
            subprocess.run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable"], check=True)
            for link in ("lo", "cable"):
                subprocess.run(["ip", "-n", name, "link", "set", link, "up"], check=True)
        yield prefixes[0], prefixes[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_another_machine_writes_through_the_filter_and_reads_a_snapshot_while_the_cable_is_pulled(
    make_image: Callable[..., Path], tmp_path: Path, namespaces: tuple[list[str], list[str]]
) -> None:
    here, there = namespaces
    image = make_image(SIZE)
    export = [*here, sys.executable, "-m", "shmcbw", "export", str(image)]
    with Coordinator(image, workers=2) as coordinator:
        servers, uris = [], []
        try:
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                before = image.read_bytes()
                for more in ([], ["--snapshot", str(snapshot.serial)]):
                    command = [*export, "--listen", f"tcp:{HERE}:0", *more]
                    servers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
                    line = servers[-1].stderr.readline()  # type: ignore[union-attr]
                    assert "serving nbd://" in line, line
                    uris.append(line.split()[-1])
                fio = [
                    *there, "fio", "--name=v", "--ioengine=nbd", f"--uri={uris[0]}", "--rw=randwrite", "--bs=4k",
                    "--size=2m", "--offset_increment=2m", "--numjobs=4", "--iodepth=8", "--verify=crc32c",
                    "--loops=2",
                ]  # fmt: skip
                subprocess.run(fio, check=True, timeout=90, cwd=tmp_path, stdout=subprocess.DEVNULL)
                subprocess.run([*there, "nbdcopy", uris[1], str(tmp_path / "out")], check=True, timeout=90)
                assert (tmp_path / "out").read_bytes() == before
                # From this machine, by loopback, there is nothing.
                alone = subprocess.run([*there, "nbdinfo", uris[1].replace(HERE, "127.0.0.1")], capture_output=True)
                assert alone.returncode != 0
                # A client that vanishes holds up nobody: neither its server, nor writers, nor a cut.
                lost = subprocess.Popen(fio, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                wait_for(lambda: len(coordinator.status()["slots"]) > 0, "it writes", 20)
                subprocess.run(["ip", "-n", here[3], "link", "set", "cable", "down"], check=True)
                lost.kill()
                lost.wait()
            with shmcbw.open(image) as disk, coordinator.snapshot(tmp_path / "scratch") as snapshot:
                before = image.read_bytes()
                disk.pwrite(b"here" * 1000, 0)
                assert snapshot.pread(SIZE, 0) == before
        finally:
            for server in servers:
                server.terminate()
                server.communicate(timeout=30)
