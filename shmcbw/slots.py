"""Slots: one per writing thread, owned by an OFD lock.

Only the lock's holder writes a slot's words.  A slot whose owner died is cleaned by whoever takes the lock next: the
coordinator when it reaps, or a new writer.  Clearing the in-flight mark of a dead writer is right because the epoch map
was marked before its store began (I6).
"""

from __future__ import annotations

import os
import threading
import time

from . import _core
from .errors import NoFreeSlotError
from .failpoints import hit, index_of
from .layout import Slot, words
from .segment import Segment, slot_byte, start_ticks

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from collections.abc import Collection

#: How long a slot that is being reaped is waited for.
_PATIENCE_S = 0.05
_LOCKED, _TAKEN, _CLEARED = index_of("slot.locked"), index_of("slot.taken"), index_of("slot.cleared")


def acquire_slot(segment: Segment, ours: Collection[int]) -> int:
    """Take a free slot for the calling thread; NoFreeSlotError if there is none.

    ours: slots that other threads have taken through the same open segment.  Its locks are those of the open file, so
    for us their bytes look free: a slot that two threads share has one in-flight mark for both, and cuts would be torn.
    """
    deadline = time.monotonic() + _PATIENCE_S
    # Twice at least: a dead writer's slot may be reaped between our two looks at it, or be held by its reaper.
    while (index := _take_any(segment, ours)) is None:
        if time.monotonic() > deadline:
            count = segment.geometry.slot_count
            raise NoFreeSlotError(
                f"all {count} slots of the image are taken by writing threads; start the coordinator with more slots"
            )
        time.sleep(_PATIENCE_S / 10)
    return index


def _take_any(segment: Segment, ours: Collection[int]) -> int | None:
    # First those nobody uses; then any whose owner is dead.
    for used in (False, True):
        for index in range(segment.geometry.slot_count):
            if index in ours or (segment.slot(index, Slot.pid) != 0) is not used:
                continue
            if segment.try_lock(slot_byte(index)):
                hit(segment.failpoints, _LOCKED)
                clear_slot(segment, index)
                segment.set_slot(index, Slot.thread_id, threading.get_native_id())
                segment.set_slot(index, Slot.start_ticks, start_ticks(os.getpid()))
                segment.set_slot(index, Slot.pid, os.getpid())
                hit(segment.failpoints, _TAKEN)
                return index
    return None


def clear_slot(segment: Segment, index: int) -> None:
    """Reset the words of a slot whose lock the caller holds."""
    # Withdraw the want first: a worker that reads the range afterwards drops it.
    sequence = segment.slot(index, Slot.want_sequence)
    segment.set_slot(index, Slot.want_sequence, (sequence + 1 & ~1) & 0xFFFFFFFF)
    for name, word in words(Slot):
        if name not in ("want_sequence", "wait_histogram"):
            segment.set_slot(index, word, 0)
    offset = segment.geometry.slot(index, Slot.wait_histogram)
    segment.memory[offset : offset + Slot.wait_histogram.size] = bytes(Slot.wait_histogram.size)


def release_slot(segment: Segment, index: int) -> None:
    """Give a slot of our own back."""
    clear_slot(segment, index)
    hit(segment.failpoints, _CLEARED)
    segment.unlock(slot_byte(index))


def reap_slot(segment: Segment, index: int) -> bool:
    """Clear a slot if its owner is dead; False if somebody lives there."""
    if not segment.try_lock(slot_byte(index)):
        return False
    release_slot(segment, index)
    return True


def lives_any_writer(segment: Segment) -> bool:
    """Whether any slot has a living owner."""
    geometry = segment.geometry
    used = _core.nonzero(segment.memory, geometry.slot(0, Slot.pid), Slot.SIZE, geometry.slot_count)
    return any(segment.locked(slot_byte(slot)) for slot in used)
