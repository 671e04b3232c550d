"""A first-touch write: 4 KiB to a cluster of 64 KiB that a snapshot still needs, one writer, against QEMU's filter.

Each write goes to a cluster of its own, so each needs one copy.  In random order, where a write needs exactly what it
says, and in sequence, where our worker copies ahead and most writes find their cluster copied.  Back to back, and with
a pause before each write, after which both sides may have gone to sleep: most programs do something between writes.

A new snapshot for each round; image and target on the same file system; both programs in turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from shmcbw.workers import Coordinator
from tools.bench import qemu
from tools.bench.figure import Figure, Spread, median
from tools.bench.place import Place, make_image, workspace
from tools.bench.plan import Plan
from tools.bench.writers import receive, running, write_timed

NAME = "first touch"
CLUSTER = 65536
RATIO_LIMIT = 0.5
PAUSE_NS = 100_000
PAUSES = {"back to back": 0, "100 µs between": PAUSE_NS}
ORDERS = ("random", "in sequence")
QEMU = "QEMU's filter"
AHEAD = "most of these writes find their cluster copied ahead, so they are judged by their mean"
BEST = "cache=none aio=native, which on tmpfs never leaves the thread; the line above it: QEMU's defaults"
THROUGH_NBD = (
    "from another process: fio, NBD over a unix socket, qemu-storage-daemon; medians of each round's percentiles"
)


@dataclass(slots=True)
class Times:
    """Single times of all rounds, and what other ways through QEMU gave in each round."""

    ours: list[float] = field(default_factory=list)
    qemu: list[float] = field(default_factory=list)
    qemu_best: list[float] = field(default_factory=list)
    qemu_bench: list[float] = field(default_factory=list)
    fio: list[Spread] = field(default_factory=list)


def measure(plan: Plan) -> list[Figure]:
    """For each place, order and pause: our percentiles beside QEMU's."""
    clusters = 512 if plan.quick else 2048
    figures = []
    for place in plan.places[-1:] if plan.quick else plan.places:
        if place.free_bytes < 4 * clusters * CLUSTER:
            plan.say(f"first touch: {place.directory} has no room")
            continue
        with workspace(place) as directory:
            figures += _measure_at(plan, place, directory, clusters)
    return figures


def _measure_at(plan: Plan, place: Place, directory: Path, clusters: int) -> list[Figure]:
    image, source = directory / "disk.img", directory / "qemu.img"
    size_bytes = clusters * CLUSTER
    make_image(image, size_bytes)
    make_image(source, size_bytes)
    rounds = 1 if plan.quick else 3
    pauses = dict(list(PAUSES.items())[:1]) if plan.quick else PAUSES
    figures = []
    with Coordinator(image) as coordinator, running(write_timed, image) as writer:
        receive(writer)
        for order in ORDERS:
            offsets = [number * CLUSTER for number in range(clusters)]
            if order == "random":
                random.Random(clusters).shuffle(offsets)
            for pause, pause_ns in pauses.items():
                plan.say(f"first touch: {place.name}, {order}, {pause}")
                times = Times()
                for _ in range(rounds):
                    times.ours += _ours(coordinator, writer, directory, offsets, pause_ns)
                    _others(times, place, source, offsets, pause_ns)
                figures += _figures(f"{place.name}, {order}, {pause}", order != "random", times)
    return figures


def _ours(
    coordinator: Coordinator, writer: Connection, directory: Path, offsets: list[int], pause_ns: int
) -> list[int]:
    with coordinator.snapshot(directory / "scratch"):
        writer.send((offsets, pause_ns))
        times: list[int] = receive(writer)
        clusters = coordinator.status()["snapshots"][0]["clusters"]
    if clusters["pending"] or clusters["copying"]:
        raise RuntimeError(f"not all clusters were copied before the writes: {clusters}")
    return times


def _others(times: Times, place: Place, source: Path, offsets: list[int], pause_ns: int) -> None:
    """QEMU in all ways that there are here."""
    if qemu.missing():
        return
    target = source.with_name("target.img")
    times.qemu += qemu.write_timed(source, target, offsets, pause_ns)
    if place.file_system == "tmpfs":
        times.qemu_best += qemu.write_timed(source, target, offsets, pause_ns, qemu.BEST)
    if offsets == sorted(offsets) and not pause_ns:
        times.qemu_bench.append(qemu.bench(source, target, len(offsets)))
    if qemu.have_fio():
        found = qemu.fio_timed(source, target, offsets, pause_ns)
        times.fio.append(
            Spread(
                len(offsets), found["50.000000"], found["99.000000"], found["99.900000"], found["max"], found["mean"]
            )
        )
    target.unlink()


def _figures(case: str, in_sequence: bool, times: Times) -> list[Figure]:
    ours = Spread.of(times.ours)
    if not times.qemu:
        return [Figure(NAME, case, "ns", ours.p50, ours, note=f"nothing to compare with: {qemu.missing()}")]
    others = Spread.of(times.qemu)
    figures = []
    if in_sequence:
        # The median write finds its cluster copied ahead: to compare that would be to compare nothing.
        means = f"{case}: mean"
        figures.append(Figure(NAME, means, "ns", ours.mean, None, QEMU, others.mean, ratio_limit=RATIO_LIMIT))
        if times.qemu_bench:
            figures.append(Figure(NAME, means, "ns", ours.mean, None, "… qemu-img bench", median(times.qemu_bench)))
        figures.append(Figure(NAME, case, "ns", ours.p50, ours, QEMU, others.p50, others, note=AHEAD))
    else:
        figures.append(Figure(NAME, case, "ns", ours.p50, ours, QEMU, others.p50, others, ratio_limit=RATIO_LIMIT))
    if times.qemu_best:
        best = Spread.of(times.qemu_best)
        figures.append(Figure(NAME, case, "ns", ours.p50, ours, "… at its best", best.p50, best, note=BEST))
    if times.fio:
        p50, p99, p999, longest, mean = (
            median([getattr(spread, name) for spread in times.fio]) for name in ("p50", "p99", "p999", "max", "mean")
        )
        spread = Spread(sum(each.count for each in times.fio), p50, p99, p999, longest, mean)
        figures.append(Figure(NAME, case, "ns", ours.p50, ours, "… through NBD", p50, spread, note=THROUGH_NBD))
    return figures
