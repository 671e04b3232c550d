"""Groups: snapshots, of one image or of several, that share one cut and count together or not at all (I9).

Each entry of a group has a group word: the group's id, and whether it is committed.  The word of the first entry, the
leader, decides: the coordinator that takes the cut commits it by one compare-and-swap when every entry is published,
and nobody else ever does.  So a group that is not committed when its coordinator is dead never will be: it has failed.
The other words repeat the leader's.  Every entry says where the leader is, the leader's where all members are.

Nobody takes an entry that is not committed as right, though writers have its clusters copied as for any active
snapshot.  Whether the images were opened meanwhile, by gated writers, does not matter: each entry was published while
its image was still closed, and none was closed later than all of them were quiet.  So they show that one moment.

A leader's entry may be free, and its segment gone, before another member is adopted.  So whoever adopts a leader
tells the members before he frees anything, and a member asks the leader first and then looks at its own word: if
neither says committed, the group was not.  (Or the leader's segment was discarded by rule, because its image was
replaced or resized: then members that were not told fail with it, loudly.)

The word carries the id, so whoever was asleep while an entry was used again can't commit another group.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from . import _core
from .errors import ShmcbwError
from .image import Identity
from .layout import GROUP_MEMBERS_MAX, SNAPSHOT_COUNT, Snapshot
from .segment import Segment, attach_named

_COMMITTED = 1
_MEMBER_SIZE = 24

# typing takes as long to import as all the rest of what a writer imports; type checkers take this name for True.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    #: An entry of the snapshot table: its segment, and its index there.
    Place = tuple[Segment, int]


def counts(segment: Segment, index: int) -> bool:
    """Whether an entry that was published may be taken as right, as far as its group is concerned."""
    word = segment.snapshot(index, Snapshot.group)
    return word == 0 or word & _COMMITTED == 1


def enrol(places: Sequence[Place]) -> None:
    """Make a new group of at most GROUP_MEMBERS_MAX entries that are not published yet; the first one leads."""
    group = int.from_bytes(os.urandom(8), "little") & ~_COMMITTED or 2
    leader, leader_index = places[0]
    base = leader.geometry.snapshot(leader_index, Snapshot.group_members)
    for number, (segment, index) in enumerate(places):
        member = (segment.identity.device, segment.identity.inode, index)
        for position, value in enumerate(member):
            _core.store_u64(leader.memory, base + _MEMBER_SIZE * number + 8 * position, value)
    leader.set_snapshot(leader_index, Snapshot.group_count, len(places))
    for segment, index in places:
        segment.set_snapshot(index, Snapshot.group_device, leader.identity.device)
        segment.set_snapshot(index, Snapshot.group_inode, leader.identity.inode)
        segment.set_snapshot(index, Snapshot.group_index, leader_index)
        segment.set_snapshot(index, Snapshot.group, group)


def group_of(segment: Segment, index: int) -> int:
    """The id of an entry's group, 0 if it has none."""
    return segment.snapshot(index, Snapshot.group) & ~_COMMITTED


def commit(segment: Segment, index: int, group: int) -> None:
    """Of the leader: this commits the group.  Of another member: this repeats it.  Of another group: nothing."""
    segment.exchange_snapshot(index, Snapshot.group, group, group | _COMMITTED)


def resolve(segment: Segment, index: int) -> bool:
    """Whether an entry whose coordinator is dead counts.  The caller holds the coordinator's lock of its segment.

    A committed leader tells its members; another member asks its leader.
    """
    group = group_of(segment, index)
    if group and not _ask_leader(segment, index, group) and counts(segment, index):
        _tell_members(segment, index, group)
    return counts(segment, index)


def _ask_leader(segment: Segment, index: int, group: int) -> bool:
    """Have a member's word repeat what the leader's says; False if this is the leader."""
    leader = Identity(segment.snapshot(index, Snapshot.group_device), segment.snapshot(index, Snapshot.group_inode))
    leader_index = segment.snapshot(index, Snapshot.group_index)
    if (leader, leader_index) == (segment.identity, index):
        return False
    with _entry_of(segment, leader, leader_index) as found:
        if found is not None and group_of(found, leader_index) == group and counts(found, leader_index):
            commit(segment, index, group)
    return True


def _tell_members(segment: Segment, index: int, group: int) -> None:
    """Commit every member that can be reached; one that can't be is gone."""
    base = segment.geometry.snapshot(index, Snapshot.group_members)
    for number in range(min(segment.snapshot(index, Snapshot.group_count), GROUP_MEMBERS_MAX)):
        device, inode, member_index = (
            _core.load_u64(segment.memory, base + _MEMBER_SIZE * number + 8 * position) for position in range(3)
        )
        with _entry_of(segment, Identity(device, inode), member_index) as found:
            if found is not None:
                commit(found, member_index, group)


@contextmanager
def _entry_of(segment: Segment, image: Identity, index: int) -> Iterator[Segment | None]:
    """The segment of an entry of the group, for a moment; None if there is none any more."""
    if image == segment.identity or index >= SNAPSHOT_COUNT:
        yield segment if index < SNAPSHOT_COUNT else None
        return
    try:
        # One coordinator made them all, so they have one owner.
        other = attach_named(image, os.fstat(segment.fd).st_uid)
    except (ShmcbwError, OSError):
        yield None
        return
    try:
        yield other
    finally:
        other.close()
