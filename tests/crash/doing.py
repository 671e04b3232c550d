"""Something done four times, each time reaching a failpoint: ``python -m tests.crash.doing WHAT IMAGE DIRECTORY``.

Reads a line, does it once, and prints "ok" or the name of an errno, until there are no more lines.
"""

from __future__ import annotations

import errno
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import shmcbw
from shmcbw.workers import Coordinator

#: Which point each of them reaches, once each time.
POINTS = {
    "filter": "writer.marked",
    "worker": "worker.copying",
    "coordinator": "coordinator.target",
    "reader": "reader.looked",
    "adoption": "adopt.opened",
}


def doing(what: str, image: str, directory: Path, stack: ExitStack) -> Callable[[], object]:
    numbers: Iterator[int] = itertools.count()
    if what == "filter":
        disk = stack.enter_context(shmcbw.open(image))
        return lambda: disk.pwrite(b"x", 0)
    if what == "adoption":
        return lambda: Coordinator(image, workers=1).close()
    coordinator = stack.enter_context(Coordinator(image, workers=1))
    if what == "worker":
        return lambda: coordinator.backup(directory / f"out{next(numbers)}").wait(30)
    if what == "coordinator":
        return lambda: coordinator.snapshot(directory / f"scratch{next(numbers)}").close()
    snapshot = stack.enter_context(coordinator.snapshot(directory / "scratch"))
    return lambda: snapshot.pread(1, 0)


def main(what: str, image: str, directory: str) -> None:
    with ExitStack() as stack:
        action = doing(what, image, Path(directory), stack)
        print("ready", flush=True)
        for _ in sys.stdin:
            try:
                action()
                print("ok", flush=True)
            except OSError as error:
                print(errno.errorcode[error.errno or 0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
