"""What a backup has beside its snapshot: a manifest, and a dirty bitmap that says what to copy or is reset by it.

The life of one, each step called by the coordinator:

    plan          its parameters go together (`Bitmaps.check_job`); nothing has changed
    take_target   a fresh target, or an existing one that is brought forward in place; the bitmap is in use
    filter        after the cut: clusters that are not in the bitmap become SKIPPED, then background copying begins
    seal          all is copied and synced: the manifest is whole
    commit        the target has its name: the bitmap begins anew at the cut
    fail          failed or cancelled: the bitmap is what it was (or, with bitmap-mode always, what was not copied)

Died before `commit`: the bitmap has its old bits, a superset, and the next coordinator goes on with the job: it finds
which bitmap by the snapshot's serial number, and filters again if background copying had not begun.

The pass after the cut is no part of the drained section.  A writer that meanwhile overwrites a cluster that is not in
the bitmap has it copied for nothing; the manifest says that it is there.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from shmcbw import _core, states
from shmcbw.bitmap import SKIPPED, ZERO, Bitmap
from shmcbw.clusters import outward
from shmcbw.dirty import DirtyBitmap, DirtySet
from shmcbw.errors import BitmapError, ShmcbwError
from shmcbw.failpoints import hit, index_of
from shmcbw.image import ImageFile
from shmcbw.layout import Snapshot
from shmcbw.points import Point
from shmcbw.segment import Segment
from shmcbw.snapshots import wake_all

from .bitmaps import Bitmaps, segment_uuid
from .forward import ForwardFile, is_rest
from .manifest import ABSENT, FINISHED, FULL, INCREMENT, NAMING, PARTIAL_SUFFIX, REST, Description, sidecar
from .manifest import ZERO as ZERO_WORD
from .pool import Pool
from .targets import TargetFile

log = logging.getLogger("shmcbw")

_HELD, _FILTERED, _SEALED = (index_of(f"increment.{step}") for step in ("held", "filtered", "sealed"))
_PASS_CLUSTERS = 1 << 20
_NEVER = 0xFFFFFFFF
REST_WAIT_S = 2.0


class Increment:
    """The manifest and the bitmap of one backup; ``user`` is its snapshot's serial number."""

    def __init__(
        self, bitmaps: Bitmaps, segment: Segment, sync: str, name: str | None, mode: str | None, *, in_place: bool
    ) -> None:
        self._bitmaps = bitmaps
        self._segment = segment
        self.sync = sync
        self.bitmap = name
        self.mode = mode
        self.in_place = in_place
        self.user = ""

    @classmethod
    def plan(
        cls,
        bitmaps: Bitmaps,
        segment: Segment,
        sync: str,
        bitmap: str | None,
        mode: str | None,
        *,
        path: str,
        in_place: bool,
        manifest: bool,
    ) -> Increment | None:
        """What a backup with these parameters to this target has; None: nothing.  BitmapError, ValueError: they make no
        sense.

        What is under the target's working name may be the rest of a job with bitmap-mode always that failed, and the
        bitmap what was not copied: then the backup goes on in it.
        """
        mode = bitmaps.check_job(sync, bitmap, mode)
        if in_place and states.SYNCS[sync] != states.SYNC_BITMAP:
            raise BitmapError(
                f"only a backup of a bitmap can bring its target forward in place, not sync mode '{sync}'"
            )
        if manifest and sync == "none":
            raise ValueError("manifest: sync mode 'none' copies nothing that could be described")
        if bitmap is None and not manifest:
            return None
        if bitmap is not None and states.SYNCS[sync] == states.SYNC_BITMAP:
            in_place |= is_rest(path, bitmaps[bitmap].since)
        return cls(bitmaps, segment, sync, bitmap, mode, in_place=in_place)

    @classmethod
    def adopt(cls, bitmaps: Bitmaps, segment: Segment, index: int) -> Increment | None:
        """That of a dead coordinator's job."""
        if not segment.snapshot(index, Snapshot.manifest):
            return None
        user = str(segment.snapshot(index, Snapshot.serial))
        name = bitmaps.used_by(user)
        value = segment.snapshot(index, Snapshot.sync)
        found = cls(
            bitmaps,
            segment,
            next(sync for sync, number in states.SYNCS.items() if number == value),
            name,
            bitmaps[name].mode if name is not None else None,
            in_place=bool(segment.snapshot(index, Snapshot.in_place)),
        )
        found.user = user
        return found

    def _found(self) -> DirtyBitmap | None:
        """The bitmap; None if it has none, or a dead coordinator's journal has lost it."""
        return self._bitmaps.get(self.bitmap) if self.bitmap is not None else None

    @property
    def filters(self) -> bool:
        """Whether the bitmap says what is copied."""
        return states.SYNCS[self.sync] == states.SYNC_BITMAP

    # -- before the cut ----------------------------------------------------------------------------------------------

    def take_target(self, serial: int, path: str, image: ImageFile, *, overwrite: bool) -> TargetFile:
        """TargetRefusedError, BitmapError: nothing has changed."""
        self.user = str(serial)
        since = None
        if self.bitmap is not None and self.mode is not None:
            self._bitmaps.hold(self.bitmap, self.user, self.mode)
            # One that is not recording need not cover all up to the cut that is to come; `seal` asks again.
            hit(self._segment.failpoints, _HELD)
            found = self._bitmaps[self.bitmap]
            since = found.covers(self._bitmaps.last_boundary) if found.recording else None
        geometry = self._segment.geometry
        description = Description(
            INCREMENT if self.filters else FULL,
            geometry.image_size,
            geometry.cluster_size,
            Point(segment_uuid(self._segment), 0),
            None,
        )
        try:
            if self.in_place:
                return ForwardFile.take(path, image, since, description, overwrite=overwrite)
            full = not self.filters
            return TargetFile.create(path, image, overwrite=overwrite, full=full, description=description)
        except BaseException:
            self._bitmaps.release(self.user)
            raise

    def give_up(self) -> None:
        """There was no cut."""
        self._bitmaps.release(self.user)

    # -- after the cut -----------------------------------------------------------------------------------------------

    def filter(self, index: int, cluster_bytes: Bitmap) -> None:
        """Mark what is not in the bitmap as SKIPPED; then background copying may begin.  Once for each snapshot: a job
        that is paused later stays so."""
        segment, epochs = self._segment, self._bitmaps.epochs
        if self.filters and segment.snapshot(index, Snapshot.filtered) != int(self.user):
            found = self._found()
            if found is not None:
                kept = found.kept_now(epochs)
                start = found.start if found.start is not None else _NEVER
                for first in range(0, epochs.clusters, _PASS_CLUSTERS):
                    end = min(first + _PASS_CLUSTERS, epochs.clusters)
                    skipped = _core.skip_clean(
                        cluster_bytes.memory,
                        first,
                        end,
                        epochs.memory,
                        epochs.offset,
                        epochs.clusters,
                        epochs.shift,
                        start,
                        kept.bits,
                        kept.granules,
                        kept.shift,
                    )
                    if skipped:
                        # Whoever waits for one of them need not.
                        wake_all(segment)
            hit(segment.failpoints, _FILTERED)
            segment.set_snapshot(index, Snapshot.background, 1)
            segment.set_snapshot(index, Snapshot.filtered, int(self.user))

    def cut(self, index: int) -> Point:
        """The point that the backup shows."""
        return Point(segment_uuid(self._segment), self._segment.snapshot(index, Snapshot.cut_epoch))

    # -- the end -----------------------------------------------------------------------------------------------------

    def seal(self, index: int, target: TargetFile, cluster_bytes: Bitmap) -> None:
        """Complete the manifest of a target that is complete.  OSError."""
        if target.manifest is not None and target.manifest.state not in (NAMING, FINISHED):
            self._put_states(target, cluster_bytes)
            target.manifest.seal(NAMING, **self._changes(index))
            hit(self._segment.failpoints, _SEALED)

    def _put_states(self, target: TargetFile, cluster_bytes: Bitmap) -> None:
        """Words of clusters that no worker has written one for."""
        assert target.manifest is not None
        # With sync mode top, what is left out was a hole.
        zeroes = (ZERO, SKIPPED) if self.sync == "top" else (ZERO,)
        first, clusters = 0, cluster_bytes.clusters
        while first < clusters:
            state, end = _core.run(cluster_bytes.memory, first, clusters)
            if state in zeroes and (self.in_place or target.manifest.default != ZERO_WORD):
                target.manifest.put_runs(first, end, ZERO_WORD)
            first = end

    def _changes(self, index: int, *, rest: int = 0) -> dict[str, object]:
        cut = self.cut(index)
        changes: dict[str, object] = {
            "point": Point(cut.segment, cut.epoch, rest=rest),
            "cut_time_ns": self._segment.snapshot(index, Snapshot.cut_time_ns),
        }
        if self.filters and not self.in_place:
            found = self._found()
            changes["since"] = found.covers(cut) if found is not None else None
        return changes

    def commit(self, index: int) -> None:
        """The target is finished and has its name."""
        try:
            self._bitmaps.finish(self.user, self.mode or "never", True, self.cut(index))
        except OSError as error:
            log.warning("bitmap %r keeps what it had, for its new start can't be stored: %s", self.bitmap, error)
            self._bitmaps.release(self.user)

    def fail(self, index: int, target: TargetFile, cluster_bytes: Bitmap, pool: Pool) -> None:
        """The job has failed or was cancelled, after its cut.  Before its entry is free."""
        rest = Point(self.cut(index).segment, self.cut(index).epoch, rest=int(self.user))
        if any(bitmap.since == rest for bitmap in self._bitmaps.values()):
            # A coordinator that died had come so far: both are safe, and the bitmap is not ours any more.
            target.stays = True
        elif self.mode == "always":
            target.stays = self._leave_rest(index, target, cluster_bytes, pool)
        if target.stays:
            log.warning("%s is not finished and stays: its bitmap holds only the rest", target.working_path)
        self._bitmaps.release(self.user)

    def leaves(self, target: str) -> str | None:
        """What a failure leaves of the target, in words; None: nothing."""
        if self.in_place:
            return (
                f"{target}{PARTIAL_SUFFIX} is not finished and stays; nothing is lost: the same backup in place, "
                "by the same bitmap, completes it"
            )
        if self.mode == "always":
            working = f"{target}{PARTIAL_SUFFIX}"
            return f"what was copied stays in {working}, where the next backup of the bitmap to that target goes on"
        return None

    def _leave_rest(self, index: int, target: TargetFile, cluster_bytes: Bitmap, pool: Pool) -> bool:
        """Bitmap-mode always: what was copied counts, so the unfinished target stays, with a manifest of its own.

        Only when both are safe does the bitmap forget what was copied.  If that can't be done it keeps its old bits.
        Died on the way: the snapshot is BROKEN, so the next coordinator fails the job again, and comes here.
        """
        if target.manifest is None or target.working_path == target.path:
            return False
        try:
            if not self._stop_copying(index, pool):
                log.warning("bitmap %r keeps all that it had: a copy worker does not let go", self.bitmap)
                return False
            found, epochs = self._found(), self._bitmaps.epochs
            uncopied = DirtySet(epochs.size_bytes, found.unit(epochs) if found is not None else epochs.cluster_size)
            uncopied.add_uncopied(cluster_bytes.memory, epochs.cluster_size)
            target.sync(target.manifest.description.image_size)
            self._put_states(target, cluster_bytes)
            if not self.in_place:
                for offset, length in uncopied.extents():
                    first, end = outward(offset, length, epochs.cluster_size)
                    target.manifest.put_runs(first, end, ABSENT)
            target.manifest.seal(REST, **self._changes(index, rest=int(self.user)))
            hit(self._segment.failpoints, _SEALED)
            final = sidecar(target.path)
            os.rename(target.manifest.path, final)
            target.manifest.path = final
            target.sync_directory()
            self._bitmaps.finish(self.user, "always", False, self.cut(index), uncopied)
        except (OSError, ShmcbwError) as error:
            log.warning("bitmap %r keeps all that it had: %s", self.bitmap, error)
            return False
        return True

    def _stop_copying(self, index: int, pool: Pool) -> bool:
        """Have nobody write into the target any more; False if somebody hangs.  Nobody copies for a BROKEN snapshot."""
        segment = self._segment
        word = segment.snapshot(index, Snapshot.state)
        if word & 0xFFFFFFFF in (*states.LIVE, states.COMPLETE):
            segment.exchange_snapshot(index, Snapshot.state, word, states.state_word(states.BROKEN, word >> 32))
            wake_all(segment)
        return pool.wait_let_go(index, int(self.user), REST_WAIT_S)


