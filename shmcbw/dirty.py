"""Dirty bitmaps: named sets of what was changed since some instant.  Pure: no file, no lock, no process.

A bitmap costs a write nothing.  The epoch map has, for each cluster, the epoch of its last write, so "changed since the
epoch S" is "marked later than S", for any S.  A bitmap is

    (its set)  joined with  (clusters marked after its start, while it is recording)

and most bitmaps have an empty set.  The set is filled when what the epochs tell would get lost: by disable, by merge,
at the end of a job, and on the way to disk.  Whatever is in doubt is dirty: a bitmap is a superset of what changed
(I6).

The *granularity* is what a user counts in: any power of two from 512 bytes on, coarser or finer than a cluster.  A
finer one tells no more, since writes are tracked by cluster, so it costs no more either: the set is kept by clusters
then.

A bitmap also knows its *coverage*: from which point on, and up to which one if it has stopped, it has seen every write
(`points.py`).  That decides which backups its increments can be laid over.  Rejected: the id of the last backup in the
bitmap.  It says less (a bitmap that is older than a backup covers it too), and a bitmap that is made in the same
transaction as a full backup would not know it.
"""

from __future__ import annotations

import hashlib

from . import _core
from .errors import BitmapError
from .points import Point

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from typing_extensions import Buffer

GRANULARITY_MIN = 512
GRANULARITY_MAX = 1 << 31
NAME_MAX_BYTES = 1023
_EXTENTS = 1 << 16


def check_granularity(granularity: int) -> int:
    """Return a granularity (bytes), or raise BitmapError: a power of two from 512 on."""
    if granularity < GRANULARITY_MIN or granularity & (granularity - 1) or granularity > GRANULARITY_MAX:
        raise BitmapError("Granularity must be power of 2 and at least 512")
    return granularity


def check_name(name: str) -> str:
    """Return a bitmap's name, or raise BitmapError: not empty, shorter than 1024 bytes."""
    if not name:
        raise BitmapError("Bitmap name cannot be empty")
    if len(name.encode(errors="surrogateescape")) > NAME_MAX_BYTES:
        raise BitmapError(f"Bitmap name too long: {name}")
    return name


