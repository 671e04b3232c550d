"""Measure, and print a table with ratios, targets and the machine.

    python -m tools.bench                    everything, less than eight minutes
    python -m tools.bench --quick            less of everything, less than two minutes
    python -m tools.bench --only hot         this one; may be given several times
    python -m tools.bench --dir /mnt/disk    where the disk is measured (default: the directory for temporary files)
    python -m tools.bench --json             one JSON object

Exit status 0 when all has been measured, whatever came out: a target that is not met is shown, and is no failure.
A measurement that can't be made is named, the others go on, and the status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shmcbw.errors import ShmcbwError
from tools.bench import machine
from tools.bench.figure import Figure
from tools.bench.plan import Plan
from tools.bench.table import print_table

MEASUREMENTS = ("hot", "first_touch", "copying", "backup", "drained", "nbd", "memory", "imports")


def run(plan: Plan, names: Sequence[str], figures: list[Figure], busy: dict[str, float]) -> list[str]:
    """Measure what is named, in that order, into ``figures``; says what could not be measured, and why.

    ``busy``: how many CPUs other processes used during each measurement.
    """
    failures = []
    for name in names:
        plan.say(name)
        # Here and not above: each process that a measurement spawns imports this file.
        module = importlib.import_module(f"tools.bench.{name}")
        others = machine.Others()
        try:
            figures += module.measure(plan)
        except (OSError, EOFError, RuntimeError, ShmcbwError, subprocess.SubprocessError) as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
            plan.say(failures[-1])
        busy[module.NAME] = round(others.cpus(), 2)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--only", action="append", choices=MEASUREMENTS, help="this measurement")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="a directory on disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not options.dir.is_dir():
        parser.error(f"--dir: {options.dir} is no directory")
    # SIGTERM ends it as Ctrl-C does: nothing is left over.  Not by raising SIGINT, which a script's "&" ignores.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = Plan(options.quick, options.dir.resolve())
    described = machine.describe(plan.places)
    figures: list[Figure] = []
    failures: list[str] = []
    busy: dict[str, float] = {}
    try:
        failures += run(plan, options.only or MEASUREMENTS, figures, busy)
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    finally:
        described["load_average_after"] = machine.load_average()
        seconds = time.monotonic() - plan.started_s
        if options.json:
            found = {"machine": described, "quick": plan.quick, "seconds": seconds, "failures": failures, "busy": busy}
            print(json.dumps({**found, "figures": [figure.as_dict() for figure in figures]}, ensure_ascii=False))
        else:
            report(described, figures, failures, busy, seconds)
    return 1 if failures else 0


def report(
    described: dict[str, Any],
    figures: Sequence[Figure],
    failures: Sequence[str],
    busy: dict[str, float],
    seconds: float,
) -> None:
    """Print what was measured and on what, to stdout."""
    print(*machine.lines(described), sep="\n")
    before, after = described["load_average"][0], described["load_average_after"][0]
    print(f"load average before {before}, after {after}; what is measured here makes some of it itself")
    if figures:
        remarks = {name: f"(others used {used:.1f} of {described['cpus']} CPUs)" for name, used in busy.items()}
        print_table(figures, remarks)
    for failure in failures:
        print(f"NOT measured: {failure}")
    print(f"measured in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
