"""Group cuts of a finished round: do all members show one instant, and are there all of them or none?

All logs are on one clock, so what bounds the instant of one image bounds that of the others.  If some write of one
image had ended before one of another image began, no instant has the second without the first: every such pair of
writes, by whichever writers, is checked by asking for one instant within the bounds of all copies of all members.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.torturing.evidence import Evidence, Taken
from tools.torturing.figures import Figures
from tools.torturing.judge import agree

Member = tuple[Evidence, Taken]


def judge_groups(evidences: Sequence[Evidence]) -> Figures:
    """After each of the images was judged."""
    figures = Figures()
    groups: dict[str, list[Member]] = {}
    for evidence in evidences:
        for taken in evidence.taken.values():
            if taken.group is not None:
                groups.setdefault(taken.group, []).append((evidence, taken))
    for name, members in groups.items():
        _judge_group(name, members, len(evidences), figures)
    return figures


def _judge_group(name: str, members: Sequence[Member], count: int, figures: Figures) -> None:
    where = members[0][0].place.directory.parent.name
    names = ", ".join(f"{evidence.place.directory.name}/{taken.name}" for evidence, taken in members)
    if any(taken.given_up for _, taken in members):
        figures.counts["groups.abandoned"] += 1
        return
    if len(members) == count and all(taken.sure for _, taken in members):
        figures.counts["groups.taken"] += 1
    else:
        figures.counts["groups.killed in the middle"] += 1
        there = [_is_there(evidence, taken) for evidence, taken in members]
        if None not in there:
            figures.counts["groups.adopted whole" if all(there) else "groups.adopted none"] += 1
            if any(there) and not (all(there) and len(members) == count):
                figures.fail("mismatch", where, f"group {name}: only a part of it was adopted: {names}: {there}")
    shown = [taken.bounds for _, taken in members if taken.bounds]
    if len(shown) > 1:
        right = agree([bound for bounds in shown for bound in bounds])
        figures.counts[f"groups.{'of one instant' if right else 'wrong'}"] += 1
        if not right:
            figures.fail("mismatch", where, f"group {name}: there is no instant that all its members show: {names}")


def _is_there(evidence: Evidence, taken: Taken) -> bool | None:
    """Whether the next coordinator has found a member; None if that one said nothing, or was not the next."""
    ready = evidence.ready.get(taken.incarnation + 1)
    if ready is None:
        return None
    return taken.name in ready or (evidence.place.targets / taken.name).exists() or bool(taken.reads)
