"""Shared memory of an image: 4 bytes a cluster, 1 byte a cluster and snapshot, and a constant.

Counted on live coordinators with one snapshot, from what their files in /dev/shm have allocated, not from what the
layout says.  Images are sparse: the size is what matters.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from shmcbw.clusters import CLUSTER_SIZE_DEFAULT
from shmcbw.image import Identity
from shmcbw.segment import SHM, segment_name
from shmcbw.sizes import format_size
from shmcbw.workers import Coordinator
from tools.bench.figure import Figure
from tools.bench.place import allocated_bytes, make_sparse, workspace
from tools.bench.plan import Plan

NAME = "memory"
SIZES = (1 << 30, 1 << 40)
#: What a "small constant" may be: header, 64 slots, 8 workers, 8 snapshots, semaphores of a page each.
CONSTANT_LIMIT_BYTES = 512 << 10


def measure(plan: Plan) -> list[Figure]:
    """For each size: the constant, the bytes of each cluster, and the sum."""
    figures = []
    for size_bytes in SIZES:
        with workspace(plan.fast_place) as directory:
            image = directory / "disk.img"
            make_sparse(image, size_bytes)
            name = segment_name(Identity.of(image.stat())).lstrip("/")
            with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(directory / "scratch"):
                figures += _count(name, size_bytes)
    return figures


def _count(name: str, size_bytes: int) -> list[Figure]:
    """What is in /dev/shm under the segment's name: the segment, ``name.<serial>`` bitmaps, and semaphores."""
    clusters = size_bytes // CLUSTER_SIZE_DEFAULT
    bitmaps = [
        allocated_bytes(Path(SHM) / each)
        for each in os.listdir(SHM)
        if each.startswith(f"{name}.") and each[-1].isdigit()
    ]
    semaphores = [allocated_bytes(Path(SHM) / each) for each in os.listdir(SHM) if each.startswith(f"sem.{name}.")]
    total = allocated_bytes(Path(SHM) / name) + sum(bitmaps) + sum(semaphores)
    constant = total - 5 * clusters
    image = format_size(size_bytes)
    return [
        Figure(
            NAME,
            f"{image} image, 1 snapshot",
            "bytes",
            total,
            other="5 bytes a cluster",
            other_value=5 * clusters,
            note=f"4 bytes, and 1 for the snapshot; clusters of {format_size(CLUSTER_SIZE_DEFAULT)}",
        ),
        Figure(
            NAME,
            f"{image} image: snapshot, per cluster",
            "bytes",
            sum(bitmaps) / len(bitmaps) / clusters,
            limit=1,
        ),
        Figure(
            NAME,
            f"{image} image: the constant",
            "bytes",
            constant,
            limit=CONSTANT_LIMIT_BYTES,
            note=f"of it {len(semaphores)} semaphores of {format_size(mmap.PAGESIZE)}",
        ),
    ]
