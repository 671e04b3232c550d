"""Commands about the daemon itself and the protocol."""

from __future__ import annotations

from typing import Any

from .desk import Arguments, Desk, Handler
from .schema import introspect
from .vocabulary import COMMANDS, EVENTS


def _query_commands(desk: Desk, arguments: Arguments) -> list[dict[str, str]]:
    return [{"name": command.name} for command in COMMANDS]


def _query_schema(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    return introspect(COMMANDS, EVENTS)


def _query_status(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    return {
        "running": not desk.stopping,
        "singlestep": False,
        "status": "shutdown" if desk.stopping else "running",
    }


def _query_name(desk: Desk, arguments: Arguments) -> dict[str, str]:
    return {"name": desk.name} if desk.name else {}


def _quit(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    desk.stop("host-qmp-quit")
    return {}


HANDLERS: dict[str, Handler] = {
    "query-commands": _query_commands,
    "query-qmp-schema": _query_schema,
    "query-status": _query_status,
    "query-name": _query_name,
    "quit": _quit,
}
