"""What this machine has of what shmcbw needs: the data behind ``shmcbw doctor``."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from . import _core
from .errors import ShmcbwError
from .image import HONEST_HOLES, NETWORK
from .segment import SHM, Segment, boot_id
from .sizes import format_size

TOOLS = ("qemu-img", "nbdinfo", "nbdcopy", "fio", "mke2fs", "strace")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; what is not needed may be missing."""

    name: str
    good: bool
    needed: bool
    found: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """All findings, in the order in which a person would look."""
    findings = [
        Finding("Python", sys.version_info >= (3, 11), True, platform.python_version()),
        Finding("Linux", sys.platform == "linux", True, platform.release()),
        Finding("CPUs", True, True, f"{len(os.sched_getaffinity(0))} usable"),
        _module("posix_ipc", needed=True),
        _module("psutil", needed=True),
        _module("rich", needed=False),
        Finding("core", True, True, os.path.basename(_core.__file__ or "")),
        _shared_memory(),
        _attempt("boot id", lambda: boot_id().hex()),
        _attempt("file locks of open files", _ofd_locks),
        _attempt("hole punching", _punch),
        _attempt("pidfd", _pidfd, needed=False),
        _file_system(),
    ]
    for tool in TOOLS:
        path = shutil.which(tool)
        findings.append(Finding(tool, path is not None, False, path or "not installed"))
    return findings


def _module(name: str, *, needed: bool) -> Finding:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Finding(name, False, needed, str(error))
    return Finding(name, True, needed, str(getattr(module, "__version__", getattr(module, "VERSION", "installed"))))


def _attempt(name: str, action: Callable[[], str], *, needed: bool = True) -> Finding:
    try:
        return Finding(name, True, needed, action())
    except (OSError, ShmcbwError, AttributeError) as error:
        return Finding(name, False, needed, str(error))


def _shared_memory() -> Finding:
    try:
        space = os.statvfs(SHM)
    except OSError as error:
        return Finding(str(SHM), False, True, str(error))
    free = space.f_bavail * space.f_frsize
    # An image of 1 TiB with 8 snapshots at 64 KiB a cluster needs 12 bytes a cluster.
    return Finding(str(SHM), free >= 16 << 20, True, f"{format_size(free)} free; 1 TiB of image needs up to 192 MiB")


def _ofd_locks() -> str:
    with tempfile.TemporaryFile() as file:
        probe = Segment.__new__(Segment)
        probe.fd = file.fileno()
        probe.try_lock(0)
    return "work"


def _punch() -> str:
    with tempfile.TemporaryFile(dir=SHM) as file:
        file.truncate(8192)
        _core.punch_hole(file.fileno(), 0, 4096)
    return "works in " + str(SHM)


def _pidfd() -> str:
    os.close(os.pidfd_open(os.getpid()))
    return "works"


def _file_system() -> Finding:
    fd = os.open(".", os.O_RDONLY)
    try:
        magic = _core.file_system(fd)
    finally:
        os.close(fd)
    if magic in NETWORK:
        return Finding("file system here", False, False, f"{magic:#x}: mappings are not coherent with other machines")
    holes = "holes are trusted" if magic in HONEST_HOLES else "holes are read as data"
    return Finding("file system here", True, False, f"{magic:#x}: {holes}")
