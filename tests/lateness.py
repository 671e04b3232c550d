"""How long something took, without the time for which this process was not given a CPU.

A thread asks to be woken every few milliseconds and adds up by how much it is late.  What is left of a duration is what
the code took and waited for by itself, so a limit on it can be asserted on a machine that is busy with others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STEP_S = 0.005


class Lateness:
    """Runs while its with block does."""

    def __init__(self) -> None:
        self._late_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(STEP_S):
            now = time.monotonic()
            # Waking takes its time on a quiet machine too.
            self._late_s += max(0.0, now - before - 2 * STEP_S)
            before = now

    def measure(self, condition: Callable[[], object], what: str, patience_s: float = 30.0) -> float:
        """Wait for a condition: the seconds that it took but for our own lateness."""
        late, started = self._late_s, time.monotonic()
        while not condition():
            assert time.monotonic() - started < patience_s, f"{what}: not within {patience_s} s"
            time.sleep(0.002)
        return time.monotonic() - started - (self._late_s - late)

    def __enter__(self) -> Lateness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
