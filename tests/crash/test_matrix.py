"""The fault matrix: whoever reaches a failpoint is killed or stopped there, in every scenario in which it is reached.

Then: the invariants hold, all live writers make progress, what was begun ends right or is broken as the policy says, a
restart needs no manual step, and nothing is left over.  `scenarios.REACHED` is the matrix; all of it is `make matrix`,
and `make test` plays a part, another one each time unless `SHMCBW_SEED` says which.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmcbw.failpoints import POINTS
from tests.conftest import SEED, leaving_nothing_behind, wait_for
from tests.crash import wave
from tests.crash.scenarios import (
    BY_CHANCE,
    KILL,
    REACHED,
    SCENARIOS,
    STOP,
    Trial,
    digest,
    judge_reader,
)
from tests.crash.world import COORDINATOR, PATIENCE_S, SIZE, STOP_S, WORKER, WRITER, World

PART = 40

ROUNDS = [
    (scenario, point, action)
    for scenario, points in REACHED.items()
    for point in points
    for action in (KILL, STOP)
    # What the scenario itself arms can't be armed for us too.
    if point not in SCENARIOS[scenario].beside or not SCENARIOS[scenario].beside[point].startswith("errno")
]
#: At no point but wherever they are: each kind that is there, while the scenario's act goes on.
ANYWHERE = [
    (scenario, kind, action)
    for scenario in ("idle", "first touch", "hot", "cut", "background copy", "finish")
    for kind in (COORDINATOR, WORKER, WRITER)
    for action in (KILL, STOP)
]


def part(rounds: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    if os.environ.get("SHMCBW_MATRIX") == "all":
        return rounds
    return sorted(random.Random(SEED).sample(rounds, count), key=rounds.index)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """The world of the rounds, made when the first round needs it, and again after one that failed."""
    found: dict[str, World] = {}
    with leaving_nothing_behind(tmp_path_factory.getbasetemp()):
        yield found
        for world in found.values():
            try:
                world.close()
            finally:
                world.kill()


def get_world(worlds: dict[str, World], factory: pytest.TempPathFactory) -> World:
    if "world" not in worlds:
        directory = factory.mktemp("matrix")
        image = directory / "disk.img"
        image.write_bytes(random.Random(SEED).randbytes(SIZE))
        worlds["world"] = World(image, directory)
    return worlds["world"]


@pytest.fixture
def lasting_world(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = get_world(worlds, tmp_path_factory)
    world.rounds += 1
    yield world
    if world.failed:
        worlds.pop("world").kill()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_scenario_reaches_the_points_that_its_row_says(lasting_world: World, scenario: str) -> None:
    world = lasting_world
    world.failed = True
    trial = Trial(world, world.rounds, KILL)
    play = SCENARIOS[scenario]
    play.prepare(trial)
    world.record(play.beside)
    play.act(trial)
    play.complete(trial)
    reached = world.reached()
    world.disarm()
    end(trial)
    assert reached - BY_CHANCE[scenario] == set(REACHED[scenario]) - BY_CHANCE[scenario]
    world.failed = False


@pytest.mark.parametrize(("scenario", "point", "action"), part(ROUNDS, PART))
def test_whoever_reaches_a_point_may_die_or_stand_still_there(
    lasting_world: World, scenario: str, point: str, action: str
) -> None:
    print(f"SHMCBW_SEED={SEED}")
    world = lasting_world
    world.failed = True
    play, kind = SCENARIOS[scenario], REACHED[scenario][point]
    trial = Trial(world, world.rounds, action, kind)
    play.prepare(trial)
    for other, specification in play.beside.items():
        world.arm(other, specification)
    world.arm(point, f"{action}*1")
    play.act(trial)

    def spent() -> bool:
        play.nudge(trial)
        return world.is_spent(point)

    wait_for(spent, f"{point} is reached", PATIENCE_S)
    if action == KILL:
        if kind != WORKER:
            wait_for(lambda: kind in world.dead_kinds(), f"a {kind} is dead", PATIENCE_S)
        assert world.dead_kinds() <= {kind}
    else:
        trial.stand_still(kind)
        outlast(world)
    world.disarm()
    end(trial)
    world.failed = False


@pytest.mark.parametrize(("scenario", "kind", "action"), part(ANYWHERE, PART // 8))
def test_anybody_may_die_or_stand_still_anywhere(lasting_world: World, scenario: str, kind: str, action: str) -> None:
    """Where chance has them: idle ones too, which reach no point."""
    world = lasting_world
    world.failed = True
    trial = Trial(world, world.rounds, action, kind)
    play = SCENARIOS[scenario]
    play.prepare(trial)
    play.act(trial)
    time.sleep(random.Random(f"{SEED} {scenario} {kind} {action}").random() * 0.02)
    victims = {COORDINATOR: [world.owner.pid], WORKER: world.serving_workers(), WRITER: [world.writers[0].pid]}[kind]
    if action == KILL:
        world.kill_by_test(victims[0])
        if kind != WORKER:
            process = world.owner.process if kind == COORDINATOR else world.writers[0]
            process.wait(PATIENCE_S)
    else:
        world.stop(victims[:1])
        outlast(world)
    end(trial)
    world.failed = False


def outlast(world: World) -> None:
    """Somebody stands still beyond every limit; all others make progress meanwhile."""
    until = time.monotonic() + STOP_S
    world.let_write()
    wait_for(lambda: time.monotonic() > until, "it stands still beyond every limit")


def end(trial: Trial) -> None:
    """Everybody who died is replaced; everything is brought to its end and judged."""
    world = trial.world
    answer = world.recover()
    assert answer is None or "ok" in answer or answer["error"] in trial.refusals, answer
    judge_reader(trial, world.end_reader())
    world.let_write()
    world.ask(do="speed", speed=0)
    results = world.ask(do="results")
    world.pause()
    if trial.has_job:
        reason = results.get(str(trial.target))
        if trial.target.exists():
            assert reason is None
            assert trial.target.read_bytes() == trial.expected
            trial.target.unlink()
        else:
            assert trial.may_fail, reason
            known = str(trial.target) in results
            assert reason in trial.reasons if known else trial.may_be_forgotten, reason
    if trial.has_snapshot and not trial.discarded:
        content = trial.target.with_name("content")
        world.order(do="read", to=str(content))
        answer = world.hear()
        assert answer is not None
        if "error" in answer:
            assert answer["error"] == "SnapshotBrokenError"
            assert trial.may_fail
        elif trial.expected is not None:
            assert answer["ok"] == [digest(trial.expected)]
        elif answer["ok"]:
            # The cut was taken while writers wrote: their order tells.
            assert wave.is_one_instant(content.read_bytes())
        else:
            assert trial.may_fail, "the cut was given up"
        content.unlink(missing_ok=True)
    world.ask(do="drop")
    after(world, trial.target.with_name(trial.target.name + "-again"))


def after(world: World, target: Path) -> None:
    """Writers write, a backup is right, the invariants hold, nothing is left over."""
    expected = world.image.read_bytes()
    assert wave.is_one_instant(expected)
    for _ in range(10):
        world.order(do="backup", target=str(target), speed=1)
        answer = world.hear()
        assert answer is not None
        if answer.get("error") != "CutAbandonedError":
            break
    world.let_write()
    world.ask(do="speed", speed=0)
    assert world.ask(do="results")[str(target)] is None
    assert target.read_bytes() == expected
    target.unlink()
    world.is_sound()


#: Tests of their own, by the failpoint's protocol or name: a world of one image can't live through them.
ELSEWHERE = {
    "create": "test_failpoints",
    "retire.names": "test_failpoints",
    "group cut": "test_groups",
    "adopt.groups": "test_groups",
    "resize": "test_resize_kill",
    "increment": "test_bitmap_kill",
}


def test_every_failpoint_is_in_the_matrix_or_in_a_test_of_its_own() -> None:
    reached = {point for points in REACHED.values() for point in points}
    elsewhere = {point.name for point in POINTS if ELSEWHERE.keys() & {point.name, point.protocol}}
    assert reached | elsewhere == {point.name for point in POINTS}
    assert len(set(ROUNDS)) == len(ROUNDS)
