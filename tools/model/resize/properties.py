"""What must hold in the world of a resize. All of them are promises (``tools.model.properties``).

======== ============ ==================================================================
property what         how it is asked here
======== ============ ==================================================================
SIZE     promise, I2  no cluster of a snapshot is copied by a worker of the old size
REACH    promise      a handle that attaches is never turned away, and never maps more
                      than file and segment have
SETTLED  promise, I8  when nobody has a step left: one size everywhere, none announced,
                      the snapshot copied, the handle attached
======== ============ ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tools.model.resize.protocol import ResizeProtocol
from tools.model.resize.state import CLUSTER, FAULT, Cluster, Fault

ResizeProperty = Callable[[ResizeProtocol, bytes], str]
"""Says what is wrong in a state; empty if nothing is."""


def size(_protocol: ResizeProtocol, state: bytes) -> str:
    return "a worker copied the last cluster by the old size" if state[CLUSTER] == Cluster.COPIED_IN_PART else ""


def reach(_protocol: ResizeProtocol, state: bytes) -> str:
    return {
        Fault.STALE: "a handle was told that the segment is another image's",
        Fault.FOREIGN: "a handle was told that the segment is not ours",
        Fault.BEYOND: "a handle has mapped more than there is",
    }.get(state[FAULT], "")


def settled(_protocol: ResizeProtocol, state: bytes) -> str:
    return "nobody can go on and something is left to do" if state[FAULT] == Fault.UNFINISHED else ""


RESIZE_PROPERTIES: Final[dict[str, ResizeProperty]] = {"SIZE": size, "REACH": reach, "SETTLED": settled}
