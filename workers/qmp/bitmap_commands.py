"""Commands on dirty bitmaps.

An action on a bitmap is data: it can be run at once, or with others of the same image as one change (`transaction.py`).
"""

from __future__ import annotations

from typing import Any

from shmcbw.errors import BitmapError

from ..bitmaps import BitmapAction
from ..nodes import Served
from .desk import Arguments, Desk, Handler
from .schema import QMPError


def action_of(desk: Desk, command: str, arguments: Arguments) -> tuple[Served, BitmapAction]:
    """The image and the action of a bitmap command's arguments; QMPError."""
    if command == "block-dirty-bitmap-add":
        node = desk.graph.find(arguments["node"])
        if node.driver in ("copy-before-write", "snapshot-access"):
            # Taken, it would be found under another node than it was added to.
            raise QMPError(f"node '{node.name}' ({node.driver}) is no image: add the bitmap to '{node.file().name}'")
        return desk.graph.image(node), BitmapAction(
            "add",
            arguments["name"],
            granularity=arguments.get("granularity"),
            persistent=arguments.get("persistent", False),
            disabled=arguments.get("disabled", False),
        )
    node = desk.graph.find_node(arguments["node"], "Node '{}' not found")
    served = desk.graph.image_if_served(node)
    if served is None:
        # Bitmaps are only on images that are served.
        raise BitmapError(f"Dirty bitmap '{arguments.get('name', arguments.get('target'))}' not found")
    if command == "block-dirty-bitmap-merge":
        return served, BitmapAction("merge", arguments["target"], sources=_sources(desk, served, arguments["bitmaps"]))
    return served, BitmapAction(command.rpartition("-")[2], arguments["name"])


def _sources(desk: Desk, served: Served, bitmaps: list[str | Arguments]) -> tuple[str, ...]:
    names = []
    for each in bitmaps:
        if isinstance(each, str):
            names.append(each)
            continue
        node = desk.graph.find_node(each["node"], "Node '{}' not found")
        if desk.graph.image_if_served(node) is not served:
            raise QMPError(f"bitmap '{each['name']}' of node '{each['node']}' is of another image: it can't be merged")
        names.append(each["name"])
    return tuple(names)


def _run(command: str) -> Handler:
    def handler(desk: Desk, arguments: Arguments) -> dict[str, Any]:
        served, action = action_of(desk, command, arguments)
        served.coordinator.bitmaps.run([action])
        return {}

    return handler


def _sha256(desk: Desk, arguments: Arguments) -> dict[str, str]:
    served = desk.graph.image_if_served(desk.graph.find_node(arguments["node"], "Node '{}' not found"))
    if served is None:
        raise BitmapError(f"Dirty bitmap '{arguments['name']}' not found")
    return {"sha256": served.coordinator.bitmaps.sha256(arguments["name"])}


COMMANDS = (
    "block-dirty-bitmap-add",
    "block-dirty-bitmap-remove",
    "block-dirty-bitmap-clear",
    "block-dirty-bitmap-enable",
    "block-dirty-bitmap-disable",
    "block-dirty-bitmap-merge",
)
HANDLERS: dict[str, Handler] = {
    **{command: _run(command) for command in COMMANDS},
    "x-debug-block-dirty-bitmap-sha256": _sha256,
}
