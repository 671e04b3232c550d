"""block_resize: of a served image by its coordinator, so that writers follow; of another file by itself, as in QEMU."""

from __future__ import annotations

from typing import Any

from ..nodes import busy
from ..resize import resize_unserved
from .desk import Arguments, Desk, Handler
from .schema import QMPError


def _resize(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    device, name, size_bytes = arguments.get("device", ""), arguments.get("node-name", ""), arguments["size"]
    node = desk.graph.nodes.get(device or name)
    if node is None:
        raise QMPError(f"Cannot find device='{device}' nor node-name='{name}'")
    if size_bytes < 0:
        raise QMPError("Parameter 'size' expects a >0 size")
    if node.driver not in ("file", "host_device", "raw"):
        raise QMPError(f"node '{node.name}' ({node.driver}) is no image: resize the one below it")
    if desk.graph.is_target(node):
        raise busy(node)
    if node.file().read_only:
        raise QMPError("Block node is read-only")
    served = desk.graph.image_if_served(node)
    if served is not None:
        served.coordinator.resize(size_bytes)
    else:
        resize_unserved(node.file().path, size_bytes)
    return {}


HANDLERS: dict[str, Handler] = {"block_resize": _resize}
