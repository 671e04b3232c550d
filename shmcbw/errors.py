"""The errors of shmcbw, split by what the caller has to do.

Each class carries the exit status of the command line tool.  What the operating system refused stays an ``OSError``
with its errno; what the caller asked wrongly is a ``ValueError``.
"""

from __future__ import annotations

import errno
import os

__all__ = [
    "BitmapError",
    "ChainError",
    "ClosedError",
    "CoordinatorRunningError",
    "CopyFailedError",
    "CopyTimeoutError",
    "CutAbandonedError",
    "EpochsExhaustedError",
    "ForeignSegmentError",
    "ImageError",
    "ImageInUseError",
    "JobCancelledError",
    "JobFailedError",
    "JobStateError",
    "LayoutVersionError",
    "ManifestError",
    "NoCoordinatorError",
    "NoFreeSlotError",
    "NoFreeSnapshotError",
    "NoSnapshotError",
    "OutOfRangeError",
    "PoolError",
    "QuiesceError",
    "ReadOnlyImageError",
    "ResizeRefusedError",
    "SegmentDamagedError",
    "ShmcbwError",
    "SnapshotBrokenError",
    "SnapshotInaccessibleError",
    "TargetRefusedError",
    "VerificationError",
]


class ShmcbwError(Exception):
    """Base of all errors raised by shmcbw on its own account."""

    exit_status = 1


class naming:
    """An OSError that leaves the block says what was attempted on which file; its errno, and so its class, stays.

    The system names a path only where it was given one, which is seldom what the caller knows about.  An error that
    has the path in it, or is one of ours, is left as it is.
    """

    __slots__ = ("_action", "_path")

    def __init__(self, path: str, action: str) -> None:
        self._path = path
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, ShmcbwError) or self._path in str(error):
            return
        where = f" ({error.filename})" if error.filename is not None else ""
        message = f"{self._path}: {self._action}: {error.strerror or error}{where}"
        raise OSError(error.errno, message) if error.errno else type(error)(message) from error


class OutOfRangeError(ShmcbwError, ValueError):
    """An offset or a length lies outside the image; nothing was changed."""


class ClosedError(ShmcbwError, ValueError):
    """The handle is closed."""


class NoCoordinatorError(ShmcbwError, ConnectionError):
    """No running coordinator serves the image: start one (``shmcbw backup`` or a ``Coordinator``) and try again."""

    exit_status = 3


class CoordinatorRunningError(ShmcbwError, BlockingIOError):
    """Another coordinator serves the image."""

    exit_status = 3


class ForeignSegmentError(ShmcbwError, PermissionError):
    """The shared memory under the image's name belongs to somebody who may not own it, or is not ours."""

    exit_status = 3


class LayoutVersionError(ShmcbwError):
    """The shared memory was made by another version of shmcbw: end its processes, or use that version."""

    exit_status = 3


class SegmentDamagedError(ShmcbwError, OSError):
    """Somebody has overwritten shared memory that others rely on (EUCLEAN): what depended on it does not count."""

    exit_status = 5


class ImageError(ShmcbwError, OSError):
    """The image can't be served: wrong kind of file, empty, or changed in size."""


class ImageInUseError(ShmcbwError, BlockingIOError):
    """Another process, a QEMU most likely, has the image open in a way that goes not together with ours."""

    exit_status = 3


class ReadOnlyImageError(ShmcbwError, PermissionError):
    """The image or the handle can't be written."""


class ResizeRefusedError(ShmcbwError):
    """The image can't be resized now, or not to that size; nothing was changed."""


class NoFreeSlotError(ShmcbwError):
    """All slots of the image are taken: the coordinator needs a larger ``slots=``."""


class NoFreeSnapshotError(ShmcbwError):
    """All snapshots of the image are taken: close one."""


class NoSnapshotError(ShmcbwError, LookupError):
    """The image has no snapshot of that number or name, or more than one where none was named."""

    exit_status = 3


class EpochsExhaustedError(ShmcbwError):
    """The image has had 2^31 cuts: close all writers and the coordinator, and start again."""


class PoolError(ShmcbwError):
    """The copy workers could not be started."""


class TargetRefusedError(ShmcbwError, OSError):
    """The target can't take the backup; nothing was changed."""

    exit_status = 4


class SnapshotBrokenError(ShmcbwError, OSError):
    """The snapshot can't be right any more: errno, cluster and time of the first failure.

    ``cluster`` is a cluster index, ``time_ns`` the wall clock in nanoseconds (0 where its writer died meanwhile).
    """

    exit_status = 5

    def __init__(self, number: int, cluster: int, time_ns: int) -> None:
        super().__init__(
            number, f"the snapshot is broken: {os.strerror(number)} at cluster {cluster}, nothing read from it counts"
        )
        self.cluster = cluster
        self.time_ns = time_ns

    def __reduce__(self) -> tuple[type[SnapshotBrokenError], tuple[int, int, int]]:
        return (type(self), (self.errno or errno.EIO, self.cluster, self.time_ns))


class SnapshotInaccessibleError(ShmcbwError, PermissionError):
    """The range is not part of the snapshot, or was discarded from it."""


class CopyFailedError(ShmcbwError, OSError):
    """Policy break-guest-write: the old content could not be copied, the write has not happened."""


class CopyTimeoutError(ShmcbwError, TimeoutError):
    """Policy break-guest-write: the copy took longer than cbw_timeout, the write has not happened."""


class CutAbandonedError(ShmcbwError):
    """The drained section reached its limit; no cut was taken and nothing has changed.

    ``pids`` are the processes that were in the middle of a write.
    """

    exit_status = 7

    def __init__(self, message: str, pids: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.pids = pids


class BitmapError(ShmcbwError, ValueError):
    """A dirty bitmap is not there, in use, can't be trusted, or was asked for what makes no sense; nothing changed.

    The texts are QEMU's where QEMU has one.
    """

    exit_status = 8


class QuiesceError(ShmcbwError):
    """The application could not be brought to rest for a cut; none was taken and nothing has changed."""

    exit_status = 7


class ManifestError(ShmcbwError):
    """A backup has no manifest, or one that is damaged or not its own: nothing can be said of the backup."""

    exit_status = 9


class ChainError(ShmcbwError):
    """Increments do not follow each other, or their base: they can't be restored together."""

    exit_status = 10


class VerificationError(ShmcbwError):
    """A backup is not what was written: clusters differ from their checksums.

    ``extents`` are the (offset, length) of what differs, in bytes.
    """

    exit_status = 11

    def __init__(self, message: str, extents: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.extents = extents


class JobFailedError(ShmcbwError, OSError):
    """A background copy failed, or the target could not be finished, and the job with it.

    The target was removed; or it has its name already, and the message says what is not sure about it.
    """

    exit_status = 5


class JobCancelledError(ShmcbwError):
    """The job was cancelled; the target was removed."""

    exit_status = 6


class JobStateError(ShmcbwError):
    """The job can't do that in the state that it is in; nothing has changed."""
