"""Commands on the NBD server and what it serves."""

from __future__ import annotations

import os
from typing import Any

from ..nbd.address import Address
from ..nbd.specification import Tls
from ..nodes import Exported
from .desk import Arguments, Desk, Handler
from .schema import QMPError


def _start(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    tls = None
    if "tls-creds" in arguments:
        tls = desk.exports.credentials.get(arguments["tls-creds"])
        if tls is None:
            raise QMPError(f"No TLS credentials with id '{arguments['tls-creds']}'")
    address = _address(arguments["addr"])
    desk.exports.start(address, tls=tls, connections_max=arguments.get("max-connections", 0))
    return {}


def _address(found: Arguments) -> Address:
    data = found["data"]
    if found["type"] == "unix":
        return Address(path=os.path.abspath(data["path"]))
    return Address.parse(f"tcp:{data['host']}:{data['port']}")


def _stop(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    desk.exports.stop()
    return {}


def _add(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    node = desk.graph.nodes.get(arguments["node-name"])
    if node is None:
        raise QMPError(f"Cannot find device='' nor node-name='{arguments['node-name']}'")
    bitmaps = [(None, each) if isinstance(each, str) else (each["node"], each["name"]) for each in _bitmaps(arguments)]
    desk.exports.add(
        Exported(
            arguments["id"],
            node,
            name=arguments.get("name", ""),
            writable=arguments.get("writable", False),
            bitmaps=tuple(bitmaps),
            description=arguments.get("description", ""),
            writethrough=arguments.get("writethrough", False),
        )
    )
    return {}


def _bitmaps(arguments: Arguments) -> list[str | Arguments]:
    found: list[str | Arguments] = arguments.get("bitmaps", [])
    return found


def _delete(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    desk.exports.remove(arguments["id"], hard=arguments.get("mode", "safe") == "hard")
    return {}


def _query(desk: Desk, arguments: Arguments) -> list[dict[str, Any]]:
    return desk.exports.query()


def _add_object(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    name = arguments["id"]
    if name in desk.exports.credentials:
        raise QMPError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    if arguments.get("endpoint", "client") != "server" or "dir" not in arguments:
        raise QMPError("tls-creds-x509: wanted are endpoint=server, and dir")
    directory, verify = arguments["dir"], arguments.get("verify-peer", True)
    certificate, key, authority = (f"{directory}/{name}.pem" for name in ("server-cert", "server-key", "ca-cert"))
    tls = Tls(certificate, key, authority if verify else None)
    for path in (tls.certificate, tls.key, tls.authority):
        if path is not None and not os.access(path, os.R_OK):
            raise QMPError(f"Unable to access credentials {path}: No such file or directory")
    desk.exports.credentials[name] = tls
    return {}


def _delete_object(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    if desk.exports.credentials.pop(arguments["id"], None) is None:
        raise QMPError(f"object '{arguments['id']}' not found")
    return {}


HANDLERS: dict[str, Handler] = {
    "nbd-server-start": _start,
    "nbd-server-stop": _stop,
    "block-export-add": _add,
    "block-export-del": _delete,
    "query-block-exports": _query,
    "object-add": _add_object,
    "object-del": _delete_object,
}
