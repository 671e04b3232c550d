"""The drained section: how long a cut holds writes, with eight busy writers.

A cut waits until no write is in flight, which is a store at memory speed; so what it waits for is a writer that was
put off its CPU in the middle of one.  With more writers than CPUs that happens: eight writers that never pause are the
hard case, the ones that pause after each write are what most programs are like.  Half of the writers write to few
blocks over and over, half all over the image.

The images are sparse, 1 GiB and 1 TiB: nothing in the section may depend on the size.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from shmcbw import CutAbandonedError
from shmcbw.sizes import format_size
from shmcbw.workers import Coordinator
from tools.bench.figure import Figure, Spread
from tools.bench.place import make_sparse, workspace
from tools.bench.plan import Plan
from tools.bench.writers import receive, running, write_busily

NAME = "drained section"
SIZES = (1 << 30, 1 << 40)
WRITERS = 8
CALL = "the whole call: target, bitmap, workers, cut"
DRAIN_LIMIT_S = 2.0
BETWEEN_S = 0.01
#: On a machine that is very busy: fewer cuts, not a run without end.
CASE_LIMIT_S = 60.0
PAUSE_NS = 1_000_000
LIMIT_NS = 1e6
PAUSES = {"8 writers flat out": 0, "8 writers, 1 ms between writes": PAUSE_NS}
#: What counts as the same for 1 GiB and 1 TiB.
SAME_RATIO = 1.5


def measure(plan: Plan) -> list[Figure]:
    """p99 of all cuts, for each kind of writers and each size; then 1 TiB beside 1 GiB."""
    cuts = 40 if plan.quick else 250
    figures = []
    for pause, pause_ns in list(PAUSES.items())[: 1 if plan.quick else None]:
        found = {}
        for size_bytes in SIZES:
            case = f"{format_size(size_bytes)}, {pause}"
            plan.say(f"drained section: {case}")
            with workspace(plan.fast_place) as directory:
                times, calls, given_up = _cut_often(directory, size_bytes, pause_ns, cuts)
            spread = found[size_bytes] = Spread.of(times)
            note = f"judged by p99; {len(times)} cuts, {given_up} of them given up after {DRAIN_LIMIT_S:.0f} s"
            figures.append(Figure(NAME, case, "ns", spread.p99, spread, limit=LIMIT_NS, note=note))
            if calls:
                call = Spread.of(calls)
                figures.append(Figure(NAME, f"{case}: snapshot()", "ns", call.p50, call, note=CALL))
        small, large = (found[size_bytes] for size_bytes in SIZES)
        name = f"1 TiB, {pause}: p50"
        figures.append(Figure(NAME, name, "ns", large.p50, None, "1 GiB", small.p50, ratio_limit=SAME_RATIO))
    return figures


def _cut_often(directory: Path, size_bytes: int, pause_ns: int, cuts: int) -> tuple[list[float], list[float], int]:
    """The nanoseconds of each drained section and of each call, and how many cuts were given up."""
    image, scratch = directory / "disk.img", directory / "scratch"
    make_sparse(image, size_bytes)
    times: list[float] = []
    calls: list[float] = []
    given_up = 0
    with Coordinator(image, drain_limit=DRAIN_LIMIT_S) as coordinator, ExitStack() as stack:
        writers = [stack.enter_context(running(write_busily, image, number, pause_ns)) for number in range(WRITERS)]
        for writer in writers:
            receive(writer)
        until = time.monotonic() + CASE_LIMIT_S
        while len(times) < cuts and time.monotonic() < until:
            started = time.perf_counter_ns()
            try:
                with coordinator.snapshot(scratch) as snapshot:
                    calls.append(time.perf_counter_ns() - started)
                    times.append(snapshot.drained_ns)
            except CutAbandonedError:
                # It held writes all that time, and counts.
                times.append(DRAIN_LIMIT_S * 1e9)
                given_up += 1
            time.sleep(BETWEEN_S)
    return times, calls, given_up
