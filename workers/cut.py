"""The cut: one instant between all writes, of one image or of a group of images.

    1  even epoch -> odd, with a deadline beside it           from here on no write begins to store (I5)
    2  wait until no slot is in flight                        dead owners are cleared by lock test
    3  publish: PREPARED -> ACTIVE by compare-and-swap        this is the cut
    4  odd -> next even by compare-and-swap, wake the gated

Of a group each step is done for all images before the next one begins, so their cuts are one instant: the one at which
all were quiet.  Between 3 and 4 one word decides that the group counts (`shmcbw.groups`).  If one publish fails, what
was published is broken before its image opens.

What can fail was done before; the section does no input or output and no work proportional to an image.  At the
deadline the coordinator, or any gated writer, ends the section without a cut (`epochs.abandon`).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shmcbw import _core
from shmcbw.epochs import EPOCH_MAX, abandon, advance, epoch, settle
from shmcbw.errors import CutAbandonedError, EpochsExhaustedError, SegmentDamagedError
from shmcbw.failpoints import hit, index_of
from shmcbw.groups import commit, counts, enrol, group_of
from shmcbw.layout import Header, Slot, Snapshot
from shmcbw.segment import Segment
from shmcbw.slots import reap_slot
from shmcbw.snapshots import break_snapshot, wake_all
from shmcbw.states import ACTIVE, PREPARED, state_word

_LOOK_NS = 2_000_000
_PREPARED, _ODD, _QUIET, _PUBLISHED, _EVEN = (
    index_of(f"coordinator.{step}") for step in ("prepared", "odd", "quiet", "published", "even")
)
_CLOSED_ONE, _PUBLISHED_ONE, _PUBLISHED_ALL, _COMMITTED, _TOLD_ONE, _OPENED_ONE = (
    index_of(f"coordinator.group_{step}")
    for step in ("closed_one", "published_one", "published", "committed", "told_one", "opened_one")
)


@dataclass(frozen=True, slots=True)
class Cut:
    """When a cut was (wall clock) and how long writes were held for it, both in nanoseconds."""

    time_ns: int
    drained_ns: int


NO_CUT = Cut(0, 0)


def take_cut(places: Sequence[tuple[Segment, int]], limit_s: float, also: Sequence[Segment] = ()) -> Cut:
    """Publish the snapshots at these places (segment, index), which are PREPARING and have everything they need.

    also: further images for which this is to be a boundary, at the same instant, though none of their snapshots is cut.
    Blocks for at most ``limit_s``.  CutAbandonedError: the limit was reached, nothing has changed.
    SegmentDamagedError: somebody else moved an epoch, so that writers may have stored in the drained section; none of
    the snapshots counts.
    """
    return _Section(places, also).cut(limit_s)


class _Section:
    """The drained section of all images of a cut."""

    def __init__(self, places: Sequence[tuple[Segment, int]], also: Sequence[Segment]) -> None:
        self._places = places
        self._also = also
        images = dict.fromkeys([*(segment for segment, _ in places), *also])
        #: Each image once, whatever number of its snapshots are in the group, with its odd epoch.
        self._odd = {segment: _next_odd(segment) for segment in images}
        self._published: list[tuple[Segment, int]] = []
        self._holder: tuple[Segment, int] | None = None
        self._deadline = 0

    def cut(self, limit_s: float) -> Cut:
        if len(self._places) > 1:
            enrol(self._places)
        for segment, index in self._places:
            segment.set_snapshot(index, Snapshot.cut_epoch, self._odd[segment])
            segment.set_snapshot(index, Snapshot.state, state_word(PREPARED, self._odd[segment]))
            hit(segment.failpoints, _PREPARED)
        started = time.monotonic_ns()
        self._deadline = started + int(limit_s * 1e9)
        taken = False
        try:
            self._close()
            cut_time = time.time_ns()
            taken = self._wait_quiet() and self._publish() and self._commit()
        finally:
            if not taken:
                self._fail()
            disturbed = self._open()
            drained_ns = time.monotonic_ns() - started
            self._wake(taken=taken)
        if not taken:
            raise self._abandoned(limit_s)
        if disturbed is not None:
            raise _disturbed(disturbed)
        for segment, index in self._places:
            segment.set_snapshot(index, Snapshot.cut_time_ns, cut_time)
            segment.set_snapshot(index, Snapshot.drained_ns, drained_ns)
        return Cut(cut_time, drained_ns)

    def _close(self) -> None:
        for number, (segment, odd) in enumerate(self._odd.items()):
            if number:
                hit(segment.failpoints, _CLOSED_ONE)
            _close(segment, odd, self._deadline)
            hit(segment.failpoints, _ODD)

    def _wait_quiet(self) -> bool:
        for segment in self._odd:
            slot = _wait_quiet(segment, self._deadline)
            if slot is not None:
                self._holder = segment, slot
                return False
            hit(segment.failpoints, _QUIET)
        # At this moment all of them are closed and quiet: those with a snapshot, if it can still be published; the
        # others, if no waiting writer has ended their section.
        return all(epoch(segment) == self._odd[segment] for segment in self._also)

    def _publish(self) -> bool:
        for segment, index in self._places:
            if self._published:
                hit(segment.failpoints, _PUBLISHED_ONE)
            odd = self._odd[segment]
            # A gated writer abandons the entry before it advances the epoch.
            if epoch(segment) != odd and segment.snapshot(index, Snapshot.state) == state_word(PREPARED, odd):
                raise _disturbed(segment)
            if not segment.exchange_snapshot(index, Snapshot.state, state_word(PREPARED, odd), state_word(ACTIVE, odd)):
                return False
            self._published.append((segment, index))
            hit(segment.failpoints, _PUBLISHED)
        for segment, odd in self._odd.items():
            if not self._is_closed(segment, odd):
                raise _disturbed(segment)
        return True

    def _is_closed(self, segment: Segment, odd: int) -> bool:
        """Whether an image is closed, or was until its deadline: nobody opens it before."""
        found = epoch(segment)
        return found == odd or (found == odd + 1 and time.monotonic_ns() >= self._deadline)

    def _commit(self) -> bool:
        """Of a group: the leader's word decides, then the others repeat it."""
        if len(self._places) <= 1:
            return True
        leader, leader_index = self._places[0]
        group = group_of(leader, leader_index)
        hit(leader.failpoints, _PUBLISHED_ALL)
        commit(leader, leader_index, group)
        hit(leader.failpoints, _COMMITTED)
        for segment, index in self._places[1:]:
            commit(segment, index, group)
            hit(segment.failpoints, _TOLD_ONE)
        return counts(leader, leader_index)

    def _fail(self) -> None:
        """Nothing of this cut counts; what was published is broken while its image is closed, as far as it still is."""
        if len(self._places) > 1 and counts(*self._places[0]):
            # Interrupted after the commit: all of it is right, and the caller will let go of it.
            return
        for segment, index in self._published:
            break_snapshot(segment, index, segment.snapshot(index, Snapshot.serial), errno.ECANCELED, 0)
        for segment, odd in self._odd.items():
            abandon(segment, odd)

    def _open(self) -> Segment | None:
        """Open all images; one that somebody else has opened before its deadline, or None."""
        disturbed = None
        for number, (segment, odd) in enumerate(self._odd.items()):
            if number:
                hit(segment.failpoints, _OPENED_ONE)
            if not advance(segment, odd) and not self._is_closed(segment, odd):
                disturbed = segment
            hit(segment.failpoints, _EVEN)
        return disturbed

    def _wake(self, *, taken: bool) -> None:
        for segment in self._odd:
            wake_all(segment)
            segment.count_header(Header.cuts if taken else Header.cuts_abandoned)

    def _abandoned(self, limit_s: float) -> CutAbandonedError:
        what = "no cut was taken"
        if len(self._odd) > 1:
            what += f" of any of {len(self._odd)} images"
        if self._holder is None:
            return CutAbandonedError(
                f"{what}: the drained section lasted over its limit of {limit_s * 1000:.0f} ms, "
                "and a waiting writer ended it"
            )
        segment, slot = self._holder
        pid = segment.slot(slot, Slot.pid)
        path = segment.text(Header.image_path.offset, Header.image_path)
        return CutAbandonedError(
            f"{what}: pid {pid} was in the middle of a write to {path} for {limit_s * 1000:.0f} ms", (pid,)
        )


