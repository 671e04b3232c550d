"""The daemon: serves images in the foreground and is driven over QMP.

At the start: the socket is bound (a second daemon is told at once), the images are served, then clients are taken on
and the daemon says that it is ready.  At the end: no new clients, the command that runs comes to its end, jobs are
cancelled and snapshots dropped, the clients are let go.  With ``detach_jobs`` unfinished jobs and snapshots are left
as they are, with the workers that serve them, as if the daemon had been killed: the next one goes on with them.  It
reloads nothing.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import sys
from typing import Any

from shmcbw import __version__
from shmcbw.errors import ShmcbwError
from shmcbw.layout import SNAPSHOT_COUNT, Header
from shmcbw.segment import COORDINATOR, attach_named, has_journal, identities
from shmcbw.snapshots import state_of

from .coordinator import Coordinator
from .exports import Exports
from .job_states import CONCLUDED, NULL
from .nbd.address import Address
from .nbd.specification import Tls
from .nodes import Exported, Graph
from .qmp import (
    backup_commands,
    bitmap_commands,
    export_commands,
    general,
    job_commands,
    node_commands,
    own_commands,
    resize_command,
    transaction,
)
from .qmp.desk import Desk
from .qmp.server import Server, runtime_directory
from .settings import Options

log = logging.getLogger("shmcbw")

SUBJECTS = (
    general,
    node_commands,
    backup_commands,
    job_commands,
    bitmap_commands,
    transaction,
    own_commands,
    resize_command,
    export_commands,
)


class Daemon:
    """One run of ``shmcbw serve``."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._path = os.path.abspath(options.qmp or os.path.join(runtime_directory(), "qmp.sock"))
        self._graph = Graph(self._serve)
        self._exports = Exports(self._graph, lambda name: self._server.post("BLOCK_EXPORT_DELETED", {"id": name}))
        self._desk = Desk(self._graph, self._exports, options.name, self._stop_soon)
        for subject in SUBJECTS:
            self._desk.learn(subject.HANDLERS)
        self._server = Server(self._path, f"shmcbw {__version__}", self._desk.execute)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._reason = ""
        #: Jobs and snapshots are left to the next daemon.
        self.detached = False

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or ``quit``.  OSError, ShmcbwError: it could not start; nothing is left."""
        loop = self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._server.bind()
        for number, reason in ((signal.SIGTERM, "host-signal"), (signal.SIGINT, "host-signal")):
            loop.add_signal_handler(number, self._stop, reason)
        try:
            # A thread: this may wait for processes, and a signal must be heard meanwhile.
            await loop.run_in_executor(None, self._serve_images)
            await self._server.start()
            log.info("ready: %s, QMP on %s", self._served_text(), self._path)
            notify("READY=1")
            await self._end.wait()
        finally:
            notify("STOPPING=1")
            if self._reason:
                log.info("ending: %s", self._reason)
                self._server.post("SHUTDOWN", {"guest": False, "reason": self._reason})
            detach = self._options.detach_jobs and self._reason != ""
            async with self._server.ending():
                self.detached = await loop.run_in_executor(None, self._close, detach)

    def _close(self, detach: bool) -> bool:
        self._exports.close()
        return self._graph.close(detach=detach)

    def _serve_images(self) -> None:
        for image in self._options.images:
            if self._desk.stopping:
                return
            self._graph.serve_device(image.name(list(self._graph.nodes)), os.path.abspath(image.filename))
        for path in left_behind(self._path):
            log.info("%s was served by a daemon that died: served again", path)
            self._graph.serve_again(path)
        if self._options.nbd_listen is not None:
            self._export_images(self._options.nbd_listen)
        self._exports.restore()
        self._graph.store()

    def _export_images(self, listen: str) -> None:
        """The images of the command line over NBD, each by its node's name."""
        files, tls = self._options.nbd_tls, None
        if files is not None:
            certificate, key = files
            tls = Tls(certificate, key, self._options.nbd_tls_authority)
        address = self._exports.start(Address.parse(listen), tls=tls)
        for served, _ in self._graph.coordinators():
            if served.device:
                self._exports.add(Exported(served.node.name, served.node, writable=True, kept=False))
                log.info(
                    "%s is exported as %s", served.coordinator.path, address.uri(served.node.name, encrypted=bool(tls))
                )

    def _served_text(self) -> str:
        names = [f"{served.coordinator.path} as {served.node.name}" for served, _ in self._graph.coordinators()]
        return f"serving {', '.join(names)}" if names else "serving no image yet"

    def _serve(self, path: str, node_name: str) -> Coordinator:
        options = self._options
        coordinator = Coordinator(
            path,
            workers=options.workers,
            cluster_size=options.cluster_size,
            slots=options.slots,
            state_dir=options.state_dir,
            control=self._path,
            on_event=functools.partial(self._event, path),
        )
        log.info("%s is served as node %s", path, node_name)
        return coordinator

    def _event(self, path: str, name: str, data: dict[str, Any]) -> None:
        """Of an image's coordinator, from any of its threads, with its lock held: only passed on."""
        if name == "SNAPSHOT_BROKEN":
            data = {"filename": path, **{key: value for key, value in data.items() if value is not None}}
        self._server.post(name, data)
        if name == "JOB_STATUS_CHANGE" and data["status"] in (CONCLUDED, NULL):
            self._server.between_commands(self._desk.tidy)

    def _stop(self, reason: str) -> None:
        """On the loop's thread."""
        self._reason = self._reason or reason
        self._desk.stopping = True
        assert self._end is not None
        self._end.set()

    def _stop_soon(self, reason: str) -> None:
        """From a command's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop, reason)


def left_behind(control: str) -> list[str]:
    """Images of dead daemons of this socket that have left a snapshot, a job or a bitmap."""
    found = []
    for identity in identities():
        try:
            segment = attach_named(identity, os.geteuid())
        except (ShmcbwError, OSError):
            continue
        try:
            ours = segment.text(Header.control.offset, Header.control) == control
            states = [state_of(segment, index) for index in range(SNAPSHOT_COUNT)]
            if ours and not segment.locked(COORDINATOR) and (any(states) or has_journal(segment)):
                found.append(segment.text(Header.image_path.offset, Header.image_path))
        finally:
            segment.close()
    return found


def notify(state: str) -> None:
    """Tell the service manager, where there is one (sd_notify: a datagram to ``$NOTIFY_SOCKET``)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), name)
        except OSError as error:
            log.warning("the service manager at %s is not told %s: %s", address, state, error.strerror)


def serve(options: Options) -> None:
    """Run a daemon to its end, in this process, with logging to stderr."""
    logging.basicConfig(
        stream=sys.stderr, level=options.log_level.upper(), format="shmcbw serve: %(levelname)s: %(message)s"
    )
    daemon = Daemon(options)
    asyncio.run(daemon.run())
    if daemon.detached:
        log.info("jobs and snapshots are left to the next daemon")
        logging.shutdown()
        # As a killed one ends: the interpreter's clean-up would close the coordinators that are to be left.
        os._exit(0)
