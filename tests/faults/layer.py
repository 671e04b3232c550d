"""The layer between processes and libc that makes the Nth call of a kind fail: built, armed, and counted with.

A kind of call is who makes it (role), which call it is, and what it touches.  The names of all three come from shim.c,
which also says how a process is told of its role.  Processes are started with `Layer.environment`; what is armed or
reset here counts for all of them at once, also for those that run.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("shim.c")
LIBRARY = Path(__file__).resolve().parents[2] / "build" / "faults" / "shim.so"

_RULE = struct.Struct("<6I4Q")
_PATH_BYTES = 512
_COUNTS_OFFSET = _RULE.size + 3 * _PATH_BYTES
_ACTION = struct.Struct("<I")
_FIRED = struct.Struct("<Q")
_FIRED_OFFSET = 48
_OFF, _FAIL, _SHORT = range(3)

#: So often as to be for good.
FOR_GOOD = 2**62


def build() -> Path:
    """The compiled layer, made anew where its source has changed."""
    made = LIBRARY
    if not made.exists() or made.stat().st_mtime_ns < SOURCE.stat().st_mtime_ns:
        made.parent.mkdir(parents=True, exist_ok=True)
        # Other test runs may do the same at this moment.
        mine = made.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", mine, SOURCE, "-ldl"], check=True)
        mine.rename(made)
    return made


class Kind(NamedTuple):
    """Calls that are counted together."""

    role: str
    call: str
    touched: str

    def __str__(self) -> str:
        return f"{self.role} {self.call} {self.touched}"


class Fault(NamedTuple):
    """`times` calls of a kind fail, after `first` of them went through; `what` is an errno's name or "short"."""

    kind: Kind
    what: str
    first: int
    times: int

    def __str__(self) -> str:
        often = "from then on" if self.times == FOR_GOOD else f"{self.times} times"
        return f"{self.kind}: {self.what} at call {self.first + 1}, {often}"


class Layer:
    """The compiled layer, and the file through which it is told what to do.  ``close`` when its processes are gone."""

    def __init__(self, directory: Path) -> None:
        self._library = build()
        # Here it only tells the names: without its environment variable it does nothing.
        loaded = ctypes.CDLL(str(self._library))
        names = [
            (ctypes.c_char_p.in_dll(loaded, f"fault_{what}").value or b"") for what in ("roles", "calls", "classes")
        ]
        self.roles, self.calls, self.classes = (text.decode().split() for text in names)
        self._counts = struct.Struct(f"<{len(self.roles) * len(self.calls) * len(self.classes)}Q")
        self._file = directory / "faults"
        size = _COUNTS_OFFSET + self._counts.size
        self._file.write_bytes(bytes(size))
        with self._file.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), size)

    def environment(self, role: str) -> dict[str, str]:
        """What makes a process, and the workers that it starts, go through the layer."""
        return {"LD_PRELOAD": str(self._library), "SHMCBW_FAULTS": str(self._file), "SHMCBW_FAULTS_ROLE": role}

    def watch(self, image: Path, targets: Path, state: Path) -> None:
        """Whose calls are of interest from now on: an image, and directories of targets and of saved bitmaps.

        Counters begin at zero.
        """
        self.disarm()
        for index, path in enumerate((image, targets, state)):
            name = os.fsencode(os.path.realpath(path))
            place = _RULE.size + index * _PATH_BYTES
            self._memory[place : place + _PATH_BYTES] = name.ljust(_PATH_BYTES, b"\0")
        self._memory[_COUNTS_OFFSET:] = bytes(self._counts.size)

    def arm(self, fault: Fault) -> None:
        """Have calls fail from now on; a fault that is armed is replaced."""
        self.disarm()
        short = fault.what == "short"
        rule = (
            _OFF,
            self.roles.index(fault.kind.role),
            self.calls.index(fault.kind.call),
            self.classes.index(fault.kind.touched),
            0 if short else getattr(errno, fault.what),
            0,
            fault.first,
            fault.times,
            0,
            0,
        )
        _RULE.pack_into(self._memory, 0, *rule)
        _ACTION.pack_into(self._memory, 0, _SHORT if short else _FAIL)

    def disarm(self) -> None:
        _ACTION.pack_into(self._memory, 0, _OFF)

    @property
    def fired(self) -> int:
        """How many calls have failed since a fault was armed."""
        (count,) = _FIRED.unpack_from(self._memory, _FIRED_OFFSET)
        return int(count)

    def counts(self) -> dict[Kind, int]:
        """Calls since `watch`, by kind; only kinds that there were."""
        numbers = iter(self._counts.unpack_from(self._memory, _COUNTS_OFFSET))
        kinds = (Kind(role, call, touched) for role in self.roles for call in self.calls for touched in self.classes)
        return {kind: count for kind, count in zip(kinds, numbers, strict=True) if count}

    def close(self) -> None:
        self._memory.close()
