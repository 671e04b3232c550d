"""Snapshots and backups of several images with one cut: all of them show the same instant, or there is none.

    from shmcbw.workers import Backup, Coordinator, backup_group

    with Coordinator("data.img") as data, Coordinator("log.img") as log:
        for job in backup_group([Backup(data, "data.bak"), Backup(log, "log.bak", speed=1 << 20)]):
            job.wait()

In order: everything that can fail, for all of them; `quiesce` is entered; the locks of all coordinators are taken, in
one order for everybody, so that two groups can't wait for each other; the cut (`cut.py`); `quiesce` is left.  What goes
wrong on the way leaves nothing behind on any image.  A single backup is a group of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar

from shmcbw import states
from shmcbw.epochs import epoch
from shmcbw.layout import GROUP_MEMBERS_MAX

from .completion import JobTransaction
from .cut import NO_CUT, take_cut
from .error_actions import ACTIONS, REPORT
from .jobs import Job

if TYPE_CHECKING:
    from .coordinator import Coordinator, CoordinatorSnapshot

_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

#: Entered before a cut and left after it.
Quiesce = AbstractContextManager[object]


@dataclass(frozen=True, slots=True)
class Request:
    """A member of a group: `Backup` or `Scratch`.  ValueError if a parameter makes no sense."""

    coordinator: Coordinator
    target: str | os.PathLike[str]
    _: KW_ONLY
    sync: str = "full"
    speed: int = 0
    on_cbw_error: str = "break-snapshot"
    cbw_timeout: float = 30.0
    overwrite: bool = False
    bitmap: str | None = None
    bitmap_mode: str | None = None
    in_place: bool = False
    manifest: bool = False
    job_id: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool | None = None
    on_source_error: str = REPORT
    on_target_error: str = REPORT
    max_workers: int = 64
    max_chunk: int = 0
    copy_range: bool = False
    transaction: JobTransaction | None = None
    source: CoordinatorSnapshot | None = None
    discard_source: bool = False

    job: ClassVar[bool]

    def __post_init__(self) -> None:
        if self.sync not in states.SYNCS:
            raise ValueError(f"sync: {self.sync!r} is none of {', '.join(states.SYNCS)}")
        if self.on_cbw_error not in states.POLICIES:
            raise ValueError(f"on_cbw_error: {self.on_cbw_error!r} is none of {', '.join(states.POLICIES)}")
        if not 0 <= self.speed < 1 << 62:
            raise ValueError(f"speed: {self.speed} bytes a second is not in 0..2^62")
        if not 0 <= self.cbw_timeout <= 1e9:
            raise ValueError(f"cbw_timeout: {self.cbw_timeout} s is not in 0..1e9")
        if self.job_id is not None and not _JOB_ID.fullmatch(self.job_id):
            raise ValueError(f"Invalid job ID '{self.job_id}'")
        for name in ("on_source_error", "on_target_error"):
            if getattr(self, name) not in ACTIONS:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(ACTIONS)}")
        if not 1 <= self.max_workers <= 2**31 - 1:
            raise ValueError("max-workers must be between 1 and 2147483647")
        if not 0 <= self.max_chunk < 1 << 62:
            raise ValueError("max-chunk must be zero (which means no limit) or positive")
        if self.source is not None and self.bitmap is not None:
            raise ValueError("a backup of a snapshot can't have a bitmap: bitmaps are of the image")
        if self.discard_source and self.source is None:
            raise ValueError("discard-source would discard the image itself: only a snapshot can be let go of")
        cluster_size = self.coordinator.segment.geometry.cluster_size
        if 0 < self.max_chunk < cluster_size:
            raise ValueError(f"Required max-chunk ({self.max_chunk}) is less than backup cluster size ({cluster_size})")


class Backup(Request):
    """A backup of a coordinator's image to a target; the parameters are those of `Coordinator.backup`."""

    __slots__ = ()
    job = True


