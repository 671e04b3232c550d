"""shmcbw: a point-in-time backup of a disk image while many processes keep writing to it.

A writer process opens the image through the filter::

    import shmcbw
    with shmcbw.open("disk.img") as disk:
        disk.pwrite(b"...", 4096)

and a coordinator (`shmcbw.workers.Coordinator`, or the ``shmcbw`` command) takes backups meanwhile.

This package is the library: state in shared memory and the rules on it.  It starts no process and handles no signal
but SIGBUS (``_core/guard.c``); what runs is in `shmcbw.workers`.
"""

from .errors import (
    BitmapError,
    ChainError,
    ClosedError,
    CopyFailedError,
    CopyTimeoutError,
    CutAbandonedError,
    ForeignSegmentError,
    ImageInUseError,
    JobCancelledError,
    JobFailedError,
    JobStateError,
    LayoutVersionError,
    ManifestError,
    NoCoordinatorError,
    NoFreeSlotError,
    NoSnapshotError,
    OutOfRangeError,
    ReadOnlyImageError,
    ResizeRefusedError,
    SegmentDamagedError,
    ShmcbwError,
    SnapshotBrokenError,
    SnapshotInaccessibleError,
    TargetRefusedError,
    VerificationError,
)
from .filter import Disk, open
from .reader import Extent, SnapshotReader, open_snapshot

__version__ = "0.1.0"

__all__ = [
    "BitmapError",
    "ChainError",
    "ClosedError",
    "CopyFailedError",
    "CopyTimeoutError",
    "CutAbandonedError",
    "Disk",
    "Extent",
    "ForeignSegmentError",
    "ImageInUseError",
    "JobCancelledError",
    "JobFailedError",
    "JobStateError",
    "LayoutVersionError",
    "ManifestError",
    "NoCoordinatorError",
    "NoFreeSlotError",
    "NoSnapshotError",
    "OutOfRangeError",
    "ReadOnlyImageError",
    "ResizeRefusedError",
    "SegmentDamagedError",
    "ShmcbwError",
    "SnapshotBrokenError",
    "SnapshotInaccessibleError",
    "SnapshotReader",
    "TargetRefusedError",
    "VerificationError",
    "__version__",
    "open",
    "open_snapshot",
]
