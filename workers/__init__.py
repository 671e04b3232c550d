"""What runs: copy worker, pool, coordinator.  Imports `shmcbw`, never the reverse."""

from .coordinator import Coordinator, CoordinatorSnapshot
from .jobs import Job, Progress

__all__ = ["Coordinator", "CoordinatorSnapshot", "Job", "Progress"]
