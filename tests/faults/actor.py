"""A coordinator or a writer in a process of its own, driven by lines of JSON: ``python -m tests.faults.actor LOG``.

Each command is a method of `Part`; its answer is {"ok": …}, or {"error": …} with the error's classes, errno and
message.  One process plays many rounds: what it opened in one, it has closed at its end.  LOG takes what it and its
workers say on stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shmcbw
from shmcbw.invariants import check
from shmcbw.workers import Coordinator
from shmcbw.workers.coordinator import CoordinatorSnapshot
from shmcbw.workers.jobs import Job
from shmcbw.workers.nbd.address import listen_tcp
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec
from shmcbw.workers.stamps import DATA, ZERO, Layout, LogWriter, make_unit
from tests.owner import Owner

SIZE_BYTES = 2 << 20
TIMEOUT_S = 10.0
#: The commanded writer of a round, and the one that writes by itself.
COMMANDED, FREE = 0, 1


def layout_of(seed: int) -> Layout:
    """The image of a round: holes, until it is written."""
    return Layout(SIZE_BYTES, 2, seed, ZERO)


class Answer:
    """What came of a command."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.value = raw.get("ok")
        self.kinds: list[str] = raw.get("error", [])
        self.errno: int | None = raw.get("errno")
        self.message: str = raw.get("message", "")

    @property
    def good(self) -> bool:
        return not self.kinds

    def __str__(self) -> str:
        return str(self.value) if self.good else f"{self.kinds[0]}: {self.message}"


class Actor(Owner):
    """The parent's end."""

    module = "tests.faults.actor"

    def play(self, do: str, *, within_s: float = 60.0, **parameters: Any) -> Answer:
        """Have a command done; AssertionError if the process hangs over it or dies."""
        self.send(do=do, **parameters)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], within_s)
        assert ready, f"{do}: pid {self.pid} does not answer within {within_s} s"
        raw = self.answer()
        assert raw is not None, f"{do}: pid {self.pid} died (status {self.process.wait()})"
        return Answer(raw)


