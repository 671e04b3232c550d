"""The tables of jobs are those of QEMU, and those that DESIGN.md shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import job_states
from shmcbw.workers.error_actions import RETRY_MAX_S, Ignored, resolve
from shmcbw.workers.job_states import STATES, STEPS, VERBS, check_step, check_verb

#: As in QEMU's job.c.
QEMU_STEPS = {
    "undefined": "created",
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "aborting concluded",
    "aborting": "concluded",
    "concluded": "null",
    "null": "",
}
QEMU_VERBS = {
    "cancel": "created running paused ready standby waiting pending",
    "pause": "created running paused ready standby",
    "resume": "created running paused ready standby",
    "set-speed": "created running paused ready standby",
    "change": "created running paused ready standby",
    "complete": "ready",
    "finalize": "pending",
    "dismiss": "concluded",
}


def test_the_steps_are_qemus() -> None:
    assert {(state, to) for state, tos in QEMU_STEPS.items() for to in tos.split()} == set(STEPS)
    assert set(STATES) == set(QEMU_STEPS)


def test_the_verbs_are_qemus() -> None:
    assert {verb: set(states.split()) for verb, states in QEMU_VERBS.items()} == VERBS


def test_the_design_shows_the_tables_of_the_code() -> None:
    assert job_states.tables() in (Path(shmcbw.__file__).parent / "DESIGN.md").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_refused_with_qemus_text_in_every_other_state(verb: str) -> None:
    for state in STATES:
        if state in VERBS[verb]:
            check_verb("j", state, verb)
            continue
        with pytest.raises(shmcbw.JobStateError) as caught:
            check_verb("j", state, verb)
        assert str(caught.value) == f"Job 'j' in state '{state}' cannot accept command verb '{verb}'"


def test_a_step_that_no_table_has_is_a_fault() -> None:
    for state in STATES:
        for to in STATES:
            if (state, to) in STEPS:
                check_step("j", state, to)
            else:
                with pytest.raises(AssertionError):
                    check_step("j", state, to)


@pytest.mark.parametrize(
    ("action", "number", "resolved"),
    [
        ("report", 28, "report"),
        ("ignore", 28, "ignore"),
        ("stop", 5, "stop"),
        ("enospc", 28, "stop"),
        ("enospc", 5, "report"),
        ("auto", 28, "stop"),
        ("auto", 5, "report"),
    ],
)
def test_an_action_is_resolved_by_the_errno(action: str, number: int, resolved: str) -> None:
    assert resolve(action, number) == resolved


def test_an_error_that_stays_is_told_once_a_second_with_a_count_and_tried_ever_more_seldom() -> None:
    ignored, told, tries = Ignored(), [], []
    for tick in range(1000):
        now = tick / 100
        if not ignored.waiting:
            tries.append(now)
            ignored.add(now, "write", 0)
        elif ignored.may_retry(now):
            ignored.retried()
        if count := ignored.report(now):
            told.append((now, count))
    assert told[0] == (0.0, 1)
    assert all(later - earlier >= 1 for (earlier, _), (later, _) in itertools.pairwise(told))
    assert sum(count for _, count in told) in (len(tries), len(tries) - 1)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:3] == pytest.approx([0.11, 0.21, 0.41])
    assert max(pauses) <= RETRY_MAX_S + 0.02


def test_what_was_copied_meanwhile_makes_the_next_try_come_soon() -> None:
    ignored = Ignored()
    for _ in range(6):
        ignored.add(0.0, "read", 4096)
    assert not ignored.may_retry(0.9)
    ignored.add(0.0, "read", 8192)
    assert ignored.may_retry(0.1)
