"""A finished round of one image: are all promises kept?  From the files in its directory alone.

Every backup and every read of a snapshot is judged by the logs of the writers.  All reads of one snapshot agree.  Jobs
and snapshots outlive their coordinators: whatever was taken and not ended by somebody is there in the next incarnation.
What failed says why, and had a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmcbw.clusters import inward
from shmcbw.workers.stamps import NEVER_NS, ZERO, Log
from tools.torturing.figures import Figures
from tools.torturing.judge import History, Interval, Judgement, judge
from tools.torturing.place import EventReader, Place
from tools.torturing.plan import COORDINATOR, READER, WRITER, ImagePlan
from tools.torturing.stalls import Stalls

ETIMEDOUT = 110
#: What a writer may wait beyond its deadline: "one scheduling delay" of a machine with more to do than CPUs.
DELAY_NS = 1_000_000_000
#: Stray units that are told of one copy.
STRAYS_MAX = 3
#: A job that is late is excused if the machine stood still for a quarter of this.
STALL_SPAN_NS = 12_000_000_000
#: A search for a snapshot that began before it was there says nothing.
SEARCH_NS = 500_000_000


@dataclass
class Fate:
    """What became of one incarnation of a process; written by the driver."""

    role: str
    number: int
    incarnation: int
    started_ns: int
    killed_ns: int | None
    dead_ns: int
    stops: list[Interval]


@dataclass
class Taken:
    """A backup or a snapshot, from its call to its end, over all incarnations."""

    name: str
    kind: str
    policy: str
    cut: Interval
    incarnation: int
    group: str | None = None
    sure: bool = False  # the call has returned
    cancelled: bool = False  # by somebody, or dropped, or the coordinator was closed
    ended_ns: int = NEVER_NS  # when somebody began to cancel, drop or close it
    given_up: bool = False
    concluded: bool = False
    error: str | None = None
    broken: bool = False
    reads: list[dict[str, Any]] = field(default_factory=list)
    discards: list[tuple[int, int, int]] = field(default_factory=list)  # ns, first and last byte
    bounds: list[list[Interval]] = field(default_factory=list)  # of the instant, by all copies of a group's member


class Evidence:
    """Everything a round has left of one image."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.plan = ImagePlan.load(place.plan)
        self.layout = self.plan.layout
        fates = json.loads(place.fates.read_text())
        self.fates = [Fate(**fate) for fate in fates["processes"]]
        self.stalls = Stalls(fates["stalls"])
        self.histories = [self._history(writer) for writer in range(self.plan.writers)]
        self.figures = Figures()
        self.taken: dict[str, Taken] = {}
        self.long_waits: list[Interval] = []
        #: What each incarnation found, or had, when it was ready.
        self.ready: dict[int, list[str]] = {}
        #: Of each size: from when on the image may have had it, and must have had it or a larger one.
        self.sizes: dict[int, Interval] = {self.plan.sizes[0]: (0, 0)}

    def _history(self, writer: int) -> History:
        path = self.place.log(writer)
        log = Log.read(path, self.layout) if path.exists() else Log(self.layout.initial)
        killed = {
            fate.incarnation: fate.killed_ns
            for fate in self.fates
            if fate.role == WRITER and fate.number == writer and fate.killed_ns is not None
        }
        refused: frozenset[int] = frozenset()
        if self.place.refused(writer).exists():
            data = self.place.refused(writer).read_bytes()
            refused = frozenset(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8))
        return History(log, killed, refused)

    def judge(self) -> Figures:
        """All of it."""
        self._judge_waits()
        for role in (COORDINATOR, READER):
            for fate in self.fates:
                if fate.role == role:
                    self._replay(fate)
        for taken in self.taken.values():
            self._judge_taken(taken)
        self._judge_image()
        return self.figures

    def fail(self, kind: str, what: str) -> None:
        self.figures.fail(kind, self.place.directory.name, what)

    # -- writers ---------------------------------------------------------------------------------------------------

    def _judge_waits(self) -> None:
        """How long each write took, without the time in which its writer was stopped or the machine stood still."""
        limit_ns = int(self.plan.cbw_timeout_s * 1e9) + DELAY_NS
        for writer, history in enumerate(self.histories):
            fates = {fate.incarnation: fate for fate in self.fates if (fate.role, fate.number) == (WRITER, writer)}
            log = history.log
            self.figures.counts["writes.all"] += log.writes
            self.figures.counts["writes.zeroes and discards"] += sum(kind == ZERO for kind in log.kinds[1:])
            self.figures.counts["writes.refused"] += len(history.refused)
            for sequence in range(1, log.writes + 1):
                begin = log.begins_ns[sequence]
                if log.finished(sequence):
                    end = log.ends_ns[sequence]
                    if end - begin < 1_000_000:
                        continue
                else:
                    self.figures.counts["writes.unfinished"] += sequence not in history.refused
                    following = log.begins_ns[sequence + 1] if sequence < log.writes else NEVER_NS
                    end = min(following, history.partial_from(sequence))
                    if end == NEVER_NS:
                        continue
                fate = fates.get(log.epochs[sequence])
                stopped = sum(max(0, min(end, b) - max(begin, a)) for a, b in fate.stops) if fate else 0
                took = end - begin - stopped - self.stalls.within(begin, end)
                self.figures.at_least("write", took)
                self.figures.at_least("write_raw", end - begin)
                if took > limit_ns:
                    self.fail("hang", f"write {sequence} of writer {writer} took {took / 1e9:.3f} s")
                if end - begin > self.plan.cbw_timeout_s * 0.95e9:
                    self.long_waits.append((begin, end))

    # -- coordinators ----------------------------------------------------------------------------------------------

    def _replay(self, fate: Fate) -> None:
        """The events of one incarnation of the coordinator or of a reader."""
        for event in EventReader(self.place.events(fate.role, fate.number, fate.incarnation)).read():
            handler = getattr(self, f"_on_{event['event']}", None)
            if handler is not None:
                handler(event, fate)

    def _on_ready(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.at_least("start", event["ns"] - fate.started_ns)
        self.figures.counts["starts.ready"] += 1
        self._has(event["size"], event["ns"])
        self.ready[fate.incarnation] = event["jobs"] + event["snapshots"]
        self.figures.counts["starts.daemons"] += self.plan.daemon
        self.figures.counts["starts.adopted_jobs"] += len(event["jobs"])
        self.figures.counts["starts.adopted_snapshots"] += len(event["snapshots"])
        for taken in self.taken.values():
            if taken.kind == "snapshot" and taken.sure and not taken.cancelled and taken.name not in event["snapshots"]:
                taken.cancelled = True
                self.fail("mismatch", f"{taken.name} is gone, and incarnation {fate.incarnation} has not adopted it")
        for name in event["jobs"] + event["snapshots"]:
            if name in self.taken and self.taken[name].given_up:
                self.fail("mismatch", f"{name} was adopted after its cut was given up")

    def _on_busy(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.counts["starts.busy"] += 1

    def _on_failed_start(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.counts["starts.failed"] += 1
        self.fail("error", f"incarnation {fate.incarnation} of the coordinator can't start: {event['error']}")

    def _on_call(self, event: dict[str, Any], fate: Fate) -> None:
        self.taken[event["name"]] = Taken(
            event["name"],
            event["kind"],
            event["policy"],
            (event["ns"], fate.dead_ns),
            fate.incarnation,
            event["group"],
        )

    def _on_cut(self, event: dict[str, Any], fate: Fate) -> None:
        taken = self.taken[event["name"]]
        taken.cut, taken.sure = (taken.cut[0], event["ns"]), True
        self.figures.counts["cuts.taken"] += 1
        self.figures.at_least("drained", event["drained_ns"])

    def _on_abandoned(self, event: dict[str, Any], fate: Fate) -> None:
        self.taken[event["name"]].given_up = True
        self.figures.counts["cuts.abandoned"] += 1

    def _on_untaken(self, event: dict[str, Any], fate: Fate) -> None:
        self.taken[event["name"]].given_up = True
        self.figures.counts["cuts.failed"] += 1

    def _on_resize(self, event: dict[str, Any], fate: Fate) -> None:
        self.sizes.setdefault(event["size"], (event["ns"], NEVER_NS))

    def _on_resized(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.counts["resizes.done"] += 1
        self._has(event["size"], event["ns"])

    def _on_unresized(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.counts["resizes.refused"] += 1

    def _has(self, size: int, ns: int) -> None:
        """The image has so many bytes now; it never has fewer again."""
        if size not in self.sizes:
            self.fail("mismatch", f"the image has {size} bytes, and nobody has resized it to that")
        elif any(size < other and since < ns for other, (_, since) in self.sizes.items()):
            self.fail("mismatch", f"the image has {size} bytes, and had more")
        elif self.sizes[size][1] == NEVER_NS:
            self.sizes[size] = self.sizes[size][0], ns

    def _sizes_within(self, interval: Interval) -> list[int]:
        """Which sizes the image may have had at an instant in the interval."""
        found = []
        for size, (begin, _) in self.sizes.items():
            end = min((since for other, (_, since) in self.sizes.items() if other > size), default=NEVER_NS)
            if begin <= interval[1] and interval[0] <= end:
                found.append(size)
        return found

    def _on_cancel(self, event: dict[str, Any], fate: Fate) -> None:
        self._end(event["name"], event["ns"])

    _on_drop = _on_cancel

    def _on_dropped(self, event: dict[str, Any], fate: Fate) -> None:
        self.figures.counts["snapshots.dropped"] += 1

    def _on_closing(self, event: dict[str, Any], fate: Fate) -> None:
        for name in event["jobs"] + event["snapshots"]:
            self._end(name, event["ns"])

    def _end(self, name: str, ns: int) -> None:
        taken = self.taken[name]
        taken.cancelled, taken.ended_ns = True, min(taken.ended_ns, ns)

    def _on_discard(self, event: dict[str, Any], fate: Fate) -> None:
        offset, length = event["offset"], event["length"]
        size = self.plan.cluster_size
        first, end = inward(offset, length, size, event["size"])
        self.taken[event["name"]].discards.append((event["ns"], first * size, end * size))
        self.figures.counts["snapshots.discards"] += 1

    def _on_read(self, event: dict[str, Any], fate: Fate) -> None:
        taken = self.taken[event["name"]]
        taken.reads.append(event)
        self.figures.counts[f"reads.by {fate.role}s"] += 1
        if taken.given_up:
            self.fail("mismatch", f"{taken.name} was read, and its cut was given up")

    def _on_gone(self, event: dict[str, Any], fate: Fate) -> None:
        """A reader has not found a snapshot: it must not have been there from the cut on to its end."""
        taken = self.taken[event["name"]]
        self.figures.counts["reads.too late or early"] += 1
        if taken.sure and taken.cut[1] < event["ns"] - SEARCH_NS and event["ns"] < taken.ended_ns:
            self.fail("mismatch", f"{fate.role} {fate.number} did not find {taken.name}: {event['error']}")

    def _on_broken(self, event: dict[str, Any], fate: Fate) -> None:
        taken = self.taken[event["name"]]
        self._judge_break(taken, event["errno"], event["ns"])
        if not taken.broken:
            self.figures.counts["snapshots.broken"] += 1
        taken.broken = True

    def _on_concluded(self, event: dict[str, Any], fate: Fate) -> None:
        taken = self.taken[event["name"]]
        taken.concluded, taken.error = True, event["error"]
        if event["error"] == "SnapshotBrokenError":
            taken.broken = True
            self._judge_break(taken, event["errno"], event["ns"])
        elif event["error"] == "JobCancelledError":
            if not taken.cancelled:
                self.fail("mismatch", f"{taken.name} was cancelled by nobody: {event['message']}")
        elif event["error"] is not None:
            self.fail("error", f"{taken.name} failed: {event['error']}: {event['message']}")

    def _on_error(self, event: dict[str, Any], fate: Fate) -> None:
        self.fail("error", f"incarnation {fate.incarnation} of the coordinator met {event['error']}\n{event['trace']}")

    def _on_hang(self, event: dict[str, Any], fate: Fate) -> None:
        if self.stalls.within(event["ns"] - STALL_SPAN_NS, event["ns"]) > STALL_SPAN_NS // 4:
            self.figures.counts["stalls.of jobs"] += 1
            return
        what = {name: value for name, value in event.items() if name not in ("ns", "event", "name")}
        self.fail("hang", f"{event['name']} is not done, in incarnation {fate.incarnation}: {what}")

    def _on_violation(self, event: dict[str, Any], fate: Fate) -> None:
        self.fail("mismatch", f"invariant {event['invariant']}: {event['found']}, in incarnation {fate.incarnation}")

    def _judge_break(self, taken: Taken, number: int, ns: int) -> None:
        """A snapshot breaks at its timeout, because a write waited that long; never with the other policy."""
        if number != ETIMEDOUT or taken.policy != "break-snapshot":
            self.fail("mismatch", f"{taken.name} ({taken.policy}) is broken with errno {number}")
        elif not any(begin < ns for begin, _ in self._waits_after(taken)):
            self.fail("mismatch", f"{taken.name} is broken by its timeout, and no write waited that long")

    def _broke_unseen(self, taken: Taken) -> bool:
        """Whether a backup broke, its coordinator said so in its log, and was killed before the role had looked.

        A job that has ended by itself is kept for nobody; so the log is the only one that can say it.
        """
        deaths = [fate.killed_ns for fate in self.fates if fate.role == COORDINATOR and fate.killed_ns is not None]
        killed_ns = max(deaths, default=0)
        if taken.policy != "break-snapshot" or not any(begin < killed_ns for begin, _ in self._waits_after(taken)):
            return False
        # The coordinator of several images has one log.
        target = f"{self.place.directory.name}/{self.place.targets.name}/{taken.name}>"
        logs = self.place.directory.parent.glob(f"*/{COORDINATOR}-*.err")
        lines = (line for log in logs for line in log.read_text(errors="replace").splitlines())
        return any(target in line and "the snapshot is broken" in line for line in lines)

    def _waits_after(self, taken: Taken) -> list[Interval]:
        """Writes that waited for as long as the timeout and ended after a cut began."""
        return [(begin, end) for begin, end in self.long_waits if end > taken.cut[0]]

    # -- copies ----------------------------------------------------------------------------------------------------

    def _judge_taken(self, taken: Taken) -> None:
        if taken.kind == "backup":
            self._judge_backup(taken)
        else:
            for read in taken.reads:
                self._judge_read(taken, read)
            self._judge_agreement(taken)
            if not taken.broken and taken.reads:
                self.figures.counts["snapshots.right"] += 1

    def _judge_backup(self, taken: Taken) -> None:
        path = self.place.targets / taken.name
        if path.exists():
            if taken.given_up or taken.error is not None:
                self.fail("mismatch", f"{taken.name} exists: {taken.error or 'its cut was given up'}")
            self._count("backups", taken.name, self._judge_copy(path, taken.cut), taken)
        elif taken.given_up or taken.cancelled or taken.error is not None:
            self.figures.counts["backups.broken" if taken.broken else "backups.cancelled"] += taken.sure
        elif taken.sure and not taken.concluded and self._broke_unseen(taken):
            self.figures.counts["backups.broken unseen"] += 1
        elif taken.concluded or taken.sure:
            what = "concluded" if taken.concluded else "lost"
            self.fail("mismatch", f"{taken.name} ({taken.policy}) is {what}: there is no such file")

    def _judge_read(self, taken: Taken, read: dict[str, Any]) -> None:
        inaccessible = [(first, last) for first, last in read["inaccessible"]]
        for first, last in inaccessible:
            if not any(ns < read["ns"] and a <= first and last <= b for ns, a, b in taken.discards):
                self.fail("mismatch", f"{read['copy']}: bytes {first}..{last} are inaccessible, nobody discarded them")
        judgement = self._judge_copy(self.place.reads / read["copy"], taken.cut, inaccessible)
        self._count("reads", read["copy"], judgement, taken)

    def _judge_copy(self, path: Path, cut: Interval, inaccessible: Sequence[Interval] = ()) -> Judgement:
        sizes = self._sizes_within(cut)
        return judge(path.read_bytes(), self.histories, self.layout, cut, inaccessible, sizes)

    def _count(self, group: str, name: str, judgement: Judgement, taken: Taken) -> None:
        if taken.group is not None and judgement.right:
            taken.bounds += judgement.bounds
        self.figures.counts[f"{group}.{'right' if judgement.right else 'wrong'}"] += 1
        self.figures.counts["writes.seen in part"] += judgement.partial
        if judgement.wrong:
            more = len(judgement.wrong) - STRAYS_MAX
            told = "; ".join(judgement.wrong[:STRAYS_MAX]) + (f"; and {more} more" if more > 0 else "")
            self.fail("mismatch", f"{name}: {told}")

    def _judge_agreement(self, taken: Taken) -> None:
        """All reads of a snapshot show the same, where they show anything."""
        first: bytes | None = None
        first_name = ""
        for read in taken.reads:
            data = (self.place.reads / read["copy"]).read_bytes()
            holes = self._holes(read)
            if first is None:
                first, first_name, first_holes = data, read["copy"], holes
                continue
            both = [*holes, *first_holes]
            if _blanked(data, both) != _blanked(first, both):
                self.fail("mismatch", f"{read['copy']} and {first_name} differ")

    def _holes(self, read: dict[str, Any]) -> list[Interval]:
        return [(begin, end) for begin, end in read["inaccessible"]]

    def _judge_image(self) -> None:
        """The image itself, at the end: what the writers have last written."""
        last_ns = max(fate.dead_ns for fate in self.fates)
        judgement = self._judge_copy(self.place.image, (last_ns, NEVER_NS))
        if judgement.wrong:
            self.fail("mismatch", f"the image itself: {'; '.join(judgement.wrong[:STRAYS_MAX])}")

    def leftovers(self) -> Iterator[str]:
        """Files beside the targets that belong to nobody."""
        for path in sorted(self.place.targets.iterdir()):
            taken = self.taken.get(path.name)
            if taken is None or taken.kind != "backup":
                yield path.name


def _blanked(data: bytes, holes: list[Interval]) -> bytes:
    """The data with zeroes in the holes."""
    if not holes:
        return data
    blanked = bytearray(data)
    for first, last in holes:
        blanked[first:last] = bytes(last - first)
    return bytes(blanked)
