"""What a daemon serves over NBD: its server, and exports by their ids.

An export stands on a node: of an image, which is served through the filter (so do the nodes above it, but for a reader
of a snapshot), or of a snapshot.  Its dirty bitmaps are in use while it is there.  What a client of QMP has asked for
is in the journal of its image (`nodes.py`) and is there again after the daemon's death, on the same address; its
clients see their connections end and may connect again.

Each method is called by the one command that has its turn; `query` also beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from shmcbw.errors import BitmapError, ShmcbwError

from .bitmaps import Bitmaps
from .coordinator import Coordinator
from .nbd.address import Address
from .nbd.server import ExportInUseError, Server
from .nbd.specification import BitmapSpec, ExportSpec, Tls
from .nodes import AccessNode, Exported, Graph, Node, busy, well_formed
from .qmp.schema import QMPError

log = logging.getLogger("shmcbw")

NAME_BYTES_MAX = 4096


class Exports:
    """The NBD server of a daemon and its exports.  ``deleted`` is called with the id of each that has ended."""

    def __init__(self, graph: Graph, deleted: Callable[[str], None]) -> None:
        self._graph = graph
        self._deleted = deleted
        self._server: Server | None = None
        #: Where the server listens, as plain data that can start it again.
        self._listening: dict[str, Any] = {}
        #: What objects of type tls-creds-x509 stand for.
        self.credentials: dict[str, Tls] = {}

    # -- the server ----------------------------------------------------------------------------------------------------

    def start(self, address: Address, *, tls: Tls | None = None, connections_max: int = 0) -> Address:
        """Listen: where, in the end.  QMPError if it does already, OSError if it can't."""
        if self._server is not None:
            raise QMPError("NBD server already running")
        listener, found = address.listen()
        self._server = Server(listener, path=found.path or None, tls=tls, connections_max=connections_max)
        self._listening = {
            "address": str(found),
            "tls": asdict(tls) if tls is not None else None,
            "connections-max": connections_max,
        }
        return found

    def stop(self) -> None:
        """End every export and listen no more."""
        if self._server is None:
            raise QMPError("NBD server not running")
        self.close()

    def close(self) -> None:
        """As `stop`, also where nothing runs.  Clients are cut off."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for export in list(self._graph.exports.values()):
            self._end(export)

    # -- exports -------------------------------------------------------------------------------------------------------

    def add(self, export: Exported) -> None:
        """Serve a node; with nothing changed QMPError, BitmapError, or OSError if the server's processes can't."""
        server = self._server
        if not well_formed(export.id):
            raise QMPError("Invalid block export id")
        if export.id in self._graph.exports:
            raise QMPError(f"Block export id '{export.id}' is already in use")
        if server is None:
            raise QMPError("NBD server not running")
        if len(export.name.encode()) > NAME_BYTES_MAX:
            raise QMPError(f"export name '{export.name}' too long")
        if len(export.description.encode()) > NAME_BYTES_MAX:
            raise QMPError(f"description '{export.description}' too long")
        if export.name in [each.name for each in server.exports]:
            raise QMPError(f"NBD server already has export named '{export.name}'")
        if export.writable and export.node.file().read_only:
            raise QMPError("Cannot export read-only node as writable")
        if self._graph.is_target(export.node):
            raise busy(export.node)
        coordinator, snapshot = self._served(export.node)
        bitmaps = self._hold_bitmaps(export, coordinator, snapshot)
        try:
            server.add(
                ExportSpec(
                    export.name,
                    coordinator.path,
                    snapshot,
                    export.writable,
                    bitmaps,
                    export.description,
                    export.writethrough,
                )
            )
        except BaseException:
            self._let_go_of_bitmaps(export)
            raise
        export.listening = self._listening
        self._graph.exports[export.id] = export

    def _served(self, node: Node) -> tuple[Coordinator, int | None]:
        """The coordinator of a node's image, and the snapshot's serial number if it reads one."""
        if isinstance(node, AccessNode):
            image = node.children[0].children[0]
            return self._graph.image(image).coordinator, node.snapshot.serial
        return self._graph.image(node).coordinator, None

    def _hold_bitmaps(self, export: Exported, coordinator: Coordinator, snapshot: int | None) -> tuple[BitmapSpec, ...]:
        held: list[BitmapSpec] = []
        try:
            for node_name, name in export.bitmaps:
                bitmaps = self._find_bitmap(coordinator, node_name, name)
                if snapshot is None and not export.writable and bitmaps[name].recording:
                    raise QMPError(f"Enabled bitmap '{name}' incompatible with readonly export")
                user = f"export {export.id} {len(held)}"
                held.append(bitmaps.export(name, user, live=snapshot is None))
                export.held.append((bitmaps, user))
        except BaseException:
            self._let_go_of_bitmaps(export)
            raise
        return tuple(held)

    def _find_bitmap(self, coordinator: Coordinator, node_name: str | None, name: str) -> Bitmaps:
        """The bitmaps of the image that is exported, which have this one; of QEMU's errors the fitting one."""
        if node_name is not None:
            served = self._graph.image_if_served(self._graph.find_node(node_name, "Node '{}' not found"))
            if served is None or name not in served.coordinator.bitmaps:
                raise BitmapError(f"Dirty bitmap '{name}' not found")
            if served.coordinator is not coordinator:
                raise QMPError(f"bitmap '{name}' of node '{node_name}' is of another image than the one exported")
        if name not in coordinator.bitmaps:
            raise BitmapError(f"Bitmap '{name}' is not found")
        return coordinator.bitmaps

    @staticmethod
    def _let_go_of_bitmaps(export: Exported) -> None:
        while export.held:
            bitmaps, user = export.held.pop()
            bitmaps.end_export(user)

    def remove(self, export_id: str, *, hard: bool) -> None:
        """End an export; QMPError while clients use it, unless ``hard``: then they are cut off."""
        export = self._graph.exports.get(export_id)
        if export is None:
            raise QMPError(f"Export '{export_id}' is not found")
        assert self._server is not None
        # Others can see it while clients are being cut off.
        export.shutting_down = True
        try:
            self._server.remove(export.name, hard=hard)
        except ExportInUseError:
            export.shutting_down = False
            raise QMPError(f"export '{export_id}' still in use") from None
        self._end(export)

    def _end(self, export: Exported) -> None:
        self._let_go_of_bitmaps(export)
        del self._graph.exports[export.id]
        self._deleted(export.id)

    def query(self) -> list[dict[str, Any]]:
        """As query-block-exports gives it, the youngest first."""
        return [
            {
                "id": export.id,
                "type": "nbd",
                "node-name": export.node.name,
                "shutting-down": export.shutting_down,
            }
            for export in reversed(list(self._graph.exports.values()))
        ]

    # -- after a death -------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Serve again what the journals of the images say; what can't be is logged, and forgotten."""
        while self._graph.exports_found:
            export = self._graph.exports_found.pop(0)
            try:
                if self._server is None:
                    self._start_again(export.listening)
                self.add(export)
            except (ShmcbwError, OSError, ValueError, TypeError, KeyError) as error:
                log.warning("export %s is not served again: %s", export.id, error)

    def _start_again(self, listening: dict[str, Any]) -> None:
        tls = listening["tls"]
        address = Address.parse(str(listening["address"]))
        self.start(
            address, tls=Tls(**tls) if tls is not None else None, connections_max=int(listening["connections-max"])
        )
