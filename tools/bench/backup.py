"""A full backup of a quiet image, against ``cp --reflink=never --sparse=never`` into a new file.

Ours is timed from ``coordinator.backup()`` to the end of ``job.wait()``: the target is complete, synced and has its
name.  The coordinator runs already; the whole of ``shmcbw backup``, which starts one, is a figure of its own.

We sync the target and cp does not, so there are two comparisons: with cp, by which we are judged, and with cp and
``sync -d``, which is the same promise.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shmcbw.sizes import format_size
from shmcbw.workers import Coordinator
from tools.bench.figure import Figure, median
from tools.bench.interpreter import environment
from tools.bench.place import Place, make_image, workspace
from tools.bench.plan import Plan

NAME = "backup"
SIZE_BYTES = 1 << 30
QUICK_BYTES = 256 << 20
TIMEOUT_S = 120.0
END_TIMEOUT_S = 5.0
RATIO_LIMIT = 1.0


def measure(plan: Plan) -> list[Figure]:
    """For each place: backup and command, beside cp and cp with sync."""
    size_bytes = QUICK_BYTES if plan.quick else SIZE_BYTES
    figures = []
    for place in plan.places:
        if place.free_bytes < 2 * size_bytes:
            plan.say(f"backup: {place.directory} has no room")
            continue
        with workspace(place) as directory:
            figures += _measure_at(plan, place, directory, size_bytes)
    return figures


def _measure_at(plan: Plan, place: Place, directory: Path, size_bytes: int) -> list[Figure]:
    image, target = directory / "disk.img", directory / "copy.img"
    make_image(image, size_bytes)

    variables = environment(directory / "bytecode")

    def copy() -> None:
        _run("cp", "--reflink=never", "--sparse=never", str(image), str(target))

    def copy_and_sync() -> None:
        copy()
        _run("sync", "-d", str(target))

    def backup() -> None:
        coordinator.backup(target).wait(TIMEOUT_S)

    def command() -> None:
        _run(sys.executable, "-m", "shmcbw", "backup", str(image), str(target), "--progress", "never", env=variables)

    # Fills the cache of bytecode.
    command()
    target.unlink()
    times: dict[Callable[[], None], list[float]] = {copy: [], backup: [], copy_and_sync: [], command: []}
    for number in range(3):
        plan.say(f"backup: {place.name}, {format_size(size_bytes)}, round {number + 1}")
        for action, found in times.items():
            if action is backup:
                # Not while the command runs, which is a coordinator itself.
                with Coordinator(image) as coordinator:
                    found.append(_time(action, target))
            else:
                found.append(_time(action, target))
            _check(image, target, number)
            target.unlink()
    ours, whole = median(times[backup]), median(times[command])
    plain, synced = median(times[copy]), median(times[copy_and_sync])
    case = f"{place.name}, {format_size(size_bytes)}"
    return [
        Figure(NAME, f"{case}: backup()", "ns", ours, None, "cp", plain, ratio_limit=RATIO_LIMIT),
        Figure(NAME, f"{case}: backup()", "ns", ours, None, "cp; sync -d", synced),
        Figure(NAME, f"{case}: shmcbw backup", "ns", whole, None, "cp", plain),
        Figure(NAME, f"{case}: shmcbw backup", "ns", whole, None, "cp; sync -d", synced),
    ]


def _time(action: Callable[[], None], target: Path) -> float:
    """Nanoseconds of an action; what was written before it is on the disk first, and not on the action's account."""
    _run("sync", "-f", str(target.parent))
    started = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - started


def _check(image: Path, target: Path, number: int) -> None:
    """A fast copy that is none would be no feat: the first ones are compared with the image."""
    if number == 0:
        _run("cmp", str(image), str(target))


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run to the end.  Where that is cut short the command is told to end, not killed: it may have workers."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        try:
            _, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise RuntimeError(f"{command[0]}: exit status {process.returncode}: {errors.decode(errors='replace').strip()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
