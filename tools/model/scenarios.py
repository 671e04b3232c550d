"""The worlds that are searched, each to its end."""

from __future__ import annotations

from typing import Final

from tools.model.state import Scenario

ONE: Final = ((0,),)
"""A writer's program: one write, to cluster 0."""

SCENARIOS: Final = (
    Scenario("full", writers=(ONE, ONE)),
    Scenario("again", writers=(((0,), (0,), (0,)),), kills=0),
    Scenario("wide", writers=(((0, 1),), ((1,),)), clusters=2, cuts=1, unchanged=False),
    Scenario("kills", writers=(ONE, ONE), cuts=1, kills=3, reader=False),
    Scenario("pool", writers=(ONE,), workers=2, clusters=2, cuts=1, unchanged=False),
    Scenario("attach", writers=(ONE, ONE), unchanged=False, attach=True),
    Scenario("drop", writers=(ONE,), drop=True, unchanged=False),
    Scenario("backup", writers=(ONE, ONE), cuts=1, kills=2, finish=True, unchanged=False),
)
"""What is searched, each to its end; the unmutated protocol holds in all of them.

full    2 writers, 1 worker, 1 reader, 2 cuts, 1 kill in one world, each write plain or unchanged
again   one writer that comes back to a cluster it has written before
wide    a write over two clusters beside one to the second
kills   three kills, also of a process's successor: coordinator and worker dead at once
pool    two workers and two clusters
attach  a dead writer's slot gets a new owner
drop    snapshot 1 is dropped while it is in use
backup  the snapshot is a backup, whose target gets its name; two kills, one of an adopter, say
"""

LARGER: Final = (
    Scenario("crowd", writers=(ONE, ONE, ONE), cuts=1, unchanged=False, reader=False),
    Scenario("storm", writers=(ONE, ONE), kills=3, unchanged=False),
    Scenario("backups", writers=(ONE, ONE), kills=1, finish=True, unchanged=False),
)
"""
crowd   three writers
storm   three kills, two cuts and a reader
backups two backups at once
"""


def scenario(name: str) -> Scenario:
    return next(scenario for scenario in SCENARIOS if scenario.name == name)
