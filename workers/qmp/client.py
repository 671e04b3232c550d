"""A QMP client that waits for its answers: what the command line uses to talk to the daemon of an image."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import time
from typing import Any

from shmcbw.errors import NoCoordinatorError, ShmcbwError
from shmcbw.layout import Header
from shmcbw.segment import COORDINATOR, Segment

from .server import peer

ANSWER_TIMEOUT_S = 60.0


class RefusedError(ShmcbwError):
    """The daemon has refused a command; ``error_class`` is QMP's."""

    def __init__(self, desc: str, error_class: str) -> None:
        super().__init__(desc)
        self.error_class = error_class


class PartedError(NoCoordinatorError, EOFError):
    """The daemon has closed the connection: it ended, died, or wants no more of this client."""

    def __init__(self, path: str, number: int = errno.ECONNRESET) -> None:
        super().__init__(
            number,
            f"the daemon at {path} has gone, or has closed the connection; jobs outlive a daemon that died: serve the "
            "image again (shmcbw serve IMAGE) and look (shmcbw job list IMAGE)",
        )


class Client:
    """A connection to a daemon: negotiated, with the events that came, in order.

    OSError: nobody listens there, or it parts at once.  ``pid``: who must be at the other end, 0 for whoever it is.
    """

    def __init__(self, path: str, *, negotiate: bool = True, pid: int = 0) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.events: list[dict[str, Any]] = []
        self._received = bytearray()
        try:
            self.socket.settimeout(ANSWER_TIMEOUT_S)
            self.socket.connect(path)
            self.pid = peer(self.socket)[0]
            if pid and self.pid != pid:
                raise ConnectionError(f"{path} is not the socket of the daemon with pid {pid}")
            self.greeting = self.receive()
            if negotiate:
                self.execute("qmp_capabilities")
        except BaseException:
            self.socket.close()
            raise

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except ConnectionError as error:
            raise PartedError(self.path, error.errno or errno.ECONNRESET) from None

    def receive(self, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """The next message, a reply or an event; PartedError, TimeoutError."""
        deadline = time.monotonic() + timeout_s
        # A server's messages are lines, unlike a client's.
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.socket], [], [], left)[0]:
                raise TimeoutError(f"the daemon has said nothing for {timeout_s} s")
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError as error:
                raise PartedError(self.path, error.errno or errno.ECONNRESET) from None
            if not data:
                raise PartedError(self.path)
            self._received += data
        line, _, rest = self._received.partition(b"\n")
        self._received = rest
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its reply, with ``return`` or ``error``."""
        self.send(json.dumps(request).encode())
        while True:
            message = self.receive()
            if "event" not in message:
                return message

    def ask(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Run a command: its reply.  Underscores in names of arguments are dashes."""
        dashed = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.request({"execute": name, "arguments": dashed})

    def execute(self, name: str, /, **arguments: Any) -> Any:
        """Run a command: what it returns; RefusedError."""
        reply = self.ask(name, **arguments)
        if "error" in reply:
            raise RefusedError(reply["error"]["desc"], reply["error"]["class"])
        return reply["return"]

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect_to_owner(segment: Segment) -> Client | None:
    """A client of the daemon that serves an image, by what stands in its segment; None if its coordinator is no daemon.

    NoCoordinatorError: it is one, but does not listen.  Whoever answers must be the coordinator itself, by the kernel's
    word: the path is only a hint.
    """
    if not segment.locked(COORDINATOR):
        return None
    path, pid = segment.text(Header.control.offset, Header.control), segment.header(Header.coordinator_pid)
    if not path:
        return None
    try:
        return Client(path, pid=pid)
    except OSError as error:
        text = os.strerror(error.errno) if error.errno else str(error)
        raise NoCoordinatorError(f"the daemon (pid {pid}) can't be reached at {path}: {text}") from None
