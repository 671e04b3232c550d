"""One NBD client: handshake, then requests until it leaves.

What can be answered at once is, by the connection's own thread, and many answers leave in one send.  What would wait (a
first touch whose copy is slow, a read from a cold disk, a flush) goes to a thread of the pool and holds up nobody.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shmcbw.errors import (
    ClosedError,
    NoCoordinatorError,
    ShmcbwError,
    SnapshotBrokenError,
)

from . import wire
from .export import Export
from .sending import Buffer, Sender
from .tls import encrypt
from .wire import ExportInfo, Handshake, ProtocolError, Request, Requests

log = logging.getLogger("shmcbw.nbd")

#: A client that has not chosen an export by then is sent away.
HANDSHAKE_LIMIT_S = 60.0
#: Requests of one connection that threads of the pool have; then it is not read from.
PENDING_LIMIT = 64
#: Data of replies that leave together.
ARENA_BYTES = 1 << 20
_REPLIES_LIMIT = 1024

_WRITES = (wire.WRITE, wire.WRITE_ZEROES, wire.TRIM)


@dataclass(frozen=True, slots=True)
class Pools:
    """Threads of an export: for writes that wait, each thread with a slot of the image, and for all else that does."""

    writing: ThreadPoolExecutor
    reading: ThreadPoolExecutor


class Connection:
    """A client on a socket; `run` serves it, `end` makes it leave, from any thread.

    find, names: the exports, by `Handshake`'s rules.  choose: called with the connection and the name of the export
    that the client has chosen; stores it in ``export`` and gives its threads, or None if it is gone meanwhile.
    """

    def __init__(
        self,
        sock: socket.socket,
        find: Callable[[str], ExportInfo | None],
        names: Callable[[], Iterable[str]],
        tls: ssl.SSLContext | None,
        choose: Callable[[Connection, str], Pools | None],
    ) -> None:
        self._sock = sock
        self._find = find
        self._names = names
        self._tls = tls
        self._choose = choose
        self._arena: memoryview | None = None
        self._pending = threading.BoundedSemaphore(PENDING_LIMIT)
        self._pools: Pools | None = None
        self.export: Export | None = None
        self._structured = False
        self._contexts: dict[str, int] = {}

    def run(self) -> None:
        """Serve until the client leaves or `end`; closes the socket."""
        try:
            rest = self._shake_hands()
            if self.export is not None and self._pools is not None:
                # The socket is another one now, if it is encrypted.
                self._transmit(self.export, self._pools, Sender(self._sock), Requests(rest))
        except (ProtocolError, ssl.SSLError) as error:
            log.warning("nbd: connection closed: %s", error)
            self.end()
        except OSError as error:
            # The client is gone, or was told to.
            log.debug("nbd: connection ended: %s", error)
        finally:
            # Whoever still works for this client finds its socket open, and shut.
            for _ in range(PENDING_LIMIT):
                self._pending.acquire()
            try:
                self._sock.close()
            except OSError as error:
                # The descriptor is gone all the same.
                log.debug("nbd: closing a connection: %s", error)

    def end(self) -> None:
        """Cut the client off."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # -- handshake -------------------------------------------------------------------------------------------------

    def _shake_hands(self) -> bytes:
        """Until an export is chosen (``export``) or the client has left; what it has sent beyond that."""
        handshake = Handshake(self._find, self._names, tls=self._tls is not None, tls_required=self._tls is not None)
        self._sock.settimeout(HANDSHAKE_LIMIT_S)
        while True:
            if handshake.chosen is not None:
                # Before it is told: a client that knows that it has the export is one of its clients.
                self._pools = self._choose(self, handshake.chosen.name)
                if self._pools is None:
                    return b""
            self._sock.sendall(handshake.outgoing)
            handshake.outgoing.clear()
            if handshake.chosen is not None or handshake.ended:
                break
            if handshake.starts_tls and self._tls is not None:
                self._sock = encrypt(self._sock, self._tls)
                self._sock.settimeout(HANDSHAKE_LIMIT_S)
                handshake.encrypted()
            data = self._sock.recv(64 << 10)
            if not data:
                return b""
            handshake.receive(data)
        self._sock.settimeout(None)
        self._structured = handshake.structured
        self._contexts = handshake.contexts
        return bytes(handshake.rest)

    # -- transmission ----------------------------------------------------------------------------------------------

    def _transmit(self, export: Export, pools: Pools, sender: Sender, requests: Requests) -> None:
        replies: list[Buffer] = []
        waiting = 0
        while True:
            for request in requests:
                if request.type == wire.DISCONNECT and not request.refused:
                    sender.send(replies)
                    return
                answer = self._answer_now(export, request, waiting)
                if answer is None:
                    # The client waits for what is ready, too.
                    sender.send(replies)
                    waiting = 0
                    pool = pools.writing if request.type in _WRITES else pools.reading
                    # The reply is sent from there.
                    data = bytes(request.data)
                    self._pending.acquire()
                    pool.submit(self._answer, export, sender, request, data)
                    continue
                replies += answer
                waiting += request.length if request.type == wire.READ else 0
                if waiting >= ARENA_BYTES or len(replies) > _REPLIES_LIMIT:
                    sender.send(replies)
                    waiting = 0
            sender.send(replies)
            waiting = 0
            count = self._sock.recv_into(requests.space())
            if count == 0:
                return
            requests.received(count)

    def _answer_now(self, export: Export, request: Request, used: int) -> list[Buffer] | None:
        """The reply, or None if it would keep other requests waiting.

        used: bytes of the arena that replies have which are not sent yet.
        """
        refusal = _refusal(export.info, self._contexts, request)
        if refusal is not None:
            return [wire.error(self._structured, request.cookie, *refusal)]
        try:
            if request.type == wire.WRITE and not request.flags & wire.FLAG_FUA and not export.writethrough:
                if export.write_now(request.data, request.offset):
                    return [wire.done(self._structured, request.cookie)]
            elif request.type == wire.READ:
                view = self._room(used, request.length)
                if export.read_now(view, request.offset):
                    return self._data_reply(request, view)
        except (OSError, ShmcbwError, MemoryError) as error:
            return [self._error_reply(request, error)]
        return None

    def _room(self, used: int, length: int) -> memoryview:
        """Where the data of a reply goes: the arena, which is used again and again, while there is room in it."""
        if used + length > ARENA_BYTES:
            return memoryview(bytearray(length))
        if self._arena is None:
            self._arena = memoryview(bytearray(ARENA_BYTES))
        return self._arena[used : used + length]

    def _answer(self, export: Export, sender: Sender, request: Request, data: bytes) -> None:
        """In a thread of the pool."""
        try:
            replies = self._perform(export, request, data)
        except (OSError, ShmcbwError, MemoryError) as error:
            replies = [self._error_reply(request, error)]
        sender.hand_over(replies, self._pending.release)

    def _perform(self, export: Export, request: Request, data: bytes) -> list[Buffer]:
        length, offset = request.length, request.offset
        if request.type == wire.READ:
            return self._read(export, request)
        if request.type == wire.BLOCK_STATUS:
            return self._block_status(export, request)
        if request.type == wire.WRITE:
            export.write(data, offset)
        elif request.type == wire.WRITE_ZEROES:
            no_hole, fast = bool(request.flags & wire.FLAG_NO_HOLE), bool(request.flags & wire.FLAG_FAST_ZERO)
            export.write_zeroes(length, offset, no_hole=no_hole, fast=fast)
        elif request.type == wire.TRIM:
            export.discard(length, offset)
        elif request.type == wire.CACHE:
            export.cache(length, offset)
        durable = request.flags & wire.FLAG_FUA or export.writethrough
        if request.type == wire.FLUSH or (request.type in _WRITES and durable):
            export.flush()
        return [wire.done(self._structured, request.cookie)]

    def _data_reply(self, request: Request, data: memoryview) -> list[Buffer]:
        if not data:
            # A chunk of data can't be empty.
            return [wire.done(self._structured, request.cookie)]
        return [wire.data_header(self._structured, request.cookie, request.offset, len(data)), data]

    def _read(self, export: Export, request: Request) -> list[Buffer]:
        """All, or with structured replies what can be read before the first byte that can't, and the error for that."""
        view = memoryview(bytearray(request.length))
        count = export.read(view, request.offset)
        if count == request.length:
            return self._data_reply(request, view)
        where = request.offset + count
        refusal = wire.error(
            self._structured, request.cookie, errno.EACCES, f"byte {where} is not part of the snapshot", where
        )
        if not self._structured:
            return [refusal]
        return [wire.data_header(True, request.cookie, request.offset, count, last=False), view[:count], refusal]

    def _block_status(self, export: Export, request: Request) -> list[Buffer]:
        replies: list[Buffer] = []
        contexts = list(self._contexts.items())
        for position, (context, number) in enumerate(contexts):
            extents = export.extents(context, request.length, request.offset)
            extents = merged(extents)
            if request.flags & wire.FLAG_REQ_ONE:
                del extents[1:]
            last = position == len(contexts) - 1
            replies.append(wire.block_status(request.cookie, number, extents, last=last))
        return replies

    def _error_reply(self, request: Request, error: BaseException) -> bytes:
        return wire.error(self._structured, request.cookie, errno_of(error), str(error))