@dataclass(frozen=True, slots=True)
class Scratch(Request):
    """A snapshot without background copying; the parameters are those of `Coordinator.snapshot`."""

    _: KW_ONLY
    sync: str = "none"

    job = False


def take_group(
    requests: Sequence[Request], *, quiesce: Quiesce | None = None, also: Sequence[Coordinator] = ()
) -> list[Job | CoordinatorSnapshot]:
    """Take one cut for all requests, of any number of images and kinds: their jobs and snapshots, in order.

    also: coordinators of further images for whose bitmaps this instant is to be a boundary (`Bitmaps.last_boundary`).

    Returns when the cut is taken.  Errors as of `Coordinator.backup`, and those of ``quiesce``: nothing has changed.
    Writes of all the images are held while the longest of the writes under way ends; ``drained_ns`` of each says how
    long, and the shortest of the coordinators' drain limits counts.
    """
    if not requests and not also:
        raise ValueError("a group needs a member")
    if len(requests) > GROUP_MEMBERS_MAX:
        raise ValueError(f"a group of {len(requests)}: at most {GROUP_MEMBERS_MAX} snapshots can share a cut")
    with ExitStack() as ends, ExitStack() as undo:
        for transaction in {id(each.transaction): each.transaction for each in requests}.values():
            if transaction is not None:
                transaction.expect(sum(each.transaction is transaction for each in requests))
                undo.callback(transaction.expect_none)
        entries = []
        for owner in also:
            ends.enter_context(owner.kept_open())
        for request in requests:
            ends.enter_context(request.coordinator.kept_open())
            entry = request.coordinator.prepare(request)
            undo.callback(request.coordinator.discard, entry)
            entries.append(entry)
        taken = False
        with quiesce or nullcontext(), ExitStack() as locks:
            owners = {owner.segment.name: owner for owner in (*also, *(request.coordinator for request in requests))}
            for _, owner in sorted(owners.items()):
                locks.enter_context(owner.lock)
                owner.check_open()
                owner.put_right()
            members = list(zip(requests, entries, strict=True))
            # A backup of a snapshot has its cut already.
            places = [(each.coordinator.segment, entry.index) for each, entry in members if each.source is None]
            limit_s = min(owner.drain_limit_s for owner in owners.values())
            cut = take_cut(places, limit_s, [owner.segment for owner in also]) if places or also else NO_CUT
            for owner in also:
                owner.bitmaps.note_boundary(epoch(owner.segment) - 1)
            for request, entry in members:
                if request.source is None:
                    request.coordinator.activate(entry, cut)
                else:
                    request.coordinator.follow(entry)
            taken = True
        if not taken:
            raise RuntimeError("quiesce has swallowed the error for which no cut was taken")
        # Opening a snapshot can fail, adding a job can't: so jobs come last.
        kept: dict[int, Job | CoordinatorSnapshot] = {}
        for number, request in sorted(enumerate(requests), key=lambda pair: pair[1].job):
            if request.job:
                kept[number] = request.coordinator.add_job(entries[number], request)
            else:
                kept[number] = snapshot = request.coordinator.add_snapshot(entries[number])
                undo.callback(snapshot.close)
        undo.pop_all()
    return [kept[number] for number in range(len(requests))]


def backup_group(backups: Sequence[Backup], *, quiesce: Quiesce | None = None) -> list[Job]:
    """Start backups that show one instant of all their images: the jobs, in order.  See `take_group`."""
    return [kept for kept in take_group(backups, quiesce=quiesce) if isinstance(kept, Job)]


def snapshot_group(scratches: Sequence[Scratch], *, quiesce: Quiesce | None = None) -> list[CoordinatorSnapshot]:
    """Take snapshots that show one instant of all their images, in order.  See `take_group`."""
    return [kept for kept in take_group(scratches, quiesce=quiesce) if not isinstance(kept, Job)]
