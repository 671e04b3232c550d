"""An NBD server: a listening socket, and processes that serve its clients.

    python -m shmcbw.workers.nbd.server FD      one of them; started by `Server`, with the socket as descriptor FD

All processes wait in ``accept`` on the one socket, so several busy connections are not held up by one interpreter.  A
process opens images and snapshots by their names, like any writer or reader; nothing but the socket is handed down.
The parent tells it what to serve by lines of JSON on its standard input, and hears by lines on its output:

    {"add": EXPORT}                     {"added": NAME} or {"refused": NAME, "errno": N, "error": TEXT}
    {"remove": NAME}                    {"removed": NAME}: its clients were cut off
                                        {"clients": {NAME: COUNT}} whenever that changes

Killed?  Its clients see their connections end, its slots are reaped like any dead writer's, and the parent starts
another process with the same exports.  The parent killed?  Standard input ends, and the process with it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from shmcbw.errors import ShmcbwError
from shmcbw.reader import open_snapshot

from .connection import Connection
from .export import DiskExport, Export, SnapshotExport
from .tls import server_context

log = logging.getLogger("shmcbw.nbd")

#: Threads of a process for requests that wait; each writing one takes a slot of the image.
POOL_THREADS = 8
RESPAWN_PAUSE_S = 0.5
ANSWER_LIMIT_S = 20.0
STOP_LIMIT_S = 5.0
_LISTEN_BACKLOG = 128


class ExportInUseError(ShmcbwError):
    """Clients are connected to the export; remove it the hard way to cut them off."""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What to serve: an image (``snapshot`` None) or a snapshot of it (serial number, or path of scratch or target).

    ``writable``: an image takes writes; a snapshot takes discards, which let go of what was read.
    """

    name: str
    image: str
    snapshot: int | str | None = None
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files; with ``authority`` clients must show a certificate that it has signed."""

    certificate: str
    key: str
    authority: str | None = None


def open_export(spec: ExportSpec) -> Export:
    """Open what a specification names, in this process; OSError or ShmcbwError."""
    if spec.snapshot is None:
        return DiskExport(spec.name, spec.image, writable=spec.writable)
    return SnapshotExport(spec.name, open_snapshot(spec.image, spec.snapshot), writable=spec.writable)


def listen_unix(path: str) -> socket.socket:
    """A listening unix socket, mode 0600; one that nobody listens on any more is replaced."""
    sock = socket.socket(socket.AF_UNIX)
    # The mode from the beginning: nobody may connect before a chmod.
    before = os.umask(0o177)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or _somebody_listens(path):
                raise OSError(error.errno, f"{path}: can't listen: {error.strerror}") from None
            os.unlink(path)
            sock.bind(path)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    sock.listen(_LISTEN_BACKLOG)
    return sock


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(address, family=family, backlog=_LISTEN_BACKLOG)


# -- one process -------------------------------------------------------------------------------------------------------


class _Process:
    """Exports and connections of one serving process."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._listener = listener
        self._tls = tls
        self._lock = threading.Lock()
        self._exports: dict[str, Export] = {}
        self._connections: set[Connection] = set()
        self._pool = ThreadPoolExecutor(POOL_THREADS, "shmcbw-nbd")

    def serve(self) -> None:
        """Accept for ever, in a thread of its own."""
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                # Out of descriptors, or a client that left in the queue: others are to be served.
                log.warning("nbd: accept: %s", error)
                time.sleep(0.05)
                continue
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve_one, args=(sock,), name="shmcbw-nbd-client", daemon=True).start()

    def _serve_one(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._find, self._names, self._pool, self._tls, self._tell_clients)
        with self._lock:
            self._connections.add(connection)
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.discard(connection)
            self._tell_clients()

    def _find(self, name: str) -> Export | None:
        with self._lock:
            if name == "" and len(self._exports) == 1:
                return next(iter(self._exports.values()))
            return self._exports.get(name)

    def _names(self) -> list[str]:
        with self._lock:
            return sorted(self._exports)

    def _tell_clients(self) -> None:
        with self._lock:
            counts = {
                name: sum(connection.export is export for connection in self._connections)
                for name, export in self._exports.items()
            }
            _say({"clients": counts})

    def obey(self, line: str) -> None:
        """One line from the parent."""
        command = json.loads(line)
        if "add" in command:
            spec = ExportSpec(**command["add"])
            try:
                export = open_export(spec)
            except (OSError, ShmcbwError) as error:
                number = getattr(error, "errno", None) or errno.EIO
                _say({"refused": spec.name, "errno": number, "error": str(error)})
                return
            with self._lock:
                self._exports[spec.name] = export
            _say({"added": spec.name})
        else:
            self._remove(command["remove"])

    def _remove(self, name: str) -> None:
        with self._lock:
            export = self._exports.pop(name, None)
            clients = [connection for connection in self._connections if connection.export is export]
        for client in clients:
            client.end()
        deadline = time.monotonic() + STOP_LIMIT_S
        while export is not None and time.monotonic() < deadline:
            with self._lock:
                if not any(connection.export is export for connection in self._connections):
                    export.close()
                    break
            time.sleep(0.005)
        _say({"removed": name})


_saying = threading.Lock()