class Part:
    """What the process has open, and what it can be told to do."""

    def __init__(self) -> None:
        self.coordinator: Coordinator | None = None
        self.snapshot_: CoordinatorSnapshot | None = None
        self.job: Job | None = None
        self.writer: Writer | None = None
        self.server: Server | None = None

    # -- the coordinator -------------------------------------------------------------------------------------------

    def start(self, image: str, state: str | None = None) -> dict[str, int]:
        self.coordinator = Coordinator(image, workers=2, slots=4, drain_limit=2.0, state_dir=state)
        self.job = next(iter(self.coordinator.jobs), None)
        self.snapshot_ = next(iter(self.coordinator.snapshots), None)
        return {"jobs": len(self.coordinator.jobs), "snapshots": len(self.coordinator.snapshots)}

    def snapshot(self, scratch: str) -> list[int]:
        assert self.coordinator is not None
        with _between() as instants:
            self.snapshot_ = self.coordinator.snapshot(scratch, cbw_timeout=TIMEOUT_S)
        return instants

    def backup(
        self, target: str, speed: int, sync: str = "full", bitmap: str | None = None, mode: str | None = None
    ) -> list[int]:
        assert self.coordinator is not None
        with _between() as instants:
            self.job = self.coordinator.backup(
                target, speed=speed, cbw_timeout=TIMEOUT_S, sync=sync, bitmap=bitmap, bitmap_mode=mode
            )
        return instants

    def add_bitmap(self, name: str) -> None:
        assert self.coordinator is not None
        self.coordinator.bitmaps.add(name, persistent=True)

    def remove_bitmap(self, name: str) -> None:
        assert self.coordinator is not None
        self.coordinator.bitmaps.remove(name)

    def bitmaps(self) -> dict[str, bool]:
        """Names, and whether an increment can be made of each."""
        assert self.coordinator is not None
        return {name: not bitmap.inconsistent for name, bitmap in self.coordinator.bitmaps.items()}

    def speed(self, speed: int) -> None:
        assert self.job is not None
        self.job.set_speed(speed)

    def wait(self, timeout: float) -> None:
        assert self.job is not None
        self.job.wait(timeout)

    def read(self, to: str) -> None:
        """All of the snapshot, into a file."""
        assert self.snapshot_ is not None
        Path(to).write_bytes(self.snapshot_.pread(SIZE_BYTES, 0))

    def extents(self) -> None:
        assert self.snapshot_ is not None
        self.snapshot_.block_status(SIZE_BYTES, 0)

    def discard(self) -> None:
        assert self.snapshot_ is not None
        self.snapshot_.discard(SIZE_BYTES // 2, 0)

    def drop(self) -> None:
        if self.snapshot_ is not None:
            self.snapshot_.close()
        self.snapshot_ = None

    def violations(self) -> list[str]:
        """Of the invariants, on the live segment."""
        assert self.coordinator is not None
        return [str(violation) for violation in check(self.coordinator._segment)]

    def status(self) -> dict[str, Any]:
        assert self.coordinator is not None
        status = self.coordinator.status()
        return {name: status[name] for name in ("epoch", "snapshots")}

    def close(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.close()
        coordinator, self.coordinator = self.coordinator, None
        self.job = self.snapshot_ = None
        if coordinator is not None:
            coordinator.close()

    # -- NBD -------------------------------------------------------------------------------------------------------

    def listen(self) -> list[Any]:
        """Serve, by one process: host and port."""
        self.server = Server(listen_tcp("localhost", 0), processes=1)
        return list(self.server.address[:2])

    def served(self) -> dict[str, Any]:
        """By which processes, and what."""
        assert self.server is not None
        return {"pids": self.server.pids, "exports": sorted(export.name for export in self.server.exports)}

    def export(self, name: str, *, writable: bool) -> int | None:
        """The image, or its snapshot: the serial number."""
        assert self.server is not None and self.coordinator is not None
        serial = self.snapshot_.serial if name == "snapshot" and self.snapshot_ is not None else None
        self.server.add(ExportSpec(name, self.coordinator.path, serial, writable=writable))
        return serial

    def clients(self, name: str) -> int:
        assert self.server is not None
        return self.server.clients(name)

    def withdraw(self, name: str) -> None:
        assert self.server is not None
        self.server.remove(name, hard=True)

    # -- the writer ------------------------------------------------------------------------------------------------

    def open(self, image: str, logs: str, seed: int) -> None:
        self.writer = Writer(image, Path(logs), seed)

    def write(self, count: int) -> None:
        assert self.writer is not None
        self.writer.write(COMMANDED, count)

    def go(self) -> None:
        """A thread writes from now on."""
        assert self.writer is not None
        self.writer.go()

    def halt(self) -> None:
        """It stops; its error, if it had one."""
        assert self.writer is not None
        self.writer.halt()

    def longest_s(self) -> float:
        """How long a write took at most."""
        return 0.0 if self.writer is None else self.writer.longest_s

    def flush(self) -> None:
        assert self.writer is not None
        self.writer.disk.flush()

    def leave(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    # -- both ------------------------------------------------------------------------------------------------------

    def holdings(self) -> list[str]:
        """Open descriptors and running threads: the same after each round."""
        found = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of listdir itself
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sorted(found) + [thread.name for thread in threading.enumerate()]


class Writer:
    """Writes stamped units through the filter, and logs it."""

    def __init__(self, image: str, logs: Path, seed: int) -> None:
        self.disk = shmcbw.open(image)
        self.layout = layout_of(seed)
        self.logs = [LogWriter(logs / str(writer)) for writer in (COMMANDED, FREE)]
        self.chances = [random.Random(seed + writer) for writer in (COMMANDED, FREE)]
        self.longest_s = 0.0
        self._thread: threading.Thread | None = None
        self._halted = threading.Event()
        self._error: Exception | None = None

    def write(self, writer: int, count: int) -> None:
        log, chance = self.logs[writer], self.chances[writer]
        units = self.layout.units_of(writer)
        for _ in range(count):
            unit = chance.choice(units)
            kind = ZERO if chance.random() < 0.2 else DATA
            data = make_unit(self.layout, unit, log.sequence) if kind == DATA else b""
            log.begin(unit, kind)
            started = time.monotonic()
            if kind == DATA:
                self.disk.pwrite(data, unit.offset)
            else:
                self.disk.pwrite_zeroes(unit.length, unit.offset)
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            log.end()

    def go(self) -> None:
        self._halted.clear()
        self._error = None
        self._thread = threading.Thread(target=self._write_on)
        self._thread.start()

    def _write_on(self) -> None:
        try:
            while not self._halted.wait(0.002):
                self.write(FREE, 1)
        except Exception as error:  # the thread's outermost level: `halt` raises it
            self._error = error

    def halt(self) -> None:
        self._halted.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        for log in self.logs:
            log.close()
        self.disk.close()


@contextlib.contextmanager
def _between() -> Iterator[list[int]]:
    """The instants before and after, CLOCK_MONOTONIC ns."""
    instants = [time.monotonic_ns()]
    yield instants
    instants.append(time.monotonic_ns())


def main(log: str) -> None:
    with open(log, "ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    part = Part()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(part, command.pop("do"))(**command)}
        except Exception as error:  # whatever it is, the test wants to see it
            answer = {
                "error": [kind.__name__ for kind in type(error).__mro__],
                "errno": getattr(error, "errno", None),
                "message": str(error),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
