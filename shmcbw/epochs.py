"""The epoch word: open and drained sections, and the way out of a drained section that nobody ends.

Even: writes go on.  Odd: no write stores data (I5); the cut is published in between.  The coordinator alone makes the
epoch odd; whoever gets there first makes it even again, always by compare-and-swap from the odd value it saw.
"""

from __future__ import annotations

from . import _core
from .failpoints import hit, index_of
from .layout import SNAPSHOT_COUNT, Header, Snapshot
from .segment import Segment
from .states import ABANDONED, PREPARED, state_word

_ENTRIES, _OPENED = index_of("gate.entries"), index_of("gate.opened")
EPOCH_FIRST = 2
EPOCH_MAX = 2**32 - 4
#: No drained section lasts longer: a deadline further away was not written by a coordinator.
DRAIN_LIMIT_MAX_S = 60.0


def epoch(segment: Segment) -> int:
    return segment.header(Header.epoch)


def advance(segment: Segment, expected: int) -> bool:
    """Move the epoch one on, if it still is what the caller saw.

    The last of all epochs is reached by scribbling only.  It is followed by the first: 0 is the mark of a cluster that
    nobody wrote, and would be taken for "copied".
    """
    following = expected + 1 if expected + 1 < 1 << 32 else EPOCH_FIRST
    return _core.compare_exchange_u32(segment.memory, Header.epoch.offset, expected, following)


def abandon(segment: Segment, odd: int) -> None:
    """Get out of the drained section with this odd epoch, whoever calls.

    First every entry PREPARED for this epoch becomes ABANDONED, by compare-and-swap against the coordinator's publish;
    only then the epoch advances.  Either the cut was published already, then it is complete, or it never will be.
    Without either compare-and-swap a snapshot can be published after writers went on (the model shows it).
    The state word carries the odd epoch, so a caller that slept for long can't hit the next cut.
    """
    for index in range(SNAPSHOT_COUNT):
        segment.exchange_snapshot(index, Snapshot.state, state_word(PREPARED, odd), state_word(ABANDONED, odd))
    hit(segment.failpoints, _ENTRIES)
    advance(segment, odd)
    hit(segment.failpoints, _OPENED)


def settle(segment: Segment) -> bool:
    """The coordinator, before a cut and while it looks around: whether the epoch is what it must be.

    A cut that was interrupted (a signal's exception) has left its drained section, and maybe `own_epoch` one behind:
    that is ended here.
    """
    found = epoch(segment)
    if found % 2 and abs(found - segment.own_epoch) == 1:
        abandon(segment, found)
        segment.own_epoch = found + 1
    return epoch(segment) == segment.own_epoch


def restore(segment: Segment) -> None:
    """Put the coordinator's epoch back where somebody has overwritten it; outside a cut."""
    while (found := epoch(segment)) != segment.own_epoch:
        _core.compare_exchange_u32(segment.memory, Header.epoch.offset, found, segment.own_epoch)
