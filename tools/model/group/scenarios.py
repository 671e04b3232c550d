"""The worlds of two images that are searched, each to its end."""

from __future__ import annotations

from typing import Final

from tools.model.group.state import GroupScenario

GROUP_SCENARIOS: Final = (
    GroupScenario("pairs", writers=((0, 1), (1, 0)), kills=1),
    GroupScenario("adopters", writers=((0, 1),), kills=3),
)
"""
pairs     two writers, one writes to image 0 first and one to image 1; the coordinator may be killed
adopters  one writer; the coordinator and two adopters may be killed, also the same image's twice
"""

GROUP_LARGER: Final = (
    GroupScenario("chains", writers=((0, 1, 0, 1), (1, 0)), kills=2),
    GroupScenario("three", writers=((0, 1), (0, 1), (1, 0)), kills=1),
)
"""
chains  one writer writes two pairs; the coordinator and an adopter may be killed
three   three writers
"""


def group_scenario(name: str) -> GroupScenario:
    return next(scenario for scenario in GROUP_SCENARIOS if scenario.name == name)
