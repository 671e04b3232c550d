"""The nursery: one process that has everything imported and forks the children, so that a restart costs milliseconds.

    python -m tools.torturing.nursery      one JSON request a line on stdin, one answer a line on stdout

{"start": ROLE, "place": DIRECTORY, "number": N, "incarnation": K} -> {"pid": P};  {"reap": P} -> {"status": S}.  A dead
child stays a zombie until it is reaped by request, so its pid names nobody else meanwhile.  At the end of stdin all
children are killed: the driver is gone or done.

The nursery itself opens no image, so nothing of the engine is inherited.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.torturing import daemon, plan, reader, writer
from tools.torturing.place import Place

ROOT = Path(__file__).resolve().parents[2]
ROLES = {plan.WRITER: writer.run, plan.READER: reader.run, plan.COORDINATOR: daemon.run}


# -- the nursery's own process -----------------------------------------------------------------------------------------


def _serve() -> None:
    children: set[int] = set()
    # A terminal's Ctrl-C is the driver's to judge.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            if "start" in request:
                pid = os.fork()
                if pid == 0:
                    _become(request)
                children.add(pid)
                answer = {"pid": pid}
            else:
                pid = request["reap"]
                answer = {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
                children.discard(pid)
            print(json.dumps(answer), flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def _become(request: dict[str, Any]) -> None:
    """In the child: play the role, never return."""
    status = 1
    try:
        place = Place(Path(request["place"]))
        number, incarnation = request["number"], request["incarnation"]
        os.setpgid(0, 0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        said = os.open(place.said(request["start"], number, incarnation), flags, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for fd, standard in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(fd, standard)
        os.close(said)
        os.close(nothing)
        # To be asked where it hangs.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
        ROLES[request["start"]](place, number, incarnation)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# -- the driver's side -------------------------------------------------------------------------------------------------


@dataclass
class Child:
    """A process that was started; times are CLOCK_MONOTONIC ns."""

    role: str
    place: Place
    number: int
    incarnation: int
    pid: int
    pidfd: int
    started_ns: int
    killed_ns: int | None = None
    dead_ns: int | None = None
    status: int | None = None
    stopped_ns: int | None = None
    stops: list[tuple[int, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.role} {self.number} of {self.place.directory.name}, incarnation {self.incarnation}"

    @property
    def alive(self) -> bool:
        return self.dead_ns is None

    def signal(self, number: int) -> None:
        if self.alive:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        if self.killed_ns is None:
            self.killed_ns = time.monotonic_ns()
        self.signal(signal.SIGKILL)
        self.proceed()

    def stop(self) -> None:
        if self.stopped_ns is None and self.killed_ns is None:
            self.stopped_ns = time.monotonic_ns()
            self.signal(signal.SIGSTOP)

    def proceed(self) -> None:
        """The end of a stop."""
        if self.stopped_ns is not None:
            self.signal(signal.SIGCONT)
            self.stops.append((self.stopped_ns, time.monotonic_ns()))
            self.stopped_ns = None

    def stopped_within(self, begin_ns: int, end_ns: int) -> int:
        """For how long (ns) it was stopped between two instants."""
        stops = [*self.stops, (self.stopped_ns, end_ns)] if self.stopped_ns is not None else self.stops
        return sum(max(0, min(end, end_ns) - max(begin, begin_ns)) for begin, end in stops)


class Nursery:
    """Starts children through the nursery process; owned by the driver."""

    def __init__(self, cache: Path) -> None:
        # Restarts are many: let even a user who wants no bytecode in his tree have it beside.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(cache)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.torturing.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
            process_group=0,
        )

    def start(self, role: str, place: Place, number: int, incarnation: int) -> Child:
        started_ns = time.monotonic_ns()
        request = {"start": role, "place": str(place.directory), "number": number, "incarnation": incarnation}
        pid = self._ask(request)["pid"]
        return Child(role, place, number, incarnation, pid, os.pidfd_open(pid), started_ns)

    def died(self, child: Child) -> bool:
        """Whether it is dead; then it is reaped, and its `status` is known."""
        if child.alive and select.select([child.pidfd], [], [], 0)[0]:
            child.dead_ns = time.monotonic_ns()
            child.status = self._ask({"reap": child.pid})["status"]
            os.close(child.pidfd)
            if child.stopped_ns is not None:
                child.stops.append((child.stopped_ns, child.dead_ns))
                child.stopped_ns = None
        return not child.alive

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the nursery ended, status {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """Kills all children that are left."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    _serve()
