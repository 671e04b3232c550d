"""The desk: where a command finds what it works on.

A handler is a function of the desk and the checked arguments; it returns what the reply carries or raises `QMPError`.
It runs in a thread.  Handlers of commands that alter something have their turn one at a time (`server.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from shmcbw.errors import ShmcbwError

from ..coordinator import Coordinator
from ..exports import Exports
from ..jobs import Job
from ..nodes import Graph, Served
from .schema import QMPError
from .vocabulary import BY_NAME

log = logging.getLogger("shmcbw")

Arguments = dict[str, Any]
Handler = Callable[["Desk", Arguments], Any]


class Desk:
    """The daemon's nodes, its name, and the way to end it."""

    def __init__(self, graph: Graph, exports: Exports, name: str | None, stop: Callable[[str], None]) -> None:
        self.graph = graph
        self.exports = exports
        self.name = name
        #: Called with a reason: the daemon begins to end.
        self.stop = stop
        self.stopping = False
        self._handlers: dict[str, Handler] = {}

    def learn(self, handlers: dict[str, Handler]) -> None:
        self._handlers.update(handlers)

    def execute(self, name: str, arguments: Arguments) -> Any:
        """Run a command whose arguments are checked."""
        if not BY_NAME[name].alters:
            return self._handlers[name](self, arguments)
        self.graph.settle()
        try:
            return self._handlers[name](self, arguments)
        finally:
            self.graph.store()

    def tidy(self) -> None:
        """Between commands: let go of nodes of jobs that have ended, here and in the journals."""
        try:
            self.graph.settle()
            self.graph.store()
        except (ShmcbwError, OSError) as error:
            log.warning("nodes of ended jobs stay in a journal: %s", error)

    def image(self, name: str) -> Served:
        """The image that a node names, which has to be served."""
        found = self.graph.image_if_served(self.graph.find(name))
        if found is None:
            raise QMPError(f"node '{name}' is no image that is served")
        return found

    def jobs(self) -> Iterator[tuple[Coordinator, Job]]:
        """All jobs, the oldest first."""
        for _, coordinator in self.graph.coordinators():
            for job in coordinator.jobs:
                yield coordinator, job
