"""transaction: several actions, all of them or none, with one cut for all images.

    1  prepare     each action is checked, in order, as if those before it had been done; nothing has changed
    2  early       actions on a bitmap that a backup of the transaction uses: done before the cut, kept to be undone
    3  cut         one for all backups and for all images whose bitmaps are to record from now on
    4  late        all other actions on bitmaps, as of the cut

So a bitmap that is added or cleared beside a backup begins exactly at that backup's cut.  If 3 fails, 2 is undone in
reverse; if 4 fails (/dev/shm is full), the jobs are cancelled, the rest of 4 and 2 are undone.  A kill between 3 and 4
leaves the bitmaps as they were: they hold more than they must.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from shmcbw.errors import BitmapError

from ..bitmaps import BitmapAction
from ..completion import JobTransaction
from ..coordinator import Coordinator
from ..nodes import Node
from . import bitmap_commands
from .backup_commands import Plan, check_no_bitmap, check_source, plan_backup, start
from .desk import Arguments, Desk, Handler
from .schema import QMPError


class Prepared:
    """The actions of a transaction, as far as they are checked."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.bitmap_actions: dict[Coordinator, list[BitmapAction]] = {}

    def add_bitmap_action(self, coordinator: Coordinator, action: BitmapAction) -> None:
        # As in QEMU, the name of a bitmap that the transaction removes is free afterwards, not before.
        if action.verb == "add" and action.name in coordinator.bitmaps:
            raise BitmapError(f"Bitmap already exists: {action.name}")
        actions = [*self.bitmap_actions.get(coordinator, []), action]
        coordinator.bitmaps.check(actions)
        self.bitmap_actions[coordinator] = actions

    def add_backup(self, desk: Desk, options: Arguments, group: JobTransaction | None) -> None:
        source, coordinator = _source(desk, options)
        coordinator.bitmaps.check_job(
            options["sync"],
            options.get("bitmap"),
            options.get("bitmap-mode"),
            after=self.bitmap_actions.get(coordinator, ()),
        )
        check_no_bitmap(source, options)
        self.plans.append(plan_backup(desk, options, transaction=group, planned=tuple(self.plans)))

    def early(self) -> dict[Coordinator, list[BitmapAction]]:
        """All actions on images where one of them touches a bitmap that a backup uses."""
        used = {(plan.served.coordinator, plan.backup.bitmap) for plan in self.plans if plan.backup.bitmap is not None}
        return {
            coordinator: actions
            for coordinator, actions in self.bitmap_actions.items()
            if any((coordinator, action.name) in used for action in actions)
        }


def _source(desk: Desk, options: Arguments) -> tuple[Node, Coordinator]:
    source, _ = desk.graph.find(options["device"]), desk.graph.find(options["target"])
    check_source(source)
    return source, desk.graph.image(source).coordinator


def _prepare(desk: Desk, arguments: Arguments) -> Prepared:
    prepared = Prepared()
    grouped = arguments.get("properties", {}).get("completion-mode", "individual") == "grouped"
    group = JobTransaction() if grouped else None
    for action in arguments["actions"]:
        if action["type"] == "abort":
            raise QMPError("Transaction aborted using Abort action")
        if action["type"] == "blockdev-backup":
            prepared.add_backup(desk, action["data"], group)
        else:
            served, change = bitmap_commands.action_of(desk, action["type"], action["data"])
            prepared.add_bitmap_action(served.coordinator, change)
    return prepared


def _transaction(desk: Desk, arguments: Arguments) -> dict[str, Any]:
    prepared = _prepare(desk, arguments)
    early = prepared.early()
    late = {owner: actions for owner, actions in prepared.bitmap_actions.items() if owner not in early}
    with ExitStack() as undo:
        for owner, actions in early.items():
            undo.callback(owner.bitmaps.undo, owner.bitmaps.before(actions))
            owner.bitmaps.run(actions)
        if prepared.plans or len(late) > 1:
            start(desk, prepared.plans, also=list(late))
        for plan in prepared.plans:
            undo.callback(_cancel, desk, plan.job_id)
        for owner, actions in late.items():
            undo.callback(owner.bitmaps.undo, owner.bitmaps.before(actions))
            at = owner.bitmaps.last_boundary if prepared.plans or len(late) > 1 else None
            owner.bitmaps.run(actions, at=at)
        undo.pop_all()
    return {}


def _cancel(desk: Desk, job_id: str) -> None:
    for _, job in desk.jobs():
        if job.id == job_id:
            job.cancel()


HANDLERS: dict[str, Handler] = {"transaction": _transaction}
