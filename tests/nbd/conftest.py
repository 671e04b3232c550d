"""The image of an NBD test, and who serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmcbw.workers import Coordinator


@pytest.fixture
def image(request: pytest.FixtureRequest, make_image: Callable[..., Path]) -> Path:
    """As large as the module's ``SIZE``, in bytes."""
    size: int = request.module.SIZE
    return make_image(size)


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=2) as coordinator:
        yield coordinator
