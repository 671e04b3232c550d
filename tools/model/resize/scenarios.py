"""The worlds of a resize that are searched, each to its end."""

from __future__ import annotations

from typing import Final

from tools.model.resize.state import ResizeScenario

RESIZE_SCENARIOS: Final = (
    ResizeScenario("undisturbed", kills=0, resizes=1),
    ResizeScenario("resize", kills=1, resizes=2),
)
"""
undisturbed  one resize, nobody dies
resize       the coordinator may be killed; the resize is tried again
"""

RESIZE_LARGER: Final = (ResizeScenario("resized-again", kills=2, resizes=2),)
"""One that adopts may be killed, too."""


def resize_scenario(name: str) -> ResizeScenario:
    return next(scenario for scenario in RESIZE_SCENARIOS if scenario.name == name)
