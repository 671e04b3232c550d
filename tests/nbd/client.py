"""Minimal NBD clients for what real ones don't do: bad requests, replies in another order, chunks as they come."""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

from shmcbw.workers.nbd import wire


class Client:
    """Connected to an export, with simple replies; requests are sent and replies received one by one.

    A unix socket by its path, another one by host and port.
    """

    def __init__(self, address: str | tuple[str, int], name: str, timeout_s: float = 20) -> None:
        if isinstance(address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout_s)
            self.sock.connect(address)
        else:
            self.sock = socket.create_connection(address, timeout_s)
        try:
            self._shake_hands(name)
        except BaseException:
            self.sock.close()
            raise

    def _shake_hands(self, name: str) -> None:
        assert self.receive(18)[:8] == b"NBDMAGIC"
        self.choose(name)

    def choose(self, name: str) -> None:
        encoded = name.encode()
        option = struct.pack(">8sII", b"IHAVEOPT", wire.OPTION_EXPORT_NAME, len(encoded)) + encoded
        self.sock.sendall(struct.pack(">I", 3) + option)
        self.size_bytes, self.flags = struct.unpack(">QH", self.receive(10))

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise ConnectionResetError(f"{len(data)} of {count} bytes came")
            data += more
        return data

    def send(self, kind: int, cookie: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> None:
        header = struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length or len(data))
        self.sock.sendall(header + data)

    def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, data) of the next reply; ``length`` bytes of data if it is a success."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return cookie, error, self.receive(length) if error == 0 else b""

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, bytes]:
        """One request and its reply: (error, data)."""
        self.send(kind, 1, offset, length, data, flags)
        _, error, found = self.reply(length if kind == wire.READ else 0)
        return error, found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()


class StructuredClient(Client):
    """With structured replies, and meta contexts: ``contexts`` has their names by their ids."""

    def __init__(self, path: str, name: str, *contexts: str) -> None:
        self._queries = contexts
        self.contexts: dict[int, str] = {}
        super().__init__(path, name)

    def choose(self, name: str) -> None:
        self.sock.sendall(struct.pack(">I", 3))
        encoded = struct.pack(">I", len(name.encode())) + name.encode()
        self._option(wire.OPTION_STRUCTURED_REPLY, b"")
        if self._queries:
            queries = b"".join(struct.pack(">I", len(query)) + query.encode() for query in self._queries)
            answers = self._option(
                wire.OPTION_SET_META_CONTEXT, encoded + struct.pack(">I", len(self._queries)) + queries
            )
            self.contexts = {int.from_bytes(data[:4], "big"): data[4:].decode() for data in answers}
        self._option(wire.OPTION_GO, encoded + bytes(2))

    def _option(self, number: int, data: bytes) -> list[bytes]:
        """The data of all answers before the acknowledgement."""
        self.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        found: list[bytes] = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            answer = self.receive(length)
            if kind == wire.REPLY_ACK:
                return found
            assert kind in (wire.REPLY_INFO, wire.REPLY_META_CONTEXT), answer
            found.append(answer)

    def chunks(self) -> list[tuple[int, bytes]]:
        """(kind, content) of each chunk of the next reply."""
        found, last = [], False
        while not last:
            magic, flags, kind, _, length = struct.unpack(">IHHQI", self.receive(20))
            assert magic == 0x668E33EF
            found.append((kind, self.receive(length)))
            last = bool(flags & 1)
        return found

    def extents(self, length: int, offset: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        """Block status: (length, flags) by context."""
        self.send(wire.BLOCK_STATUS, 1, offset, length, flags=flags)
        found = {}
        for kind, content in self.chunks():
            assert kind == 5, content
            (number,) = struct.unpack_from(">I", content)
            found[self.contexts[number]] = list(struct.iter_unpack(">II", content[4:]))
        return found
