"""A counter-example for people: who does what, and which words change.

Says every step's name and meaning, then each word that differs from the state
before. Where a process is in its program is left out: the next step tells.
Writers, workers and slots are counted from 1 here. That the coordinator sees a
slot clear has no line of its own: it does at once (``reductions.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from tools.model.state import (
    COPIED,
    CUT,
    ENTRY_ODD,
    ENTRY_TOLD,
    EPOCH,
    PENDING,
    READER,
    READER_CLUSTER,
    READER_SNAPSHOT,
    WORKER_CLUSTER,
    WORKER_SNAPSHOT,
    WRITER_EPOCH,
    WRITER_KIND,
    WRITER_MARK,
    WRITER_SEEN,
    WRITER_WANTED,
    Copy,
    Entry,
    Kind,
    Layout,
    Reader,
    Told,
    Worker,
    name_of,
)
from tools.model.world import Step

NUMBERED: Final = (
    "coordinator.see_slot",
    "coordinator.reap_slot",
    "coordinator.test_lock",
    "coordinator.return_claims",
    "kill.writer",
    "kill.worker",
    "group.see_slot",
)
"""Steps that say to which slot, writer or worker they happen."""

OF_AN_IMAGE: Final = {
    *(f"group.{step}" for step in ("close", "publish", "open", "finish", "break", "abandon", "free")),
    *(f"adopt.{step}" for step in ("abandon", "open", "ask", "look", "repeat", "tell", "keep", "drop", "finish")),
    "kill.adopter",
}
"""Steps that say to which image they happen; images are counted from 0."""

STUCK: Final = {
    "writer.blocked": "has no step until somebody else does one",
    "nobody": "has a step left",
}
"""What stands in a trace where no step can be done."""


def words(at: Layout, state: bytes) -> dict[str, str]:
    """The words of a state by name, as text."""
    found = {
        "epoch": f"{state[EPOCH]} ({'drained' if state[EPOCH] & 1 else 'open'})",
        "cut published last": str(state[CUT]),
    }
    for cluster in at.clusters:
        first = at.source[cluster]
        stamps = f"[{state[first]} {state[first + 1]}]"
        found[f"source cluster {cluster}, cuts before its last store"] = stamps
        found[f"epoch map of cluster {cluster}"] = str(state[at.epoch_map[cluster]])
    for snapshot in at.snapshots:
        entry = at.entry[snapshot]
        name = name_of(Entry, state[entry])
        if state[entry] == Entry.PREPARED:
            name += f" for epoch {state[entry + ENTRY_ODD]}"
        found[f"snapshot {snapshot}"] = name
        found[f"told of cut {snapshot}"] = name_of(Told, state[entry + ENTRY_TOLD])
        if state[entry] != Entry.ACTIVE:
            continue
        for cluster in at.clusters:
            where = f"of snapshot {snapshot}, cluster {cluster}"
            found[f"byte {where}"] = _byte(state[at.cluster_byte[snapshot][cluster]])
            found[f"target {where}"] = name_of(Copy, state[at.target[snapshot][cluster]])
    for slot, w in enumerate(at.writer):
        who = slot + 1
        found[f"slot {who}"] = "in flight" if state[w + WRITER_MARK] else "clear"
        found[f"slot {who} drained"] = "yes" if state[w + WRITER_SEEN] else "no"
        found[f"write of writer {who}"] = name_of(Kind, state[w + WRITER_KIND])
        found[f"epoch remembered by writer {who}"] = str(state[w + WRITER_EPOCH])
        wanted = [str(k) for k in at.snapshots if state[w + WRITER_WANTED] >> k & 1]
        found[f"writer {who} waits for a copy in snapshot"] = ", ".join(wanted) or "none"
    for worker, k in enumerate(at.worker):
        doing = "nothing"
        if state[k] in (Worker.COPY, Worker.PUBLISH):
            where = f"snapshot {state[k + WORKER_SNAPSHOT]}, cluster {state[k + WORKER_CLUSTER]}"
            doing = f"{name_of(Worker, state[k])} {where}"
        found[f"worker {worker + 1} has to do"] = doing
    if state[READER] != Reader.LOOK:
        where = f"snapshot {state[READER_SNAPSHOT]}, cluster {state[READER_CLUSTER]}"
        found["reader has to do"] = f"{name_of(Reader, state[READER])} {where}"
    return found


def _byte(value: int) -> str:
    if value == PENDING:
        return "PENDING"
    return "COPIED" if value == COPIED else f"COPYING by worker {value}"


def lines(
    words: Callable[[bytes], dict[str, str]], meanings: Mapping[str, str], trace: Sequence[Step]
) -> Iterator[str]:
    """The trace as text, the first state left out: all idle, nothing written, epoch 2."""
    meanings = {**meanings, **STUCK}
    before = words(trace[0][2])
    for number, (name, process, state) in enumerate(trace[1:], start=1):
        subject, _, action = name.partition(".")
        if subject in ("writer", "worker"):
            subject += f" {process + 1}"
        elif name in NUMBERED:
            action += f" {process + 1}"
        elif name in OF_AN_IMAGE:
            action += f" {process}"
        yield f"{number:3}  {f'{subject} {action}':<26} {meanings[name]}"
        after = words(state)
        for word, value in after.items():
            if before.get(word, value) != value:
                yield f"{'':9}{word}: {before[word]} -> {value}"
            elif word not in before and value not in ("PENDING", "NONE"):
                yield f"{'':9}{word}: {value}"
        before = after
