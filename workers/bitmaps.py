"""The dirty bitmaps of one image: names, states, and what a death leaves of them.

`shmcbw/dirty.py` knows what a bitmap is; here is who may do what to it when, and where it is kept:

    journal, section "bitmaps"               one object for each: granularity, start, coverage, flags, its job
    /dev/shm/shmcbw-<device>-<inode>.d<n>    the set of a bitmap that has one

Each change is made to copies, then stored, then shown; a set's file is there before the journal names it, and goes
after the journal has forgotten it.  So whatever dies, the journal names sets that are whole, and what it says of a
bitmap is a superset of what changed: the epochs are in the segment, and a job's end changes a bitmap only when its
target is safe.

What is read back is checked.  A bitmap whose entry makes sense but whose set is gone or damaged is inconsistent: it can
only be removed.  An entry that makes none is dropped.  Both are logged.

A new start wants a *boundary*: an instant at which no write was half done, a drained section without a snapshot.  Where
a writer holds that up, the last known boundary is taken instead: then the bitmap holds more than it must.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shmcbw.dirty import DirtyBitmap, DirtySet, EpochMap
from shmcbw.epochs import epoch
from shmcbw.errors import BitmapError, CutAbandonedError, SegmentDamagedError
from shmcbw.layout import Header
from shmcbw.points import Point
from shmcbw.segment import Segment

from .cut import take_boundary
from .journal import Journal, list_files, read_file, remove_file, replace_file
from .nbd.dirty import BitmapFile
from .nbd.specification import BitmapSpec

if TYPE_CHECKING:
    from .saved import SavedBitmaps

log = logging.getLogger("shmcbw")

SET_SUFFIX = ".d"
_SET_HEADER = struct.Struct("<8sQQ32s")
_SET_MAGIC = b"shmcbw d"
COUNT_MAX = 1000

MODES = ("on-success", "never", "always")
DEFAULT_GRANULARITY_MIN, DEFAULT_GRANULARITY_MAX = 4096, 65536


def segment_uuid(segment: Segment) -> str:
    """The generation of a control segment, 32 hexadecimal digits."""
    return bytes(segment.memory[Header.uuid.offset : Header.uuid.offset + Header.uuid.size]).hex()


@dataclass(frozen=True, slots=True)
class BitmapAction:
    """A change to a bitmap: ``verb`` is add, remove, clear, enable, disable or merge; the rest as the methods of
    `Bitmaps` take it."""

    verb: str
    name: str
    granularity: int | None = None
    persistent: bool = False
    disabled: bool = False
    sources: tuple[str, ...] = ()


class Bitmaps(Mapping[str, DirtyBitmap]):
    """The bitmaps of one coordinator's image.  Usable from any thread; each call is one change, or none if it raises.

    BitmapError: refused, with QEMU's text.  OSError: /dev/shm has no room for it.
    """

    def __init__(
        self,
        segment: Segment,
        journal: Journal,
        lock: threading.RLock,
        drain_limit_s: float,
        saved: SavedBitmaps | None = None,
        loaded: dict[str, DirtyBitmap] | None = None,
    ) -> None:
        self._segment = segment
        self._journal = journal
        self._lock = lock
        self._drain_limit_s = drain_limit_s
        self._uuid = segment_uuid(segment)
        #: By name: the set that is in a file, and the number of that.
        self._files: dict[str, tuple[DirtySet, int]] = {}
        self._next_file = 1
        #: The last boundary that is known.  Epoch 2 is the first one: before it nothing was written.
        self._boundary = Point(self._uuid, 1)
        self._bitmaps: dict[str, DirtyBitmap] = {}
        #: Those that an NBD export shows, by their users.
        self._exported: dict[str, BitmapFile] = {}
        #: Where persistent ones go; None: there are none.
        self._saved = saved
        self._adopt()
        if loaded is not None:
            self._take_over(loaded)

    @property
    def epochs(self) -> EpochMap:
        """Of the image as it is now: a resize makes it longer."""
        geometry = self._segment.geometry
        return EpochMap(self._segment.memory, geometry.epoch_map_offset, geometry.image_size, geometry.cluster_size)

    # -- a mapping from names ----------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> DirtyBitmap:
        return self._bitmaps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._bitmaps))

    def __len__(self) -> int:
        return len(self._bitmaps)

    def find(self, name: str) -> DirtyBitmap:
        """The bitmap with this name, or BitmapError."""
        return _find(self._bitmaps, name)

    # -- what a user does --------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        granularity: int | None = None,
        persistent: bool = False,
        disabled: bool = False,
        at: Point | None = None,
    ) -> None:
        """A new, empty bitmap, which records unless ``disabled``.  ``granularity``: default as QEMU's, the cluster size
        between 4 KiB and 64 KiB.  ``at``: the boundary from which on it records, for a transaction; else now."""
        self.run([BitmapAction("add", name, granularity, persistent, disabled)], at=at)

    def remove(self, name: str) -> None:
        """Also an inconsistent one; refused while it is in use."""
        self.run([BitmapAction("remove", name)])

    def clear(self, name: str, *, at: Point | None = None) -> None:
        self.run([BitmapAction("clear", name)], at=at)

    def enable(self, name: str, *, at: Point | None = None) -> None:
        self.run([BitmapAction("enable", name)], at=at)

    def disable(self, name: str) -> None:
        """Record no more.  Every write that ended before this call is in it."""
        self.run([BitmapAction("disable", name)])

    def merge(self, target: str, sources: Sequence[str]) -> None:
        """Add what ``sources`` hold now to ``target``; granularities may differ."""
        self.run([BitmapAction("merge", target, sources=tuple(sources))])

    def run(self, actions: Sequence[BitmapAction], *, at: Point | None = None) -> None:
        """Several changes in order, as one: all of them or none.  ``at``: as in `add`."""
        with self._lock:
            if self.check(actions) and at is None:
                at = self.boundary()
            with self._change() as bitmaps:
                for action in actions:
                    self._act(bitmaps, action, at or self.last_boundary)

    def check(self, actions: Sequence[BitmapAction]) -> bool:
        """Try what `run` would do, and change nothing: whether it needs a boundary.  BitmapError."""
        with self._lock:
            return self._try(actions)[1]

    def _try(self, actions: Sequence[BitmapAction]) -> tuple[dict[str, DirtyBitmap], bool]:
        tried = {name: copy.copy(bitmap) for name, bitmap in self._bitmaps.items()}
        # All of them, whatever the first one says.
        records = [self._act(tried, action, self.last_boundary) for action in actions]
        return tried, any(records)

    def before(self, actions: Sequence[BitmapAction]) -> dict[str, DirtyBitmap | None]:
        """What the bitmaps that actions would change are now, for `undo`."""
        with self._lock:
            return {action.name: self._bitmaps.get(action.name) for action in actions}

    def undo(self, state: dict[str, DirtyBitmap | None]) -> None:
        """Bitmaps are again what `before` has found; what was written since, the epochs know."""
        with self._lock, self._change() as bitmaps:
            for name, bitmap in state.items():
                bitmaps.pop(name, None)
                if bitmap is not None:
                    bitmaps[name] = bitmap

    def _act(self, bitmaps: dict[str, DirtyBitmap], action: BitmapAction, boundary: Point) -> bool:
        """Change copies: whether something records from the boundary on."""
        name = action.name
        if action.verb == "add":
            self._add(bitmaps, action, boundary)
            return not action.disabled
        found = _find(bitmaps, name)
        found.check(inconsistent=action.verb != "remove")
        recorded = found.recording
        if action.verb == "remove":
            del bitmaps[name]
        elif action.verb == "clear":
            found.clear(boundary)
        elif action.verb == "enable":
            found.enable(boundary)
        elif action.verb == "disable":
            # What is after the last boundary may be in it, and is not covered: so not up to one that is to come.
            found.disable(self.epochs, self.last_boundary)
        else:
            found.merge(self.epochs, [_find(bitmaps, source) for source in action.sources], self.last_boundary)
        return (action.verb == "clear" and recorded) or (action.verb == "enable" and not recorded)

    def _add(self, bitmaps: dict[str, DirtyBitmap], action: BitmapAction, boundary: Point) -> None:
        granularity = action.granularity
        if granularity is None:
            granularity = min(max(self.epochs.cluster_size, DEFAULT_GRANULARITY_MIN), DEFAULT_GRANULARITY_MAX)
        made = DirtyBitmap(action.name, granularity, start=None, persistent=action.persistent)
        if action.persistent:
            if self._saved is None:
                raise BitmapError(
                    f"Can't store persistent bitmap '{action.name}': the coordinator has no state directory"
                )
            self._saved.check_image()
        if action.name in bitmaps:
            raise BitmapError(f"Bitmap already exists: {action.name}")
        if len(bitmaps) >= COUNT_MAX:
            raise BitmapError(f"the image has {COUNT_MAX} bitmaps already")
        if not action.disabled:
            made.enable(boundary)
        bitmaps[action.name] = made

    def query(self) -> list[dict[str, Any]]:
        """As ``dirty-bitmaps`` in QEMU's queries."""
        with self._lock:
            return [bitmap.describe(self.epochs) for bitmap in self._bitmaps.values()]

    def sha256(self, name: str) -> str:
        """A hash of the bits: equal for equal sets of equal granularity."""
        with self._lock:
            found = self.find(name)
            found.check(busy=False)
            return found.sha256(self.epochs)

    def extents(self, name: str) -> Iterator[tuple[int, int]]:
        """The dirty (offset, length) in bytes, in order, as of this call."""
        with self._lock:
            found = self.find(name)
            found.check(busy=False)
            return found.dirty(self.epochs).extents()

    def doubt(self, name: str) -> str:
        """Why no increment can be taken by a bitmap; empty if one can."""
        with self._lock:
            bitmap = self._bitmaps.get(name)
            if bitmap is None:
                return "there is no such bitmap"
            if bitmap.inconsistent:
                return "it is inconsistent: it may have missed writes"
            if not bitmap.recording or bitmap.covers(self.last_boundary) is None:
                return "it was not recording all the time"
            return ""

    def begin_anew(self, name: str, *, persistent: bool) -> None:
        """A new bitmap of the name, in the place of what was there."""
        with self._lock:
            actions = [BitmapAction("remove", name)] if name in self._bitmaps else []
            self.run([*actions, BitmapAction("add", name, persistent=persistent)])

    # -- boundaries --------------------------------------------------------------------------------------------------

    @property
    def last_boundary(self) -> Point:
        return self._boundary

    def boundary(self) -> Point:
        """A boundary now, or the last known one where a writer holds that up for longer than a cut's limit."""
        with self._lock:
            try:
                self.note_boundary(take_boundary(self._segment, self._drain_limit_s))
            except (CutAbandonedError, SegmentDamagedError) as error:
                log.info("a bitmap of %s may hold more than it must: %s", self._segment.name, error)
            return self._boundary

    def note_boundary(self, odd: int) -> Point:
        """A cut was taken: its epoch is a boundary."""
        with self._lock:
            self._boundary = Point(self._uuid, max(odd, self._boundary.epoch))
            return Point(self._uuid, odd)

    def distrust(self) -> None:
        """Somebody has overwritten the epoch: writes may be marked as older than they are, and nobody knows which."""
        with self._lock:
            for file in self._exported.values():
                file.distrust()
            if all(bitmap.inconsistent for bitmap in self._bitmaps.values()):
                return
            log.error("the bitmaps of %s can't be trusted any more", self._segment.name)
            with self._change() as bitmaps:
                for bitmap in bitmaps.values():
                    bitmap.inconsistent = True

    # -- jobs --------------------------------------------------------------------------------------------------------

    def check_job(
        self, sync: str, name: str | None, mode: str | None, *, after: Sequence[BitmapAction] = ()
    ) -> str | None:
        """The bitmap-mode of a job with this sync, bitmap and bitmap-mode, if they go together; else BitmapError.

        ``after``: actions that will have been done before.
        """
        if sync in ("bitmap", "incremental") and name is None:
            raise BitmapError(f"must provide a valid bitmap name for '{sync}' sync mode")
        if sync == "incremental":
            if mode not in (None, "on-success"):
                raise BitmapError("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'")
            mode = "on-success"
        if name is None:
            if mode is not None:
                raise BitmapError("Cannot specify bitmap sync mode without a bitmap")
            return None
        with self._lock:
            bitmaps, _ = self._try(after)
        if name not in bitmaps:
            raise BitmapError(f"Bitmap '{name}' could not be found")
        if mode is None:
            raise BitmapError("Bitmap sync mode must be given when providing a bitmap")
        if mode not in MODES:
            raise ValueError(f"bitmap_mode: {mode!r} is none of {', '.join(MODES)}")
        bitmaps[name].check()
        if sync == "none":
            raise BitmapError("sync mode 'none' does not produce meaningful bitmap outputs")
        if mode == "never" and sync not in ("bitmap", "incremental"):
            raise BitmapError(
                f"Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            )
        return mode

    def hold(self, name: str, user: str, mode: str) -> None:
        """A job has it from now on; ``user`` names that beyond a death (the snapshot's serial number)."""
        with self._lock:
            self.find(name).check()
            with self._change() as bitmaps:
                bitmaps[name].user, bitmaps[name].mode = user, mode

    def release(self, user: str) -> None:
        """The job has not come to be, or has ended without an effect.  Never fails: what is not stored is found out
        by the next coordinator (`release_all_but`)."""
        with self._lock:
            name = self.used_by(user)
            if name is None:
                return
            try:
                with self._change() as bitmaps:
                    bitmaps[name].user = bitmaps[name].mode = None
            except OSError as error:
                log.warning("the end of a job of bitmap %r can't be stored: %s", name, error)
                self._bitmaps[name].user = self._bitmaps[name].mode = None

    def finish(self, user: str, mode: str, success: bool, cut: Point, uncopied: DirtySet | None = None) -> None:
        """The end of a job, by the table in `DirtyBitmap.finish`.  Harmless when it was done before.

        OSError: it can't be stored; then the bitmap holds what it held, a superset.
        """
        with self._lock:
            name = self.used_by(user)
            if name is not None:
                with self._change() as bitmaps:
                    bitmaps[name].finish(mode, success, cut, uncopied, int(user))
                    bitmaps[name].user = bitmaps[name].mode = None

    def used_by(self, user: str) -> str | None:
        """The name of the bitmap that a job has."""
        return next((name for name, bitmap in self._bitmaps.items() if bitmap.user == user), None)

    def release_all_but(self, users: set[str]) -> None:
        """After adoption: jobs that are not there any more have no bitmap.  What they had is a superset still."""
        with self._lock:
            if any(bitmap.user is not None and bitmap.user not in users for bitmap in self._bitmaps.values()):
                with self._change() as bitmaps:
                    for bitmap in bitmaps.values():
                        if bitmap.user not in users:
                            bitmap.user = bitmap.mode = None

    # -- exports -----------------------------------------------------------------------------------------------------

    def export(self, name: str, user: str, *, live: bool) -> BitmapSpec:
        """An NBD export shows it from now on: what its server is to be told.  ``live``: see `nbd/dirty.py`.

        BitmapError: it is in use, or can't be trusted.  `end_export` with the same ``user`` lets go of it.
        """
        with self._lock:
            self.hold(name, user, "never")
            try:
                file = self._exported[user] = BitmapFile(self._bitmaps[name], self.epochs, live=live)
            except BaseException:
                self.release(user)
                raise
            return file.spec

    def end_export(self, user: str) -> None:
        """Nobody reads it any more."""
        with self._lock:
            self.release(user)
            self._exported.pop(user).close()

    # -- where they are kept -----------------------------------------------------------------------------------------

    @contextmanager
    def _change(self) -> Iterator[dict[str, DirtyBitmap]]:
        """Copies to change: stored at the end of the block and shown then; forgotten if it raises."""
        changed = {name: copy.copy(bitmap) for name, bitmap in self._bitmaps.items()}
        yield changed
        if self._saved is not None and _persistent(changed) != _persistent(self._bitmaps):
            # Before it can be used: what is not marked is taken for clean.
            self._saved.mark(self._uuid, changed)
        self._store(changed)
        self._bitmaps = changed

    def _store(self, bitmaps: dict[str, DirtyBitmap]) -> None:
        files: dict[str, tuple[DirtySet, int]] = {}
        written: list[int] = []
        try:
            for name, bitmap in bitmaps.items():
                if bitmap.kept is None:
                    continue
                # Sets are replaced, never changed: the same object is the same set.
                there = self._files.get(name)
                if there is None or there[0] is not bitmap.kept:
                    replace_file(self._segment, f"{SET_SUFFIX}{self._next_file}", pack_set(bitmap.kept))
                    written.append(self._next_file)
                    there = (bitmap.kept, self._next_file)
                    self._next_file += 1
                files[name] = there
            with self._journal.change() as document:
                document["bitmaps"] = {
                    name: _to_json(bitmap, files[name][1] if name in files else None)
                    for name, bitmap in bitmaps.items()
                }
        except BaseException:
            for number in written:
                remove_file(self._segment, f"{SET_SUFFIX}{number}")
            raise
        old = {number for _, number in self._files.values()}
        self._files = files
        for number in old - {number for _, number in files.values()}:
            remove_file(self._segment, f"{SET_SUFFIX}{number}")

    def _adopt(self) -> None:
        """What a dead coordinator, or one that left the segment to its writers, has written down."""
        now = epoch(self._segment)
        for name, entry in self._journal.document["bitmaps"].items():
            try:
                bitmap, number = _from_json(name, entry, now)
            except (ValueError, TypeError, KeyError) as error:
                log.warning("a bitmap in the journal of %s is dropped: %s", self._segment.name, error)
                continue
            if number is not None:
                try:
                    bitmap.kept = self._read_set(number)
                    self._files[name] = (bitmap.kept, number)
                except (OSError, ValueError) as error:
                    log.warning("bitmap %r of %s is inconsistent: %s", name, self._segment.name, error)
                    bitmap.inconsistent = True
            self._bitmaps[name] = bitmap
        named = {f"{SET_SUFFIX}{number}" for _, number in self._files.values()}
        for suffix in list_files(self._segment, SET_SUFFIX):
            number_text = suffix.removeprefix(SET_SUFFIX)
            if number_text.isascii() and number_text.isdigit():
                self._next_file = max(self._next_file, int(number_text) + 1)
            if suffix not in named:
                remove_file(self._segment, suffix)

    def _take_over(self, loaded: dict[str, DirtyBitmap]) -> None:
        """What was in the state directory, for a segment that begins now or that was adopted.

        One that the journal does not know although the file has it was lost, so it is inconsistent.
        """
        assert self._saved is not None
        fresh = not self._bitmaps and epoch(self._segment) == 2
        lost = {name: bitmap for name, bitmap in loaded.items() if name not in self._bitmaps}
        for bitmap in lost.values():
            bitmap.inconsistent |= not fresh
        if lost:
            self._store({**self._bitmaps, **lost})
            self._bitmaps.update(lost)
        self._saved.mark(self._uuid, self._bitmaps)

    def put_away(self) -> dict[str, DirtyBitmap]:
        """The end: everything as one to save, each set by itself.  The journal forgets them; `put_back` undoes that."""
        with self._lock:
            packed = {name: copy.copy(bitmap) for name, bitmap in self._bitmaps.items()}
            for bitmap in packed.values():
                if bitmap.persistent and not bitmap.inconsistent:
                    bitmap.kept = bitmap.dirty(self.epochs)
            # Where there is none nothing is stored: it would be us who keep the segment alive.
            if self._journal.document["bitmaps"]:
                with self._journal.change() as document:
                    document["bitmaps"] = {}
            return packed

    def put_back(self) -> None:
        """The segment goes on without a coordinator: the journal knows them again."""
        with self._lock:
            if self._bitmaps:
                self._store(dict(self._bitmaps))

    def _read_set(self, number: int) -> DirtySet:
        size = self.epochs.size_bytes
        return unpack_set(read_file(self._segment, f"{SET_SUFFIX}{number}", set_bytes_max(size)), size)


def _find(bitmaps: Mapping[str, DirtyBitmap], name: str) -> DirtyBitmap:
    try:
        return bitmaps[name]
    except KeyError:
        raise BitmapError(f"Dirty bitmap '{name}' not found") from None


def _persistent(bitmaps: Mapping[str, DirtyBitmap]) -> set[str]:
    return {name for name, bitmap in bitmaps.items() if bitmap.persistent}


def pack_set(found: DirtySet) -> bytes:
    """A set as bytes: 56 bytes of header with a hash, then the bits."""
    digest = hashlib.sha256(found.bits).digest()
    return _SET_HEADER.pack(_SET_MAGIC, found.size_bytes, found.granularity, digest) + found.bits


def set_bytes_max(size_bytes: int) -> int:
    """How many bytes a set of an image of this size has at most."""
    return _SET_HEADER.size + -(-size_bytes // 512) // 8 + 1


def unpack_set(data: bytes, size_bytes: int) -> DirtySet:
    """The set that `pack_set` wrote, of an image of this size or of a smaller one (it may have been resized since);
    ValueError if it is not whole."""
    if len(data) < _SET_HEADER.size:
        raise ValueError("its set is no set")
    magic, size, granularity, digest = _SET_HEADER.unpack_from(data)
    bits = data[_SET_HEADER.size :]
    if magic != _SET_MAGIC or not 0 < size <= size_bytes or granularity < 512 or granularity & (granularity - 1):
        raise ValueError("its set is of another image, or no set")
    if hashlib.sha256(bits).digest() != digest:
        raise ValueError("its set does not fit its hash")
    return DirtySet(size, granularity, bits)


def _to_json(bitmap: DirtyBitmap, number: int | None) -> dict[str, Any]:
    return {
        "granularity": bitmap.granularity,
        "start": bitmap.start,
        "since": str(bitmap.since) if bitmap.since is not None else None,
        "until": str(bitmap.until) if bitmap.until is not None else None,
        "persistent": bitmap.persistent,
        "inconsistent": bitmap.inconsistent,
        "user": bitmap.user,
        "mode": bitmap.mode,
        "set": number,
    }


def _from_json(name: str, entry: Any, now: int) -> tuple[DirtyBitmap, int | None]:
    """The bitmap and the number of its set's file; ValueError, TypeError or KeyError if the entry makes no sense.

    A start in the future would miss writes: it makes no sense.  One in the past only adds some.
    """
    start, number, user = entry["start"], entry["set"], entry["user"]
    if start is not None and not (type(start) is int and 0 <= start < now):
        raise ValueError(f"{name!r} records from the epoch {start!r} on, now it is {now}")
    if number is not None and not (type(number) is int and number > 0):
        raise ValueError(f"{name!r} has the set {number!r}")
    if user is not None and not (isinstance(user, str) and entry["mode"] in MODES):
        raise ValueError(f"{name!r} is used by {user!r} in the mode {entry['mode']!r}")
    if type(entry["granularity"]) is not int:
        raise ValueError(f"{name!r} has the granularity {entry['granularity']!r}")
    bitmap = DirtyBitmap(
        name,
        entry["granularity"],
        start=start,
        since=Point.parse(entry["since"]) if entry["since"] is not None else None,
        until=Point.parse(entry["until"]) if entry["until"] is not None else None,
        persistent=bool(entry["persistent"]),
        inconsistent=bool(entry["inconsistent"]),
    )
    bitmap.user, bitmap.mode = user, entry["mode"] if user is not None else None
    return bitmap, number
