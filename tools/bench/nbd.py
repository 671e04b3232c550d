"""Throughput through NBD over a unix socket, beside the servers of `servers.py`, in turn.

4 KiB random writes by fio at queue depths 1 and 16, with 1 and 4 connections; all of an image read and written in order
by nbdcopy, with its defaults.  A new server, and where there is one a new snapshot, for each run: so "under a snapshot"
a part of the random writes, and all of those in order, need copies.

Times are for one write (of all that were done in the time), or for one MiB: medians over the rounds.  nbdkit's cow
keeps what is written beside the image, not what was there: it does less, and what it has is gone at the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

from tools.bench.figure import Figure, median
from tools.bench.place import make_image, workspace
from tools.bench.plan import Plan
from tools.bench.servers import CONTENDERS, KEEPING, QUIET, SNAPSHOT, Contender

NAME = "NBD"
SIZE_BYTES = 256 << 20
RUN_S = 0.7
RATIO_LIMIT = 1.0
DEPTHS, CONNECTIONS = (1, 16), (1, 4)
TIMEOUT_S = 120.0


def measure(plan: Plan) -> list[Figure]:
    missing = [program for program in ("fio", "nbdcopy") if shutil.which(program) is None]
    if missing:
        return [Figure(NAME, "throughput", "ns", None, note=f"not measured: {', '.join(missing)} not installed")]
    rounds, size_bytes = (1, SIZE_BYTES // 4) if plan.quick else (3, SIZE_BYTES)
    figures: list[Figure] = []
    place = plan.fast_place
    if place.free_bytes < 3 * size_bytes:
        raise OSError(f"{place.directory} has no room for three images of {size_bytes} bytes")
    with workspace(place) as directory:
        image = directory / "disk.img"
        for kind in (QUIET, KEEPING):
            for depth in DEPTHS:
                for connections in CONNECTIONS[-1:] if plan.quick else CONNECTIONS:
                    plan.say(f"NBD: {kind}, queue depth {depth}, {connections} connections")
                    figures += _compare(
                        f"{kind}, 4 KiB random writes, depth {depth} x{connections}",
                        kind,
                        rounds,
                        lambda contender, depth=depth, connections=connections: _random_writes(
                            plan, contender, image, size_bytes, depth, connections
                        ),
                    )
        for kind in (QUIET, SNAPSHOT):
            plan.say(f"NBD: {kind}, read in order")
            figures += _compare(
                f"{kind}, MiB read in order", kind, rounds, lambda contender: _read(contender, image, size_bytes)
            )
        for kind in (QUIET, KEEPING):
            plan.say(f"NBD: {kind}, written in order")
            figures += _compare(
                f"{kind}, MiB written in order", kind, rounds, lambda contender: _write(contender, image, size_bytes)
            )
    return figures


def _compare(name: str, kind: str, rounds: int, run: object) -> list[Figure]:
    """Every contender in turn, as often as there are rounds."""
    assert callable(run)
    there = [contender for contender in CONTENDERS[kind] if not contender.missing()]
    times: dict[str, list[float]] = {contender.name: [] for contender in there}
    for _ in range(rounds):
        for contender in there:
            times[contender.name].append(run(contender))
    ours, *others = there
    value = median(times[ours.name])
    figures = [
        Figure(
            NAME,
            name,
            "ns",
            value,
            other=other.name,
            other_value=median(times[other.name]),
            ratio_limit=RATIO_LIMIT if other.rival else None,
        )
        for other in others
    ]
    return figures or [Figure(NAME, name, "ns", value, note="nothing to compare with")]


def _random_writes(
    plan: Plan, contender: Contender, image: Path, size_bytes: int, depth: int, connections: int
) -> float:
    """Nanoseconds for one of all writes of all connections."""
    make_image(image, size_bytes)
    with contender.serve(image) as uri:
        command = ["fio", "--name=writes", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k"]
        command += [f"--iodepth={depth}", f"--numjobs={connections}", "--group_reporting", f"--size={size_bytes}"]
        command += ["--time_based", f"--runtime={int(RUN_S * (400 if plan.quick else 1000))}ms"]
        command += ["--output-format=json"]
        done = subprocess.run(command, cwd=image.parent, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    # Lines about the connection come before the object.
    writes = json.loads(done.stdout[done.stdout.index("{\n") :])["jobs"][0]["write"]
    return 1e9 / float(writes["iops"])


def _read(contender: Contender, image: Path, size_bytes: int) -> float:
    """Nanoseconds for a MiB."""
    make_image(image, size_bytes)
    with contender.serve(image) as uri:
        return _timed(["nbdcopy", uri, "null:"], size_bytes)


def _write(contender: Contender, image: Path, size_bytes: int) -> float:
    new = image.with_suffix(".new")
    make_image(image, size_bytes)
    make_image(new, size_bytes)
    with contender.serve(image) as uri:
        return _timed(["nbdcopy", str(new), uri], size_bytes)


def _timed(command: list[str], size_bytes: int) -> float:
    started = time.perf_counter_ns()
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    return (time.perf_counter_ns() - started) / (size_bytes / (1 << 20))
