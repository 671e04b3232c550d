"""Nodes: the names by which QMP speaks of images, targets, snapshots and what reads them.

A node only names something.  A file node names a file; its image is *served*, that is, gets a coordinator of its own
in this process, when a command first needs that: as the source of a backup or a snapshot, or for a bitmap.  A raw node
is another name for the node below it.  A copy-before-write node is a snapshot, a snapshot-access node its reader.

A node that another one or a job stands on can't be removed.  Everything here runs in the one command that has its turn
(`qmp/server.py`); what only looks may run beside it and takes copies of the tables.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any

from shmcbw.errors import ShmcbwError
from shmcbw.image import Identity, ImageFile

from .coordinator import Coordinator, CoordinatorSnapshot
from .job_states import CONCLUDED
from .qmp.schema import QMPError

log = logging.getLogger("shmcbw")

NODE_NAME_BYTES_MAX = 31
_WELL_FORMED = re.compile(r"[a-zA-Z][-._a-zA-Z0-9]*\Z")


def well_formed(name: str) -> bool:
    """Whether a name can be one of a node or a job: a letter, then letters, digits, ``-``, ``.``, ``_``."""
    return _WELL_FORMED.match(name) is not None


class Node:
    """A name for something.  ``owned``: by a client, who may remove it; a child that was given inline is not."""

    def __init__(self, name: str, driver: str, children: tuple[Node, ...] = (), *, owned: bool = True) -> None:
        self.name = name
        self.driver = driver
        self.children = children
        self.owned = owned
        self.parents: list[Node] = []
        #: Jobs that stand on this node.
        self.users: set[str] = set()
        #: Jobs that write it.
        self.targets_of: set[str] = set()

    def file(self) -> FileNode:
        """The file at the bottom of it."""
        return self.children[0].file()

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.driver}>"


class FileNode(Node):
    """A regular file (``file``) or a block device (``host_device``), by its path."""

    def __init__(self, name: str, driver: str, path: str, *, read_only: bool, owned: bool = True) -> None:
        super().__init__(name, driver, owned=owned)
        self.path = path
        self.read_only = read_only
        self.identity()

    def file(self) -> FileNode:
        return self

    def identity(self) -> Identity:
        """Of the file that has the path now: a finished backup replaces its target.  QMPError if there is none."""
        return Identity.of(self._status())

    def size_bytes(self) -> int:
        status = self._status()
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        image = ImageFile.open(self.path, writable=False)
        image.close()
        return image.size_bytes

    def allocated_bytes(self) -> int:
        return self._status().st_blocks * 512

    def _status(self) -> os.stat_result:
        if not self.path:
            raise QMPError(f"The '{self.driver}' block driver requires a file name")
        if "\0" in self.path:
            raise QMPError("a path can't have a NUL in it")
        try:
            status = os.stat(self.path)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(self.path, os.R_OK if self.read_only else os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise QMPError(f"Could not open '{self.path}': {error.strerror}") from None
        if self.driver == "file" and not stat.S_ISREG(status.st_mode):
            raise QMPError(f"'file' driver requires '{self.path}' to be a regular file")
        if self.driver == "host_device" and not stat.S_ISBLK(status.st_mode):
            # QEMU takes character devices too, which can't be mapped.
            raise QMPError(f"'host_device' driver requires '{self.path}' to be a block device")
        return status


class SnapshotNode(Node):
    """A copy-before-write node: a snapshot of the image below it."""

    def __init__(self, name: str, image: Node, target: Node, snapshot: CoordinatorSnapshot) -> None:
        super().__init__(name, "copy-before-write", (image, target))
        self.snapshot = snapshot


class AccessNode(Node):
    """A snapshot-access node: reads the snapshot below it."""

    def __init__(self, name: str, below: SnapshotNode) -> None:
        super().__init__(name, "snapshot-access", (below,))
        self.snapshot = below.snapshot


class Served:
    """An image with its coordinator, and the node that it was first served by: bitmaps are shown there."""

    def __init__(self, node: Node, coordinator: Coordinator, *, device: bool) -> None:
        self.node = node
        self.coordinator = coordinator
        #: Served since the daemon's start, as QEMU's drives are: it is a device of its node's name.
        self.device = device

    def needed(self) -> bool:
        """Whether the next daemon has something to come back for."""
        coordinator = self.coordinator
        jobs = [job for job in coordinator.jobs if job.status != CONCLUDED]
        return bool(coordinator.snapshots or jobs or coordinator.bitmaps)


class Graph:
    """All nodes and served images.  ``serve(path, node_name)`` makes a coordinator."""

    def __init__(self, serve: Callable[[str, str], Coordinator]) -> None:
        self._serve = serve
        self.nodes: dict[str, Node] = {}
        self.served: dict[Identity, Served] = {}
        self._next_auto = 1

    # -- names -----------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Node:
        """The node of a name; QMPError as QEMU says it where a device or a node may be meant."""
        node = self.nodes.get(name)
        if node is None:
            raise QMPError(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def find_node(self, name: str, text: str = "Failed to find node with node-name='{}'") -> Node:
        """The node of a name, where only a node may be meant."""
        node = self.nodes.get(name)
        if node is None:
            raise QMPError(text.format(name))
        return node

    def check_name(self, name: str) -> str:
        """A name for a new node."""
        if not well_formed(name):
            raise QMPError(f"Invalid node-name: '{name}'")
        if len(name) > NODE_NAME_BYTES_MAX:
            raise QMPError("Node name too long")
        if name in self.nodes:
            raise QMPError(f"Duplicate nodes with node-name='{name}'")
        return name

    def auto_name(self) -> str:
        """A name that no client can give."""
        name = f"#block{self._next_auto:03}"
        self._next_auto += 1
        return name

    # -- adding and removing ---------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        for child in node.children:
            child.parents.append(node)
        self.nodes[node.name] = node

    def remove(self, name: str) -> None:
        """Remove a node and the children that were given inline with it; QMPError while anything needs it."""
        node = self.find_node(name)
        if node.targets_of:
            raise busy(node)
        if not node.owned:
            raise QMPError(f"Node {name} is not owned by the monitor")
        if node.parents or node.users:
            raise QMPError(f"Block device {name} is in use")
        self._remove(node)

    def discard(self, node: Node) -> None:
        """Remove an inline child that could not get its parent."""
        if self.nodes.get(node.name) is node:
            self._remove(node)

    def _remove(self, node: Node) -> None:
        # First what can fail.
        if isinstance(node, SnapshotNode):
            node.snapshot.close()
        self._stop_serving(node)
        del self.nodes[node.name]
        for child in node.children:
            child.parents.remove(node)
            if not child.owned and not child.parents:
                self._remove(child)

    def _stop_serving(self, node: Node) -> None:
        """The last node of a served image takes its coordinator along; another one takes over the serving."""
        for identity, served in list(self.served.items()):
            if served.node is node:
                others = [each for each in self.nodes.values() if each is not node and self._names(each, identity)]
                if others:
                    served.node = others[-1]
                else:
                    del self.served[identity]
                    self._close(served)

    @staticmethod
    def _names(node: Node, identity: Identity) -> bool:
        if node.driver not in ("file", "host_device", "raw"):
            return False
        try:
            return node.file().identity() == identity
        except QMPError:
            return False

    # -- served images ---------------------------------------------------------------------------------------------

    def image(self, node: Node) -> Served:
        """The served image below a node; it is served from now on.  QMPError if it can't be."""
        file = node.file()
        identity = file.identity()
        found = self.served.get(identity)
        if found is None:
            found = Served(node, self._serve(file.path, node.name), device=False)
            self.served[identity] = found
            self._restore(found)
        return found

    def image_if_served(self, node: Node) -> Served | None:
        """The served image that a node of an image names, if it is."""
        if node.driver not in ("file", "host_device", "raw"):
            return None
        try:
            return self.served.get(node.file().identity())
        except QMPError:
            return None

    def serve_device(self, name: str, path: str) -> Served:
        """Serve an image under a node of its own, as the command line says."""
        self.check_name(name)
        driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
        node = FileNode(name, driver, path, read_only=False)
        identity = node.identity()
        if identity in self.served:
            raise QMPError(f"{path} is served already, as node {self.served[identity].node.name}")
        self.served[identity] = served = Served(node, self._serve(path, name), device=True)
        self.add(node)
        self._restore(served)
        return served

    def serve_again(self, path: str) -> None:
        """Serve an image that a dead daemon served, by the nodes in its journal."""
        identity = Identity.of(os.stat(path))
        if identity in self.served:
            return
        coordinator = self._serve(path, "")
        stored = coordinator.journal.document["nodes"]
        served = Served(Node("", "file"), coordinator, device=False)
        self.served[identity] = served
        self._restore(served)
        node = self.nodes.get(str(stored.get("served")))
        if node is None or not self._names(node, identity):
            log.warning("%s was served, but its journal does not say as which node: let go", path)
            del self.served[identity]
            coordinator.close()
        else:
            served.node = node

    def coordinators(self) -> Iterator[tuple[Served, Coordinator]]:
        for served in list(self.served.values()):
            yield served, served.coordinator

    def close(self) -> None:
        """Close every coordinator: jobs are cancelled, snapshots dropped."""
        while self.served:
            _, served = self.served.popitem()
            self._close(served)
        self.nodes.clear()

    @staticmethod
    def _close(served: Served) -> None:
        # Nobody is to come back for it: a journal that says something keeps the segment.
        _store(served, {})
        served.coordinator.close()

    # -- what a restarted daemon finds again -------------------------------------------------------------------------

    def store(self) -> None:
        """Write to the journal of each served image which nodes it has, if that has changed.

        Those that name the image, its snapshots and their readers, and the targets of snapshots and jobs; nothing where
        there is neither snapshot nor job nor bitmap, for a journal that says something keeps the segment.  A node that
        only names a file is forgotten with the daemon.
        """
        for identity, served in list(self.served.items()):
            nodes: dict[str, Any] = {}
            if served.needed():
                kept = [node for node in self.nodes.values() if self._belongs(node, served, identity)]
                nodes = {"served": served.node.name, "nodes": [_to_json(node) for node in kept]}
            _store(served, nodes)

    def _belongs(self, node: Node, served: Served, identity: Identity) -> bool:
        if any(self._belongs(parent, served, identity) for parent in node.parents):
            return True
        if isinstance(node, (SnapshotNode, AccessNode)):
            return self._names(_image_node(node), identity)
        return self._names(node, identity) or any(job.id in node.targets_of for job in served.coordinator.jobs)

    def _restore(self, served: Served) -> None:
        """Make the nodes again that are in an image's journal; its entries are checked, and dropped if they are wrong.

        Then snapshots that no node names: the daemon died before it told anybody of them.
        """
        entries = served.coordinator.journal.document["nodes"].get("nodes", [])
        for entry in entries if isinstance(entries, list) else []:
            try:
                self._restore_node(served, entry)
            except (ShmcbwError, ValueError, TypeError, KeyError, AttributeError) as error:
                log.warning("a node in the journal of %s is dropped: %s", served.coordinator.path, error)
        named = {id(node.snapshot) for node in self.nodes.values() if isinstance(node, SnapshotNode)}
        for snapshot in served.coordinator.snapshots:
            if id(snapshot) not in named:
                log.info("a snapshot of %s that nobody was told of is dropped", served.coordinator.path)
                snapshot.close()

    def _restore_node(self, served: Served, entry: dict[str, Any]) -> None:
        name, driver, owned = str(entry["name"]), str(entry["driver"]), bool(entry["owned"])
        if name in self.nodes:
            return
        if owned:
            self.check_name(name)
        children = tuple(self.nodes[str(child)] for child in entry["children"])
        if driver in ("file", "host_device"):
            path, read_only = str(entry["path"]), bool(entry["read-only"])
            node: Node = FileNode(name, driver, path, read_only=read_only, owned=owned)
        elif driver == "raw":
            (below,) = children
            node = Node(name, driver, (below,), owned=owned)
        elif driver == "copy-before-write":
            image, target = children
            serial = entry["serial"]
            found = [each for each in served.coordinator.snapshots if each.serial == serial]
            if not found:
                raise ValueError(f"{name} was a snapshot that is not there any more")
            node = SnapshotNode(name, image, target, found[0])
        elif driver == "snapshot-access" and isinstance(children[0], SnapshotNode):
            node = AccessNode(name, children[0])
        else:
            raise ValueError(f"{name} is a {driver}")
        self.add(node)
        if not owned and name.startswith("#block") and name[6:].isdigit():
            self._next_auto = max(self._next_auto, int(name[6:]) + 1)

    # -- what there is ---------------------------------------------------------------------------------------------

    def describe(self, node: Node) -> dict[str, Any]:
        """A node as query-named-block-nodes has it."""
        file = node.file()
        image: dict[str, Any] = {
            "filename": file.path,
            "format": node.driver,
            "actual-size": file.allocated_bytes(),
            "virtual-size": file.size_bytes(),
        }
        if node.driver != "snapshot-access":
            image["dirty-flag"] = False
        return {
            "file": file.path,
            "node-name": node.name,
            "ro": file.read_only,
            "drv": node.driver,
            "backing_file_depth": 0,
            "encrypted": False,
            "detect_zeroes": "off",
            **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "write_threshold"), 0),
            "image": image,
            "cache": {"writeback": True, "direct": False, "no-flush": False},
        }


def busy(node: Node) -> QMPError:
    return QMPError(f"Node '{node.name}' is busy: block device is in use by block job: backup")


def _image_node(node: Node) -> Node:
    """The node of an image that a snapshot or its reader stands on."""
    while node.driver in ("copy-before-write", "snapshot-access"):
        node = node.children[0]
    return node


def _to_json(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": node.name,
        "driver": node.driver,
        "owned": node.owned,
        "children": [child.name for child in node.children],
    }
    if isinstance(node, FileNode):
        found |= {"path": node.path, "read-only": node.read_only}
    if isinstance(node, SnapshotNode):
        found["serial"] = node.snapshot.serial
    return found


def _store(served: Served, nodes: dict[str, Any]) -> None:
    journal = served.coordinator.journal
    if journal.document["nodes"] != nodes:
        with journal.change() as document:
            document["nodes"] = nodes
