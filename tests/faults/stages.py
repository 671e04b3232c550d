"""Stages by scenario: each has its layer, and rounds of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.chain import Chain
from tests.faults.layer import Layer
from tests.faults.round import Round, Stage

KINDS: dict[str, type[Round]] = {"plain": Round, "adopting": Round, "dying": Round, "chain": Chain}


@contextmanager
def staged(directory: Path, scenario: str) -> Iterator[Stage]:
    """A stage whose processes and layer are gone afterwards."""
    layer = Layer(directory)
    stage = Stage(directory, layer, scenario, KINDS[scenario])
    try:
        yield stage
    finally:
        stage.end()
        layer.close()
