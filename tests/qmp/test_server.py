"""The socket: negotiation, errors, ids, several clients, who may connect, and input that is meant to hurt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmcbw.workers.qmp.server import CLIENTS_MAX, QUEUE_BYTES_MAX, Server, runtime_directory
from shmcbw.workers.qmp.vocabulary import COMMANDS
from tests.conftest import needs_root, wait_for
from tests.monitor import Monitored

ROOT = Path(__file__).resolve().parents[2]
MakeImage = Callable[..., Path]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Monitored]:
    with Monitored(tmp_path) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """For tests that leave nothing in it."""
    with Monitored(tmp_path_factory.mktemp("shared")) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log.read_text()


def test_the_greeting_is_what_clients_read(shared: Monitored) -> None:
    greeting = shared.connect(negotiate=False).greeting["QMP"]
    assert set(greeting["version"]["qemu"]) == {"major", "minor", "micro"}
    assert greeting["version"]["package"].startswith("shmcbw ")
    assert greeting["capabilities"] == []


def test_negotiation_comes_first_and_once(shared: Monitored) -> None:
    client = shared.connect(negotiate=False)
    early = {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}
    assert client.ask("query-version")["error"] == early
    assert client.ask("nope")["error"] == early
    assert client.refusal("qmp_capabilities", enable=["weird"]) == "Parameter 'null' does not accept value 'weird'"
    assert client.execute("qmp_capabilities", enable=[]) == {}
    late = {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}
    assert client.ask("qmp_capabilities")["error"] == late


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ([1], "QMP input must be a JSON object"),
        ({}, "QMP input lacks member 'execute'"),
        ({"execute": 1}, "QMP input member 'execute' must be a string"),
        ({"execute": "query-version", "arguments": []}, "QMP input member 'arguments' must be an object"),
        ({"execute": "query-version", "arguments": {"x": 1}}, "Parameter 'x' is unexpected"),
        ({"execute": "query-version", "bogus": 1}, "QMP input member 'bogus' is unexpected"),
        ({"exec-oob": "query-version"}, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": "blockdev-del"}, "Parameter 'node-name' is missing"),
        (
            {"execute": "blockdev-del", "arguments": {"node-name": 5}},
            "Invalid parameter type for 'node-name', expected: string",
        ),
        ({"execute": "transaction", "arguments": {"actions": [{}]}}, "Parameter 'actions[0].type' is missing"),
        (
            {"execute": "transaction", "arguments": {"actions": [5]}},
            "Invalid parameter type for 'actions[0]', expected: object",
        ),
        (
            {"execute": "transaction", "arguments": {"actions": [{"type": "weird"}]}},
            "Parameter 'type' does not accept value 'weird'",
        ),
        (
            {"execute": "transaction", "arguments": {"actions": [{"type": "abort", "data": {"x": 1}}]}},
            "Parameter 'actions[0].data.x' is unexpected",
        ),
        (
            {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "n", "file": 5}},
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            {"execute": "block-dirty-bitmap-add", "arguments": {"node": "n", "name": "b", "granularity": -1}},
            "Parameter 'granularity' expects uint32_t",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_qemus_words(shared: Monitored, request_: Any, error: str) -> None:
    client = shared.connect()
    client.send(json.dumps(request_).encode())
    assert client.receive() == {"error": {"class": "GenericError", "desc": error}}


@pytest.mark.parametrize("identifier", [None, True, 0, -1.5, "", "ü\n", [1, [2]], {"a": {"b": []}}, 2**64 - 1])
def test_an_id_of_any_type_comes_back(shared: Monitored, identifier: Any) -> None:
    client = shared.connect()
    assert client.request({"execute": "query-name", "id": identifier}) == {"return": {}, "id": identifier}
    assert client.request({"execute": "nope", "id": identifier})["id"] == identifier


def test_commands_need_nothing_between_them_and_are_answered_in_order(shared: Monitored) -> None:
    client = shared.connect()
    client.send(b"".join(b'{"execute":"query-name","id":%d}' % number for number in range(200)))
    assert [client.receive()["id"] for _ in range(200)] == list(range(200))


def test_every_declared_command_is_there_and_described(shared: Monitored) -> None:
    client = shared.connect()
    names = {each["name"] for each in client.execute("query-commands")}
    assert names == {command.name for command in COMMANDS}
    schema = {entry["name"]: entry for entry in client.execute("query-qmp-schema")}
    for name in names:
        assert schema[name]["meta-type"] == "command"
        assert {schema[name]["arg-type"], schema[name]["ret-type"]} <= set(schema)
        if name != "qmp_capabilities":
            assert client.refusal(name, **{"no-such": 1}).endswith((" is unexpected", " is missing"))


def test_a_refused_node_leaves_nothing_and_the_others_stay(daemon: Monitored, make_image: MakeImage) -> None:
    image, small = make_image(1 << 20), make_image(1 << 16, "small.img")
    client = daemon.connect()
    client.execute("blockdev-add", driver="file", node_name="n", filename=str(image))
    client.execute("blockdev-add", driver="file", node_name="small", filename=str(small))
    inline = {"driver": "file", "filename": str(image)}
    assert (
        client.refusal("blockdev-add", driver="raw", node_name="n", file=inline) == "Duplicate nodes with node-name='n'"
    )
    assert (
        client.refusal("blockdev-add", driver="file", filename=str(image))
        == "'node-name' must be specified for the root node"
    )
    assert (
        client.refusal("blockdev-add", driver="file", node_name="x", filename="/nope")
        == "Could not open '/nope': No such file or directory"
    )
    for name in ("9n", "", "a b", "é"):
        assert (
            client.refusal("blockdev-add", driver="file", node_name=name, filename=str(image))
            == f"Invalid node-name: '{name}'"
        )
    assert (
        client.refusal("blockdev-add", driver="file", node_name="n" * 32, filename=str(image)) == "Node name too long"
    )
    assert {each["node-name"] for each in client.execute("query-named-block-nodes")} == {"n", "small"}
    client.execute("blockdev-del", node_name="n")
    assert client.refusal("blockdev-del", node_name="n") == "Failed to find node with node-name='n'"


def test_several_clients_at_once_all_see_the_end(daemon: Monitored) -> None:
    clients = [daemon.connect() for _ in range(5)]
    silent = daemon.connect(negotiate=False)
    clients[0].execute("quit")
    for client in clients:
        assert client.wait_event("SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
    with pytest.raises(EOFError):
        silent.receive()
    assert silent.events == [], "events are for those who have negotiated"
    assert daemon.process.wait(30) == 0
    assert not daemon.path.exists()


def test_a_client_that_reads_nothing_holds_up_nobody_and_costs_a_bounded_amount(shared: Monitored) -> None:
    deaf, other = shared.connect(), shared.connect()
    deaf.socket.setblocking(False)
    request = b'{"execute":"query-qmp-schema"}' * 100
    sent = 0
    deadline = time.monotonic() + 20
    # It is not read from any more once its answers are not taken.
    while time.monotonic() < deadline:
        try:
            sent += deaf.socket.send(request)
        except BlockingIOError:
            other.execute("query-version")
            if other.request({"execute": "query-name", "id": sent}) and _stuck(deaf.socket):
                break
    else:
        pytest.fail("it took everything")
    assert other.execute("query-status")["running"]


def test_a_client_that_takes_no_events_is_dropped_and_the_others_get_all_of_them(tmp_path: Path) -> None:
    path, count = str(tmp_path / "socket"), 3 * QUEUE_BYTES_MAX // 4096

    async def converse() -> None:
        server = Server(path, "test", lambda name, arguments: {})
        server.bind()
        await server.start()
        try:
            clients = [await asyncio.open_unix_connection(path, limit=1 << 20) for _ in range(2)]
            for reader, writer in clients:
                await reader.readline()
                writer.write(b'{"execute":"qmp_capabilities"}')
                await reader.readline()
            (deaf, deaf_writer), (other, other_writer) = clients
            deaf_writer.transport.pause_reading()  # type: ignore[attr-defined]
            for number in range(count):
                server.post("SHUTDOWN", {"number": number, "text": "x" * 4096})
                assert json.loads(await other.readline())["data"]["number"] == number
            deaf_writer.transport.resume_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(ConnectionError):
                while await deaf.read(1 << 20):
                    pass
            other_writer.write(b'{"execute":"query-name","id":1}')
            assert json.loads(await other.readline()) == {"return": {}, "id": 1}
            for _, writer in clients:
                writer.close()
        finally:
            async with server.ending():
                pass

    asyncio.run(asyncio.wait_for(converse(), 60))


def _stuck(connection: socket.socket) -> bool:
    time.sleep(0.05)
    try:
        connection.send(b" ")
    except BlockingIOError:
        return True
    return False


def test_the_socket_is_private(shared: Monitored) -> None:
    assert stat.S_IMODE(shared.path.stat().st_mode) == 0o600


def test_another_user_is_turned_away_by_the_kernels_word(daemon: Monitored, tmp_path: Path) -> None:
    needs_root("becoming another user")
    # As if somebody had opened the doors: the mode is not the only lock.
    daemon.path.chmod(0o666)
    for directory in (tmp_path, *tmp_path.parents):
        if "pytest-of-" in str(directory):
            directory.chmod(0o755)
    code = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(100))"
    )
    command = [sys.executable, "-c", code, str(daemon.path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "b''\n"
    assert daemon.connect().execute("query-name") == {}
    assert "of uid 65534" in daemon.log.read_text()


def test_a_second_daemon_on_the_same_socket_is_told(shared: Monitored) -> None:
    second = subprocess.run(shared.command(), capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert "another server listens there" in second.stderr
    assert shared.connect().execute("query-name") == {}


def test_the_socket_of_a_killed_daemon_is_taken_over(daemon: Monitored) -> None:
    daemon.kill()
    assert daemon.path.exists()
    daemon.start()
    assert daemon.connect().execute("query-name") == {}


def test_a_runtime_directory_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert runtime_directory(str(directory)) == str(directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    with pytest.raises(PermissionError, match="nobody else may enter"):
        runtime_directory(str(directory))
    link = tmp_path / "link"
    link.symlink_to("/root")
    with pytest.raises(PermissionError):
        runtime_directory(str(link))


def test_it_says_when_it_is_ready_and_when_it_ends(tmp_path: Path, make_image: MakeImage) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)
        image = make_image(1 << 20)
        with Monitored(tmp_path, str(image), environment={"NOTIFY_SOCKET": str(address)}) as daemon:
            assert manager.recv(100) == b"READY=1"
            assert daemon.connect().execute("query-block")[0]["device"] == "disk"
            assert daemon.stop() == 0
            assert manager.recv(100) == b"STOPPING=1"


def test_settings_come_from_a_file_and_the_command_line_wins(tmp_path: Path, make_image: MakeImage) -> None:
    image, other = make_image(1 << 20), make_image(1 << 20, "other.img")
    config = tmp_path / "shmcbw.toml"
    config.write_text(
        f'name = "file"\ncluster-size = "4K"\nworkers = 1\n[[image]]\nfilename = "{image}"\nnode-name = "first"\n'
    )
    with Monitored(tmp_path, "--config", str(config), "--name", "line", str(other)) as daemon:
        client = daemon.connect()
        assert client.execute("query-name") == {"name": "line"}
        blocks = {each["device"]: each["inserted"]["image"] for each in client.execute("query-block")}
        assert {name: image["cluster-size"] for name, image in blocks.items()} == {"first": 4096, "other": 4096}
        assert len(client.execute("x-shmcbw-query-workers", node_name="first")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wokers = 3", "wokers: no such setting"),
        ("workers = 0", "workers: 0 is not a number above 0"),
        ('cluster-size = "5K"', "cluster-size: "),
        ("detach-jobs = 1", "detach-jobs: 1 is neither true nor false"),
        ("[[image]]\nnode-name = 'x'", "image: an image is a table"),
        ("= =", "Invalid"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "shmcbw.toml"
    config.write_text(text)
    command = [sys.executable, "-m", "shmcbw", "serve", "--config", str(config), "--qmp", str(tmp_path / "s")]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert failed.returncode == 1
    assert message in failed.stderr and str(config) in failed.stderr


# -- real clients ------------------------------------------------------------------------------------------------------


def test_the_client_of_the_qemu_project_talks_to_it(daemon: Monitored, make_image: MakeImage) -> None:
    code = (
        "import asyncio, sys\n"
        "from qemu.qmp import QMPClient, ExecuteError\n"
        "async def main():\n"
        "    client = QMPClient('test')\n"
        "    await client.connect(sys.argv[1])\n"
        "    await client.execute('blockdev-add', {'driver': 'file', 'node-name': 'n', 'filename': sys.argv[2]})\n"
        "    try:\n"
        "        await client.execute('blockdev-del', {'node-name': 'x'})\n"
        "    except ExecuteError as error:\n"
        "        print(error.error_class, error)\n"
        "    answers = await asyncio.gather(*(client.execute('query-named-block-nodes') for _ in range(20)))\n"
        "    print(len(answers), answers[0][0]['node-name'], (await client.execute('query-version'))['package'])\n"
        "    await client.disconnect()\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, str(daemon.path), str(make_image(1 << 20))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == "GenericError Failed to find node with node-name='x'"
    assert found.stdout.splitlines()[1].startswith("20 n shmcbw ")


def test_qmp_shell_talks_to_it(daemon: Monitored, make_image: MakeImage) -> None:
    lines = f"blockdev-add driver=file node-name=n filename={make_image(1 << 20)}\nquery-named-block-nodes\nquit\n"
    shell = Path(sys.executable).with_name("qmp-shell")
    found = subprocess.run([shell, str(daemon.path)], input=lines, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert '"node-name": "n"' in found.stdout, found.stdout + found.stderr
    assert daemon.process.wait(30) == 0


# -- input that is meant to hurt ---------------------------------------------------------------------------------------

_PIECES = st.one_of(
    st.binary(max_size=300),
    st.text("{}[]:,\"'\\u0019eE+-.true nul", max_size=200).map(str.encode),
    st.sampled_from(
        [b"[" * 5000, b'{"a":' * 2000, b'"' + b"x" * 100_000, b"9" * 50_000, b"]" * 2000, b'{"execute":"qu']
    ),
    st.sampled_from([command.name for command in COMMANDS if command.name not in ("quit",)]).map(
        lambda name: json.dumps({"execute": name, "arguments": {"node-name": "\0", "id": "x", "device": []}}).encode()
    ),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=10), inner),
    ).map(lambda value: json.dumps({"execute": "blockdev-add", "arguments": value}).encode()),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    with Monitored(tmp_path_factory.mktemp("fuzz")) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log.read_text()
        assert "internal error" not in daemon.log.read_text()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_PIECES, min_size=1, max_size=6), st.booleans())
def test_no_input_stops_the_daemon_or_its_loop(fuzzed: Monitored, pieces: list[bytes], negotiate: bool) -> None:
    connection = fuzzed.connect(negotiate=negotiate)
    try:
        connection.send(b"".join(pieces))
    finally:
        # Half a message, and nobody there any more.
        connection.close()
    other = fuzzed.connect()
    other.socket.settimeout(10)
    assert other.request({"execute": "query-name", "id": 1}) == {"return": {}, "id": 1}
    other.close()


def test_a_thousand_connections_are_too_many_and_harmless(fuzzed: Monitored) -> None:
    sockets = []
    first = fuzzed.connect()
    try:
        for _ in range(1000):
            each = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Without a timeout: connect() is to wait for room in the backlog, as a client's does.
            each.connect(str(fuzzed.path))
            each.settimeout(30)
            sockets.append(each)
        assert first.execute("query-name") == {}, "who is there goes on"
        greeted = sum(bool(each.recv(1)) for each in sockets)
        assert CLIENTS_MAX - 50 <= greeted < CLIENTS_MAX
    finally:
        for each in sockets:
            each.close()
    first.close()
    wait_for(lambda: _answers(fuzzed), "a client is taken again")


def _answers(daemon: Monitored) -> bool:
    try:
        connection = daemon.connect()
    except (EOFError, OSError):
        return False
    connection.close()
    return True
