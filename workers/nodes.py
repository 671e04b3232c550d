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
from dataclasses import dataclass
from typing import Any

from shmcbw.errors import ShmcbwError
from shmcbw.image import Identity, ImageFile
from shmcbw.layout import Slot
from shmcbw.segment import slot_byte

from .bitmaps import Bitmaps
from .coordinator import Coordinator, CoordinatorSnapshot
from .job_states import CONCLUDED, NULL
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

    def __init__(self, name: str, image: Node, target: Node | None, snapshot: CoordinatorSnapshot) -> None:
        super().__init__(name, "copy-before-write", (image,) if target is None else (image, target))
        self.snapshot = snapshot


class AccessNode(Node):
    """A snapshot-access node: reads the snapshot below it."""

    def __init__(self, name: str, below: SnapshotNode) -> None:
        super().__init__(name, "snapshot-access", (below,))
        self.snapshot = below.snapshot


@dataclass(frozen=True, slots=True)
class JobNodes:
    """The nodes that a job stands on; ``filter_name``: of the one that shows its filter, if a client has named it."""

    job_id: str
    source: Node
    target: Node
    filter_name: str | None = None


class Exported:
    """An NBD export of a node (`exports.py`).  ``bitmaps``: pairs of a node's name, or None for its own, and a name."""

    def __init__(
        self,
        export_id: str,
        node: Node,
        *,
        name: str = "",
        writable: bool = False,
        bitmaps: tuple[tuple[str | None, str], ...] = (),
        description: str = "",
        writethrough: bool = False,
        kept: bool = True,
    ) -> None:
        """``name``: default the node's.  ``kept``: a restarted daemon is to serve it again."""
        self.id = export_id
        self.node = node
        self.name = name or node.name
        self.writable = writable
        self.bitmaps = bitmaps
        self.description = description
        self.writethrough = writethrough
        self.kept = kept
        self.shutting_down = False
        #: Where the server listens.
        self.listening: dict[str, Any] = {}
        #: Bitmaps that it has, and as which user.
        self.held: list[tuple[Bitmaps, str]] = []

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "node": self.node.name,
            "name": self.name,
            "writable": self.writable,
            "bitmaps": [list(each) for each in self.bitmaps],
            "description": self.description,
            "writethrough": self.writethrough,
            "listening": self.listening,
        }


class Served:
    """An image with its coordinator, and the node that it was first served by: bitmaps are shown there."""

    def __init__(self, node: Node, coordinator: Coordinator, *, device: bool) -> None:
        self.node = node
        self.coordinator = coordinator
        #: Served since the daemon's start, as QEMU's drives are: it is a device of its node's name.
        self.device = device

    def unfinished(self) -> bool:
        """Whether it has a snapshot or a job that has not ended, or is kept to be dismissed."""
        jobs = [job for job in self.coordinator.jobs if job.auto_dismiss is not None or not job.ended]
        return bool(self.coordinator.snapshots or jobs)

    def needed(self) -> bool:
        """Whether the next daemon has something to come back for."""
        return self.unfinished() or bool(self.coordinator.bitmaps)


