"""Where an NBD server listens: ``unix:PATH``, or ``tcp:HOST:PORT``; without a host this machine only.

A unix socket is private (0600).  Port 0 takes any.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from urllib.parse import quote

from .. import unix_sockets

_BACKLOG = 128


@dataclass(frozen=True, slots=True)
class Address:
    """``path`` of a unix socket, else host and port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """ValueError if it is none."""
        kind, _, where = text.partition(":")
        if kind == "unix" and where:
            return cls(path=os.path.abspath(where))
        host, _, port = where.rpartition(":")
        if kind != "tcp" or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text}: neither unix:PATH nor tcp:HOST:PORT")
        return cls(host=host.strip("[]") or "localhost", port=int(port))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"tcp:{host}:{self.port}"

    def uri(self, name: str, *, encrypted: bool = False) -> str:
        """Of an export there."""
        scheme = "nbds" if encrypted else "nbd"
        if self.path:
            return f"{scheme}+unix:///{quote(name)}?socket={quote(self.path)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{quote(name)}"

    def listen(self) -> tuple[socket.socket, Address]:
        """A listening socket, and the address that it has got; OSError."""
        if self.path:
            return listen_unix(self.path), self
        sock = listen_tcp(self.host, self.port)
        return sock, Address(host=self.host, port=sock.getsockname()[1])


def listen_unix(path: str) -> socket.socket:
    """A listening unix socket, mode 0600; OSError."""
    return unix_sockets.listen(path, _BACKLOG)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address, family=family, backlog=_BACKLOG)
