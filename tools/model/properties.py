"""What must hold: the invariants of ``shmcbw/DESIGN.md``, put as questions to the model.

Promises and means
------------------
A *promise* is something a user can find broken: wrong bytes from a snapshot, a wrong answer, a
change not reported, a writer that hangs, a clean-up that never comes. A *means* is a rule inside
shared memory by which promises are kept. The unmutated protocol is judged by all of them, each
mutation by the one promise it is said to break: taking away a rule must hurt somebody, not just
break the rule.

======== ============ ==================================================================
property what         how it is asked here
======== ============ ==================================================================
CONTENT  promise, I7  what a reader of snapshot k returns is the content at cut k
TOLD     promise      a cut's caller hears success: its snapshot was published and is
                      ACTIVE, BROKEN, DROPPED or COMPLETE ever after, or a backup;
                      hears failure: it never is
BACKUP   promise      a target that gets its name holds the content at the cut
CHANGED  promise, I6  a cluster stored to after published cut k has a higher value in
                      the epoch map than the cut's odd epoch, whenever no live writer
                      is in flight (which is when a cut looks at the map)
WRITERS  promise      a live writer always has a step of its own: nobody can block it
END      promise, I3  when nobody has a step left: writers are through, the gate is
                      open, each snapshot is complete, broken, dropped or abandoned
I1       means        a data store finds each ACTIVE snapshot COPIED
I2       means        COPIED and ACTIVE or COMPLETE: the target holds the content at the cut
I5       means        at the instant of a publish no live writer has stored half its
                      data, and no data is stored until the epoch has moved on
======== ============ ==================================================================

I4 (one writer per word) and I8 (nothing is left over) are about layout and files; the model has
neither.

Two invariants need more words than their short form has. I2 holds for snapshots that are not
broken: a worker that reads the source after a break publishes garbage late, which "means nothing".
I5 can't mean that no store happens at an odd epoch: a writer in flight has read the even epoch
and may store when the epoch has turned odd; the drained section waits for exactly that writer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tools.model.protocol import Protocol
from tools.model.state import (
    COPIED,
    ENTRY_ODD,
    ENTRY_TOLD,
    FAULT,
    WRITER_MARK,
    Copy,
    Entry,
    Fault,
    Told,
    Writer,
)
from tools.model.world import PUBLISHED

Property = Callable[[Protocol, bytes], str]
"""Says what is wrong in a state; empty if nothing is."""


def content(_protocol: Protocol, state: bytes) -> str:
    if state[FAULT] == Fault.SOURCE_READ:
        return "a reader returned newer data from the source"
    if state[FAULT] == Fault.TARGET_READ:
        return "a reader returned wrong data from the target"
    return ""


def told(protocol: Protocol, state: bytes) -> str:
    for snapshot in protocol.layout.snapshots:
        entry = protocol.entry[snapshot]
        heard, published = state[entry + ENTRY_TOLD], state[entry] in PUBLISHED
        if heard == Told.SUCCESS and not published:
            return f"cut {snapshot} reported success and its snapshot is gone"
        if heard == Told.FAILURE and published:
            return f"cut {snapshot} reported failure and its snapshot is there"
    return ""


def changed(protocol: Protocol, state: bytes) -> str:
    at = protocol.layout
    for w in at.writer:
        if state[w + WRITER_MARK] and state[w] != Writer.DEAD:
            return ""
    for snapshot in at.snapshots:
        entry = at.entry[snapshot]
        if state[entry] not in PUBLISHED:
            continue
        for cluster in at.clusters:
            marked = state[at.epoch_map[cluster]] > state[entry + ENTRY_ODD]
            if not marked and not protocol.source_is_right(state, snapshot, cluster):
                return f"cluster {cluster} changed after cut {snapshot} and is not reported"
    return ""


def backup(_protocol: Protocol, state: bytes) -> str:
    return "a finished backup is wrong" if state[FAULT] == Fault.WRONG_BACKUP else ""


def writers(_protocol: Protocol, state: bytes) -> str:
    return "a live writer can be blocked for ever" if state[FAULT] == Fault.BLOCKED else ""


def end(_protocol: Protocol, state: bytes) -> str:
    if state[FAULT] == Fault.UNFINISHED:
        return "nobody can go on and something is left to do"
    return ""


def i1(_protocol: Protocol, state: bytes) -> str:
    if state[FAULT] == Fault.UNCOPIED_STORE:
        return "data stored to a cluster that an active snapshot lacks"
    return ""


def i2(protocol: Protocol, state: bytes) -> str:
    at = protocol.layout
    for snapshot in at.snapshots:
        if state[at.entry[snapshot]] not in (Entry.ACTIVE, Entry.COMPLETE):
            continue
        for byte, target in zip(at.cluster_byte[snapshot], at.target[snapshot], strict=True):
            if state[byte] == COPIED and state[target] != Copy.RIGHT:
                return f"snapshot {snapshot}: a cluster is COPIED and its target wrong"
    return ""


def i5(_protocol: Protocol, state: bytes) -> str:
    if state[FAULT] == Fault.HALF_STORE:
        return "a cut published in the middle of a live writer's store"
    if state[FAULT] == Fault.DRAINED_STORE:
        return "data stored after a publish and before the next epoch"
    return ""


PROMISES: Final[dict[str, Property]] = {
    "CONTENT": content,
    "TOLD": told,
    "BACKUP": backup,
    "CHANGED": changed,
    "WRITERS": writers,
    "END": end,
}
MEANS: Final[dict[str, Property]] = {"I1": i1, "I2": i2, "I5": i5}
PROPERTIES: Final[dict[str, Property]] = PROMISES | MEANS
