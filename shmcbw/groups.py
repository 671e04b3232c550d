"""Groups: snapshots, of one image or of several, that share one cut and count together or not at all (I9).

Each entry of a group has a group word: the group's id and what was decided.  The word of the first entry, the leader,
decides, by one compare-and-swap; the others repeat it.  Where the leader is stands in every entry, where the members
are stands in the leader's.

    from        to          by
    UNDECIDED   COMMITTED   the coordinator that takes the cut, after every entry was published
    UNDECIDED   FAILED      that coordinator, when one was not; or one that adopts a member: then the first is dead

Nobody takes an undecided entry as right, though writers have its clusters copied as for any active snapshot.  Whether
the images were opened meanwhile, by gated writers, does not matter: each entry was published while its image was still
closed, and no image was closed later than all of them were quiet.  So what they show is that one moment.

A leader's entry may be free, and its segment gone, before another member is adopted.  So whoever adopts a leader
tells the members before he frees anything, and a member that finds no leader looks at its own word again: if that
still is undecided, the group had not been committed.  (Or the leader's segment was discarded by rule, because its
image was replaced or resized: then the members fail with it, loudly.)

The word carries the id, so whoever was asleep while an entry was used again can't decide another group.
"""

from __future__ import annotations

import os

from . import _core
from .errors import ShmcbwError
from .image import Identity
from .layout import GROUP_MEMBERS_MAX, SNAPSHOT_COUNT, Snapshot
from .segment import Segment, attach_named

UNDECIDED, COMMITTED, FAILED = 1, 2, 3
_DECISION = 3
_MEMBER_SIZE = 24

# typing takes as long to import as all the rest of what a writer imports; type checkers take this name for True.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    #: An entry of the snapshot table: its segment, and its index there.
    Place = tuple[Segment, int]


def counts(segment: Segment, index: int) -> bool:
    """Whether an entry that was published may be taken as right, as far as its group is concerned."""
    word = segment.snapshot(index, Snapshot.group)
    return word == 0 or word & _DECISION == COMMITTED


def enrol(places: Sequence[Place]) -> None:
    """Make a new, undecided group of at most GROUP_MEMBERS_MAX entries that are not published yet; the first leads."""
    group = int.from_bytes(os.urandom(8), "little") & ~_DECISION or _DECISION + 1
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
        segment.set_snapshot(index, Snapshot.group, group | UNDECIDED)


def decide(segment: Segment, index: int, group: int, decision: int) -> int:
    """Store a decision in an entry's word if it still is of this group and undecided: what it says afterwards.

    Of the leader: this decides the group.  Of another member: this repeats what was decided.  ``group``: the id, as in
    the word.  0 if the entry is not of this group (any more).
    """
    segment.exchange_snapshot(index, Snapshot.group, group | UNDECIDED, group | decision)
    word = segment.snapshot(index, Snapshot.group)
    return word & _DECISION if word & ~_DECISION == group else 0


def group_of(segment: Segment, index: int) -> int:
    """The id of an entry's group, 0 if it has none."""
    return segment.snapshot(index, Snapshot.group) & ~_DECISION


def resolve(segment: Segment, index: int) -> bool:
    """Whether an entry whose coordinator is dead counts.  The caller holds the coordinator's lock of its segment.

    Decides the group (failed) if the dead one had not, and if this is the leader tells the members.
    """
    group = group_of(segment, index)
    if not group:
        return True
    leader = Identity(segment.snapshot(index, Snapshot.group_device), segment.snapshot(index, Snapshot.group_inode))
    leader_index = segment.snapshot(index, Snapshot.group_index)
    if (leader, leader_index) == (segment.identity, index):
        decision = decide(segment, index, group, FAILED)
        _tell(segment, index, group, decision)
    else:
        # First what the leader says, then our own word: told meanwhile, by a leader that is gone now, it stands.
        decided = _decide_at(segment, leader, leader_index, group, FAILED)
        decision = decide(segment, index, group, decided or FAILED)
    return decision == COMMITTED


def _tell(segment: Segment, index: int, group: int, decision: int) -> None:
    """Repeat the leader's decision in every member that can be reached; one that can't be is gone."""
    base = segment.geometry.snapshot(index, Snapshot.group_members)
    for number in range(min(segment.snapshot(index, Snapshot.group_count), GROUP_MEMBERS_MAX)):
        device, inode, member_index = (
            _core.load_u64(segment.memory, base + _MEMBER_SIZE * number + 8 * position) for position in range(3)
        )
        _decide_at(segment, Identity(device, inode), member_index, group, decision)


def _decide_at(segment: Segment, image: Identity, index: int, group: int, decision: int) -> int:
    """`decide` for an entry of another image, which may be gone: 0."""
    if index >= SNAPSHOT_COUNT:
        return 0
    if image == segment.identity:
        return decide(segment, index, group, decision)
    try:
        # One coordinator made them all, so they have one owner.
        other = attach_named(image, os.fstat(segment.fd).st_uid)
    except (ShmcbwError, OSError):
        return 0
    try:
        return decide(other, index, group, decision)
    finally:
        other.close()