def _refusal(info: ExportInfo, contexts: dict[str, int], request: Request) -> tuple[int, str] | None:
    """Why the request makes no sense for this export: (errno, text)."""
    kind = request.type
    if request.refused:
        return request.refused, "unknown command or flags, or too long"
    if kind == wire.FLUSH:
        return None
    if kind in _WRITES:
        if info.flags & wire.READ_ONLY or (kind != wire.TRIM and not info.flags & wire.SEND_FUA):
            return errno.EPERM, "the export is read-only"
    elif kind == wire.BLOCK_STATUS and (request.length == 0 or not contexts):
        return errno.EINVAL, "block status of no bytes, or in no context"
    if kind == wire.CACHE and not info.flags & wire.SEND_CACHE:
        return errno.EINVAL, "CACHE is not offered"
    if request.offset + request.length > info.size_bytes:
        writes = kind in (wire.WRITE, wire.WRITE_ZEROES)
        return errno.ENOSPC if writes else errno.EINVAL, f"beyond the end of the export at {info.size_bytes}"
    return None


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours of the same state as one."""
    found: list[tuple[int, int]] = []
    for length, flags in extents:
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + length, flags)
        else:
            found.append((length, flags))
    return found


def errno_of(error: BaseException) -> int:
    """What a client is told: EIO for a broken snapshot, ESHUTDOWN for one that is gone, else the error's own errno."""
    if isinstance(error, SnapshotBrokenError):
        return errno.EIO
    if isinstance(error, (ClosedError, NoCoordinatorError)):
        return errno.ESHUTDOWN
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, ValueError):
        return errno.EINVAL
    return getattr(error, "errno", None) or errno.EIO