def backup_parameters(
    bitmaps: Bitmaps,
    path: str,
    *,
    since: str | None,
    sync: str | None,
    bitmap_mode: str | None,
    in_place: bool,
    manifest: bool,
    overwrite: bool,
    persistent: bool,
) -> tuple[dict[str, Any], str]:
    """The parameters of a backup that are about its bitmap ``since``, and what is to be said about them.

    ``sync`` "auto" is decided here: "incremental" if the bitmap can be trusted, else "full", and a new bitmap takes the
    place of the old one (``persistent`` if so).  None: what the others call for.  BitmapError: there is no such bitmap.
    """
    found: dict[str, Any] = {"in_place": in_place, "manifest": manifest, "overwrite": overwrite}
    if since is None:
        if sync == "auto":
            raise BitmapError("sync auto needs a bitmap (--since BITMAP)")
        return {**found, "sync": sync or "full", "bitmap_mode": bitmap_mode}, ""
    said = ""
    if sync == "auto":
        sync, doubt = "incremental", bitmaps.doubt(since)
        if doubt:
            said = f"bitmap '{since}' of {path}: {doubt}; taking a full backup"
            bitmaps.begin_anew(since, persistent=persistent)
            sync = "full"
            # It was to be brought forward anyway.
            found.update(in_place=False, overwrite=overwrite or in_place)
    elif since not in bitmaps:
        raise BitmapError(
            f"{path} has no bitmap '{since}': bitmaps live with a running coordinator (shmcbw serve, or a Coordinator "
            "in a program); --state-dir keeps persistent ones beyond it"
        )
    sync = sync or ("bitmap" if bitmap_mode else "incremental")
    if sync != "incremental" and bitmap_mode is None:
        bitmap_mode = "on-success"
    return {**found, "sync": sync, "bitmap": since, "bitmap_mode": bitmap_mode}, said
