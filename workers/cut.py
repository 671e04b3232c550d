"""The cut: one instant between all writes.

    1  even epoch -> odd, with a deadline beside it           from here on no write begins to store (I5)
    2  wait until no slot is in flight                        dead owners are cleared by lock test
    3  publish: PREPARED -> ACTIVE by compare-and-swap        this is the cut
    4  odd -> next even by compare-and-swap, wake the gated

What can fail was done before; the section does no input or output and no work proportional to the image.  At the
deadline the coordinator, or any gated writer, ends the section without a cut (`epochs.abandon`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from shmcbw import _core
from shmcbw.epochs import EPOCH_MAX, abandon, advance, epoch
from shmcbw.errors import CutAbandonedError, EpochsExhaustedError
from shmcbw.failpoints import hit, index_of
from shmcbw.layout import Header, Slot, Snapshot
from shmcbw.segment import Segment
from shmcbw.slots import reap_slot
from shmcbw.snapshots import wake_all
from shmcbw.states import ACTIVE, PREPARED, state_word

_LOOK_NS = 2_000_000
_PREPARED, _ODD, _QUIET, _PUBLISHED, _EVEN = (
    index_of(f"coordinator.{step}") for step in ("prepared", "odd", "quiet", "published", "even")
)


@dataclass(frozen=True, slots=True)
class Cut:
    """When a cut was (wall clock) and how long writes were held for it, both in nanoseconds."""

    time_ns: int
    drained_ns: int


def take_cut(segment: Segment, index: int, limit_s: float) -> Cut:
    """Publish the snapshot at `index`, which is PREPARING and has everything it needs.

    Blocks for at most ``limit_s``.  CutAbandonedError: the limit was reached, nothing has changed.
    """
    even = epoch(segment)
    if even % 2:
        abandon(segment, even)
        even = epoch(segment)
    if even >= EPOCH_MAX:
        raise EpochsExhaustedError("the image has had all the cuts that 32 bits can count")
    odd = even + 1
    segment.set_snapshot(index, Snapshot.cut_epoch, odd)
    segment.set_snapshot(index, Snapshot.state, state_word(PREPARED, odd))
    hit(segment.failpoints, _PREPARED)
    started = time.monotonic_ns()
    deadline = started + int(limit_s * 1e9)
    # Before the odd epoch: whoever sees that one sees its deadline.
    segment.set_header(Header.drain_deadline_ns, deadline)
    advance(segment, even)
    hit(segment.failpoints, _ODD)
    cut_time = time.time_ns()
    holder = _wait_quiet(segment, deadline)
    hit(segment.failpoints, _QUIET)
    published = holder is None and segment.exchange_snapshot(
        index, Snapshot.state, state_word(PREPARED, odd), state_word(ACTIVE, odd)
    )
    if published:
        hit(segment.failpoints, _PUBLISHED)
        advance(segment, odd)
        hit(segment.failpoints, _EVEN)
    else:
        abandon(segment, odd)
    drained_ns = time.monotonic_ns() - started
    wake_all(segment)
    if not published:
        segment.count_header(Header.cuts_abandoned)
        raise _abandoned(segment, holder, limit_s)
    segment.count_header(Header.cuts)
    segment.set_snapshot(index, Snapshot.cut_time_ns, cut_time)
    segment.set_snapshot(index, Snapshot.drained_ns, drained_ns)
    return Cut(cut_time, drained_ns)


def _wait_quiet(segment: Segment, deadline: int) -> int | None:
    """Wait until each slot was seen out of flight once; the slot that held us at the deadline, or None."""
    geometry = segment.geometry
    slot: int | None = 0
    while slot is not None:
        left = deadline - time.monotonic_ns()
        if left <= 0:
            return slot
        slot = _core.wait_quiet(
            segment.memory,
            geometry.slot(0, Slot.in_flight),
            Slot.SIZE,
            geometry.slot_count,
            slot,
            min(left, _LOOK_NS),
        )
        if slot is not None:
            reap_slot(segment, slot)
    return None


def _abandoned(segment: Segment, holder: int | None, limit_s: float) -> CutAbandonedError:
    if holder is None:
        return CutAbandonedError(
            f"no cut was taken: the drained section lasted over its limit of {limit_s * 1000:.0f} ms, "
            "and a waiting writer ended it"
        )
    pid = segment.slot(holder, Slot.pid)
    return CutAbandonedError(
        f"no cut was taken: pid {pid} was in the middle of a write for {limit_s * 1000:.0f} ms", (pid,)
    )
