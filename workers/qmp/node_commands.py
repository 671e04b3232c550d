"""Commands on nodes: adding them (a copy-before-write node takes a snapshot), removing them, and what there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..nodes import AccessNode, FileNode, Node, Served, SnapshotNode, busy
from .backup_commands import check_cluster_size_min
from .desk import Arguments, Desk, Handler
from .schema import QMPError


def _add(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    if "node-name" not in arguments:
        raise QMPError("'node-name' must be specified for the root node")
    _make(desk, arguments, owned=True)
    return {}


def _make(desk: Desk, options: Arguments, *, owned: bool) -> Node:
    """Make a node, and its inline children before it; of a failure nothing is left."""
    graph = desk.graph
    driver = options["driver"]
    made: list[Node] = []

    def child(reference: str | Arguments) -> Node:
        if isinstance(reference, str):
            return graph.find(reference)
        made.append(_make(desk, reference, owned="node-name" in reference))
        return made[-1]

    try:
        if driver in ("file", "host_device"):
            name = _name(desk, options)
            path, read_only = options["filename"], options.get("read-only", False)
            node: Node = FileNode(name, driver, path, read_only=read_only, owned=owned)
        elif driver == "raw":
            below = child(options["file"])
            node = Node(_name(desk, options), driver, (below,), owned=owned)
        elif driver == "copy-before-write":
            node = _snapshot(desk, options, child(options["file"]), child(options["target"]))
        else:
            below = child(options["file"])
            if not isinstance(below, SnapshotNode):
                raise QMPError(f"node '{below.name}' is no copy-before-write node: only its snapshot can be accessed")
            node = AccessNode(_name(desk, options), below)
    except BaseException:
        for each in reversed(made):
            graph.discard(each)
        raise
    graph.add(node)
    return node


def _name(desk: Desk, options: Arguments) -> str:
    return desk.graph.check_name(options["node-name"]) if "node-name" in options else desk.graph.auto_name()


def _snapshot(desk: Desk, options: Arguments, image: Node, target: Node) -> SnapshotNode:
    name = _name(desk, options)
    served, path = check_pair(desk, image, target)
    geometry = served.coordinator.segment.geometry
    check_cluster_size_min(options, geometry.cluster_size)
    snapshot = served.coordinator.snapshot(
        path,
        overwrite=True,
        access=_access(desk, options["bitmap"], served) if "bitmap" in options else None,
        on_cbw_error=options.get("on-cbw-error", "break-guest-write"),
        cbw_timeout=options.get("cbw-timeout", 0),
    )
    return SnapshotNode(name, image, target, snapshot)


def _access(desk: Desk, place: Arguments, served: Served) -> Iterator[tuple[int, int]]:
    """What a bitmap lets a snapshot show; looked up after the cut, so that nothing written before is missed."""
    owner = desk.image(place["node"]).coordinator
    if owner.segment.geometry.image_size != served.coordinator.segment.geometry.image_size:
        raise QMPError("bitmap size does not match the size of the node")
    owner.bitmaps.find(place["name"]).check(busy=False)

    def later() -> Iterator[tuple[int, int]]:
        yield from owner.bitmaps.extents(place["name"])

    return later()


def check_pair(desk: Desk, source: Node, target: Node) -> tuple[Served, str]:
    """Source and target of a backup or a snapshot: the source's image, served from now on, and the target's path.

    QEMU checks sizes only for jobs: a small target of a copy-before-write node ends it at a later write.
    """
    if source.driver not in ("file", "host_device", "raw"):
        raise QMPError(f"node '{source.name}' ({source.driver}) is no image")
    if target.driver not in ("file", "host_device", "raw"):
        raise QMPError(f"node '{target.name}' ({target.driver}) can't be written")
    if source is target or source.file().identity() == target.file().identity():
        raise QMPError("Source and target cannot be the same")
    if desk.graph.is_target(target):
        raise busy(target)
    if target.file().read_only:
        raise QMPError("Block node is read-only")
    if source.file().size_bytes() != target.file().size_bytes():
        raise QMPError("Source and target image have different sizes")
    return desk.graph.image(source), target.file().path


def _delete(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    desk.graph.remove(arguments["node-name"])
    return {}


def _query_nodes(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    return [_describe(desk, node) for node in reversed(list(desk.graph.nodes.values()))]


def _describe(desk: Desk, node: Node) -> dict[str, Any]:
    found = desk.graph.describe(node)
    served = desk.graph.image_if_served(node)
    if served is not None:
        found["image"]["cluster-size"] = served.coordinator.segment.geometry.cluster_size
        bitmaps = served.coordinator.bitmaps.query() if served.node is node else []
        if bitmaps:
            found["dirty-bitmaps"] = bitmaps
    return found


def _query_block(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    return [
        {
            "device": served.node.name,
            "type": "unknown",
            "removable": False,
            "locked": False,
            "inserted": _describe(desk, served.node),
        }
        for served, _ in desk.graph.coordinators()
        if served.device
    ]


HANDLERS: dict[str, Handler] = {
    "blockdev-add": _add,
    "blockdev-del": _delete,
    "query-named-block-nodes": _query_nodes,
    "query-block": _query_block,
}
