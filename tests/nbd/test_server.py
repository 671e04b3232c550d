"""The NBD server's own behaviour: what runs beside what, what fails alone, who dies."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shmcbw
from shmcbw import _core
from shmcbw.invariants import check
from shmcbw.workers import Coordinator
from shmcbw.workers.nbd import wire
from shmcbw.workers.nbd.address import listen_unix
from shmcbw.workers.nbd.server import ExportInUseError, Server
from shmcbw.workers.nbd.specification import ExportSpec
from tests.conftest import wait_for
from tests.nbd.client import Client, StructuredClient
from tests.processes import continue_all, stop_all

SIZE = 4 << 20
CLUSTER = 65_536


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=1) as coordinator:
        yield coordinator


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "nbd.sock")


@pytest.fixture
def server(coordinator: Coordinator, path: str) -> Iterator[Server]:
    with Server(listen_unix(path), path=path, processes=1) as server:
        server.add(ExportSpec("disk", coordinator.path, writable=True))
        yield server


def worker_pids(coordinator: Coordinator) -> list[int]:
    return [worker["pid"] for worker in coordinator.status()["workers"]]


def test_a_written_byte_is_in_the_image_and_the_snapshot_keeps_the_old_one(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        with Client(path, "disk") as disk, Client(path, "snapshot") as old:
            assert disk.ask(wire.WRITE, 1000, data=b"new" * 1000) == (0, b"")
            assert disk.ask(wire.WRITE_ZEROES, 3 * CLUSTER, 2 * CLUSTER) == (0, b"")
            assert disk.ask(wire.TRIM, 10 * CLUSTER, CLUSTER) == (0, b"")
            assert disk.ask(wire.READ, 1000, 3000) == (0, b"new" * 1000)
            assert disk.ask(wire.FLUSH) == (0, b"")
            assert old.ask(wire.READ, 0, SIZE) == (0, before)
        after = before[:1000] + b"new" * 1000 + before[4000:]
        for first, end in ((3, 5), (10, 11)):
            after = after[: first * CLUSTER] + bytes((end - first) * CLUSTER) + after[end * CLUSTER :]
        assert image.read_bytes() == after
        server.remove("snapshot", hard=True)


def test_a_write_that_waits_for_its_copy_holds_up_no_other_request(
    coordinator: Coordinator, server: Server, path: str, tmp_path: Path
) -> None:
    with coordinator.snapshot(tmp_path / "scratch"), Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"hot") == (0, b"")
        stop_all(worker_pids(coordinator))
        try:
            disk.send(wire.WRITE, 1, 20 * CLUSTER, data=b"first touch")
            disk.send(wire.READ, 2, 0, 3)
            disk.send(wire.WRITE, 3, 1, data=b"still hot")
            disk.send(wire.WRITE_ZEROES, 4, 30 * CLUSTER, 100)
            assert [disk.reply(3), disk.reply()] == [(2, 0, b"hot"), (3, 0, b"")]
        finally:
            continue_all(worker_pids(coordinator))
        assert {disk.reply()[:2], disk.reply()[:2]} == {(1, 0), (4, 0)}


def test_a_dozen_slow_writes_hold_up_neither_reads_nor_flushes_nor_another_export(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, Client(path, "disk") as disk:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        stop_all(worker_pids(coordinator))
        try:
            for number in range(12):
                disk.send(wire.WRITE, number, (20 + number) * CLUSTER, data=b"first touch")
            for cookie, kind, length in ((100, wire.FLUSH, 0), (101, wire.READ, 3)):
                disk.send(kind, cookie, 0, length)
                assert disk.reply(length)[:2] == (cookie, 0)
            with Client(path, "snapshot") as old:
                assert old.ask(wire.READ, 20 * CLUSTER, 10)[0] == 0
        finally:
            continue_all(worker_pids(coordinator))
        assert sorted(disk.reply()[:2] for _ in range(12)) == [(number, 0) for number in range(12)]
        server.remove("snapshot", hard=True)


def test_a_client_that_does_not_read_its_replies_holds_up_no_other(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial, writable=True))
        with StructuredClient(path, "snapshot") as deaf, Client(path, "snapshot") as other:
            assert other.ask(wire.TRIM, 4 * CLUSTER, CLUSTER) == (0, b"")
            # Each runs into a part that was let go, so it is a thread's; and each has a large reply.
            for cookie in range(40):
                deaf.send(wire.READ, cookie, 0, CLUSTER * 5)
            assert other.ask(wire.READ, 3 * CLUSTER, 2 * CLUSTER)[0] == errno.EPERM, "a thread's, too"
            assert other.ask(wire.FLUSH) == (0, b"")
            for _ in range(40):
                (kind, content), (error, _) = deaf.chunks()
                assert (kind, content[8:], error) == (1, before[: 4 * CLUSTER], 0x8002)
        server.remove("snapshot", hard=True)


def test_chunks_are_as_the_flags_ask(coordinator: Coordinator, server: Server, path: str, image: Path) -> None:
    with image.open("r+b") as file:
        for hole in (2 * CLUSTER, 6 * CLUSTER):
            _core.punch_hole(file.fileno(), hole, CLUSTER)
    with StructuredClient(path, "disk", "base:allocation") as disk:
        extents = disk.extents(SIZE, 0)["base:allocation"]
        hole = wire.STATE_HOLE | wire.STATE_ZERO
        assert extents[:4] == [(2 * CLUSTER, 0), (CLUSTER, hole), (3 * CLUSTER, 0), (CLUSTER, hole)]
        assert disk.extents(SIZE, 0, wire.FLAG_REQ_ONE)["base:allocation"] == [(2 * CLUSTER, 0)]
        assert disk.extents(100, 2 * CLUSTER + 50)["base:allocation"] == [(100, hole)]
        disk.send(wire.READ, 1, CLUSTER, 2 * CLUSTER, flags=wire.FLAG_DF)
        ((kind, content),) = disk.chunks()
        assert (kind, content[8:]) == (1, image.read_bytes()[CLUSTER : 3 * CLUSTER])
        disk.send(wire.READ, 1, 0, 0)
        assert disk.chunks() == [(0, b"")], "nothing, and no empty chunk of data"
        disk.send(wire.CACHE, 1, 0, CLUSTER)
        assert disk.chunks() == [(0, b"")]
        disk.send(wire.BLOCK_STATUS, 1, SIZE, 1)
        ((kind, content),) = disk.chunks()
        assert kind == 0x8001 and b"beyond the end" in content


def test_block_status_in_no_context_is_einval(server: Server, path: str) -> None:
    with Client(path, "disk") as disk:
        assert disk.ask(wire.BLOCK_STATUS, 0, 512)[0] == errno.EINVAL
        assert disk.ask(wire.READ, 0, 1)[0] == 0


def test_zeroes_are_holes_unless_they_must_not_be_and_fast_ones_are_refused_where_they_are_slow(
    coordinator: Coordinator, server: Server, path: str, image: Path
) -> None:
    def blocks() -> int:
        return os.stat(image).st_blocks

    with Client(path, "disk") as disk:
        before = blocks()
        assert disk.ask(wire.WRITE_ZEROES, 0, 4 * CLUSTER, flags=wire.FLAG_NO_HOLE) == (0, b"")
        assert blocks() == before
        assert disk.ask(wire.WRITE_ZEROES, 0, 4 * CLUSTER, flags=wire.FLAG_FAST_ZERO) == (0, b"")
        assert blocks() == before - 4 * CLUSTER // 512
        both = wire.FLAG_FAST_ZERO | wire.FLAG_NO_HOLE
        assert disk.ask(wire.WRITE_ZEROES, 8 * CLUSTER, CLUSTER, flags=both)[0] == errno.ENOTSUP
        assert disk.ask(wire.TRIM, 8 * CLUSTER, CLUSTER) == (0, b"")
        assert blocks() == before - 5 * CLUSTER // 512
        assert image.read_bytes()[: 4 * CLUSTER] == bytes(4 * CLUSTER)


@pytest.mark.parametrize("kind", [wire.WRITE, wire.WRITE_ZEROES, wire.TRIM, wire.FLUSH])
def test_what_must_be_durable_is_synced_before_it_is_answered(
    server: Server, path: str, tmp_path: Path, kind: int
) -> None:
    (pid,) = server.pids
    trace = tmp_path / "trace"
    with Client(path, "disk") as disk:
        # Its threads are there from now on, and traced.
        assert disk.ask(wire.FLUSH) == (0, b"")
        assert disk.ask(wire.WRITE, 0, data=b"x", flags=wire.FLAG_FUA) == (0, b"")
        command = ["strace", "-f", "-e", "trace=fdatasync", "-o", str(trace), "-p", str(pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            try:
                assert strace.stderr is not None
                while "attached" not in strace.stderr.readline():
                    assert strace.poll() is None
                data = b"x" if kind == wire.WRITE else b""
                assert disk.ask(wire.WRITE, 10, data=b"x") == (0, b"")
                assert "fdatasync" not in trace.read_text()
                flush = kind == wire.FLUSH
                flags = 0 if flush else wire.FLAG_FUA
                assert disk.ask(kind, 0, 0 if flush else 1, data, flags) == (0, b"")
                # The line of a call that has ended, or is done but for its end.
                wait_for(lambda: "fdatasync" in trace.read_text(), "strace has written it")
            finally:
                strace.terminate()


def test_a_full_file_system_is_enospc_and_the_connection_lives(make_tmpfs: Callable[[str], Path], path: str) -> None:
    image = make_tmpfs("1m") / "disk.img"
    with image.open("wb") as file:
        file.truncate(2 * SIZE)
    with Coordinator(image, workers=1), Server(listen_unix(path), path=path, processes=1) as server:
        server.add(ExportSpec("disk", str(image), writable=True))
        with Client(path, "disk") as disk:
            assert disk.ask(wire.WRITE, 0, data=b"x" * (2 << 20))[0] == errno.ENOSPC
            assert disk.ask(wire.TRIM, 0, 2 << 20) == (0, b"")
            assert disk.ask(wire.WRITE, 0, data=b"fits") == (0, b"")
            assert disk.ask(wire.READ, 0, 4) == (0, b"fits")


def test_a_client_that_leaves_gives_everything_back(coordinator: Coordinator, server: Server, path: str) -> None:
    def slots() -> int:
        return len(coordinator.status()["slots"])

    before = slots()
    with Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"x") == (0, b"")
        wait_for(lambda: server.clients("disk") == 1 and slots() == before + 1, "it is counted, and has a slot")
        disk.send(wire.DISCONNECT, 1)
        with pytest.raises(ConnectionResetError, match="0 of 1"):
            disk.receive(1)
        wait_for(lambda: server.clients("disk") == 0 and slots() == before, "both are given back")


def test_several_clients_are_served_by_several_processes(image: Path, path: str) -> None:
    with Coordinator(image, workers=1) as coordinator, Server(listen_unix(path), path=path, processes=2) as server:
        server.add(ExportSpec("disk", str(image), writable=True))
        with Client(path, "disk") as one, Client(path, "disk") as two:
            for client in (one, two):
                assert client.ask(wire.WRITE, 0, data=b"x") == (0, b"")
            writers = [slot["pid"] for slot in coordinator.status()["slots"]]
            assert set(writers) == set(server.pids)


def test_a_clients_bad_request_gets_einval_and_its_connection_lives(server: Server, path: str) -> None:
    with Client(path, "disk") as disk:
        assert disk.ask(wire.READ, SIZE - 1, 2)[0] == errno.EINVAL
        assert disk.ask(wire.READ, 1 << 63, 1)[0] == errno.EINVAL
        assert disk.ask(wire.WRITE, SIZE - 1, data=b"xy")[0] == errno.ENOSPC
        assert disk.ask(99)[0] == errno.EINVAL
        assert disk.ask(wire.WRITE, 0, data=b"x", flags=wire.FLAG_DF)[0] == errno.EINVAL
        assert disk.ask(wire.READ, 0, wire.MAXIMUM_BLOCK_BYTES + 1)[0] == errno.EINVAL
        assert disk.ask(wire.READ, 0, 1)[0] == 0


def test_a_snapshot_takes_no_writes_and_a_read_only_image_neither(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    with coordinator.snapshot(tmp_path / "scratch") as snapshot:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial, writable=True))
        server.add(ExportSpec("read-only", str(image)))
        for name in ("snapshot", "read-only"):
            with Client(path, name) as client:
                assert client.ask(wire.WRITE, 0, data=b"x")[0] == errno.EPERM
                assert client.ask(wire.WRITE_ZEROES, 0, 10)[0] == errno.EPERM
                assert client.ask(wire.READ, 0, 10)[0] == 0
        server.remove("snapshot", hard=True)


def test_a_discard_of_a_snapshot_lets_whole_clusters_go_and_a_small_one_is_harmless(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with coordinator.snapshot(tmp_path / "scratch") as snapshot:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial, writable=True))
        with Client(path, "snapshot") as client:
            assert client.ask(wire.TRIM, 4096, 4096) == (0, b"")
            assert client.ask(wire.READ, 0, CLUSTER) == (0, before[:CLUSTER])
            assert client.ask(wire.TRIM, CLUSTER, 2 * CLUSTER) == (0, b"")
            assert client.ask(wire.READ, CLUSTER, 1)[0] == errno.EPERM
            assert client.ask(wire.READ, 0, 2 * CLUSTER)[0] == errno.EPERM, "straddling"
            assert client.ask(wire.READ, 3 * CLUSTER, 100) == (0, before[3 * CLUSTER :][:100])
        server.remove("snapshot", hard=True)


def test_a_broken_snapshot_is_eio_and_closes_nothing_that_works(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    with coordinator.snapshot(tmp_path / "scratch", cbw_timeout=0.2) as snapshot:
        server.add(ExportSpec("snapshot", str(image), snapshot.serial))
        with Client(path, "snapshot") as old, Client(path, "disk") as disk:
            stop_all(worker_pids(coordinator))
            try:
                assert disk.ask(wire.WRITE, 0, data=b"breaks it") == (0, b"")
            finally:
                continue_all(worker_pids(coordinator))
            assert old.ask(wire.READ, CLUSTER, 10)[0] == errno.EIO
            assert old.ask(wire.READ, 2 * CLUSTER, 10)[0] == errno.EIO
            assert disk.ask(wire.WRITE, 0, data=b"works") == (0, b"")
            coordinator.snapshots[0].close()
            assert old.ask(wire.READ, 0, 1)[0] in (errno.EIO, errno.ESHUTDOWN)
        server.remove("snapshot", hard=True)


def test_a_killed_process_is_a_writers_death_and_is_replaced(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    (pid,) = server.pids
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"x" * CLUSTER) == (0, b"")
        stop_all(worker_pids(coordinator))
        disk.send(wire.WRITE, 1, 20 * CLUSTER, data=b"waits for its copy")
        wait_for(lambda: len(coordinator.status()["slots"]) == 2, "the write has gone to a thread of its own")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            disk.reply()
        continue_all(worker_pids(coordinator))
        wait_for(lambda: server.pids != [pid], "another process serves")
        with Client(path, "disk") as again:
            assert again.ask(wire.WRITE, 20 * CLUSTER, data=b"y") == (0, b"")
        wait_for(lambda: pid not in [slot["pid"] for slot in coordinator.status()["slots"]], "its slots are reaped")
        assert snapshot.pread(SIZE, 0) == before
        assert check(coordinator._segment) == []


def test_an_export_in_use_is_removed_only_the_hard_way(server: Server, path: str) -> None:
    with Client(path, "disk") as disk:
        wait_for(lambda: server.clients("disk") == 1, "the client is counted")
        with pytest.raises(ExportInUseError, match="in use by 1"):
            server.remove("disk")
        assert disk.ask(wire.READ, 0, 1)[0] == 0
        server.remove("disk", hard=True)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            disk.ask(wire.READ, 0, 1)
    assert server.exports == []


def test_what_cannot_be_opened_is_refused_with_its_reason_and_the_others_are_served(
    server: Server, path: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        server.add(ExportSpec("gone", str(tmp_path / "gone")))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="already"):
        server.add(ExportSpec("disk", "x"))
    with Client(path, "disk") as disk:
        assert disk.ask(wire.READ, 0, 1)[0] == 0


def test_the_socket_is_private_is_replaced_when_stale_and_refused_when_somebody_listens(
    server: Server, path: str, tmp_path: Path
) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(OSError, match="another server listens there"):
        listen_unix(path)
    stale = str(tmp_path / "stale.sock")
    listen_unix(stale).close()
    listen_unix(stale).close()


def test_in_flight_requests_count_for_the_cut(
    coordinator: Coordinator, server: Server, path: str, image: Path, tmp_path: Path
) -> None:
    """A write through NBD lies before or after each cut: what was answered before it is in the snapshot."""
    with Client(path, "disk") as disk:
        for count in range(1, 20):
            assert disk.ask(wire.WRITE, 0, data=count.to_bytes(8, "little")) == (0, b"")
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                disk.send(wire.WRITE, 1, 0, data=bytes(8))
                assert snapshot.pread(8, 0) == count.to_bytes(8, "little")
                disk.reply()


def test_disk_writes_need_a_coordinator(image: Path, path: str) -> None:
    with Server(listen_unix(path), path=path, processes=1) as server:
        with pytest.raises(OSError, match="no coordinator"):
            server.add(ExportSpec("disk", str(image), writable=True))
    assert not os.path.exists(path)


def test_a_disk_is_the_writer_that_it_says_it_is(coordinator: Coordinator, server: Server, path: str) -> None:
    with Client(path, "disk") as disk:
        assert disk.ask(wire.WRITE, 0, data=b"x") == (0, b"")
        assert set(server.pids) & {slot["pid"] for slot in coordinator.status()["slots"]}
        with shmcbw.open(coordinator.path) as other:
            assert other.pread(1, 0) == b"x"
