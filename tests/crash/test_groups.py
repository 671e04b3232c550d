"""The coordinator of a group dies, or sleeps, at each step of its cut: all snapshots of the group count, or none does.

Whoever adopts the images afterwards, in whatever order: what was published and not committed is dropped, what was
committed goes on and is one instant.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import shmcbw
from shmcbw.invariants import check
from shmcbw.status import describe_segment
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import running, write_forever, write_pairs_across_forever

SIZE = 1 << 20
OFFSETS = (0, 500_000)

#: Whether the group was committed when its coordinator died.
STEPS = {
    "coordinator.prepared": False,
    "coordinator.odd": False,
    "coordinator.group_closed_one": False,
    "coordinator.quiet": False,
    "coordinator.group_published_one": False,
    "coordinator.group_published": False,
    "coordinator.group_committed": True,
    "coordinator.group_told_one": True,
    "coordinator.group_opened_one": True,
    "coordinator.even": True,
}


class World:
    """Two images, and processes that write pairs: first to the one, then to the other."""

    def __init__(self, images: list[Path], targets: list[Path]) -> None:
        self.images = images
        self.targets = targets
        self.disks: list[shmcbw.Disk] = []

    def all_write(self) -> None:
        """Writers are not held up beyond the cut's limit (2 s), whatever became of it."""
        for disk in self.disks:
            disk.pwrite(b"x", SIZE - 1)
            assert disk.statistics()["wait_max_ns"] < 10e9


@pytest.fixture
def world(make_image: Callable[..., Path], tmp_path: Path) -> Iterator[World]:
    images = [make_image(SIZE, "data.img"), make_image(SIZE, "log.img")]
    for image in images:
        with image.open("r+b") as file:
            for offset in OFFSETS:
                file.seek(offset)
                file.write(bytes(8))
    yield World(images, [tmp_path / "data.bak", tmp_path / "log.bak"])
    # The coordinator closed before the writers were killed: the next one takes away what they left.
    for image in images:
        Coordinator(image, workers=1).close()


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def interrupted(world: World, stack: ExitStack, point: str, action: str) -> Owner:
    """A coordinator of both images that comes to ``point`` in the middle of a group cut, while writers write."""
    owner = Owner(*world.images, SHMCBW_FAILPOINTS=f"{point}={action}")
    stack.callback(owner.end)
    assert owner.answer() == {"ok": []}
    world.disks = [stack.enter_context(shmcbw.open(image)) for image in world.images]
    writers = [
        stack.enter_context(running(write_pairs_across_forever, *map(str, world.images), offset)) for offset in OFFSETS
    ]
    counters = [disk.pread for disk in world.disks]
    wait_for(lambda: all(any(pread(8, offset)) for pread in counters for offset in OFFSETS), "the writers write", 20)
    owner.send(do="group", targets=[str(target) for target in world.targets])
    assert len(writers) == len(OFFSETS)
    return owner


def is_one_instant(backups: list[Path]) -> bool:
    first, second = (backup.read_bytes() for backup in backups)
    for offset in OFFSETS:
        one, other = (int.from_bytes(data[offset : offset + 8], "little") for data in (first, second))
        if one not in (other, other + 1):
            return False
    return True


def finish(image: Path, killed_at: str | None = None) -> list[str]:
    """Adopt one image, bring its jobs to their end, and close: the targets."""
    if killed_at is not None:
        owner = Owner(image, SHMCBW_FAILPOINTS=f"{killed_at}=kill")
        try:
            assert owner.answer() is None
        finally:
            owner.end()
    with Coordinator(image, workers=1) as coordinator:
        targets = [job.target for job in coordinator.jobs]
        for job in coordinator.jobs:
            job.wait(30)
        assert coordinator.status()["snapshots"] == []
        # Its entry is used again: nothing there tells of the group any more.
        coordinator.snapshot(image.with_suffix(".scratch")).close()
        assert check(coordinator.segment) == []
    return targets


#: In which order the images are adopted matters only after something was published: the leader first, or last.
ORDERS = [
    (point, order)
    for point in STEPS
    for order in ((0, 1), (1, 0))
    if order == (0, 1) or "published" in point or "committed" in point
]


@pytest.mark.parametrize(("point", "order"), ORDERS)
def test_a_coordinator_killed_in_a_group_cut_leaves_all_of_it_or_nothing(
    world: World, point: str, order: tuple[int, int]
) -> None:
    """Each image is adopted, and its backup finished and forgotten, before the other is."""
    with ExitStack() as stack:
        owner = interrupted(world, stack, point, "kill")
        assert owner.answer() is None
        world.all_write()
        adopted = [finish(world.images[number], None) for number in order]
        expected = [[str(world.targets[number])] for number in order] if STEPS[point] else [[], []]
        assert adopted == expected
        world.all_write()
    assert [target.exists() for target in world.targets] == [STEPS[point]] * 2
    if STEPS[point]:
        assert is_one_instant(world.targets)
    left = {path.name for path in world.targets[0].parent.iterdir()}
    assert left <= {"data.img", "log.img", "data.bak", "log.bak"}


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("point", ["adopt.locked", "adopt.groups", "adopt.entry"])
def test_an_adopter_killed_over_it_changes_nothing_about_the_group(world: World, point: str, committed: bool) -> None:
    step = "coordinator.group_committed" if committed else "coordinator.group_published"
    with ExitStack() as stack:
        assert interrupted(world, stack, step, "kill").answer() is None
        adopted = [finish(image, killed_at=point) for image in world.images]
    assert adopted == ([[str(target)] for target in world.targets] if committed else [[], []])
    assert not committed or is_one_instant(world.targets)


