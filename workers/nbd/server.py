"""An NBD server: a listening socket, and the processes that serve its clients.

The parent accepts, and hands each client to the process with the fewest, so several busy connections are not held up by
one interpreter.  It sees none of their requests.  A process opens images and snapshots by their names, like any writer
or reader; `process.py` says how it is spoken to.

Killed?  Its clients see their connections end, its slots are reaped like any dead writer's, and the parent starts
another process with the same exports.  The parent killed?  Its processes end with it, and nobody listens any more.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shmcbw.errors import ShmcbwError
from shmcbw.image import close_descriptor

from .. import unix_sockets
from .specification import ExportSpec, Tls
from .tls import server_context

log = logging.getLogger("shmcbw.nbd")

PROCESSES = max(2, min(4, os.cpu_count() or 1))
RESPAWN_PAUSE_S = 0.5
ANSWER_LIMIT_S = 20.0
STOP_LIMIT_S = 5.0
#: A client is sent away if no process has taken it by then.
HAND_OVER_LIMIT_S = 5.0


class ExportInUseError(ShmcbwError):
    """Clients are connected to the export; remove it the hard way to cut them off."""


class _Child:
    """A serving process as its parent sees it."""

    def __init__(self, tls: Tls | None, changed: Callable[[], None]) -> None:
        """``changed`` is called, from another thread, when a client has left, and when the process has ended."""
        self.door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A stopped process must not hold up clients of the others.
        self.door.setblocking(False)
        command = [sys.executable, "-P", "-m", "shmcbw.workers.nbd.process", str(theirs.fileno())]
        if tls is not None:
            command.append(json.dumps(asdict(tls)))
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(theirs.fileno(),)
            )
        #: Its clients by their numbers: the export that each has chosen, None: it has not yet.
        self.clients: dict[int, str | None] = {}
        self.ended = False
        self._changed = changed
        self._serial = 0
        self._answer: dict[str, Any] | None = None
        self._answered = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="shmcbw-nbd-child", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "chosen" in message:
                number, name = message["chosen"]
                if number in self.clients:
                    self.clients[number] = name
            elif "left" in message:
                self.clients.pop(message["left"], None)
                self._changed()
            else:
                with self._answered:
                    self._answer = message
                    self._answered.notify_all()
        with self._answered:
            self.ended = True
            self._answered.notify_all()
        self.clients.clear()
        self._changed()

    def take(self, number: int, client: socket.socket) -> bool:
        """Hand a client over; False if it can't be taken now."""
        self.clients[number] = None
        try:
            socket.send_fds(self.door, [number.to_bytes(8, "little")], [client.fileno()])
        except OSError:
            # It is dead, or takes none.
            self.clients.pop(number, None)
            return False
        return not self.ended

    def ask(self, **command: Any) -> dict[str, Any] | None:
        """Send a command and wait for its answer; None: the process has died, over this or before.

        One that does not answer in time is killed: another one will take its place.
        """
        assert self.process.stdin is not None
        self._serial += 1
        try:
            self.process.stdin.write(json.dumps({"serial": self._serial, **command}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return None
        with self._answered:
            self._answered.wait_for(lambda: self._is_answered() or self.ended, ANSWER_LIMIT_S)
            if self._is_answered():
                return self._answer
        if not self.ended:
            log.error("nbd: process %d does not answer: killed", self.process.pid)
            self.process.kill()
        return None

    def _is_answered(self) -> bool:
        return self._answer is not None and self._answer["serial"] == self._serial

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
        self.door.close()


class Server:
    """Serves exports on a listening socket, by ``processes`` processes, until closed.

    The socket belongs to the server from here on.  ``path``: of a unix socket, removed at the end.
    ``connections_max``: clients at once, 0: no limit; more of them wait.  Usable from any thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        path: str | None = None,
        tls: Tls | None = None,
        processes: int = PROCESSES,
        connections_max: int = 0,
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
        self.address: Any = listener.getsockname()
        self._path = path
        self._place = unix_sockets.place_of(path) if path is not None else (0, 0)
        self._tls = tls
        self._connections_max = connections_max
        self._lock = threading.RLock()
        self._exports: dict[str, ExportSpec] = {}
        self._closed = False
        self._next_client = 1
        #: Notified when a client leaves, when a process ends or is replaced, and at the end.
        self._changed = threading.Condition()
        self._children = [_Child(tls, self._notify) for _ in range(processes)]
        self._threads = [
            threading.Thread(target=target, name=f"shmcbw-nbd-{target.__name__.strip('_')}", daemon=True)
            for target in (self._accept, self._supervise)
        ]
        for thread in self._threads:
            thread.start()

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
        return sum(list(child.clients.values()).count(name) for child in self._children)

    # -- exports -----------------------------------------------------------------------------------------------------

    def add(self, spec: ExportSpec) -> None:
        """Serve one more; OSError with nothing changed if it can't be opened, ValueError if the name is taken."""
        with self._lock:
            if spec.name in self._exports:
                raise ValueError(f"an export is called {spec.name!r} already")
            done: list[_Child] = []
            for child in self._children:
                answer = child.ask(add=asdict(spec))
                if answer is not None and "error" in answer:
                    for other in done:
                        other.ask(remove=spec.name, hard=True)
                    what = f"export {spec.name!r} of {spec.image}: {answer['error']}"
                    raise OSError(answer["errno"], what)
                done.append(child)
            self._exports[spec.name] = spec

    def remove(self, name: str, *, hard: bool = False) -> None:
        """Serve one less.  ExportInUseError while clients use it, unless ``hard``: then they are cut off."""
        with self._lock:
            if name not in self._exports:
                raise ValueError(f"no export is called {name!r}")
            done: list[_Child] = []
            for child in self._children:
                answer = child.ask(remove=name, hard=hard)
                if answer is not None and "clients" in answer:
                    for other in done:
                        other.ask(add=asdict(self._exports[name]))
                    raise ExportInUseError(f"export {name!r} is in use by {answer['clients']} connections")
                done.append(child)
            del self._exports[name]

    # -- clients -----------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return not self._connections_max or sum(len(child.clients) for child in self._children) < self._connections_max

    def _accept(self) -> None:
        """Take clients, in a thread of its own, until the end."""
        complaint: int | None = None
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._has_room() or self._closed)
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    # Out of descriptors, or a client that left in the queue: others are to be served.
                    if error.errno != complaint:
                        log.warning("nbd: accept: %s", error)
                    complaint = error.errno
                    time.sleep(0.05)
                continue
            complaint = None
            try:
                self._hand_over(client)
            finally:
                # Whatever close() has to say: the next client is to be served.
                close_descriptor(client.detach())

    def _hand_over(self, client: socket.socket) -> None:
        """To the process with the fewest clients that takes it."""
        number, self._next_client = self._next_client, self._next_client + 1
        deadline = time.monotonic() + HAND_OVER_LIMIT_S
        while not self._closed and time.monotonic() < deadline:
            if any(child.take(number, client) for child in sorted(self._children, key=lambda each: len(each.clients))):
                return
            with self._changed:
                self._changed.wait(0.05)
        if not self._closed:
            log.error("nbd: no process takes a client: it is sent away")

    # -- processes ---------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Another process for each that dies, in a thread of its own, until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or any(child.ended for child in self._children))
            with self._lock:
                if self._closed:
                    return
                for index, child in enumerate(self._children):
                    if child.ended:
                        child.stop()
                        log.warning("nbd: process %d ended (%s): replaced", child.process.pid, child.process.returncode)
                        self._children[index] = self._replacement()
            self._notify()
            # Not in a circle at full speed if it dies at once each time.
            time.sleep(RESPAWN_PAUSE_S)

    def _replacement(self) -> _Child:
        child = _Child(self._tls, self._notify)
        for spec in self._exports.values():
            answer = child.ask(add=asdict(spec))
            if answer is not None and "error" in answer:
                log.error("nbd: export %r is not served by all: %s", spec.name, answer["error"])
        return child

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cut all clients off, end the processes, remove the socket."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # Wakes who waits in accept.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._notify()
        for thread in self._threads:
            thread.join()
        for child in self._children:
            child.stop()
        self._listener.close()
        if self._path is not None:
            unix_sockets.remove(self._path, self._place)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
