"""A page that is not there (SIGBUS) becomes an OSError in the core's own copies; every other SIGBUS stays one."""

from __future__ import annotations

import errno
import mmap
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shmcbw import _core


@pytest.fixture
def truncated(tmp_path: Path) -> mmap.mmap:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16384)
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 16384)
        file.truncate(4096)
    return memory


def test_a_load_from_a_truncated_page_is_an_oserror(truncated: mmap.mmap) -> None:
    target = bytearray(8192)
    with pytest.raises(OSError, match="SIGBUS") as caught:
        _core.copy(target, 0, truncated, 4096, 8192)
    assert caught.value.errno == errno.EIO
    _core.copy(target, 0, truncated, 0, 4096)
    assert target[:4096] == b"x" * 4096


def test_a_store_to_a_truncated_page_is_an_oserror(truncated: mmap.mmap) -> None:
    for _ in range(3):
        with pytest.raises(OSError, match="SIGBUS"):
            _core.copy(truncated, 8192, bytes(4096), 0, 4096)
    with pytest.raises(OSError, match="SIGBUS"):
        _core.is_zero(truncated, 4096, 4096)


def test_a_long_copy_without_the_gil_is_guarded_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 1 << 20)
        file.truncate(0)
    with pytest.raises(OSError, match="SIGBUS"):
        _core.copy(bytearray(1 << 20), 0, memory, 0, 1 << 20)


OTHER_FAULT = """
import mmap, sys
from shmcbw import _core
with open(sys.argv[1], "w+b") as file:
    file.truncate(8192)
    memory = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
print(memory[0])
"""


def test_a_fault_outside_the_core_kills_as_ever(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", OTHER_FAULT, str(tmp_path / "f")], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS


CHAINED = """
import faulthandler, mmap, sys
faulthandler.enable()
from shmcbw import _core
with open(sys.argv[1], "w+b") as file:
    file.truncate(8192)
    memory = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
try:
    _core.is_zero(memory, 0, 8192)
except OSError:
    print("guarded", flush=True)
print(memory[0])
"""


def test_the_handler_before_ours_gets_other_faults(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHAINED, str(tmp_path / "f")], capture_output=True, check=False)
    assert done.stdout == b"guarded\n"
    assert b"Fatal Python error: Bus error" in done.stderr
    assert done.returncode == -signal.SIGBUS


LATER = """
import faulthandler, mmap, sys
from shmcbw import _core
faulthandler.enable()
with open(sys.argv[1], "w+b") as file:
    file.truncate(8192)
    memory = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
for _ in range(2):
    try:
        _core.is_zero(memory, 0, 8192)
    except OSError:
        print("guarded", flush=True)
"""


def test_a_handler_that_came_after_ours_does_not_kill(tmp_path: Path) -> None:
    """faulthandler, enabled after the import, reports the fault and passes it on; the process lives."""
    done = subprocess.run([sys.executable, "-c", LATER, str(tmp_path / "f")], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"guarded\nguarded\n")
