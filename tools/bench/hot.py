"""A hot write: 4 KiB to a cluster that needs no copy, against a plain store into a mapping.

Both in this process, in turn, in the same order of blocks: ``disk.pwrite(data, offset)`` and
``mapping[offset:end] = data``.  In a working set that fits into a cache and in one that does not; without a snapshot,
and with one that has the clusters already.

Then the same writes in a process under strace: there must be no system call between them.
"""

from __future__ import annotations

import gc
import mmap
import random
import time
from collections.abc import Sequence
from pathlib import Path

import shmcbw
from shmcbw.sizes import format_size
from shmcbw.workers import Coordinator
from tools.bench import system_calls
from tools.bench.figure import Figure, median
from tools.bench.place import make_image, workspace
from tools.bench.plan import Plan

NAME = "hot"
BLOCK = 4096
SIZE_BYTES = 64 << 20
WORKING_SETS = (256 << 10, SIZE_BYTES)
WRITES = 10_000
RATIO_LIMIT = 1.2


def measure(plan: Plan) -> list[Figure]:
    """The figures; needs 64 MiB of tmpfs, or of disk where there is none."""
    rounds = 41 if plan.quick else 101
    figures = []
    with workspace(plan.fast_place) as directory:
        image = directory / "disk.img"
        make_image(image, SIZE_BYTES)
        with Coordinator(image) as coordinator:
            figures += [_compare(image, size, rounds, "no snapshot") for size in WORKING_SETS]
            with coordinator.snapshot(directory / "scratch"):
                figures += [_compare(image, size, rounds, "clusters copied") for size in WORKING_SETS]
            figures.append(_system_calls(image))
    return figures


def _compare(image: Path, working_set: int, rounds: int, case: str) -> Figure:
    """The same blocks through the filter and through a mapping, in turn."""
    chance = random.Random(working_set)
    blocks = working_set // BLOCK
    offsets = [chance.randrange(blocks) * BLOCK for _ in range(WRITES)]
    data = chance.randbytes(BLOCK)
    ours, others = [], []
    with shmcbw.open(image) as disk, image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        # Nothing is a first touch after this, neither for the filter nor for the page tables.
        for offset in range(0, working_set, BLOCK):
            disk.pwrite(data, offset)
            mapping[offset : offset + BLOCK] = data
        gc.disable()
        try:
            for _ in range(rounds):
                ours.append(_time_filter(disk, data, offsets))
                others.append(_time_mapping(mapping, data, offsets))
        finally:
            gc.enable()
    return Figure(
        NAME,
        f"4 KiB write, {format_size(working_set)}, {case}",
        "ns",
        median(ours),
        other="mmap slice store",
        other_value=median(others),
        ratio_limit=RATIO_LIMIT,
    )


def _time_filter(disk: shmcbw.Disk, data: bytes, offsets: Sequence[int]) -> float:
    """Nanoseconds a write."""
    started = time.perf_counter_ns()
    for offset in offsets:
        disk.pwrite(data, offset)
    return (time.perf_counter_ns() - started) / len(offsets)


def _time_mapping(mapping: mmap.mmap, data: bytes, offsets: Sequence[int]) -> float:
    """Nanoseconds a store."""
    started = time.perf_counter_ns()
    for offset in offsets:
        mapping[offset : offset + BLOCK] = data
    return (time.perf_counter_ns() - started) / len(offsets)


def _system_calls(image: Path) -> Figure:
    name = f"system calls of {WRITES} hot writes"
    if not system_calls.have_strace():
        return Figure(NAME, name, "calls", None, limit=0, note="strace is not installed")
    found = system_calls.count(image, WRITES)
    note = ", ".join(f"{number} {call}" for call, number in found.most_common())
    return Figure(NAME, name, "calls", found.total(), limit=0, note=note)
