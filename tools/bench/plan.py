"""What a run was asked for."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.place import Place, find_places

FAST_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """``quick``: fewer rounds of less.  ``directory``: on disk, for what is measured there."""

    quick: bool
    directory: Path
    started_s: float = field(default_factory=time.monotonic)

    @property
    def places(self) -> list[Place]:
        return find_places(self.directory)

    @property
    def fast_place(self) -> Place:
        """For what is about memory only: tmpfs where there is one with room."""
        places = self.places
        return places[-1] if places[-1].free_bytes >= FAST_BYTES else places[0]

    def say(self, what: str) -> None:
        """Progress, to stderr."""
        print(f"{time.monotonic() - self.started_s:6.1f} s  {what}", file=sys.stderr, flush=True)
