"""The NBD server over QMP: exports of images and snapshots, with their dirty bitmaps, and again after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shmcbw.workers.nbd import wire
from tests.conftest import wait_for
from tests.monitor import Connection, Monitored, StorageDaemon
from tests.nbd.client import Client

MakeImage = Callable[..., Path]
SIZE = 1 << 20
CLUSTER = 65536


@pytest.fixture
def image(make_image: MakeImage) -> Path:
    return make_image(SIZE)


@pytest.fixture
def daemon(tmp_path: Path, image: Path) -> Iterator[Monitored]:
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        yield daemon


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nbd.sock")


def start(client: Connection, path: str, **options: Any) -> None:
    client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}}, **options)


def add(client: Connection, node: str, **options: Any) -> None:
    client.execute("block-export-add", type="nbd", node_name=node, **{"id": f"e-{node}", **options})


def add_snapshot(client: Connection, scratch: Path) -> None:
    """Node ``access``: the image ``n`` as it is now."""
    scratch.touch()
    os.truncate(scratch, SIZE)
    client.execute("blockdev-add", driver="file", node_name="scratch", filename=str(scratch))
    client.execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target="scratch")
    client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")


def dirty(path: str, export: str, bitmap: str) -> list[tuple[int, int]]:
    """The dirty (offset, length) as nbdinfo has them."""
    uri = f"nbd+unix:///{export}?socket={path}"
    command = ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [(each["offset"], each["length"]) for each in json.loads(done.stdout) if each["type"]]


def serving(daemon: Monitored) -> list[psutil.Process]:
    """The processes that serve NBD clients."""
    found = []
    for child in psutil.Process(daemon.process.pid).children():
        try:
            if "shmcbw.workers.nbd.process" in child.cmdline():
                found.append(child)
        except psutil.Error:
            # It has just died.
            pass
    return found


def test_an_increment_is_pulled_with_commands_of_qmp(daemon: Monitored, image: Path, tmp_path: Path, path: str) -> None:
    client = daemon.connect()
    client.execute("block-dirty-bitmap-add", node="n", name="b0")
    backup = bytearray(image.read_bytes())
    start(client, path)
    add(client, "n", name="disk", writable=True, description="the disk")
    with Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 3 * CLUSTER + 5, data=b"x" * CLUSTER) == (0, b"")
        add_snapshot(client, tmp_path / "scratch.img")
        at_the_cut = image.read_bytes()
        assert disk.ask(wire.WRITE, 9 * CLUSTER, data=b"later") == (0, b"")
        add(client, "access", bitmaps=[{"node": "n", "name": "b0"}])
        assert "in use" in client.refusal("block-dirty-bitmap-clear", node="n", name="b0")
        runs = dirty(path, "access", "b0")
        assert sum(length for _, length in runs) <= 3 * CLUSTER
        with Client(path, "access") as snapshot:
            for offset, length in runs:
                error, data = snapshot.ask(wire.READ, offset, length)
                assert error == 0
                backup[offset : offset + length] = data
        assert backup == at_the_cut
    assert client.execute("query-block-exports") == [
        {"id": "e-access", "type": "nbd", "node-name": "access", "shutting-down": False},
        {"id": "e-n", "type": "nbd", "node-name": "n", "shutting-down": False},
    ]
    busy = client.execute("query-named-block-nodes")
    assert [b["busy"] for node in busy for b in node.get("dirty-bitmaps", [])] == [True]
    # Its server sees a moment later that a client has left.
    wait_for(lambda: "return" in client.ask("block-export-del", id="e-access"), "nobody uses it any more")
    client.execute("block-dirty-bitmap-clear", node="n", name="b0")
    client.execute("nbd-server-stop")
    client.wait_event("BLOCK_EXPORT_DELETED", lambda data: data == {"id": "e-n"})
    assert client.execute("query-block-exports") == []
    assert not os.path.exists(path)
    for node in ("access", "cbw", "scratch"):
        client.execute("blockdev-del", node_name=node)


def test_an_export_in_use_ends_only_the_hard_way_and_then_its_clients_are_gone(daemon: Monitored, path: str) -> None:
    client = daemon.connect()
    start(client, path)
    add(client, "n")
    with Client(path, "n") as disk:
        assert client.refusal("block-export-del", id="e-n") == "export 'e-n' still in use"
        assert disk.ask(wire.READ, 0, 1)[0] == 0
        client.execute("block-export-del", id="e-n", mode="hard")
        client.wait_event("BLOCK_EXPORT_DELETED", lambda data: data == {"id": "e-n"})
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            disk.ask(wire.READ, 0, 1)


def test_after_a_kill_of_the_daemon_everything_is_exported_again(
    daemon: Monitored, image: Path, tmp_path: Path, path: str
) -> None:
    client = daemon.connect()
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    start(client, path, max_connections=7)
    add(client, "n", name="disk", writable=True)
    with Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"before") == (0, b"")
        at_the_cut = image.read_bytes()
        add_snapshot(client, tmp_path / "scratch.img")
        add(client, "access", bitmaps=[{"node": "n", "name": "b"}], writable=True)
        assert disk.ask(wire.WRITE, 5 * CLUSTER, data=b"after") == (0, b"")
        processes = serving(daemon)
        assert processes
        daemon.kill()
        psutil.wait_procs(processes, 20)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            disk.ask(wire.READ, 0, 1)
    daemon.start()
    client = daemon.connect()
    assert {each["id"] for each in client.execute("query-block-exports")} == {"e-n", "e-access"}
    with Client(path, "disk") as disk, Client(path, "access") as old:
        assert disk.ask(wire.WRITE, 7 * CLUSTER, data=b"again") == (0, b"")
        assert old.ask(wire.READ, 0, SIZE) == (0, at_the_cut)
    runs = dirty(path, "access", "b")
    assert (0, CLUSTER) in runs, "what was written before the cut"
    client.execute("nbd-server-stop")
    for node in ("access", "cbw", "scratch"):
        client.execute("blockdev-del", node_name=node)
    client.execute("block-dirty-bitmap-remove", node="n", name="b")


def test_a_killed_export_process_is_a_writers_death_and_the_daemon_starts_another(
    daemon: Monitored, image: Path, tmp_path: Path, path: str
) -> None:
    client = daemon.connect()
    start(client, path)
    add(client, "n", writable=True)
    before = image.read_bytes()
    add_snapshot(client, tmp_path / "scratch.img")
    add(client, "access")
    killed = serving(daemon)
    with Client(path, "n") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"x" * CLUSTER) == (0, b"")
        for process in killed:
            process.kill()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            disk.ask(wire.READ, 0, 1)
    wait_for(lambda: len({*serving(daemon)} - {*killed}) == len(killed), "others serve", 20)
    with Client(path, "n") as disk, Client(path, "access") as old:
        assert disk.ask(wire.WRITE, 0, data=b"y" * SIZE) == (0, b"")
        assert old.ask(wire.READ, 0, SIZE) == (0, before)
    gone = {process.pid for process in killed}

    def slots() -> set[int]:
        return {slot["pid"] for slot in client.execute("x-shmcbw-query-slots", node_name="n")}

    wait_for(lambda: not gone & slots(), "their slots are reaped")
    command = [sys.executable, "-m", "shmcbw", "check", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_of_the_command_line_are_exported_by_their_names(tmp_path: Path, image: Path, path: str) -> None:
    arguments = ("--image", f"filename={image},node-name=n", "--nbd-listen", f"unix:{path}")
    with Monitored(tmp_path, *arguments) as daemon:
        with Client(path, "n") as disk:
            assert disk.ask(wire.WRITE, 0, data=b"nbd") == (0, b"")
        assert image.read_bytes()[:3] == b"nbd"
        client = daemon.connect()
        assert client.refusal("nbd-server-start", addr={"type": "unix", "data": {"path": "x"}}).startswith("NBD server")
        daemon.kill()
        daemon.start()
        with Client(path, "n") as disk:
            assert disk.ask(wire.READ, 0, 3) == (0, b"nbd")
        assert daemon.stop() == 0
    assert not os.path.exists(path)


def test_more_clients_than_allowed_wait_until_one_leaves(daemon: Monitored, path: str) -> None:
    client = daemon.connect()
    start(client, path, max_connections=1)
    add(client, "n")
    second = None
    with Client(path, "n") as first:
        assert first.ask(wire.READ, 0, 1)[0] == 0
        # Through the backlog, in a process of its own: it ends when it has been served.
        command = ["nbdinfo", "--size", f"nbd+unix:///n?socket={path}"]
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.3)
        assert first.ask(wire.READ, 0, 1)[0] == 0
    output, _ = second.communicate(timeout=30)
    assert output.strip() == str(SIZE)


def test_tcp_is_this_machine_only_unless_told(daemon: Monitored) -> None:
    client = daemon.connect()
    client.execute("nbd-server-start", addr={"type": "inet", "data": {"host": "", "port": "0"}})
    listening = [each for each in psutil.Process(daemon.process.pid).net_connections() if each.status == "LISTEN"]
    assert [each.laddr.ip for each in listening] in (["127.0.0.1"], ["::1"])
    client.execute("nbd-server-stop")
    assert client.refusal(
        "nbd-server-start", addr={"type": "inet", "data": {"host": "", "port": "0"}}, tls_creds="gone"
    ) == ("No TLS credentials with id 'gone'")


# -- beside QEMU's storage daemon --------------------------------------------------------------------------------------

STEPS: list[tuple[str, dict[str, Any]]] = [
    ("nbd-server-stop", {}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n"}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "PATH"}}}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "PATH"}}}),
    ("nbd-server-start", {"addr": {"type": "unix"}}),
    ("nbd-server-start", {"addr": {"type": "carrier"}}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "none"}),
    ("block-export-add", {"id": "1e", "type": "nbd", "node-name": "n"}),
    ("block-export-add", {"type": "nbd", "node-name": "n"}),
    ("block-export-add", {"id": "e", "type": "fax", "node-name": "n"}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "bitmaps": ["none"]}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "bitmaps": [{"node": "n", "name": "none"}]}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "bitmaps": [{"node": "x", "name": "b"}]}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "name": "x" * 4097}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "ro", "writable": True}),
    ("block-dirty-bitmap-add", {"node": "n", "name": "b"}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "bitmaps": ["b"]}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "bitmaps": ["b"], "writable": True}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n", "name": "other"}),
    ("block-export-add", {"id": "e2", "type": "nbd", "node-name": "n"}),
    ("block-export-add", {"id": "e2", "type": "nbd", "node-name": "n", "name": "m", "bitmaps": ["b"]}),
    ("block-dirty-bitmap-remove", {"node": "n", "name": "b"}),
    ("block-dirty-bitmap-clear", {"node": "n", "name": "b"}),
    ("blockdev-del", {"node-name": "n"}),
    ("query-block-exports", {}),
    ("block-export-del", {"id": "none"}),
    ("block-export-del", {"id": "e", "mode": "soft"}),
    ("block-export-del", {"id": "e"}),
    ("block-dirty-bitmap-remove", {"node": "n", "name": "b"}),
    ("block-export-add", {"id": "e", "type": "nbd", "node-name": "n"}),
    ("nbd-server-stop", {}),
    ("query-block-exports", {}),
    ("block-export-del", {"id": "e"}),
    ("blockdev-del", {"node-name": "n"}),
]


def play(daemon: Monitored, directory: Path) -> list[tuple[str, Any]]:
    """What each step gives, and the events of exports at the end."""
    found: list[tuple[str, Any]] = []
    with daemon:
        client = daemon.connect()
        for name, read_only in (("n", False), ("ro", True)):
            image = directory / f"{name}.img"
            image.write_bytes(bytes(SIZE))
            client.execute("blockdev-add", driver="file", node_name=name, filename=str(image), read_only=read_only)
        for command, arguments in STEPS:
            text = json.dumps(arguments).replace("PATH", str(directory / "nbd.sock"))
            reply = client.request({"execute": command, "arguments": json.loads(text)})
            found.append((f"{command} {arguments}", reply.get("error", {}).get("desc", reply.get("return"))))
            if command in ("block-export-del", "nbd-server-stop") and "return" in reply:
                client.wait_event("BLOCK_EXPORT_DELETED")
                client.events = [each for each in client.events if each["event"] != "BLOCK_EXPORT_DELETED"]
    return found


def test_exports_are_added_refused_and_ended_as_in_qemu(tmp_path: Path) -> None:
    results = []
    for kind in (Monitored, StorageDaemon):
        directory = tmp_path / kind.__name__
        directory.mkdir()
        results.append(play(kind(directory), directory))
    ours, theirs = results
    differences = [(step, our, their) for (step, our), (_, their) in zip(ours, theirs, strict=True) if our != their]
    assert not differences, "\n".join(map(str, differences))


def test_a_signal_to_the_daemon_ends_everything(tmp_path: Path, image: Path, path: str) -> None:
    with Monitored(tmp_path, str(image), "--nbd-listen", f"unix:{path}") as daemon:
        processes = serving(daemon)
        with Client(path, "disk") as disk:
            assert disk.ask(wire.WRITE, 0, data=b"x") == (0, b"")
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(30) == 0
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                disk.ask(wire.READ, 0, 1)
        assert not any(process.is_running() for process in processes)
