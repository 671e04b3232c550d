"""What the coordinator knows by itself, compared with what the segment says.

Whoever may write the segment can scribble on it.  The coordinator is the one process that has a copy of its own of what
must not change, and looks ten times a second:

    header: what the creator wrote, size, pid, retired        put right: only who attaches reads them
    epoch                                                     put right, and every snapshot is broken: writers have
                                                              gone by another epoch, and may have taken for copied
                                                              what was not.  Dirty bitmaps are inconsistent
    constant words, speed, background and state of an entry   its snapshot is broken
    an entry that nobody made                                 freed
    marks of the epoch map that are later than the epoch      put to the epoch, before the next cut

Broken means EUCLEAN in the sticky error: reads fail and the job fails.  What lies outside the copy is found by those
who use it (DESIGN.md, "Untrusted memory").
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

from shmcbw import _core, states
from shmcbw.bitmap import COPIED, SKIPPED, ZERO
from shmcbw.epochs import epoch, restore, settle
from shmcbw.errors import SegmentDamagedError
from shmcbw.layout import Header, Snapshot, Word
from shmcbw.seals import HEADER_WORDS, entry_seal
from shmcbw.segment import Segment
from shmcbw.snapshots import wake_all

if TYPE_CHECKING:
    from .coordinator import Entry

log = logging.getLogger("shmcbw")


class Watch:
    """The coordinator's copy of the header."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._header = [(word, self._bytes(word)) for word in (*HEADER_WORDS, Header.seal, Header.magic)]

    def _bytes(self, word: Word) -> bytes:
        return bytes(self._segment.memory[word.offset : word.offset + word.size])

    def put_header_right(self) -> None:
        """Undo what was done to words that nobody but the coordinator writes; not in the middle of a resize."""
        segment = self._segment
        for word, value in self._header:
            if self._bytes(word) != value:
                log.error("%s: somebody has overwritten the header at byte %d: put right", segment.name, word.offset)
                segment.memory[word.offset : word.offset + word.size] = value
        own = (
            (Header.image_size, segment.geometry.image_size),
            (Header.resize_to, 0),
            (Header.retired, 0),
            (Header.coordinator_pid, os.getpid()),
        )
        for word, number in own:
            if segment.header(word) != number:
                segment.set_header(word, number)

    def put_epoch_right(self) -> bool:
        """Whether the epoch was what it must be, outside a cut; if not, it is now, and no snapshot can be trusted."""
        segment = self._segment
        found = epoch(segment)
        if settle(segment):
            return True
        log.error("%s: epoch %d, not %d: somebody has overwritten it", segment.name, found, segment.own_epoch)
        restore(segment)
        wake_all(segment)
        return False

    def put_marks_right(self) -> None:
        """Before a cut: no cluster was written later than now.

        A mark from the future, a scribbled one or that of a writer which went by a scribbled epoch, would look like a
        write after the cut (I1).  What it says, "written", stays true.  One pass over the map, about 10 ms for 1 TiB in
        clusters of 64 KiB, and nobody waits for it.
        """
        segment, geometry = self._segment, self._segment.geometry
        late = _core.clamp_marks(segment.memory, geometry.epoch_map_offset, geometry.clusters, segment.own_epoch)
        if late:
            log.error("%s: %d clusters were marked later than epoch %d", segment.name, late, segment.own_epoch)

    def check_preparing(self, index: int, seal: int) -> None:
        """While the workers open a target: the lock is held meanwhile, so nobody else looks at what they need for it.

        SegmentDamagedError: somebody has overwritten the entry, so that none will open it.
        """
        self.put_header_right()
        segment = self._segment
        preparing = segment.snapshot(index, Snapshot.state) == states.state_word(states.PREPARING, 0)
        if not preparing or seal != entry_seal(segment.memory, segment.geometry, index):
            raise SegmentDamagedError(
                errno.EUCLEAN, f"{segment.name}: somebody has overwritten the entry of its target, nothing was copied"
            )


def of_entry(segment: Segment, entry: Entry) -> str | None:
    """What is wrong with a snapshot's entry, or None.  One that is complete needs its entry no more."""
    if entry.complete:
        return None
    word = segment.snapshot(entry.index, Snapshot.state)
    if word not in (states.state_word(state, entry.odd_epoch) for state in (*states.LIVE, states.BROKEN)):
        return f"its state is {word:#x}"
    if seal_of(segment, entry) != entry.seal:
        return "a word that does not change has changed"
    if segment.snapshot(entry.index, Snapshot.speed) != entry.speed:
        return "its speed has changed"
    if segment.snapshot(entry.index, Snapshot.background) != entry.background:
        return "its background copying was switched"
    return None


def seal_of(segment: Segment, entry: Entry) -> int:
    """The seal of the entry as it is now."""
    return entry_seal(segment.memory, segment.geometry, entry.index)


def of_bytes(histogram: list[int], worker_count: int, *, full: bool) -> str | None:
    """What is wrong with a snapshot's cluster bytes, as far as their number tells; or None.

    ``full``: a backup of everything, from which nobody can discard.
    """
    if unknown := sum(histogram[ZERO + 1 :]):
        return f"{unknown} cluster bytes have no known state"
    if sum(histogram[worker_count + 1 : COPIED]):
        return "cluster bytes name a worker that can't be"
    if full and histogram[SKIPPED]:
        return f"{histogram[SKIPPED]} clusters are left out of a full backup"
    return None
