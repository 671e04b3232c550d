"""The QMP server: a unix socket, its clients, and events to all of them.

Everything that is shared lives on the event loop's thread.  The loop never blocks and never waits for a client:

* a command runs in a thread.  The commands of one client run in order; those that alter something also take turns with
  the other clients', as in QEMU, so that a handler may look and then act;
* a client that does not read its replies waits in its own task, and no more is read from it; one that leaves
  `QUEUE_BYTES_MAX` of replies and events unread when an event comes is dropped;
* what comes in is bounded by the decoder, how many come in by `CLIENTS_MAX`.

Who may connect: the socket is 0600, and the kernel's word on the peer (SO_PEERCRED) must be our own user or root.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shmcbw.errors import ShmcbwError

from .. import unix_sockets
from .schema import QMPError, message_of
from .vocabulary import BY_NAME
from .wire import Decoder, Malformed, encode

log = logging.getLogger("shmcbw")

CLIENTS_MAX = 128
QUEUE_BYTES_MAX = 4 << 20
CLOSE_TIMEOUT_S = 2.0
_READ_BYTES = 1 << 16

#: The QEMU whose commands we follow: clients decide by it what they may ask for.
QEMU_VERSION = {"major": 10, "minor": 1, "micro": 0}

Execute = Callable[[str, dict[str, Any]], Any]


class Client:
    """One connection."""

    def __init__(self, writer: asyncio.StreamWriter, number: int) -> None:
        self.writer = writer
        self.number = number
        self.negotiated = False

    def send(self, message: Any) -> None:
        """Queue a reply; the caller waits until there is room for the next one."""
        if not self.writer.is_closing():
            self.writer.write(encode(message))

    def send_event(self, message: Any) -> None:
        """Queue an event; a client that leaves too much unread is dropped."""
        self.send(message)
        if not self.writer.is_closing() and self.writer.transport.get_write_buffer_size() > QUEUE_BYTES_MAX:
            log.warning("QMP client %d does not read: dropped", self.number)
            self.writer.transport.abort()


class Server:
    """Serves one socket.  ``execute(name, arguments)`` runs a checked command in a thread and may block."""

    def __init__(self, path: str, package: str, execute: Execute) -> None:
        self.path = path
        self.version = {"qemu": QEMU_VERSION, "package": package}
        self._execute = execute
        self._clients: dict[Client, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="shmcbw-qmp")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self._count = 0
        self._place = (0, 0)
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self) -> None:
        """Take the path; clients may connect and wait.  OSError: it is another daemon's, too long, or can't be had."""
        self._socket = unix_sockets.listen(self.path, CLIENTS_MAX)
        self._place = unix_sockets.place_of(self.path)

    async def start(self) -> None:
        """Take on clients."""
        self._loop = asyncio.get_running_loop()
        self._listener = await asyncio.start_unix_server(self._connected, sock=self._socket, limit=_READ_BYTES)

    @contextlib.asynccontextmanager
    async def ending(self) -> AsyncIterator[None]:
        """The end: no new clients and no new commands; the command that runs comes to its end; then the block, of which
        events still go out; then the clients are let go."""
        if self._socket is not None:
            unix_sockets.remove(self.path, self._place)
            if self._listener is not None:
                self._listener.close()
            self._socket.close()
        self._ending = True
        try:
            async with self._turn:
                yield
        finally:
            await self._part()

    async def _part(self) -> None:
        # What was posted until now is queued first.
        await asyncio.sleep(0)
        clients = dict(self._clients)
        for client in clients:
            client.writer.close()
        if clients:
            _, late = await asyncio.wait(clients.values(), timeout=CLOSE_TIMEOUT_S)
            for client, task in clients.items():
                if task in late:
                    client.writer.transport.abort()
                    task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._threads.shutdown(wait=False)

    def post(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to every client that has negotiated.  From any thread; never blocks; in order per thread."""
        now = time.time_ns()
        stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
        message = {"event": name, "data": data, "timestamp": stamp}
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._broadcast, message)
        except RuntimeError:
            # The loop is closed: there are no clients any more.
            pass

    def between_commands(self, act: Callable[[], None]) -> None:
        """Have ``act`` run soon, in a thread, when it is nobody's turn.  From any thread; never blocks."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_between, act)
        except RuntimeError:
            # The loop is closed.
            pass

    def _begin_between(self, act: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(self._between(act))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _between(self, act: Callable[[], None]) -> None:
        async with self._turn:
            if not self._ending:
                await asyncio.get_running_loop().run_in_executor(self._threads, act)

    def _broadcast(self, message: dict[str, Any]) -> None:
        for client in list(self._clients):
            if client.negotiated:
                client.send_event(message)

    # -- one client ------------------------------------------------------------------------------------------------

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = peer(writer.get_extra_info("socket"))
        self._count += 1
        client = Client(writer, self._count)
        if uid not in (os.geteuid(), 0):
            log.warning("QMP client refused: pid %d of uid %d", pid, uid)
        elif len(self._clients) >= CLIENTS_MAX:
            log.warning("QMP client refused: there are %d already", CLIENTS_MAX)
        else:
            task = asyncio.current_task()
            assert task is not None
            self._clients[client] = task
            try:
                client.send({"QMP": {"version": self.version, "capabilities": []}})
                await self._converse(client, reader)
            except (ConnectionError, TimeoutError):
                pass
            finally:
                del self._clients[client]
        writer.close()

    async def _converse(self, client: Client, reader: asyncio.StreamReader) -> None:
        decoder = Decoder()
        while data := await reader.read(_READ_BYTES):
            for message in decoder.feed(data):
                client.send(await self._answer(client, message))
                await client.writer.drain()
                # Malformed input is answered without waiting for anything: the others get their turn too.
                await asyncio.sleep(0)

    async def _answer(self, client: Client, message: Any) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        if isinstance(message, dict) and "id" in message:
            answer["id"] = message["id"]
        try:
            name, arguments = parse_request(message)
            answer["return"] = await self._run(client, name, arguments)
        except QMPError as error:
            answer["error"] = {"class": error.error_class, "desc": error.desc}
        return answer

    async def _run(self, client: Client, name: str, arguments: dict[str, Any]) -> Any:
        if not client.negotiated and name != "qmp_capabilities":
            raise QMPError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        if client.negotiated and name == "qmp_capabilities":
            raise QMPError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        command = BY_NAME.get(name)
        if command is None:
            raise QMPError(f"The command {name} has not been found", "CommandNotFound")
        checked = command.check(arguments)
        if name == "qmp_capabilities":
            for capability in checked.get("enable", ()):
                raise QMPError(f"Capability '{capability}' is not available")
            client.negotiated = True
            return {}
        if name == "query-version":
            return self.version
        loop = asyncio.get_running_loop()
        if not command.alters:
            return await loop.run_in_executor(self._threads, self._guarded, name, checked)
        async with self._turn:
            if self._ending:
                raise QMPError("the daemon is ending")
            return await loop.run_in_executor(self._threads, self._guarded, name, checked)

    def _guarded(self, name: str, arguments: dict[str, Any]) -> Any:
        """In a thread: whatever goes wrong is this command's answer, and never the daemon's end."""
        try:
            return self._execute(name, arguments)
        except QMPError:
            raise
        except (ShmcbwError, OSError, ValueError) as error:
            raise QMPError(message_of(error)) from error
        except Exception as error:  # a thread's outermost level
            log.exception("command %s", name)
            raise QMPError(f"internal error in {name}: {type(error).__name__}: {error}") from error


def parse_request(message: Any) -> tuple[str, dict[str, Any]]:
    """Command and arguments of a message; QMPError for what is none, in QEMU's order and words."""
    if isinstance(message, Malformed):
        raise QMPError(message.desc)
    if not isinstance(message, dict):
        raise QMPError("QMP input must be a JSON object")
    for member, value in message.items():
        if member == "execute":
            if not isinstance(value, str):
                raise QMPError("QMP input member 'execute' must be a string")
        elif member == "arguments":
            if not isinstance(value, dict):
                raise QMPError("QMP input member 'arguments' must be an object")
        elif member != "id":
            raise QMPError(f"QMP input member '{member}' is unexpected")
    if "execute" not in message:
        raise QMPError("QMP input lacks member 'execute'")
    return message["execute"], message.get("arguments", {})


# -- the socket -------------------------------------------------------------------------------------------------------


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end, as the kernel noted them at connect."""
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def runtime_directory(path: str | None = None) -> str:
    """The directory for the socket, made if need be: ours, 0700.  PermissionError if it is anything else.

    Default: ``$XDG_RUNTIME_DIR/shmcbw``, for root ``/run/shmcbw``, else ``/tmp/shmcbw-UID``.
    """
    if path is None:
        base = os.environ.get("XDG_RUNTIME_DIR", "")
        if base and os.path.isabs(base):
            path = os.path.join(base, "shmcbw")
        elif os.geteuid() == 0:
            path = "/run/shmcbw"
        else:
            path = f"/tmp/shmcbw-{os.geteuid()}"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(
            errno.EPERM,
            f"is no directory of ours that nobody else may enter (uid {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):o}): give another one with --qmp, or set XDG_RUNTIME_DIR",
            path,
        )
    return path
