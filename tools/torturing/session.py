"""One coordinator process from its start to its end: a role for each of its images, and group cuts over all of them.

What is cut together is told to each image's log of events, with the group's name: all before the first of them is cut,
and all after the last of them is.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import Any

from shmcbw.errors import CutAbandonedError
from shmcbw.workers.groups import Backup, Request, Scratch, take_group
from tools.torturing.coordinator import JOBS_MAX, SNAPSHOTS_MAX, Role
from tools.torturing.place import A_GROUP, A_RESIZE, FINISH, GROUPING, IDLE, NOTHING
from tools.torturing.reader import COPIES_MAX

GROUP_CHANCE = 0.25
#: Between the cuts of a group that is none: sabotage.
APART_S = 0.05


class Session:
    """One incarnation, of one or more roles."""

    def __init__(self, roles: Sequence[Role]) -> None:
        self.roles = roles
        first = roles[0]
        self.chance = random.Random(f"{first.plan.seed} session {first.incarnation}")
        self.parent = os.getppid()
        self.groups = 0

    def run(self) -> None:
        for role in self.roles:
            role.open()
        for role in self.roles:
            role.begin_reading()
        while not any(role.orders.value for role in self.roles) and os.getppid() == self.parent:
            for role in self.roles:
                role.turn()
            self._turn()
            time.sleep(self.chance.random() ** 2 * 0.060)
        finish = any(role.orders.value == FINISH for role in self.roles)
        for role in self.roles:
            role.end(finish=finish)

    def _turn(self) -> None:
        """What is asked for, and a group now and then."""
        asked = False
        for role in self.roles:
            wish, role.wish.value = role.wish.value, NOTHING
            if wish == A_RESIZE:
                with role.told():
                    role.resize()
            asked |= wish == A_GROUP
        if len(self.roles) > 1 and (asked or self.chance.random() < GROUP_CHANCE):
            with self.roles[0].told():
                self._take_group()

    def _take_group(self) -> None:
        members = []
        for role in self.roles:
            kinds = ["backup"] * (len(role.running) <= JOBS_MAX and role.copies < COPIES_MAX)
            kinds += ["snapshot"] * (len(role.snapshots) <= SNAPSHOTS_MAX)
            if not kinds:
                return
            kind = self.chance.choice(kinds)
            members.append((role, role.new_name(kind), kind))
        self.groups += 1
        group = f"{self.roles[0].incarnation}-{self.groups}"
        requests = [self._request(role, name, kind, group) for role, name, kind in members]
        for role in self.roles:
            role.stage.value = GROUPING
        try:
            for (role, name, _), taken in zip(members, self._take(requests), strict=True):
                role.took(name, taken)
        except CutAbandonedError as error:
            for role, name, _ in members:
                role.events.write("abandoned", name=name, error=str(error))
        except Exception as error:
            for role, name, _ in members:
                role.events.write("untaken", name=name, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            for role in self.roles:
                role.stage.value = IDLE

    def _request(self, role: Role, name: str, kind: str, group: str) -> Request:
        asked = role.choose(kind, name, group)
        coordinator, path = role.coordinator, role.place.targets / name
        policy, timeout_s = asked["policy"], role.plan.cbw_timeout_s
        if kind == "snapshot":
            return Scratch(coordinator, path, on_cbw_error=policy, cbw_timeout=timeout_s)
        return Backup(
            coordinator, path, sync=asked["sync"], speed=asked["speed"], on_cbw_error=policy, cbw_timeout=timeout_s
        )

    def _take(self, requests: Sequence[Request]) -> Sequence[Any]:
        if "apart" not in self.roles[0].plan.sabotage:
            return take_group(requests)
        found: list[Any] = []
        for request in requests:
            found += take_group([request])
            time.sleep(APART_S)
        return found