def _next_odd(segment: Segment) -> int:
    """The odd epoch of an image's next cut."""
    if not settle(segment):
        raise _disturbed(segment)
    if segment.own_epoch >= EPOCH_MAX:
        raise EpochsExhaustedError("the image has had all the cuts that 32 bits can count")
    return segment.own_epoch + 1


def _close(segment: Segment, odd: int, deadline: int) -> None:
    # Before the odd epoch: whoever sees that one sees its deadline.
    segment.set_header(Header.drain_deadline_ns, deadline)
    if not advance(segment, odd - 1):
        raise _disturbed(segment)
    segment.own_epoch = odd + 1


def _disturbed(segment: Segment) -> SegmentDamagedError:
    return SegmentDamagedError(
        errno.EUCLEAN,
        f"no cut was taken: somebody has overwritten the epoch of {segment.name}: {epoch(segment)}, not "
        f"{segment.own_epoch - 1} or {segment.own_epoch}",
    )


def take_boundary(segment: Segment, limit_s: float) -> int:
    """A drained section without a snapshot: its odd epoch.  Every write was wholly before or wholly after it.

    Blocks for at most ``limit_s``.  CutAbandonedError: the limit was reached; there was no such instant.
    SegmentDamagedError: somebody else moved the epoch.
    """
    odd = _next_odd(segment)
    deadline = time.monotonic_ns() + int(limit_s * 1e9)
    _close(segment, odd, deadline)
    # A waiting writer that ended it did so at the deadline, when somebody may still have been in flight.
    sharp = _wait_quiet(segment, deadline) is None and advance(segment, odd)
    if not sharp:
        abandon(segment, odd)
    wake_all(segment)
    if not sharp:
        raise CutAbandonedError(f"a write lasted over the limit of {limit_s * 1000:.0f} ms")
    return odd


def _wait_quiet(segment: Segment, deadline: int) -> int | None:
    """Wait until each slot was seen out of flight once; the slot that held us at the deadline, or None."""
    geometry = segment.geometry
    slot = 0
    while True:
        found = _core.wait_quiet(
            segment.memory,
            geometry.slot(0, Slot.in_flight),
            Slot.SIZE,
            geometry.slot_count,
            slot,
            max(0, min(deadline - time.monotonic_ns(), _LOOK_NS)),
        )
        if found is None:
            return None
        slot = found
        if not reap_slot(segment, slot) and time.monotonic_ns() >= deadline:
            return slot
