"""The protocol holds in every interleaving of the model; without any one of its rules it does not.

Each search is exhaustive for its scenario, without randomness: it passes or fails for ever.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from tools.model.__main__ import main, search_mutation, search_scenario
from tools.model.explorer import Search, longest_run
from tools.model.group.protocol import GROUP_STEPS, GroupProtocol
from tools.model.group.scenarios import GROUP_SCENARIOS, group_scenario
from tools.model.group.state import GroupScenario
from tools.model.mutations import Mutation
from tools.model.protocol import STEPS, Protocol
from tools.model.resize.protocol import RESIZE_STEPS, ResizeProtocol
from tools.model.resize.scenarios import RESIZE_SCENARIOS, resize_scenario
from tools.model.resize.state import ResizeScenario
from tools.model.scenarios import scenario
from tools.model.state import WRITER_SEEN, Scenario
from tools.model.worlds import MUTATIONS, WORLDS, Anyone

SMALL = Scenario("small", writers=(((0,),), ((0,),)), cuts=1)
"""Small enough to be searched without reductions."""


def test_full_scenario_is_two_writers_one_worker_one_reader_two_cuts_one_kill() -> None:
    full = scenario("full")
    assert full.size == "2 writers, 1 worker, 1 reader, 2 cuts, 1 kill, 1 cluster"
    assert full.unchanged


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_protocol_holds(world: Anyone) -> None:
    verdict = search_scenario(world)
    assert (verdict.broken, verdict.what) == ("", "")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_removing_a_rule_breaks_its_promise(mutation: Mutation) -> None:
    verdict = search_mutation(mutation)
    assert verdict.broken == mutation.promise
    assert verdict.steps > 0


def test_reductions_reach_what_stands_for_every_reachable_state() -> None:
    """But for which slots the coordinator has seen: reduced, it sees them at once."""
    reduced, apart = Search(Protocol, SMALL), Search(Protocol, SMALL, reduced=False)
    apart.protocol.every_kill = False

    def unseen(state: bytes) -> bytes:
        new = bytearray(reduced.reductions.normal(state))
        for w in reduced.protocol.layout.writer:
            new[w + WRITER_SEEN] = 0
        return reduced.reductions.representative(bytes(new))

    everything = {unseen(state) for state in apart.reachable()}
    assert everything == {unseen(state) for state in reduced.reachable()}


def test_protocol_holds_without_reductions_and_with_every_kill() -> None:
    assert search_scenario(SMALL, reduced=False).broken == ""


@pytest.mark.parametrize("name", ["kills", "attach", "backup"])
def test_every_run_ends(name: str) -> None:
    world = scenario(name)
    without_reader = Scenario(
        world.name,
        writers=world.writers,
        cuts=1,
        kills=world.kills,
        reader=False,
        attach=world.attach,
        finish=world.finish,
    )
    assert longest_run(Search(Protocol, without_reader)) is not None


@pytest.mark.parametrize("world", GROUP_SCENARIOS, ids=lambda world: world.name)
def test_every_run_of_two_images_ends(world: GroupScenario) -> None:
    assert longest_run(Search(GroupProtocol, world)) is not None


def test_two_images_hold_without_reductions() -> None:
    assert search_scenario(GroupScenario("small", writers=((0, 1),), kills=2), reduced=False).broken == ""


@pytest.mark.parametrize("world", RESIZE_SCENARIOS, ids=lambda world: world.name)
def test_every_run_of_a_resize_ends(world: ResizeScenario) -> None:
    """But for a handle that starts over, which it does only when the resize has gone on meanwhile."""
    assert longest_run(Search(ResizeProtocol, world)) is not None


def test_every_step_of_a_resize_is_done_and_no_other() -> None:
    search = Search(ResizeProtocol, resize_scenario("resize"))
    done = {name for state in search.reachable() for name, _, _ in search.protocol.steps(state)}
    assert done == set(RESIZE_STEPS)


def test_every_step_of_the_group_cut_is_done_and_no_other() -> None:
    search = Search(GroupProtocol, group_scenario("adopters"), reduced=False)
    done = {name for state in search.reachable() for name, _, _ in search.protocol.steps(state)}
    assert done == set(GROUP_STEPS)


def test_every_step_of_the_table_is_done_and_no_other() -> None:
    world = Scenario("tiny", writers=(((0,),),), cuts=1, attach=True, drop=True, finish=True)
    search = Search(Protocol, world, reduced=False)
    done = {name for state in search.reachable() for name, _, _ in search.protocol.steps(state)}
    assert done == set(STEPS)


def test_trace_is_a_run_of_the_mutated_protocol() -> None:
    mutation = next(mutation for mutation in MUTATIONS if mutation.name == "reap-without-lock")
    trace = search_mutation(mutation).trace
    search = Search(mutation.protocol, mutation.scenario, judged=[mutation.promise])
    assert trace[0][2] == search.protocol.layout.first_state()
    for (_, _, before), after in pairwise(trace):
        same = [step for step in search.protocol.steps(before) if step[:2] == after[:2]]
        assert search.key(after[2]) in [search.key(step[2]) for step in same]


def test_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "no-mark"]) == 0
    header, protocol, mutation = capsys.readouterr().out.splitlines()
    assert header.split() == ["protocol", "scenario", "states", "time", "verdict"]
    assert protocol.startswith("unmutated") and protocol.endswith("holds")
    assert mutation.startswith("no-mark") and mutation.endswith("CONTENT, 11 steps")


def test_command_fails_if_a_mutation_is_not_caught(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = Mutation("harmless", Protocol, "CONTENT", scenario("pool"))
    monkeypatch.setattr("tools.model.__main__.MUTATIONS", (harmless,))
    assert main(["harmless"]) == 1
    assert "should be: CONTENT" in capsys.readouterr().out


def test_command_prints_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", "publish-before-copy"]) == 0
    printed = capsys.readouterr().out
    assert "worker 1 publish" in printed
    assert "CONTENT: a reader returned wrong data from the target" in printed
    assert main(["--trace", "no-group-word"]) == 0
    printed = capsys.readouterr().out
    assert "group publish 0" in printed
    assert "ALL: the snapshot of image 0 counts, that of image 1 is gone" in printed
