"""What is counted, and how it is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from shmcbw.sizes import format_ns

#: Failures that are told in full; all are counted.
TOLD_MAX = 40


@dataclass
class Figures:
    """Of one round, or of all.

    A cycle is a death after which something took the dead one's place.  Kinds of failures: mismatch (a wrong byte, a
    result that is gone, a violated invariant), hang, leak, error (an exception that no caller should meet).
    """

    rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    longest_ns: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        self.rounds += other.rounds
        self.counts.update(other.counts)
        for name, ns in other.longest_ns.items():
            self.at_least(name, ns)
        self.failures += other.failures[: max(0, TOLD_MAX - len(self.failures))]

    def at_least(self, name: str, ns: int) -> None:
        self.longest_ns[name] = max(self.longest_ns[name], ns)

    def fail(self, kind: str, where: str, what: str) -> None:
        self.counts[f"failures.{kind}"] += 1
        if len(self.failures) < TOLD_MAX:
            self.failures.append({"kind": kind, "where": where, "what": what})

    @property
    def failed(self) -> bool:
        return any(count for name, count in self.counts.items() if name.startswith("failures."))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: counts by their names, nested at the dots."""
        counts = self.counts
        taken = counts["backups.right"] + counts["snapshots.right"]
        broken = counts["backups.broken"] + counts["snapshots.broken"]
        found: dict[str, Any] = {
            "failed": self.failed,
            "rounds": self.rounds,
            "cycles": counts["cycles"],
            "mismatches": counts["failures.mismatch"],
            "hangs": counts["failures.hang"],
            "leaks": counts["failures.leak"],
            "errors": counts["failures.error"],
            "longest_wait_ns": self.longest_ns["write"],
            "broken_ratio": broken / max(1, taken + broken),
        }
        for name, count in sorted(counts.items()):
            group, dot, rest = name.partition(".")
            if dot and group != "failures":
                found.setdefault(group, {})[rest] = count
        found["longest_ns"] = dict(sorted(self.longest_ns.items()))
        found["failures"] = self.failures
        return found


#: What a run of two minutes or more has done to be called one.
PLAYED = (
    *(f"{act}.{role}" for act in ("kills", "stops") for role in ("writer", "reader", "worker", "coordinator")),
    *("cuts.taken", "backups.right", "backups.cancelled", "snapshots.right", "snapshots.broken", "snapshots.dropped"),
    *("snapshots.discards", "reads.by coordinators", "reads.by readers", "writes.zeroes and discards"),
    *(
        "starts.orderly restarts",
        "starts.adopted_jobs",
        "starts.adopted_snapshots",
        "starts.daemons",
        "aims.coordinator at odd",
        "aims.coordinator at resize",
        "resizes.done",
    ),
)


#: Where one coordinator has several images.
PLAYED_TOGETHER = ("groups.taken", "groups.of one instant", "groups.killed in the middle", "aims.coordinator at group")


def never_happened(figures: Figures) -> list[str]:
    """Which of these are missing."""
    wanted = (*PLAYED, *(PLAYED_TOGETHER if figures.counts["groups.rounds"] else ()))
    return [name for name in wanted if not figures.counts[name]]


def lines(figures: Figures) -> list[str]:
    """For people."""
    found = figures.as_dict()
    backups, snapshots, reads = found.get("backups", {}), found.get("snapshots", {}), found.get("reads", {})
    longest = figures.longest_ns

    def some(group: str) -> str:
        return ", ".join(f"{count} {name}" for name, count in found.get(group, {}).items()) or "none"

    told = [
        f"cycles      {found['cycles']} (a death after which something took the dead one's place), "
        f"in {figures.rounds} rounds",
        f"kills       {some('kills')}",
        f"stops       {some('stops')}",
        f"caught      {some('aims')}",
        f"cuts        {some('cuts')}; drained at most {format_ns(longest['drained'])}",
        f"groups      {some('groups')}",
        f"resizes     {some('resizes')}",
        f"backups     {some('backups')}",
        f"snapshots   {some('snapshots')}; reads of them: {some('reads')}",
        f"broken      {found['broken_ratio']:.2%} of {sum(backups.values()) + sum(snapshots.values())}",
        f"writes      {some('writes')}",
        f"wait        of a writer {format_ns(longest['write'])} at most; {format_ns(longest['write_raw'])} with "
        "its own stops and the machine's",
        f"reaped      {some('reaps')}; after {format_ns(longest['reap_writer'])} (writers) and "
        f"{format_ns(longest['reap_worker'])} (workers) at most; "
        f"{format_ns(longest['reap_raw'])} with the machine's stalls",
        f"stalls      {some('stalls')}; {format_ns(longest['stall'])} at most: not counted as anybody's wait",
        f"starts      {some('starts')}; a coordinator's took {format_ns(longest['start'])} at most",
    ]
    if not reads and not backups:
        told.append("Nothing was copied: this run says nothing.")
    if missing := never_happened(figures):
        told.append(f"Not played: {', '.join(missing)}.")
    told += [f"{failure['kind'].upper():<10}  {failure['where']}: {failure['what']}" for failure in figures.failures]
    told.append(
        f"{found['mismatches']} mismatches, {found['hangs']} hangs, {found['leaks']} leaks, {found['errors']} errors"
    )
    return told
