"""Copying from a snapshot instead of the image: "fleecing".  Old data goes to a fast scratch file, where writers wait
for it, and from the snapshot to a slow target, for which nobody waits.

A backup of a snapshot is an entry of its own, in the state FOLLOWING.  It has the cut of the snapshot that it follows,
and its own cluster bytes.  Writers do not look at it: what they overwrite is kept for the snapshot.  Workers claim,
copy and publish its clusters in the background as those of any backup, only that they read as a snapshot reader reads
(I7), so what is published is the content at the cut (I2) whatever is written meanwhile.

With ``discard_source`` a cluster is let go of in the snapshot after it was published: its space in the scratch file is
given back, and writers need not have it copied any more.  Who dies in between has only not given it back.

Rejected: a thread of the daemon that copies (a target that hangs would hold the daemon); a second segment for the
snapshot (its clusters are those of the image, and so is its life).
"""

from __future__ import annotations

import array
import errno
from collections.abc import Callable
from contextlib import ExitStack

from shmcbw import _core, states
from shmcbw.bitmap import SKIPPED, ZERO
from shmcbw.clusters import byte_range
from shmcbw.errors import ShmcbwError
from shmcbw.image import ImageFile, close_descriptor
from shmcbw.layout import SNAPSHOT_COUNT, Snapshot
from shmcbw.reader import SnapshotReader, open_snapshot_target
from shmcbw.segment import Segment
from shmcbw.snapshots import state_of

from .copying import PIECE_BYTES, Copied, check_target, write_fully
from .manifest import checksum, put_words

_LOOK_AHEAD_BYTES = 1 << 32


class SnapshotSource:
    """A snapshot as a copy worker reads it."""

    def __init__(self, reader: SnapshotReader, *, discard: bool) -> None:
        self._reader = reader
        self._discard = discard
        self._buffer = memoryview(bytearray(max(PIECE_BYTES, reader.cluster_size_bytes)))

    @classmethod
    def open(cls, segment: Segment, index: int, image: ImageFile) -> SnapshotSource | None:
        """What the backup in this entry copies; None if that is the image.  OSError: it is gone."""
        serial = segment.snapshot(index, Snapshot.source)
        if not serial:
            return None
        for place in range(SNAPSHOT_COUNT):
            if segment.snapshot(place, Snapshot.serial) == serial and state_of(segment, place) == states.ACTIVE:
                discard = bool(segment.snapshot(index, Snapshot.discard_source))
                return cls._of(segment, place, serial, image, discard=discard)
        raise OSError(errno.ESTALE, "the snapshot that is backed up is gone")

    @classmethod
    def _of(cls, segment: Segment, place: int, serial: int, image: ImageFile, *, discard: bool) -> SnapshotSource:
        with ExitStack() as undo:
            file = ImageFile.open(image.path, writable=False)
            undo.callback(file.close)
            if file.identity != image.identity:
                raise OSError(errno.ESTALE, "the image was replaced", image.path)
            target_fd = open_snapshot_target(segment, place)
            undo.callback(close_descriptor, target_fd)
            try:
                reader = SnapshotReader(segment, place, serial, file, target_fd)
            except ShmcbwError as error:
                raise OSError(errno.ESTALE, str(error)) from None
            undo.pop_all()
        return cls(reader, discard=discard)

    def close(self) -> None:
        self._reader.close()

    def data_from(self, offset: int) -> int:
        """The first byte from ``offset`` on that may be data; a hint, that looks some way ahead.  OSError."""
        count = min(_LOOK_AHEAD_BYTES, self._reader.size_bytes - offset)
        try:
            (first, *_) = self._reader.block_status(count, offset, limit=1)
        except ShmcbwError:
            # It will fail again where the copy is made, and there it is the job's error.
            return offset
        return first.offset + first.length if first.status == "zero" else offset

    def let_go(self, runs: list[tuple[int, int, int]]) -> None:
        """Clusters were published: the snapshot need not have them any more, if that was asked for.

        What cannot be let go of stays: it costs space, and no more.
        """
        if not self._discard:
            return
        size, end_bytes = self._reader.cluster_size_bytes, self._reader.size_bytes
        for first, end, _ in runs:
            offset, length = byte_range(first, end, size, end_bytes)
            try:
                # Whoever copies one of them just now is not waited for: writers may be waiting for us.
                self._reader.discard(length, offset, wait_s=0.0)
            except (OSError, ShmcbwError):
                return

    def copy_run(
        self,
        target_fd: int,
        first: int,
        end: int,
        *,
        cluster_size: int,
        copied_state: int,
        skip_holes: bool,
        before_write: Callable[[], None],
        manifest_fd: int = -1,
    ) -> Copied:
        """As `copying.copy_run`, of the snapshot; the target is fresh."""
        run = _Run(self._reader, self._buffer, target_fd, before_write, manifest_fd)
        result = run.copied
        run.cluster = first
        try:
            check_target(target_fd, self._reader.size_bytes)
            while run.cluster < end:
                run.step(end, cluster_size, copied_state, SKIPPED if skip_holes else ZERO)
        except OSError as error:
            result.error = error
        except ShmcbwError as error:
            result.error = OSError(errno.ESTALE, str(error))
        if result.error is not None:
            result.failed_cluster = run.cluster
            result.from_source = not run.writing
        return result


