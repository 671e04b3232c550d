"""One process that serves NBD clients: started, and told what to serve, by `server.Server`.

    python -m shmcbw.workers.nbd.process DOOR [TLS]

It opens images and snapshots by their names, like any writer or reader.  Lines of JSON on standard input, and its
answers on standard output:

    {"serial": N, "add": EXPORT}                {"serial": N}, or with "errno" and "error": refused
    {"serial": N, "remove": NAME, "hard": B}    {"serial": N}, or with "clients": in use by so many, and not removed
                                                {"chosen": [CLIENT, NAME]}: a client has chosen an export
                                                {"left": CLIENT}: it has left

DOOR is the descriptor of a socket by which clients come: packets of 8 bytes, the client's number, with its socket.
The end of standard input is the parent's death, and the end of this process.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from shmcbw.errors import ShmcbwError
from shmcbw.image import close_descriptor
from shmcbw.reader import open_snapshot

from .connection import Connection, Pools
from .export import DiskExport, Export, SnapshotExport
from .specification import ExportSpec
from .tls import server_context
from .wire import ExportInfo

log = logging.getLogger("shmcbw.nbd")

#: Threads of an export for what waits: writes, each of which takes a slot of the image, and all the rest.
WRITING_THREADS = 8
READING_THREADS = 8
#: How long a removed export waits for requests of the clients that were cut off.
REMOVE_LIMIT_S = 5.0


def open_export(spec: ExportSpec) -> Export:
    """Open what a specification names, in this process; OSError or ShmcbwError."""
    if spec.snapshot is None:
        return DiskExport(spec)
    return SnapshotExport(spec, open_snapshot(spec.image, spec.snapshot))


class _Served:
    """An export and its threads: slow writes of one export wait beside those of others, and beside its reads."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.pools = Pools(
            ThreadPoolExecutor(WRITING_THREADS, "shmcbw-nbd-write"),
            ThreadPoolExecutor(READING_THREADS, "shmcbw-nbd-read"),
        )

    def close(self) -> None:
        """After the last connection: no request is under way."""
        self.pools.writing.shutdown()
        self.pools.reading.shutdown()
        self.export.close()


class Process:
    """Exports and connections of one serving process."""

    def __init__(self, door: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._door = door
        self._tls = tls
        self._lock = threading.Lock()
        self._exports: dict[str, _Served] = {}
        self._connections: dict[int, Connection] = {}

    def take_clients(self) -> None:
        """For ever, in a thread of its own."""
        complaint: int | None = None
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._door, 8, 1)
            except OSError as error:
                # The client waits at the door, and others will come.
                if error.errno != complaint:
                    log.warning("nbd: no client can be taken: %s", error)
                complaint = error.errno
                time.sleep(0.05)
                continue
            complaint = None
            if not data:
                return
            number = int.from_bytes(data, "little")
            try:
                if not descriptors:
                    # This process has no descriptor left for it.
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                self._take(number, descriptors[0])
            except (OSError, RuntimeError) as error:
                # RuntimeError: no thread can be started.
                log.warning("nbd: a client is sent away: %s", error)
                say({"left": number})

    def _take(self, number: int, fd: int) -> None:
        """Serve a client in a thread of its own; OSError, RuntimeError: its socket is closed."""
        with ExitStack() as opened:
            opened.callback(close_descriptor, fd)
            sock = socket.socket(fileno=fd)
            opened.callback(sock.detach)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # A machine that vanished is found out some day.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            threading.Thread(target=self._serve, args=(number, sock), name="shmcbw-nbd-client", daemon=True).start()
            opened.pop_all()

    def _serve(self, number: int, sock: socket.socket) -> None:
        choose = functools.partial(self._choose, number)
        connection = Connection(sock, self._find, self._names, self._tls, choose)
        with self._lock:
            self._connections[number] = connection
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[number]
            say({"left": number})

    def _find(self, name: str) -> ExportInfo | None:
        with self._lock:
            served = self._look_up(name)
            return served.export.info if served is not None else None

    def _choose(self, number: int, connection: Connection, name: str) -> Pools | None:
        with self._lock:
            served = self._look_up(name)
            if served is None:
                return None
            connection.export = served.export
        say({"chosen": [number, served.export.info.name]})
        return served.pools

    def _look_up(self, name: str) -> _Served | None:
        """The only one has also the name ""."""
        if name == "" and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        return self._exports.get(name)

    def _names(self) -> list[str]:
        with self._lock:
            return sorted(self._exports)

    def obey(self, line: str) -> None:
        """One line from the parent."""
        command = json.loads(line)
        answer: dict[str, Any] = {"serial": command["serial"]}
        if "add" in command:
            answer |= self._add(ExportSpec.from_json(command["add"]))
        else:
            answer |= self._remove(command["remove"], hard=command["hard"])
        say(answer)

    def _add(self, spec: ExportSpec) -> dict[str, Any]:
        try:
            served = _Served(open_export(spec))
        except (OSError, ShmcbwError, ValueError) as error:
            return {"errno": getattr(error, "errno", None) or errno.EIO, "error": str(error)}
        with self._lock:
            self._exports[spec.name] = served
        return {}

    def _remove(self, name: str, *, hard: bool) -> dict[str, Any]:
        with self._lock:
            served = self._exports.get(name)
            if served is None:
                return {}
            clients = self._clients(served)
            if clients and not hard:
                return {"clients": len(clients)}
            # From here on nobody can choose it.
            del self._exports[name]
        for client in clients:
            client.end()
        deadline = time.monotonic() + REMOVE_LIMIT_S
        while clients and time.monotonic() < deadline:
            time.sleep(0.002)
            with self._lock:
                clients = self._clients(served)
        if clients:
            log.warning("nbd: requests of export %r still wait: it is closed by the end of its process", name)
        else:
            served.close()
        return {}

    def _clients(self, served: _Served) -> list[Connection]:
        return [each for each in self._connections.values() if each.export is served.export]


_saying = threading.Lock()


def say(message: dict[str, Any]) -> None:
    """Tell the parent."""
    with _saying:
        try:
            print(json.dumps(message), flush=True)
        except BrokenPipeError:
            # The parent is gone; standard input says so too.
            pass


def main(arguments: list[str]) -> int:
    """One serving process, until its standard input ends."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # A terminal's Ctrl-C goes to the whole group: the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    door = socket.socket(fileno=int(arguments[0]))
    tls = server_context(**json.loads(arguments[1])) if len(arguments) > 1 else None
    process = Process(door, tls)
    threading.Thread(target=process.take_clients, name="shmcbw-nbd-door", daemon=True).start()
    for line in sys.stdin:
        process.obey(line)
    # Not the interpreter's slow way out: threads may wait for copies, and clients for us.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