@pytest.mark.parametrize("committed", [False, True])
def test_one_coordinator_adopts_the_whole_group(world: World, committed: bool) -> None:
    step = "coordinator.group_committed" if committed else "coordinator.group_published"
    with ExitStack() as stack:
        assert interrupted(world, stack, step, "kill").answer() is None
        owner = Owner(*world.images)
        stack.callback(owner.end)
        expected = [str(target) for target in world.targets] if committed else []
        assert owner.answer() == {"ok": expected}
        assert owner.ask(do="wait") == owner.ask(do="close") == {"ok": None}
    assert not committed or is_one_instant(world.targets)


def test_coordinators_killed_at_any_moment_of_group_cuts_leave_all_or_nothing(world: World) -> None:
    """Not at failpoints but at random, one coordinator after the other, while the same writers go on."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with ExitStack() as stack:
        first = Owner(*world.images)
        stack.callback(first.end)
        assert first.answer() == {"ok": []}
        for offset in OFFSETS:
            stack.enter_context(running(write_pairs_across_forever, *map(str, world.images), offset))
        disks = [stack.enter_context(shmcbw.open(image)) for image in world.images]
        wait_for(
            lambda: all(any(disk.pread(8, offset)) for disk in disks for offset in OFFSETS), "the writers write", 20
        )
        for turn in range(4):
            targets = [target.with_name(f"{turn}.{target.name}") for target in world.targets]
            first.send(do="group", targets=[str(target) for target in targets])
            # Not to wait for anything: the moment is to be anywhere in preparation, cut and copying.
            time.sleep(rng.uniform(0, 0.03))
            first.end()
            first = Owner(*world.images)
            stack.callback(first.end)
            answer = (first.answer() or {})["ok"]
            assert first.ask(do="wait") == {"ok": None}
            there = [target.exists() for target in targets]
            assert there[0] == there[1], f"turn {turn}: adopted {answer}"
            assert not there[0] or is_one_instant(targets)
            assert not [path for path in targets[0].parent.iterdir() if "partial" in path.name]
        assert first.ask(do="close") == {"ok": None}


@pytest.mark.parametrize(
    ("point", "taken"),
    [
        ("coordinator.group_closed_one", False),
        ("coordinator.group_published_one", False),
        ("coordinator.group_published", True),
        ("coordinator.group_opened_one", True),
    ],
)
def test_a_coordinator_that_sleeps_over_its_limit_hears_what_became_of_the_cut(
    world: World, point: str, taken: bool
) -> None:
    """The writers end the drained sections by themselves; what was published before that stands only if all was."""
    with ExitStack() as stack:
        owner = interrupted(world, stack, point, "stop")
        wait_for(lambda: stopped(owner.pid), "stopped")
        world.all_write()
        os.kill(owner.pid, signal.SIGCONT)
        answer = owner.answer() or {}
        assert ("ok" in answer) is taken, answer
        assert taken or answer["error"] == "CutAbandonedError"
        assert owner.ask(do="wait") == {"ok": None}
        world.all_write()
        assert owner.ask(do="close") == {"ok": None}
    assert [target.exists() for target in world.targets] == [taken] * 2
    assert not taken or is_one_instant(world.targets)
    left = {path.name for path in world.targets[0].parent.iterdir()}
    assert left <= {"data.img", "log.img", "data.bak", "log.bak"}


def test_what_was_published_of_a_failed_group_is_broken_before_its_image_opens(world: World) -> None:
    """Nobody writes to the first image, so nobody opens it; the second one's writers give the cut up at its limit."""
    with ExitStack() as stack:
        owner = Owner(*world.images, SHMCBW_FAILPOINTS="coordinator.group_published_one=delay:2500,break.state=stop")
        stack.callback(owner.end)
        assert owner.answer() == {"ok": []}
        disks = [stack.enter_context(shmcbw.open(image)) for image in world.images]
        stack.enter_context(running(write_forever, str(world.images[1]), 1))
        owner.send(do="group", targets=[str(target) for target in world.targets])
        wait_for(lambda: stopped(owner.pid), "the first snapshot is broken", 20)
        first, second = (describe_segment(disk._attached()) for disk in disks)
        assert (first["snapshots"][0]["state"], first["epoch"] % 2) == ("broken", 1)
        assert first["snapshots"][0]["broken"]["errno"] == errno.ECANCELED
        assert (second["snapshots"][0]["state"], second["epoch"] % 2) == ("abandoned", 0)
        os.kill(owner.pid, signal.SIGCONT)
        assert (owner.answer() or {})["error"] == "CutAbandonedError"
        for disk in disks:
            disk.pwrite(b"x", 0)
        assert owner.ask(do="close") == {"ok": None}
    assert not list(world.targets[0].parent.glob("*.bak*"))
