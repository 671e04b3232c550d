"""Who coordinates: one process for each image, or one for all images of a round, so that it can cut them together."""

from __future__ import annotations

from collections.abc import Sequence

from tools.torturing.crew import Crew
from tools.torturing.nursery import Nursery
from tools.torturing.place import GO_ON, NOTHING, STARTING
from tools.torturing.plan import COORDINATOR


class Chair:
    """The coordinator process of one crew or of several, kept alive by the driver.

    It is started for the first crew, whose plan names the others, and is a child of each.
    """

    def __init__(self, crews: Sequence[Crew], nursery: Nursery) -> None:
        self._crews = crews
        self._nursery = nursery
        self._incarnations = 0

    def start(self) -> None:
        for crew in self._crews:
            crew.orders.value = GO_ON
            crew.wish.value = NOTHING
            crew.stage.value = STARTING
        child = self._nursery.start(COORDINATOR, self._crews[0].place, 0, self._incarnations)
        self._incarnations += 1
        for crew in self._crews:
            crew.coordinator_started(child)

    def keep_up(self) -> None:
        """Start it again if it died."""
        child = self._crews[0].coordinator
        if child is None or not self._nursery.died(child):
            return
        for crew in self._crews:
            crew.coordinator_died(child)
        if self._crews[0].kept_up:
            self.start()
