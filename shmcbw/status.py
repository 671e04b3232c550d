"""What a control segment tells to whoever may attach: the data behind ``shmcbw status``.  Reads only."""

from __future__ import annotations

import errno
import glob
import os
from typing import Any

import psutil

from . import states
from .bitmap import Bitmap
from .epochs import epoch
from .errors import ShmcbwError
from .image import Identity
from .layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Worker
from .segment import COORDINATOR, SHM, Segment, attach_named
from .snapshots import broken_error, state_of, target_path


def describe_all() -> list[dict[str, Any]]:
    """All control segments of this machine; one that we may not or can't read is {"segment", "error"}."""
    found = []
    for path in sorted(glob.glob(f"{SHM}/shmcbw-*")):
        name = os.path.basename(path)
        if "." in name:
            continue
        try:
            device, inode = (int(part, 16) for part in name.split("-")[1:])
            segment = attach_named(Identity(device, inode), os.geteuid())
        except (ShmcbwError, OSError, ValueError) as error:
            found.append({"segment": "/" + name, "error": str(error)})
            continue
        try:
            found.append(describe_segment(segment))
        finally:
            segment.close()
    return found


def describe_segment(segment: Segment, path: str | None = None) -> dict[str, Any]:
    """What a control segment tells, without its coordinator's help: plain dicts, lists and numbers."""
    geometry = segment.geometry
    owner = segment.header(Header.coordinator_pid)
    return {
        "segment": segment.name,
        "image": {
            "path": path or segment.text(Header.image_path.offset, Header.image_path),
            "size_bytes": geometry.image_size,
            "cluster_size_bytes": geometry.cluster_size,
            "clusters": geometry.clusters,
        },
        "coordinator_pid": owner,
        # Our own lock does not count as somebody else's: the coordinator describes itself.
        "coordinator_alive": segment.locked(COORDINATOR) or owner == os.getpid(),
        "epoch": epoch(segment),
        "slots": [_slot_status(segment, i) for i in range(geometry.slot_count) if segment.slot(i, Slot.pid)],
        "workers": [
            _worker_status(segment, i) for i in range(1, geometry.worker_count + 1) if segment.worker(i, Worker.pid)
        ],
        "snapshots": [
            _snapshot_status(segment, i) for i in range(SNAPSHOT_COUNT) if state_of(segment, i) != states.FREE
        ],
        "counters": {
            name: segment.header(getattr(Header, name))
            for name in ("cuts", "cuts_abandoned", "workers_replaced", "slots_reaped")
        },
    }


def _slot_status(segment: Segment, index: int) -> dict[str, Any]:
    names = ["pid", "thread_id", "in_flight", "writes", "write_bytes", "first_touches"]
    names += ["wait_count", "wait_total_ns", "wait_max_ns", "gate_count"]
    waiting = segment.slot(index, Slot.want_sequence) % 2 == 1
    return {
        "slot": index,
        "program": _program(segment.slot(index, Slot.pid)),
        **{name: segment.slot(index, getattr(Slot, name)) for name in names},
        "wanted_clusters": [segment.slot(index, Slot.want_first), segment.slot(index, Slot.want_end)]
        if waiting
        else None,
    }


def _program(pid: int) -> str | None:
    """The name of a process; None if it is gone or hidden."""
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, ValueError):
        return None


def _worker_status(segment: Segment, worker_id: int) -> dict[str, Any]:
    names = ("pid", "wanted_chunks", "ahead_chunks", "background_chunks", "errors", "sleeps")
    state = segment.worker(worker_id, Worker.state)
    return {
        "id": worker_id,
        "state": ("away", "busy", "looking", "asleep")[state] if state < 4 else f"unknown ({state})",
        **{name: segment.worker(worker_id, getattr(Worker, name)) for name in names},
    }


def _snapshot_status(segment: Segment, index: int) -> dict[str, Any]:
    error = broken_error(segment, index)
    state = state_of(segment, index)
    policy = segment.snapshot(index, Snapshot.policy)
    status: dict[str, Any] = {
        "snapshot": index,
        "serial": segment.snapshot(index, Snapshot.serial),
        "state": states.NAMES.get(state, f"unknown ({state})"),
        "on_cbw_error": next((name for name, value in states.POLICIES.items() if value == policy), "unknown"),
        "cbw_timeout_s": segment.snapshot(index, Snapshot.timeout_ns) / 1e9,
        "speed": segment.snapshot(index, Snapshot.speed),
        "cut_time_ns": segment.snapshot(index, Snapshot.cut_time_ns),
        "drained_ns": segment.snapshot(index, Snapshot.drained_ns),
        "target": target_path(segment, index),
        "broken": None,
        "clusters": None,
    }
    if error is not None:
        status["broken"] = {
            "errno": error.errno,
            "error": os.strerror(error.errno or errno.EIO),
            "cluster": error.cluster,
            "time_ns": error.time_ns,
        }
    try:
        bitmap = Bitmap.attach(segment, status["serial"])
    except OSError:
        return status
    status["clusters"] = vars(bitmap.counts())
    bitmap.close()
    return status
