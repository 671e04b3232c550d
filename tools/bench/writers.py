"""Writer processes: on their own, as writers are.  In the coordinator's process its threads would get in their way."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shmcbw

CONTEXT = multiprocessing.get_context("spawn")
BLOCK = 4096
START_TIMEOUT_S = 60.0
HOT_BLOCKS = 64
RANDOM_SITES = 1024
LOOK_EVERY = 256


@contextmanager
def running(target: Callable[..., None], *arguments: Any) -> Iterator[Connection]:
    """A spawned process ``target(*arguments, connection)``, and our end; it is gone afterwards, whatever happened."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.kill()
        process.join()
        process.close()


def receive(connection: Connection, timeout_s: float = START_TIMEOUT_S) -> Any:
    """What the process sends next; TimeoutError if it sends nothing, EOFError if it has died."""
    if not connection.poll(timeout_s):
        raise TimeoutError(f"a writer has sent nothing for {timeout_s:.0f} s")
    return connection.recv()


# -- timed writes ------------------------------------------------------------------------------------------------------


def write_timed(image: Path, connection: Connection) -> None:
    """A process that answers each (offsets, pause in ns) with the nanoseconds that each write took, until the end."""
    data = os.urandom(BLOCK)
    with shmcbw.open(image) as disk:
        connection.send(True)
        while True:
            try:
                offsets, pause_ns = connection.recv()
            except EOFError:
                return
            gc.disable()
            times = _timed(disk, data, offsets, pause_ns)
            gc.enable()
            connection.send(times)


def _timed(disk: shmcbw.Disk, data: bytes, offsets: Sequence[int], pause_ns: int) -> list[int]:
    times = []
    clock, pause_s = time.perf_counter_ns, pause_ns / 1e9
    for offset in offsets:
        if pause_s:
            time.sleep(pause_s)
        started = clock()
        disk.pwrite(data, offset)
        times.append(clock() - started)
    return times


# -- busy writers ------------------------------------------------------------------------------------------------------


def write_busily(image: Path, number: int, pause_ns: int, connection: Connection) -> None:
    """A process that writes until it is killed or its parent is gone.

    Even numbers write to few blocks of their own, over and over; odd ones to many places all over the image, each of
    which needs a copy after each cut.  The places are few enough that a sparse image stays small.
    """
    chance = random.Random(number)
    data = chance.randbytes(BLOCK)
    parent, pause_s = os.getppid(), pause_ns / 1e9
    with shmcbw.open(image) as disk:
        blocks = disk.size_bytes // BLOCK
        first = chance.randrange(blocks - HOT_BLOCKS)
        places = (
            [chance.randrange(blocks) for _ in range(RANDOM_SITES)] if number % 2 else range(first, first + HOT_BLOCKS)
        )
        offsets = [place * BLOCK for place in places]
        disk.pwrite(data, offsets[0])
        connection.send(True)
        while os.getppid() == parent:
            for offset in chance.choices(offsets, k=LOOK_EVERY):
                disk.pwrite(data, offset)
                if pause_s:
                    time.sleep(pause_s)