class Graph:
    """All nodes and served images.  ``serve(path, node_name)`` makes a coordinator."""

    def __init__(self, serve: Callable[[str, str], Coordinator]) -> None:
        self._serve = serve
        self.nodes: dict[str, Node] = {}
        self.served: dict[Identity, Served] = {}
        self.exports: dict[str, Exported] = {}
        #: What journals say of exports of a daemon that died, until they are served again.
        self.exports_found: list[Exported] = []
        self._jobs: dict[str, JobNodes] = {}
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
        jobs = self._live_jobs()
        if self.is_target(node):
            raise busy(node)
        exported = any(export.node is node for export in self.exports.values())
        if name in {job.filter_name for job in jobs} or exported or self._has_writers(node):
            raise QMPError(f"Node {name} is in use")
        if not node.owned:
            raise QMPError(f"Node {name} is not owned by the monitor")
        if node.parents or node in {job.source for job in jobs}:
            raise QMPError(f"Block device {name} is in use")
        self._remove(node)

    def _has_writers(self, node: Node) -> bool:
        """Whether a node is the last one of a served image that somebody has open for writing."""
        found = next(((identity, each) for identity, each in self.served.items() if each.node is node), None)
        if found is None or self._others(node, found[0]):
            return False
        _, served = found
        segment = served.coordinator.segment
        slots = range(segment.geometry.slot_count)
        return any(segment.slot(slot, Slot.pid) and segment.locked(slot_byte(slot)) for slot in slots)

    def _others(self, node: Node, identity: Identity) -> list[Node]:
        """Other nodes of the image of a node."""
        return [each for each in self.nodes.values() if each is not node and self._names(each, identity)]

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
                others = self._others(node, identity)
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

    # -- jobs --------------------------------------------------------------------------------------------------------

    def stand(self, job: JobNodes) -> None:
        """A job is about to stand on nodes."""
        self._jobs[job.job_id] = job
        if job.filter_name is not None:
            self.add(Node(job.filter_name, "copy-before-write", (job.source,), owned=False))

    def let_go(self, job_id: str) -> None:
        """It does not, or not any more."""
        job = self._jobs.pop(job_id, None)
        node = self.nodes.get(job.filter_name) if job is not None and job.filter_name is not None else None
        if node is not None:
            self._remove(node)

    def settle(self) -> None:
        """Let go of nodes of jobs that have ended.  Called before each command that alters something, or looks at
        nodes; a job's filter is gone before anybody can look for it in the state `concluded`."""
        live = {job.job_id for job in self._live_jobs()}
        for job_id in list(self._jobs):
            if job_id not in live:
                self.let_go(job_id)

    def _live_jobs(self) -> list[JobNodes]:
        ended = (CONCLUDED, NULL)
        live = {job.id for _, owner in self.coordinators() for job in owner.jobs if job.status not in ended}
        return [job for job in list(self._jobs.values()) if job.job_id in live]

    def is_target(self, node: Node) -> bool:
        """Whether a job writes a node's file."""
        targets = [job.target for job in self._live_jobs()]
        return any(node is target or node.file() is target.file() for target in targets)

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

    def close(self, *, detach: bool = False) -> bool:
        """Close every coordinator: jobs are cancelled, snapshots dropped.

        With ``detach``, those that somebody must come back for are left as they are: whether there are any.  Then this
        process has to end at once, without clean-up of its own: what it leaves is what a killed one leaves.
        """
        left = False
        while self.served:
            _, served = self.served.popitem()
            if detach and served.unfinished():
                left = True
            else:
                self._close(served)
        self.nodes.clear()
        return left

    @staticmethod
    def _close(served: Served) -> None:
        # Nobody is to come back for it: a journal that says something keeps the segment.
        _store(served, {})
        served.coordinator.close()

    # -- what a restarted daemon finds again -------------------------------------------------------------------------

    def store(self) -> None:
        """Write to the journal of each served image which nodes it has, if that has changed.

        Those that name the image, its snapshots and their readers, and the targets of snapshots and jobs; nothing where
        there is no snapshot, job, bitmap or export, for a journal that says something keeps the segment.  A node that
        only names a file is forgotten with the daemon.
        """
        for identity, served in list(self.served.items()):
            nodes: dict[str, Any] = {}
            exports = [
                each for each in self.exports.values() if each.kept and self._belongs(each.node, served, identity)
            ]
            if served.needed() or exports:
                kept = [node for node in self.nodes.values() if self._belongs(node, served, identity)]
                jobs = [job for job in self._live_jobs() if job.source in kept]
                nodes = {
                    "served": served.node.name,
                    "nodes": [_to_json(node) for node in kept],
                    "jobs": {job.job_id: [job.source.name, job.target.name, job.filter_name] for job in jobs},
                    "exports": [export.to_json() for export in exports],
                }
            _store(served, nodes)

    def _belongs(self, node: Node, served: Served, identity: Identity) -> bool:
        if any(self._belongs(parent, served, identity) for parent in node.parents):
            return True
        if isinstance(node, (SnapshotNode, AccessNode)):
            return self._names(_image_node(node), identity)
        ids = {job.id for job in served.coordinator.jobs}
        return self._names(node, identity) or any(
            node is job.target or node is job.target.file() for job in self._live_jobs() if job.job_id in ids
        )

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
        stored = served.coordinator.journal.document["nodes"].get("jobs", {})
        for job_id, names in stored.items() if isinstance(stored, dict) else ():
            try:
                source, target, filter_name = names
                if filter_name is not None:
                    self.check_name(filter_name)
                self.stand(JobNodes(job_id, self.nodes[source], self.nodes[target], filter_name))
            except (KeyError, TypeError, ValueError, QMPError) as error:
                log.warning("the nodes of job %s are dropped: %s", job_id, error)
        self._find_exports(served)
        named = {id(node.snapshot) for node in self.nodes.values() if isinstance(node, SnapshotNode)}
        for snapshot in served.coordinator.snapshots:
            if id(snapshot) not in named:
                log.info("a snapshot of %s that nobody was told of is dropped", served.coordinator.path)
                snapshot.close()

    def _find_exports(self, served: Served) -> None:
        entries = served.coordinator.journal.document["nodes"].get("exports", [])
        for entry in entries if isinstance(entries, list) else []:
            try:
                bitmaps = tuple((node if node is None else str(node), str(name)) for node, name in entry["bitmaps"])
                export = Exported(
                    str(entry["id"]),
                    self.nodes[str(entry["node"])],
                    name=str(entry["name"]),
                    writable=bool(entry["writable"]),
                    bitmaps=bitmaps,
                    description=str(entry["description"]),
                    writethrough=bool(entry["writethrough"]),
                )
                export.listening = dict(entry["listening"])
            except (KeyError, TypeError, ValueError) as error:
                log.warning("an export in the journal of %s is dropped: %s", served.coordinator.path, error)
            else:
                self.exports_found.append(export)

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
            image, *targets = children
            serial = entry["serial"]
            found = [each for each in served.coordinator.snapshots if each.serial == serial]
            if not found:
                raise ValueError(f"{name} was a snapshot that is not there any more")
            node = SnapshotNode(name, image, targets[0] if targets else None, found[0])
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
        try:
            allocated, size = file.allocated_bytes(), file.size_bytes()
        except (QMPError, OSError):
            # Somebody has removed the file; the others are to be seen nevertheless.
            allocated = size = 0
        image: dict[str, Any] = {
            "filename": file.path,
            "format": node.driver,
            "actual-size": allocated,
            "virtual-size": size,
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
