"""Writer processes for tests: plain functions that a spawned process can find by name."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Semaphore
from typing import Any

import shmcbw
from shmcbw.layout import Slot

CONTEXT = multiprocessing.get_context("spawn")


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[SpawnProcess]:
    """A spawned process that is gone afterwards, whatever happened."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        process.join()
        process.close()


def write_forever(path: str, seed: int, block: int = 4096, end: int = 0) -> None:
    """Write blocks at pseudo-random places before `end` (0: anywhere) until killed; ends when its parent does."""
    parent = os.getppid()
    with shmcbw.open(path) as disk:
        blocks = (end or disk.size_bytes) // block
        state = seed * 2654435761 % 2**32
        count = 0
        while os.getppid() == parent:
            state = (state * 1103515245 + 12345) % 2**31
            count += 1
            disk.pwrite(count.to_bytes(8, "little") * (block // 8), state % blocks * block)


def write_pairs_forever(path: str, first: int, second: int) -> None:
    """Write 1, 2, 3, … first at `first`, then at `second`: an instant never shows the second ahead of the first."""
    parent = os.getppid()
    with shmcbw.open(path) as disk:
        count = 0
        while os.getppid() == parent:
            count += 1
            disk.pwrite(count.to_bytes(8, "little"), first)
            disk.pwrite(count.to_bytes(8, "little"), second)


def write_pairs_across_forever(first: str, second: str, offset: int) -> None:
    """Write 1, 2, 3, … to one image, then to another: an instant never shows the second ahead of the first."""
    parent = os.getppid()
    with shmcbw.open(first) as one, shmcbw.open(second) as other:
        count = 0
        while os.getppid() == parent:
            count += 1
            one.pwrite(count.to_bytes(8, "little"), offset)
            other.pwrite(count.to_bytes(8, "little"), offset)


def sweep_pairs(first: str, second: str, step: int, go: Semaphore, begun: Semaphore) -> None:
    """At each `go` write each block once, to one image and then to the other; `begun` at a quarter and at the end."""
    with shmcbw.open(first) as one, shmcbw.open(second) as other:
        while go.acquire(timeout=60):
            for offset in range(0, one.size_bytes, step):
                one.pwrite(b"x", offset)
                other.pwrite(b"x", offset)
                if offset == one.size_bytes // 4:
                    begun.release()
            begun.release()


def hold_in_flight(path: str) -> None:
    """A writer that is stopped in the middle of a write: marked in flight, then SIGSTOP."""
    disk = shmcbw.open(path)
    assert disk._segment is not None
    (slot,) = disk._slots
    disk._segment.set_slot(slot, Slot.in_flight, 1)
    os.kill(os.getpid(), signal.SIGSTOP)
    disk._segment.set_slot(slot, Slot.in_flight, 0)


def limit_address_space(size_bytes: int) -> None:
    """From here on this process and its children may map so much: who takes a size from the outside on trust fails.

    Not under AddressSanitizer, whose shadow of the memory is larger than any limit.
    """
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))


def write_once(path: str, data: bytes, offset: int) -> None:
    with shmcbw.open(path) as disk:
        disk.pwrite(data, offset)


def open_and_exit(path: str) -> None:
    shmcbw.open(path).close()


def stop_all(pids: list[int]) -> None:
    """SIGSTOP, and wait until they are stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        deadline = time.monotonic() + 5
        while state(pid) not in "TtZX":
            assert time.monotonic() < deadline, f"pid {pid} does not stop"
            time.sleep(0.001)


def continue_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    """The state letter of a process: "T" stopped, "Z" dead and not waited for, "" gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""