class _Run:
    """One claimed run on its way."""

    def __init__(
        self,
        reader: SnapshotReader,
        buffer: memoryview,
        target_fd: int,
        before_write: Callable[[], None],
        manifest_fd: int,
    ) -> None:
        self.copied = Copied()
        self.cluster = 0
        self.writing = False
        self._reader = reader
        self._buffer = buffer
        self._target_fd = target_fd
        self._before_write = before_write
        self._manifest_fd = manifest_fd

    def step(self, end: int, cluster_size: int, copied_state: int, hole_state: int) -> None:
        """Copy some clusters from the present one on, of one kind.  OSError, ShmcbwError."""
        self.writing = False
        size_bytes = self._reader.size_bytes
        offset, length = byte_range(self.cluster, end, cluster_size, size_bytes)
        (extent, *_) = self._reader.block_status(length, offset, limit=1)
        stop = extent.offset + extent.length
        hole_end = end if stop == offset + length else stop // cluster_size
        if extent.status == "zero" and hole_end > self.cluster:
            self._put(self.cluster, hole_end, None, hole_state, cluster_size)
            return
        piece_end = min(end, self.cluster + max(1, PIECE_BYTES // cluster_size))
        # What is partly a hole, or can't be read, by itself.
        piece_end = min(piece_end, -(-stop // cluster_size)) if extent.status == "data" else self.cluster + 1
        offset, length = byte_range(self.cluster, piece_end, cluster_size, size_bytes)
        data = self._buffer[:length]
        self._reader.pread_into(data, offset)
        zeroes = [
            _core.is_zero(data, start, min(cluster_size, length - start)) for start in range(0, length, cluster_size)
        ]
        # The first clusters that are alike.
        count = zeroes.index(not zeroes[0]) if (not zeroes[0]) in zeroes else len(zeroes)
        found = None if zeroes[0] else data[: count * cluster_size]
        self._put(self.cluster, self.cluster + count, found, ZERO if zeroes[0] else copied_state, cluster_size)

    def _put(self, first: int, end: int, data: memoryview | None, state: int, cluster_size: int) -> None:
        """Write clusters; None: zeroes, which a fresh target has already."""
        offset, length = byte_range(first, end, cluster_size, self._reader.size_bytes)
        if data is not None:
            self.writing = True
            self._before_write()
            write_fully(self._target_fd, data, offset)
            if self._manifest_fd >= 0:
                pieces = [data[start : start + cluster_size] for start in range(0, length, cluster_size)]
                # After the data: a word that is there is right for what the target holds.
                put_words(self._manifest_fd, first, array.array("Q", map(checksum, pieces)))
            self.copied.written_bytes += length
        self.copied.add(first, end, state)
        self.cluster = end