class DirtySet:
    """A set of granules of an image: one bit each, the lowest bit of the first byte first.

    size_bytes: of the image; the last granule may be partial.  granularity: bytes, a power of two.
    """

    __slots__ = ("bits", "granularity", "size_bytes")

    def __init__(self, size_bytes: int, granularity: int, bits: bytes | bytearray | None = None) -> None:
        self.size_bytes = size_bytes
        self.granularity = granularity
        length = -(-self.granules // 8)
        if bits is not None and len(bits) != length:
            raise ValueError(f"{len(bits)} bytes are not the bits of {self.granules} granules")
        self.bits = bytearray(length) if bits is None else bytearray(bits)
        if self.bits and self.granules % 8:
            # What comes from a file may have bits beyond the end.
            self.bits[-1] &= (1 << self.granules % 8) - 1

    @property
    def granules(self) -> int:
        return -(-self.size_bytes // self.granularity)

    @property
    def shift(self) -> int:
        return self.granularity.bit_length() - 1

    def add(self, offset: int, length: int) -> None:
        """Add a range of bytes, rounded outward."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} are not in 0..{self.size_bytes}")
        if length:
            _core.bits_add(self.bits, self.granules, offset >> self.shift, ((offset + length - 1) >> self.shift) + 1)

    def merge(self, other: DirtySet) -> None:
        """Add another set of the same image, of any granularity; ValueError if the sizes differ."""
        if other.size_bytes != self.size_bytes:
            raise ValueError(f"sets of {self.size_bytes} and {other.size_bytes} bytes")
        _core.bits_merge(self.bits, self.granules, self.shift, other.bits, other.granules, other.shift)

    def add_uncopied(self, states: Buffer, cluster_size: int) -> None:
        """Add the clusters of a snapshot whose bytes are below COPIED."""
        clusters = -(-self.size_bytes // cluster_size)
        _core.bits_add_uncopied(self.bits, self.granules, self.shift, states, clusters, cluster_size.bit_length() - 1)

    def count_bytes(self) -> int:
        """Granules in the set, in bytes; the last one counts whole, also where the image ends in it."""
        return _core.bits_count(self.bits, self.granules) * self.granularity

    def extents(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """The (offset, length) of every run of dirty bytes in a range, in order; none ends beyond the image."""
        stop = self.size_bytes if end is None else min(end, self.size_bytes)
        if not 0 <= offset <= stop:
            raise ValueError(f"bytes {offset}..{stop} are not in 0..{self.size_bytes}")
        position = offset
        while position < stop:
            found = _core.bits_extents(self.bits, self.granules, self.shift, position, stop, _EXTENTS)
            yield from found
            if len(found) < _EXTENTS:
                return
            position = sum(found[-1])

    def sha256(self) -> str:
        """A hash of the serialised bits, as QEMU has it (of whole 64-bit words): equal sets of equal granularity have
        equal ones."""
        return hashlib.sha256(self.bits + bytes(-len(self.bits) % 8)).hexdigest()

    def regrained(self, granularity: int) -> DirtySet:
        """The same set in another granularity, rounded outward."""
        other = DirtySet(self.size_bytes, granularity)
        other.merge(self)
        return other

    def resized(self, size_bytes: int) -> DirtySet:
        """The set for an image that has grown or shrunk; what is new is clean."""
        other = DirtySet(size_bytes, self.granularity)
        for first, length in self.extents(0, min(size_bytes, self.size_bytes)):
            other.add(first, length)
        return other

    def copy(self) -> DirtySet:
        return DirtySet(self.size_bytes, self.granularity, self.bits)

    def __contains__(self, offset: int) -> bool:
        granule = offset >> self.shift
        return bool(self.bits[granule // 8] >> granule % 8 & 1)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, DirtySet)
            and (self.size_bytes, self.granularity) == (other.size_bytes, other.granularity)
            and self.bits == other.bits
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<DirtySet {self.count_bytes()} of {self.size_bytes} bytes, granularity {self.granularity}>"


class EpochMap:
    """Where the epochs of an image's clusters are: u32 each, from ``offset`` in ``memory``."""

    __slots__ = ("cluster_size", "memory", "offset", "size_bytes")

    def __init__(self, memory: Buffer, offset: int, size_bytes: int, cluster_size: int) -> None:
        self.memory = memory
        self.offset = offset
        self.size_bytes = size_bytes
        self.cluster_size = cluster_size

    @property
    def clusters(self) -> int:
        return -(-self.size_bytes // self.cluster_size)

    @property
    def shift(self) -> int:
        return self.cluster_size.bit_length() - 1

    def add_to(self, found: DirtySet, start: int) -> None:
        """Add the clusters that were marked after the epoch ``start``.  About 10 ms for 1 TiB in clusters of 64 KiB."""
        _core.bits_add_epochs(
            found.bits, found.granules, found.shift, self.memory, self.offset, self.clusters, self.shift, start
        )


class DirtyBitmap:
    """A named bitmap.  Its owner (`workers/bitmaps.py`) gives it the epoch map and the boundaries between epochs.

    A *boundary* is an odd epoch that is over: every write was wholly before or wholly after it.
    """

    def __init__(
        self,
        name: str,
        granularity: int,
        *,
        start: int | None,
        since: Point | None = None,
        until: Point | None = None,
        persistent: bool = False,
        inconsistent: bool = False,
        kept: DirtySet | None = None,
    ) -> None:
        self.name = check_name(name)
        self.granularity = check_granularity(granularity)
        #: Recording what is marked after this epoch; None: not recording.
        self.start = start
        #: Coverage: every write after `since`, up to `until` or, if that is None, still.  None: nobody knows.
        self.since = since
        self.until = until
        self.persistent = persistent
        self.inconsistent = inconsistent
        #: What is in it beside the epochs; None: nothing.
        self.kept = kept
        #: Who uses it, and that job's bitmap-mode.
        self.user: str | None = None
        self.mode: str | None = None

    # -- what it says ----------------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        return self.start is not None and not self.inconsistent

    @property
    def busy(self) -> bool:
        return self.user is not None

    def check(self, *, busy: bool = True, inconsistent: bool = True) -> None:
        """BitmapError if the bitmap is in use, or can't be trusted."""
        if busy and self.busy:
            raise BitmapError(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if inconsistent and self.inconsistent:
            raise BitmapError(f"Bitmap '{self.name}' is inconsistent and cannot be used")

    def unit(self, epochs: EpochMap) -> int:
        """The granularity of the set that is kept: what is finer than a cluster tells no more."""
        return max(self.granularity, epochs.cluster_size)

    def dirty(self, epochs: EpochMap) -> DirtySet:
        """All that is dirty now, in a set of its own; granularity: `unit`."""
        found = DirtySet(epochs.size_bytes, self.unit(epochs))
        found.merge(self.kept_now(epochs))
        if self.start is not None:
            epochs.add_to(found, self.start)
        return found

    def kept_now(self, epochs: EpochMap) -> DirtySet:
        """What is in it beside the epochs, for the image's size now: what a resize has added is clean."""
        if self.kept is None:
            return DirtySet(epochs.size_bytes, self.unit(epochs))
        return self.kept if self.kept.size_bytes == epochs.size_bytes else self.kept.resized(epochs.size_bytes)

    def count_bytes(self, epochs: EpochMap) -> int:
        """What is dirty, in granules of this bitmap, as bytes."""
        return self._seen(epochs).count_bytes()

    def sha256(self, epochs: EpochMap) -> str:
        return self._seen(epochs).sha256()

    def _seen(self, epochs: EpochMap) -> DirtySet:
        found = self.dirty(epochs)
        return found if found.granularity == self.granularity else found.regrained(self.granularity)

    def covers(self, cut: Point) -> Point | None:
        """The point since which this bitmap has every change up to ``cut``; None if it can't be sure of any."""
        if self.since is None or self.inconsistent:
            return None
        if self.recording or (self.until is not None and cut.not_after(self.until)):
            return self.since
        return None

    def describe(self, epochs: EpochMap) -> dict[str, Any]:
        """As in QEMU's queries; ``inconsistent`` only where it is so."""
        found = {
            "name": self.name,
            "recording": self.recording,
            "persistent": self.persistent,
            "busy": self.busy,
            "granularity": self.granularity,
            "count": 0 if self.inconsistent else self.count_bytes(epochs),
        }
        if self.inconsistent:
            found["inconsistent"] = True
        return found

    # -- what is done to it ----------------------------------------------------------------------------------------

    def clear(self, boundary: Point) -> None:
        """Nothing is dirty: from this boundary on it records anew, if it records."""
        self.check()
        self.kept = None
        self.since = self.until = None
        if self.start is not None:
            self.start, self.since = boundary.epoch, boundary

    def enable(self, boundary: Point) -> None:
        """Record from this boundary on.  What was written while it was disabled is not in it, and not covered."""
        self.check()
        if self.start is not None:
            return
        if self.until is not None and not boundary.not_after(self.until):
            self.since = None
        elif self.until is None and self.kept is None:
            # It never held anything: it begins here.
            self.since = boundary
        self.start, self.until = boundary.epoch, None

    def disable(self, epochs: EpochMap, boundary: Point) -> None:
        """Record no more.  ``boundary``: the last one; what was written after it may be in it, and is not covered."""
        self.check()
        if self.start is None:
            return
        self.kept = self.dirty(epochs)
        self.start, self.until = None, boundary if self.since is not None else None

    def merge(self, epochs: EpochMap, sources: Iterable[DirtyBitmap], boundary: Point) -> None:
        """Add what other bitmaps of the image hold now.  Nothing has changed if one of them can't be used.

        ``boundary``: the last one; where coverages meet, they are joined.
        """
        self.check()
        found = self.kept_now(epochs).copy()
        since, until = self.since, self.until
        blank = self.start is None and self.kept is None and since is None
        for source in sources:
            source.check()
            found.merge(source.dirty(epochs))
            source_until = boundary if source.recording else source.until
            if blank:
                since, until, blank = source.since, source_until, False
            elif source is not self:
                since, until = _join(since, until, source.since, source_until, open_end=self.recording)
        self.kept, self.since, self.until = found, since, until if since is not None else None

    def finish(self, mode: str, success: bool, cut: Point, uncopied: DirtySet | None, rest: int = 0) -> None:
        """The end of a job that used it, by bitmap-mode and outcome; it began at ``cut``.

        ``rest``: names what it leaves if it fails with mode always.

        | mode | success | failure or cancel |
        | on-success | what was written since the cut | as if there had been no job |
        | never | as if there had been no job | the same |
        | always | what was written since the cut | ``uncopied`` and what was written since the cut |

        There is no successor bitmap: "old bits and writes since" is what it holds anyway, and "writes since" is a new
        start.  So a death at any moment of a job leaves the old bits, a superset.
        """
        if mode == "never" or (not success and mode != "always"):
            return
        covered = success or (rest != 0 and self.covers(cut) is not None)
        self.kept = None if success else uncopied
        if self.start is not None:
            self.start, self.until = cut.epoch, None
        else:
            self.until = cut
        self.since = Point(cut.segment, cut.epoch, rest=0 if success else rest) if covered else None


def _join(
    since: Point | None, until: Point | None, other_since: Point | None, other_until: Point | None, *, open_end: bool
) -> tuple[Point | None, Point | None]:
    """The coverage of two bitmaps together; (None, None) if there may be a gap between them.

    ``open_end``: the first one is still recording, its ``until`` is None.
    """
    if since is None or other_since is None or other_until is None or (until is None and not open_end):
        return (since, until) if other_since is None and since is not None else (None, None)
    if other_since.not_after(since):
        # The other one began earlier: it has to reach up to where this one begins.
        if not since.not_after(other_until):
            return since, until
        first = other_since
    elif since.not_after(other_since):
        first = since
        if not open_end and until is not None and not other_since.not_after(until):
            return since, until
    else:
        return since, until
    if open_end:
        return first, None
    return first, other_until if until is None or until.not_after(other_until) else until
