"""A snapshot in the table: what it is called, whether it is broken, and breaking it.  `reader.py` reads it."""

from __future__ import annotations

import errno
import os
import stat
import time

from . import _core, states
from .bitmap import COPIED, Bitmap
from .errors import SnapshotBrokenError
from .failpoints import hit, index_of
from .image import Identity, close_descriptor
from .layout import Slot, Snapshot, Word
from .segment import Segment

#: What a target is called until it is finished; scratch always is.
PARTIAL_SUFFIX = ".shmcbw-partial"

_BREAK_ERROR, _BREAK_STATE = index_of("break.error"), index_of("break.state")


def state_of(segment: Segment, index: int) -> int:
    """The state (see `states.py`) of an entry."""
    return segment.snapshot(index, Snapshot.state) & 0xFFFFFFFF


def is_active(segment: Segment, index: int, serial: int) -> bool:
    """Whether the entry still is the snapshot with this serial, and active."""
    return state_of(segment, index) == states.ACTIVE and segment.snapshot(index, Snapshot.serial) == serial


def broken_error(segment: Segment, index: int) -> SnapshotBrokenError | None:
    """Why the entry's snapshot is broken, or None."""
    found = states.split_error(segment.snapshot(index, Snapshot.broken), segment.snapshot(index, Snapshot.state) >> 32)
    if found is None:
        return None
    number, cluster = found
    return SnapshotBrokenError(number or errno.EIO, cluster, segment.snapshot(index, Snapshot.broken_time_ns))


def store_first_error(segment: Segment, index: int, word: Word, odd_epoch: int, number: int, cluster: int) -> bool:
    """Store an error of one cut in a sticky word, unless one of the same cut is there: whether this one is the first.

    What another cut left in the word is replaced; 2^19 cuts later its tag could be taken for ours.
    """
    while True:
        there = segment.snapshot(index, word)
        if states.split_error(there, odd_epoch) is not None:
            return False
        if segment.exchange_snapshot(index, word, there, states.error_word(number, odd_epoch, cluster)):
            return True


def break_snapshot(segment: Segment, index: int, serial: int, number: int, cluster: int) -> None:
    """Break an active or following snapshot: from when this returns, no read of it succeeds and no write waits for it.

    The sticky error comes first (the first one wins), then the state, then the caller may store data: a reader that
    saw the data sees the error at its second look.  Died in between: the error alone already fails every read, and
    the next waiter or the coordinator completes the state.  Both words carry the cut's epoch, so a caller that slept
    while the entry was used again breaks nothing.
    """
    word = segment.snapshot(index, Snapshot.state)
    if word & 0xFFFFFFFF not in states.LIVE or segment.snapshot(index, Snapshot.serial) != serial:
        return
    odd = word >> 32
    if store_first_error(segment, index, Snapshot.broken, odd, number, cluster):
        segment.set_snapshot(index, Snapshot.broken_time_ns, time.time_ns())
    hit(segment.failpoints, _BREAK_ERROR)
    segment.exchange_snapshot(index, Snapshot.state, word, states.state_word(states.BROKEN, odd))
    hit(segment.failpoints, _BREAK_STATE)
    wake_all(segment)
    segment.wake_coordinator()


def damage_snapshot(segment: Segment, index: int, odd_epoch: int, cluster: int = 0) -> None:
    """Break the snapshot of this cut although its entry can't be believed any more: the coordinator only.

    As `break_snapshot`, but whatever the state word is.
    """
    if store_first_error(segment, index, Snapshot.broken, odd_epoch, errno.EUCLEAN, cluster):
        segment.set_snapshot(index, Snapshot.broken_time_ns, time.time_ns())
    segment.set_snapshot(index, Snapshot.state, states.state_word(states.BROKEN, odd_epoch))
    wake_all(segment)


def marked_uncopied(segment: Segment, bitmap: Bitmap, first: int, end: int, odd_epoch: int) -> int | None:
    """A cluster of first..end that was written after this cut although it is not copied (I1 does not hold), or None.

    In a snapshot that was active and unbroken all the time there is none, unless somebody has scribbled on the epoch
    map, the state or the cluster bytes.  The mark first, then the byte: a copy comes before its mark.
    """
    cluster: int | None = first
    while cluster is not None:
        cluster = _core.find_marked(segment.memory, segment.geometry.epoch_map_offset, cluster, end, odd_epoch)
        if cluster is not None:
            if bitmap.state(cluster) < COPIED:
                return cluster
            cluster += 1
    return None


def open_target(name: str, working: str, identity: Identity, size_bytes: int, flags: int) -> int | None:
    """Open ``name`` if it can be the unfinished target that ``working`` names: its descriptor, None if it is not.

    The path lies in memory that others can write, so it may be anybody's, and opening some things does something.  So
    it is looked at before it is opened: what has not our suffix, is a link, is no regular file or is not as long as the
    image is never opened (EUCLEAN).
    """
    if not working.endswith(PARTIAL_SUFFIX):
        raise OSError(errno.EUCLEAN, "not the name of an unfinished target", working)
    probe = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(probe)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EUCLEAN, "not a regular file", name)
        if Identity.of(status) != identity:
            return None
        if status.st_size != size_bytes:
            raise OSError(errno.EUCLEAN, f"not as long as the image, but {status.st_size} bytes", name)
        return os.open(f"/proc/self/fd/{probe}", flags | os.O_CLOEXEC)
    finally:
        close_descriptor(probe)


def target_path(segment: Segment, index: int) -> str:
    """Where the snapshot's data goes."""
    return segment.text(segment.geometry.snapshot(index, Snapshot.target_path), Snapshot.target_path)


def wake_all(segment: Segment) -> None:
    """Have every sleeping writer look again."""
    geometry = segment.geometry
    for slot in _core.nonzero(segment.memory, geometry.slot(0, Slot.asleep), Slot.SIZE, geometry.slot_count):
        segment.wake_slot(slot)
