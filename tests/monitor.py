"""A daemon that speaks QMP, and a client of it: ``shmcbw serve`` or ``qemu-storage-daemon``, driven in the same way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from shmcbw.workers.qmp.client import Client
from shmcbw.workers.qmp.vocabulary import BY_NAME, EVENTS

EVENT_DATA = {event.name: event.data for event in EVENTS}
DEADLINE_S = 30.0


class Connection(Client):
    """The client of the command line, which here also checks that what comes is as declared."""

    def __init__(self, path: Path, *, ours: bool, negotiate: bool = True) -> None:
        self._ours = ours
        super().__init__(str(path), negotiate=negotiate)

    def receive(self, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        message = super().receive(timeout_s)
        if self._ours and "event" in message:
            EVENT_DATA[message["event"]].check(message["data"], message["event"])
        return message

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        message = super().request(request)
        if self._ours and "return" in message:
            BY_NAME[request["execute"]].gives.check(message["return"], request["execute"])
        return message

    def refusal(self, name: str, /, **arguments: Any) -> str:
        """Run a command that must be refused: why."""
        reply = self.ask(name, **arguments)
        assert "error" in reply, f"{name} {arguments}: {reply}"
        desc: str = reply["error"]["desc"]
        return desc

    def wait_event(self, name: str, test: Callable[[dict[str, Any]], bool] = lambda data: True) -> dict[str, Any]:
        """The data of the first event of a name that passes a test, among those that came and those to come."""
        looked = 0
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for event in self.events[looked:]:
                if event["event"] == name and test(event["data"]):
                    data: dict[str, Any] = event["data"]
                    return data
            looked = len(self.events)
            self.receive(deadline - time.monotonic())

    def wait_status(self, job: str, status: str) -> None:
        """Wait until a job has been in a state."""
        self.wait_event("JOB_STATUS_CHANGE", lambda data: data == {"id": job, "status": status})

    def close(self) -> None:
        self.socket.close()


class Monitored:
    """A daemon in a process of its own; ends when the block ends."""

    ours = True

    def __init__(self, directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.path = directory / "qmp.sock"
        self.log = directory / "daemon.log"
        self._arguments = arguments
        self._environment = {**os.environ, "SHMCBW_FAILPOINTS": "segment", **(environment or {})}
        self._connections: list[Connection] = []
        self.process = self.start()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "shmcbw", "serve", "--qmp", str(self.path), *self._arguments]

    def start(self) -> subprocess.Popen[bytes]:
        """Start (again); returns when it takes clients."""
        with self.log.open("ab") as log:
            start = log.tell()
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        deadline = time.monotonic() + DEADLINE_S
        while not self.ready(start):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"the daemon did not start:\n{self.log.read_text()}")
            time.sleep(0.01)
        return self.process

    def ready(self, start: int) -> bool:
        return b"ready: " in self.log.read_bytes()[start:]

    def connect(self, *, negotiate: bool = True) -> Connection:
        connection = Connection(self.path, ours=self.ours, negotiate=negotiate)
        self._connections.append(connection)
        return connection

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM and wait: the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> Monitored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()
        try:
            if self.process.poll() is None:
                self.stop()
        finally:
            self.kill()
        if kind is not None:
            print(self.log.read_text(), file=sys.stderr)


class StorageDaemon(Monitored):
    """QEMU's."""

    ours = False

    def command(self) -> list[str]:
        socket_option = f"socket,id=monitor,path={self.path},server=on,wait=off"
        return ["qemu-storage-daemon", "--chardev", socket_option, "--monitor", "chardev=monitor", *self._arguments]

    def ready(self, start: int) -> bool:
        return self.path.is_socket()
