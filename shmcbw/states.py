"""States of a snapshot table entry, and who moves it from one to the next.

    from        to          by
    FREE        CREATING    the coordinator, before it makes the target and the bitmap: their names are in the entry
    CREATING    PREPARING   the coordinator, after it has made them
    PREPARING   PREPARED    the coordinator, when every worker has opened the target
    PREPARED    ACTIVE      the coordinator, in the drained section: this is the cut (compare-and-swap)
    PREPARED    ABANDONED   a gated writer or the coordinator, at the drained section's limit (compare-and-swap)
    any         ABANDONED   the coordinator, before it removes an unfinished target: given up, and nothing lost
    PREPARING   FOLLOWING   the coordinator: it shows the cut of another snapshot, and writers need not know of it
    ACTIVE      BROKEN      whoever broke it, after the sticky error was stored (compare-and-swap)
    ACTIVE      COMPLETE    the coordinator: every byte is >= COPIED, nobody can break it any more (compare-and-swap)
    FOLLOWING   BROKEN      as ACTIVE; the coordinator, too, when the snapshot that it follows is broken or gone
    FOLLOWING   COMPLETE    as ACTIVE
    any         FREE        the coordinator: dropped, finished or given up

The state word carries the odd epoch of its cut above the state: a compare-and-swap of one cut can't hit another.
"""

from __future__ import annotations

FREE = 0
PREPARING = 1
PREPARED = 2
ACTIVE = 3
BROKEN = 4
ABANDONED = 5
COMPLETE = 6
CREATING = 7
FOLLOWING = 8

#: It has a cut, and is neither complete nor broken.
LIVE = frozenset({ACTIVE, FOLLOWING})

NAMES = {
    FREE: "free",
    PREPARING: "preparing",
    PREPARED: "prepared",
    ACTIVE: "active",
    BROKEN: "broken",
    ABANDONED: "abandoned",
    COMPLETE: "complete",
    CREATING: "creating",
    FOLLOWING: "following",
}

BREAK_SNAPSHOT = 0
BREAK_GUEST_WRITE = 1
POLICIES = {"break-snapshot": BREAK_SNAPSHOT, "break-guest-write": BREAK_GUEST_WRITE}

SYNC_FULL = 0
SYNC_TOP = 1
SYNC_NONE = 2
SYNC_BITMAP = 3
#: The first name of a value is the one that it is read back as.
SYNCS = {"full": SYNC_FULL, "top": SYNC_TOP, "none": SYNC_NONE, "bitmap": SYNC_BITMAP, "incremental": SYNC_BITMAP}


#: In the errno of a background error: reading the source failed, not writing the target.
SOURCE_ERROR = 0x800


def state_word(state: int, odd_epoch: int) -> int:
    """The state word of a cut."""
    return odd_epoch << 32 | state


def error_word(number: int, odd_epoch: int, cluster: int) -> int:
    """errno (12 bits), tag (20) and cluster (32) in one word: the first error is stored by one compare-and-swap.

    The tag is the low end of the cut's epoch: an error that was meant for the entry's last snapshot does not count.
    """
    return (number & 0xFFF) << 52 | (odd_epoch & 0xFFFFF) << 32 | (cluster & 0xFFFFFFFF)


def split_error(word: int, odd_epoch: int) -> tuple[int, int] | None:
    """(errno, cluster) of an error word, or None if it holds no error of that cut."""
    if word == 0 or word >> 32 & 0xFFFFF != odd_epoch & 0xFFFFF:
        return None
    return word >> 52, word & 0xFFFFFFFF
