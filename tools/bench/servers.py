"""NBD servers to compare ours with, each on a new image or on the one it is given, at a unix socket.

What writes through while old content is kept is compared with what does the same: our export under a snapshot with
qemu-storage-daemon's copy-before-write filter and nbdkit's cow; our export of a quiet image with qemu-nbd and nbdkit's
file.  All with their defaults, and as many connections as they are asked for.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shmcbw.workers import Coordinator
from shmcbw.workers.nbd.address import listen_unix
from shmcbw.workers.nbd.server import Server
from shmcbw.workers.nbd.specification import ExportSpec
from tools.bench import qemu

START_TIMEOUT_S = 10.0
#: Of the kinds of what is served.
QUIET, KEEPING, SNAPSHOT = "image", "image under a snapshot", "snapshot"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server: its name, the programs that it needs, and how it is started on an image: the export's URI."""

    name: str
    needs: tuple[str, ...]
    serve: Callable[[Path], AbstractContextManager[str]]
    #: Whether we want to be ahead of it.
    rival: bool = True

    def missing(self) -> str:
        """What is not installed of what it needs; empty if all is."""
        return ", ".join(program for program in self.needs if shutil.which(program) is None)


@contextmanager
def shmcbw_image(image: Path) -> Iterator[str]:
    """Our export of an image."""
    with Coordinator(image) as coordinator, _ours(coordinator, None) as uri:
        yield uri


@contextmanager
def shmcbw_keeping(image: Path) -> Iterator[str]:
    """Our export of an image with a new snapshot."""
    scratch = image.with_suffix(".scratch")
    with Coordinator(image) as coordinator, coordinator.snapshot(scratch), _ours(coordinator, None) as uri:
        yield uri


@contextmanager
def shmcbw_snapshot(image: Path) -> Iterator[str]:
    """Our export of a new snapshot."""
    scratch = image.with_suffix(".scratch")
    with Coordinator(image) as coordinator, coordinator.snapshot(scratch) as snapshot:
        with _ours(coordinator, snapshot.serial) as uri:
            yield uri


@contextmanager
def _ours(coordinator: Coordinator, snapshot: int | None) -> Iterator[str]:
    socket = Path(coordinator.path).with_suffix(".sock")
    with Server(listen_unix(str(socket)), path=str(socket)) as server:
        server.add(ExportSpec("e", coordinator.path, snapshot, writable=snapshot is None))
        yield _uri(socket)


@contextmanager
def qemu_nbd(image: Path) -> Iterator[str]:
    socket = image.with_suffix(".sock")
    command = ["qemu-nbd", "-f", "raw", "-x", "e", "-e", "8", "--persistent", "-k", str(socket), str(image)]
    with _serving(command, socket) as uri:
        yield uri


@contextmanager
def qemu_filter(image: Path) -> Iterator[str]:
    """qemu-storage-daemon with its copy-before-write filter."""
    target = image.with_suffix(".target")
    qemu.empty_target(image, target)
    with _removed(target), qemu.daemon(image, target) as socket:
        yield _uri(socket)


@contextmanager
def qemu_snapshot(image: Path) -> Iterator[str]:
    """The snapshot of that filter."""
    target = image.with_suffix(".target")
    qemu.empty_target(image, target)
    with _removed(target), qemu.daemon(image, target, snapshot=True) as socket:
        yield _uri(socket)


@contextmanager
def nbdkit(image: Path, *filters: str) -> Iterator[str]:
    socket = image.with_suffix(".sock")
    command = ["nbdkit", "--foreground", "--exportname", "e", "--unix", str(socket), *filters, "file", str(image)]
    with _serving(command, socket) as uri:
        yield uri


def nbdkit_cow(image: Path) -> AbstractContextManager[str]:
    return nbdkit(image, "--filter=cow")


@contextmanager
def _serving(command: list[str], socket: Path) -> Iterator[str]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve (exit status {process.returncode})")
            time.sleep(0.01)
        yield _uri(socket)
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        yield


def _uri(socket: Path) -> str:
    return f"nbd+unix:///e?socket={socket}"


#: Ours first, by what they do.
CONTENDERS: dict[str, tuple[Contender, ...]] = {
    QUIET: (
        Contender("shmcbw", (), shmcbw_image),
        Contender("qemu-nbd", ("qemu-nbd",), qemu_nbd),
        Contender("nbdkit file", ("nbdkit",), nbdkit, rival=False),
    ),
    KEEPING: (
        Contender("shmcbw", (), shmcbw_keeping),
        Contender("QEMU's filter", ("qemu-storage-daemon",), qemu_filter),
        Contender("nbdkit cow", ("nbdkit",), nbdkit_cow, rival=False),
    ),
    SNAPSHOT: (
        Contender("shmcbw", (), shmcbw_snapshot),
        Contender("QEMU's snapshot", ("qemu-storage-daemon",), qemu_snapshot),
    ),
}