def _say(message: dict[str, Any]) -> None:
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
    listener = socket.socket(fileno=int(arguments[0]))
    tls = server_context(**json.loads(arguments[1])) if len(arguments) > 1 else None
    process = _Process(listener, tls)
    threading.Thread(target=process.serve, name="shmcbw-nbd-accept", daemon=True).start()
    for line in sys.stdin:
        process.obey(line)
    # Not the interpreter's slow way out: threads may wait for copies, and clients for us.
    os._exit(0)


# -- the parent's side -------------------------------------------------------------------------------------------------


class _Child:
    """A serving process as its parent sees it."""

    def __init__(self, listener: socket.socket, tls: Tls | None, changed: Callable[[], None]) -> None:
        command = [sys.executable, "-P", "-m", "shmcbw.workers.nbd.server", str(listener.fileno())]
        if tls is not None:
            command.append(json.dumps(asdict(tls)))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(listener.fileno(),)
        )
        self.clients: dict[str, int] = {}
        self._changed = changed
        self._answers: list[dict[str, Any]] = []
        self._answered = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name="shmcbw-nbd-child", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "clients" in message:
                self.clients = message["clients"]
            else:
                with self._answered:
                    self._answers.append(message)
                    self._answered.notify_all()
        with self._answered:
            self._ended = True
            self._answered.notify_all()
        self._changed()

    def ask(self, command: dict[str, Any]) -> dict[str, Any] | None:
        """Send a command and wait for its answer; None if the process died over it or does not answer in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return None
        with self._answered:
            self._answered.wait_for(lambda: self._answers or self._ended, ANSWER_LIMIT_S)
            return self._answers.pop(0) if self._answers else None

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        self.process.stdout.close()


class Server:
    """Serves exports on a listening socket, by ``processes`` processes, until closed.

    The socket belongs to the server from here on.  ``path``: of a unix socket, removed at the end.
    """

    def __init__(
        self, listener: socket.socket, *, path: str | None = None, tls: Tls | None = None, processes: int = 2
    ) -> None:
        try:
            if processes < 1:
                raise ValueError(f"processes: {processes} is not above 0")
            if tls is not None:
                # What is wrong with the files is found now, and here.
                server_context(**asdict(tls))
        except BaseException:
            listener.close()
            if path is not None:
                os.unlink(path)
            raise
        self._listener = listener
        self._path = path
        self._identity = os.stat(path)[1:3] if path is not None else None
        self._tls = tls
        self._lock = threading.RLock()
        self._exports: dict[str, ExportSpec] = {}
        self._closed = False
        self._wake = threading.Event()
        self._children = [_Child(listener, tls, self._wake.set) for _ in range(processes)]
        self._supervisor = threading.Thread(target=self._supervise, name="shmcbw-nbd-supervisor", daemon=True)
        self._supervisor.start()

    @property
    def address(self) -> Any:
        """Where it listens: a path, or (host, port, …)."""
        return self._listener.getsockname()

    @property
    def exports(self) -> list[ExportSpec]:
        with self._lock:
            return list(self._exports.values())

    @property
    def pids(self) -> list[int]:
        """The serving processes."""
        with self._lock:
            return [child.process.pid for child in self._children]

    def clients(self, name: str) -> int:
        """Connections that use an export."""
        return sum(child.clients.get(name, 0) for child in self._children)

    def add(self, spec: ExportSpec) -> None:
        """Serve one more; OSError with nothing changed if it can't be opened, ValueError if the name is taken."""
        with self._lock:
            if spec.name in self._exports:
                raise ValueError(f"an export is called {spec.name!r} already")
            done: list[_Child] = []
            for child in self._children:
                answer = child.ask({"add": asdict(spec)})
                if answer is not None and "refused" in answer:
                    for other in done:
                        other.ask({"remove": spec.name})
                    raise OSError(answer["errno"], f"export {spec.name!r}: {answer['error']}")
                done.append(child)
            self._exports[spec.name] = spec

    def remove(self, name: str, *, hard: bool = False) -> None:
        """Serve one less.  ExportInUseError while clients use it, unless ``hard``: then they are cut off."""
        with self._lock:
            if name not in self._exports:
                raise ValueError(f"no export is called {name!r}")
            if not hard and (count := self.clients(name)):
                raise ExportInUseError(f"export {name!r} is in use by {count} connections")
            del self._exports[name]
            for child in self._children:
                child.ask({"remove": name})

    def _supervise(self) -> None:
        """Another process for each that dies."""
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                if self._closed:
                    return
                for index, child in enumerate(self._children):
                    if child.process.poll() is None and not child._ended:
                        continue
                    child.stop()
                    log.warning("nbd: process %d ended (%s): replaced", child.process.pid, child.process.returncode)
                    self._children[index] = replacement = _Child(self._listener, self._tls, self._wake.set)
                    for spec in self._exports.values():
                        answer = replacement.ask({"add": asdict(spec)})
                        if answer is not None and "refused" in answer:
                            log.error("nbd: export %r is not served by all: %s", spec.name, answer["error"])
            # Not in a circle at full speed if it dies at once each time.
            time.sleep(RESPAWN_PAUSE_S)

    def close(self) -> None:
        """Cut all clients off, end the processes, remove the socket."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake.set()
        self._supervisor.join()
        for child in self._children:
            child.stop()
        self._listener.close()
        if self._path is not None:
            try:
                if os.stat(self._path)[1:3] == self._identity:
                    os.unlink(self._path)
            except FileNotFoundError:
                pass

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
