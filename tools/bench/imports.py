"""``import shmcbw`` in a fresh interpreter: what it adds to the start, and what it pulls in.

A bare interpreter and one that imports are started in turn; the figure is the difference of the medians of their whole
lives.  Beside it, what ``-X importtime`` says, which leaves out what the import costs at exit.

Without site (-S): an editable install puts a finder there that loads pathlib, re and more at every start, so that the
import after it would look cheaper than it is for somebody who has installed a wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import posix_ipc

from tools.bench.figure import Figure, median
from tools.bench.interpreter import ROOT, environment
from tools.bench.plan import Plan

NAME = "imports"
LIMIT_NS = 30e6
HEAVY = ("numpy", "asyncio")
STATEMENT = "import shmcbw"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def measure(plan: Plan) -> list[Figure]:
    """Three figures: time added, time of the import alone, and heavy modules loaded."""
    rounds = 11 if plan.quick else 51
    bare, importing, reported = [], [], []
    with tempfile.TemporaryDirectory(prefix="cbw-bench-") as directory:
        run = _interpreter(directory)
        run("-c", STATEMENT)
        for _ in range(rounds):
            bare.append(_life(run, "pass"))
            importing.append(_life(run, STATEMENT))
        for _ in range(max(5, rounds // 5)):
            reported.append(_importtime(run))
        loaded = run("-c", f"{STATEMENT}; import sys; print(*sys.modules)").stdout.split()
    heavy = [name for name in HEAVY if name in loaded]
    base = median(bare)
    return [
        Figure(
            NAME,
            "import shmcbw, over a bare start",
            "ns",
            median(importing) - base,
            limit=LIMIT_NS,
            other="bare start",
            other_value=base,
        ),
        Figure(NAME, "import shmcbw, by -X importtime", "ns", median(reported), limit=LIMIT_NS),
        Figure(NAME, f"of {' and '.join(HEAVY)} loaded", "modules", len(heavy), limit=0, note=", ".join(heavy)),
    ]


def _interpreter(directory: str) -> Run:
    """Starts interpreters that find the checkout's package, what it depends on, and cached bytecode, and no more."""
    paths = [str(ROOT), os.path.dirname(posix_ipc.__file__)]
    variables = {**environment(Path(directory)), "PYTHONPATH": os.pathsep.join(paths)}

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *options]
        return subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True, check=True)

    return run


def _life(run: Run, statement: str) -> float:
    started = time.perf_counter_ns()
    run("-c", statement)
    return time.perf_counter_ns() - started


def _importtime(run: Run) -> float:
    """Cumulative nanoseconds of the package's line: ``import time: self [us] | cumulative | name``."""
    for line in run("-X", "importtime", "-c", STATEMENT).stderr.splitlines():
        fields = [field.strip() for field in line.removeprefix("import time:").split("|")]
        if len(fields) == 3 and fields[2] == "shmcbw":
            return float(fields[1]) * 1000
    raise RuntimeError("-X importtime does not name shmcbw")
