"""What runs: copy worker, pool, coordinator.  Imports `shmcbw`, never the reverse."""

from .completion import JobTransaction
from .coordinator import Coordinator, CoordinatorSnapshot
from .groups import Backup, Scratch, backup_group, snapshot_group, take_group
from .jobs import Job, Progress

__all__ = [
    "Backup",
    "Coordinator",
    "CoordinatorSnapshot",
    "Job",
    "JobTransaction",
    "Progress",
    "Scratch",
    "backup_group",
    "snapshot_group",
    "take_group",
]
