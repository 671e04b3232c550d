"""Random clients of a real server: what makes sense is done right, what does not harms nobody else.

hypothesis prints what it has found; the same again with its seed.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shmcbw.invariants import check
from shmcbw.workers import Coordinator
from shmcbw.workers.nbd import wire
from shmcbw.workers.nbd.address import listen_unix
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec
from tests.nbd.client import Client

SIZE = 1 << 20
CLUSTER = 65_536
IN_TURN = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def coordinator(make_image: Callable[..., Path]) -> Iterator[Coordinator]:
    with Coordinator(make_image(SIZE), workers=2) as coordinator:
        yield coordinator


@pytest.fixture
def path(coordinator: Coordinator, tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "nbd.sock")
    with Server(listen_unix(path), path=path, processes=1) as server:
        server.add(ExportSpec("disk", coordinator.path, writable=True))
        yield path


OFFSETS = st.integers(0, SIZE - 1) | st.builds(lambda c, by: c * CLUSTER + by, st.integers(1, 15), st.integers(-2, 2))
REQUESTS = st.tuples(
    st.sampled_from((wire.READ, wire.WRITE, wire.WRITE_ZEROES, wire.TRIM, wire.FLUSH, wire.CACHE)),
    OFFSETS,
    st.integers(1, 3 * CLUSTER),
    st.sampled_from((0, wire.FLAG_FUA, wire.FLAG_NO_HOLE, wire.FLAG_FAST_ZERO)),
    st.integers(0, 255),
)


@given(st.lists(REQUESTS, min_size=1, max_size=20))
@IN_TURN
def test_requests_do_to_the_image_what_they_do_to_an_array_and_nothing_to_the_snapshot(
    coordinator: Coordinator, path: str, tmp_path: Path, requests: list[tuple[int, int, int, int, int]]
) -> None:
    image = Path(coordinator.path)
    model = bytearray(image.read_bytes())
    before = bytes(model)
    with coordinator.snapshot(tmp_path / "scratch") as snapshot, Client(path, "disk") as disk:
        for kind, offset, length, flags, byte in requests:
            end = offset + length
            allowed = wire._ALLOWED_FLAGS[kind]
            data = bytes([byte]) * length if kind == wire.WRITE else b""
            where, count = (0, 0) if kind == wire.FLUSH else (offset, length)
            error, found = disk.ask(kind, where, count, data, flags)
            if flags & ~allowed:
                assert error == errno.EINVAL
            elif kind != wire.FLUSH and end > SIZE:
                assert error == (errno.ENOSPC if kind in (wire.WRITE, wire.WRITE_ZEROES) else errno.EINVAL)
            else:
                assert error == 0
                if kind == wire.READ:
                    assert found == model[offset:end]
                elif kind == wire.WRITE:
                    model[offset:end] = data
                elif kind in (wire.WRITE_ZEROES, wire.TRIM):
                    model[offset:end] = bytes(length)
        assert snapshot.pread(SIZE, 0) == before
    assert image.read_bytes() == model


GREETING = struct.pack(">I", 3)


def option(number: int, data: bytes) -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def request(kind: int, flags: int, offset: int, length: int, data: bytes) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, kind, 7, offset, length) + data


STRUCTURED = option(wire.OPTION_STRUCTURED_REPLY, b"")
CHOOSE = option(wire.OPTION_GO, struct.pack(">I4sH", 4, b"disk", 0))
PIECES = st.one_of(
    st.binary(max_size=100),
    st.builds(option, st.integers(0, 20), st.binary(max_size=60)),
    st.builds(
        request,
        st.integers(0, 9),
        st.integers(0, 65535),
        st.sampled_from((0, 1, SIZE - 1, SIZE, 1 << 32, (1 << 64) - 1)),
        st.sampled_from((0, 1, 512, 1 << 20, (32 << 20) + 1, (1 << 32) - 1)),
        st.binary(max_size=600),
    ),
    st.just(STRUCTURED),
    st.just(CHOOSE),
)


@given(st.lists(PIECES, max_size=8), st.booleans())
@IN_TURN
def test_whatever_a_client_sends_others_are_served_and_nothing_is_left(
    coordinator: Coordinator, path: str, pieces: list[bytes], chosen: bool
) -> None:
    with Client(path, "disk") as witness:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(path)
            # The server may be quicker to close than we are to send.
            with suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(GREETING + (STRUCTURED + CHOOSE if chosen else b"") + b"".join(pieces))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 20):
                    pass
        mark = os.urandom(16)
        assert witness.ask(wire.WRITE, 5 * CLUSTER - 8, data=mark) == (0, b"")
        assert witness.ask(wire.READ, 5 * CLUSTER - 8, 16) == (0, mark)
    assert check(coordinator.segment) == []
