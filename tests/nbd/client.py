"""A minimal NBD client for what real clients don't do: bad requests, and replies that come in another order."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

from shmcbw.workers.nbd import wire


class Client:
    """Connected to an export, with simple replies; requests are sent and replies received one by one."""

    def __init__(self, path: str, name: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(path)
        assert self.receive(18)[:8] == b"NBDMAGIC"
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

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()
