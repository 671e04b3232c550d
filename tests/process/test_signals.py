"""Signals: a handler that runs in the middle of a call, a storm of them in every wait, and what ends a process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import shmcbw
from shmcbw.layout import Slot
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.processes import continue_all, stop_all

SIZE = 4 << 20


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@contextmanager
def handler(number: signal.Signals, action: Callable[[], None]) -> Iterator[None]:
    """The signal's handler, in this (the main) thread."""
    before = signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def stopped_workers(coordinator: Coordinator) -> Iterator[list[int]]:
    """The workers stand still, so a first touch waits."""
    pids = [worker["pid"] for worker in coordinator.status()["workers"]]
    stop_all(pids)
    try:
        yield pids
    finally:
        continue_all(pids)


@contextmanager
def signalled_when(condition: Callable[[], object], number: signal.Signals) -> Iterator[None]:
    """Another thread sends us the signal as soon as the condition holds."""

    def send() -> None:
        wait_for(condition, "what the signal waits for")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def waits(coordinator: Coordinator) -> bool:
    return any(slot["wanted_clusters"] for slot in coordinator.status()["slots"])


def test_a_handler_may_close_the_disk_whose_write_it_interrupted(image: Path, tmp_path: Path) -> None:
    """The write ends with nothing written; the handle lets go when it has left."""
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        before = snapshot.pread(SIZE, 0)
        disk = shmcbw.open(image)
        with stopped_workers(coordinator), handler(signal.SIGUSR1, disk.close):
            with signalled_when(lambda: waits(coordinator), signal.SIGUSR1):
                with pytest.raises(shmcbw.ClosedError):
                    disk.pwrite(b"x" * 100_000, 0)
        assert disk.closed
        assert coordinator.status()["slots"] == []
        disk.close()
        assert image.read_bytes() == before


def test_a_handler_may_write_through_the_disk_whose_write_it_interrupted(image: Path, tmp_path: Path) -> None:
    """The handler's write takes the place of the want; the interrupted one asks again."""
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        before = snapshot.pread(SIZE, 0)
        with shmcbw.open(image) as disk, stopped_workers(coordinator) as pids:
            segment = disk._attached()

            def serve_the_inner_one() -> None:
                wait_for(lambda: segment.slot(0, Slot.want_first) == 16, "the handler's write waits")
                continue_all(pids)

            def write_too() -> None:
                server = threading.Thread(target=serve_the_inner_one)
                server.start()
                disk.pwrite(b"inner", 16 * 65_536)
                server.join()

            with handler(signal.SIGUSR1, write_too):
                with signalled_when(lambda: waits(coordinator), signal.SIGUSR1):
                    disk.pwrite(b"outer", 0)
            assert disk.statistics()["wait_max_ns"] < 15e9, "served, not given up at cbw_timeout"
            assert (disk.pread(5, 0), disk.pread(5, 16 * 65_536)) == (b"outer", b"inner")
        assert snapshot.pread(SIZE, 0) == before
