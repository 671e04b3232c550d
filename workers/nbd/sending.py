"""Sending replies: many threads, one socket, and nobody waits for a client but its own thread.

Whoever sends holds the lock.  A thread of a pool that finds it taken leaves its reply in the queue, and whoever has the
lock sends that, too; one that finds the socket full leaves the rest to a thread made for it.  So a client that does not
read holds up its own requests and no others, although they share the threads of their export.

The race of the queue: the holder finds it empty, another one adds to it, the holder lets go of the lock.  Both look
again after that: the one that has added, whether the lock is free, the one that let go, whether the queue is empty.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

Buffer = bytes | bytearray | memoryview

_JOIN_BYTES = 64 << 10
_IOV_LIMIT = 512


class Sender:
    """The sending side of a connection.  Each reply is sent as a whole, whatever else is sent."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._queue: deque[tuple[list[Buffer], Callable[[], None]]] = deque()

    def send(self, buffers: list[Buffer]) -> None:
        """Send, and empty the list; may wait for the client.  OSError: it is gone."""
        if not buffers:
            return
        try:
            with self._lock:
                self._write(buffers)
                buffers.clear()
                self._drain()
        finally:
            self._look_again()

    def hand_over(self, buffers: list[Buffer], then: Callable[[], None]) -> None:
        """Have it sent, without waiting for the client; ``then`` is called when it is, or will never be."""
        self._queue.append((buffers, then))
        self._look_again()

    def _look_again(self) -> None:
        """Send what is in the queue, unless somebody else is at it."""
        while self._queue and self._lock.acquire(blocking=False):
            rest: list[Buffer] = []
            try:
                while self._queue and not rest:
                    buffers, then = self._queue.popleft()
                    rest = self._try_write(buffers)
                    if not rest:
                        then()
            finally:
                if not rest:
                    self._lock.release()
            if rest:
                self._finish_elsewhere(rest, then)
                return

    def _finish_elsewhere(self, rest: list[Buffer], then: Callable[[], None]) -> None:
        """In a thread that has the lock from here on."""
        try:
            threading.Thread(target=self._finish, args=(rest, then), name="shmcbw-nbd-send", daemon=True).start()
        except RuntimeError:
            # No more threads: better no client than one that gets half a reply.
            self._cut_off()
            self._finish(rest, then)

    def _finish(self, rest: list[Buffer], then: Callable[[], None]) -> None:
        try:
            self._write(rest)
        except OSError:
            self._cut_off()
        finally:
            self._lock.release()
            then()
        self._look_again()

    def _drain(self) -> None:
        while self._queue:
            buffers, then = self._queue.popleft()
            try:
                self._write(buffers)
            finally:
                then()

    def _write(self, buffers: list[Buffer]) -> None:
        if sum(map(len, buffers)) <= _JOIN_BYTES:
            self._sock.sendall(b"".join(buffers))
            return
        left = [memoryview(buffer) for buffer in buffers]
        while left:
            left = _behind(left, self._sock.sendmsg(left[:_IOV_LIMIT]))

    def _try_write(self, buffers: list[Buffer]) -> list[Buffer]:
        """Send as much as goes without waiting: what is left.  Nothing, if the client is gone."""
        left = [memoryview(buffer) for buffer in buffers]
        try:
            while left:
                left = _behind(left, self._sock.sendmsg(left[:_IOV_LIMIT], (), socket.MSG_DONTWAIT))
        except BlockingIOError:
            return [*left]
        except OSError:
            self._cut_off()
        return []

    def _cut_off(self) -> None:
        """A reply is lost.  A client that lives would wait for it for ever, or take what follows for the rest of it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            # It is gone.
            pass


def _behind(buffers: list[memoryview], sent: int) -> list[memoryview]:
    """What is behind the first bytes of some buffers."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [buffer[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
