"""The system calls of a run of hot writes, counted by strace.

    python -m tools.bench.system_calls IMAGE WRITES [--with-calls N]

is the process that is traced: it opens a served image, writes once to each block that it will write to, and then
writes between two marks.  A mark is an access() to a name that nobody has.  With ``--with-calls`` it makes that many
system calls of its own between the marks: the control, for a counter that counts nothing would be content with
everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import shmcbw
from tools.bench.interpreter import ROOT

BEGIN, END = "/cbw-bench/begin", "/cbw-bench/end"
BLOCK = 4096
BLOCKS = 64
TIMEOUT_S = 60.0


def have_strace() -> bool:
    """Whether strace is installed."""
    return shutil.which("strace") is not None


def count(image: Path, writes: int, *, calls: int = 0) -> Counter[str]:
    """System calls by name, of all threads of a process that does ``writes`` hot writes of 4 KiB and ``calls`` others.

    The image has a coordinator.  RuntimeError, with strace's words, if the process can't be traced.
    """
    with tempfile.NamedTemporaryFile(prefix="cbw-bench-", suffix=".strace") as log:
        command = ["strace", "-f", "-qq", "-o", log.name, sys.executable, "-m", "tools.bench.system_calls"]
        command += [str(image), str(writes), "--with-calls", str(calls)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"strace: exit status {done.returncode}: {done.stderr.strip()}")
        return between_marks(Path(log.name).read_text().splitlines())


def between_marks(lines: Sequence[str]) -> Counter[str]:
    """The calls, by name, in strace's log between the two marks; RuntimeError if it has not both."""
    begin = [number for number, line in enumerate(lines) if f'"{BEGIN}"' in line]
    end = [number for number, line in enumerate(lines) if f'"{END}"' in line]
    if len(begin) != 1 or len(end) != 1 or begin[0] > end[0]:
        raise RuntimeError(f"strace: {len(begin)} first and {len(end)} second marks in its log")
    names: Counter[str] = Counter()
    for line in lines[begin[0] + 1 : end[0]]:
        # PID name(…  or  PID <... name resumed>  or  PID --- SIG… ---
        call = line.split(maxsplit=1)[1] if line[:1].isdigit() else line
        if not call.startswith(("<...", "---", "+++")):
            names[call.partition("(")[0]] += 1
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench.system_calls", description=__doc__)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("writes", metavar="WRITES", type=int)
    parser.add_argument("--with-calls", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    data = os.urandom(BLOCK)
    with shmcbw.open(options.image) as disk:
        blocks = min(BLOCKS, disk.size_bytes // BLOCK)
        offsets = [number % blocks * BLOCK for number in range(options.writes)]
        for offset in offsets[:blocks]:
            disk.pwrite(data, offset)
        os.access(BEGIN, os.F_OK)
        for offset in offsets:
            disk.pwrite(data, offset)
        for _ in range(options.with_calls):
            os.getppid()
        os.access(END, os.F_OK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
