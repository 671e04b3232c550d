"""Commands of ours, under the prefix x-shmcbw-: what QEMU has no words for."""

from __future__ import annotations

import base64
import os
from typing import Any

from shmcbw import failpoints
from shmcbw.image import Identity
from shmcbw.layout import HISTOGRAM_COUNT, Slot
from shmcbw.reader import SnapshotReader
from shmcbw.status import describe_segment

from ..groups import Backup, backup_group
from ..increments import backup_parameters
from ..nodes import AccessNode, Served, SnapshotNode
from .desk import Arguments, Desk, Handler
from .job_commands import find_job
from .schema import QMPError, message_of

READ_BYTES_MAX = 1 << 20


def _image(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    return desk.image(arguments["node-name"]).coordinator.status()


def _part(name: str) -> Handler:
    def query(desk: Desk, arguments: Arguments) -> Any:
        return describe_segment(desk.image(arguments["node-name"]).coordinator.segment)[name]

    return query


def _waits(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    segment = desk.image(arguments["node-name"]).coordinator.segment
    geometry = segment.geometry
    slots = [slot for slot in range(geometry.slot_count) if segment.slot(slot, Slot.pid)]
    place = Slot.wait_histogram
    rows = []
    for slot in slots:
        offset = geometry.slot(slot, place)
        raw = segment.memory[offset : offset + place.size]
        rows.append([int.from_bytes(raw[8 * b : 8 * b + 8], "little") for b in range(HISTOGRAM_COUNT)])
    return {
        "count": sum(segment.slot(slot, Slot.wait_count) for slot in slots),
        "total-ns": sum(segment.slot(slot, Slot.wait_total_ns) for slot in slots),
        "max-ns": max((segment.slot(slot, Slot.wait_max_ns) for slot in slots), default=0),
        "histogram": [
            {"below-ns": 1 << bucket, "count": count}
            for bucket in range(HISTOGRAM_COUNT)
            if (count := sum(row[bucket] for row in rows))
        ],
    }


def _query_failpoints(desk: Desk, arguments: Arguments) -> list[dict[str, str]]:
    return [vars(point) for point in failpoints.POINTS]


def _set_failpoint(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    segment = desk.image(arguments["node-name"]).coordinator.segment
    failpoints.arm(segment.memory, arguments["name"], arguments["action"])
    return {}


def _reader(desk: Desk, arguments: Arguments) -> SnapshotReader:
    node = desk.graph.find(arguments["node-name"])
    if not isinstance(node, AccessNode):
        raise QMPError(f"node '{node.name}' ({node.driver}) is no snapshot-access node")
    return node.snapshot


def _read(desk: Desk, arguments: Arguments) -> dict[str, str]:
    if not 0 <= arguments["length"] <= READ_BYTES_MAX:
        raise QMPError(f"Parameter 'length' expects 0 to {READ_BYTES_MAX}")
    data = _reader(desk, arguments).pread(arguments["length"], arguments["offset"])
    return {"data": base64.b64encode(data).decode()}


def _status(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    extents = _reader(desk, arguments).block_status(arguments["length"], arguments["offset"])
    return [{"offset": each.offset, "length": each.length, "status": each.status} for each in extents]


def _discard(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    _reader(desk, arguments).discard(arguments["length"], arguments["offset"])
    return {}


def _served(desk: Desk, path: str) -> Served:
    try:
        identity = Identity.of(os.stat(path))
    except (OSError, ValueError) as error:
        raise QMPError(f"Could not open '{path}': {message_of(error)}") from None
    found = desk.graph.served.get(identity)
    if found is None:
        raise QMPError(f"{path} is no image that is served")
    return found


def _find_image(desk: Desk, arguments: Arguments) -> dict[str, str]:
    return {"node-name": _served(desk, arguments["filename"]).node.name}


def _query_job(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    return find_job(desk, arguments["id"], block=False).describe()


_BITMAP_OPTIONS: Arguments = {
    "since": None,
    "sync": None,
    "bitmap_mode": None,
    "in_place": False,
    "manifest": False,
    "overwrite": False,
    "persistent": False,
}


def _backup(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    requests, notes = [], []
    for options in arguments["backups"]:
        given = {name.replace("-", "_"): value for name, value in options.items()}
        coordinator = _served(desk, given.pop("image")).coordinator
        target = given.pop("target_file")
        bitmap_options = {name: given.pop(name, default) for name, default in _BITMAP_OPTIONS.items()}
        parameters, said = backup_parameters(coordinator.bitmaps, coordinator.path, **bitmap_options)
        notes += [said] if said else []
        requests.append(Backup(coordinator, target, **given, **parameters))
    return {"jobs": [job.id for job in backup_group(requests)], "notes": notes}


def _snapshot(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    name = desk.graph.check_name(arguments["node-name"])
    served = _served(desk, arguments["image"])
    policy = {name.replace("-", "_"): arguments[name] for name in ("on-cbw-error", "cbw-timeout") if name in arguments}
    snapshot = served.coordinator.snapshot(arguments["scratch-file"], **policy)
    desk.graph.add(SnapshotNode(name, served.node, None, snapshot))
    return {}


HANDLERS: dict[str, Handler] = {
    "x-shmcbw-snapshot-add": _snapshot,
    "x-shmcbw-backup": _backup,
    "x-shmcbw-query-job": _query_job,
    "x-shmcbw-find-image": _find_image,
    "x-shmcbw-query-image": _image,
    "x-shmcbw-query-waits": _waits,
    "x-shmcbw-query-slots": _part("slots"),
    "x-shmcbw-query-workers": _part("workers"),
    "x-shmcbw-query-snapshots": _part("snapshots"),
    "x-shmcbw-query-failpoints": _query_failpoints,
    "x-shmcbw-set-failpoint": _set_failpoint,
    "x-shmcbw-snapshot-read": _read,
    "x-shmcbw-snapshot-status": _status,
    "x-shmcbw-snapshot-discard": _discard,
}
