"""The same scripts for ``shmcbw serve`` and for QEMU's storage daemon: same returns, errors and order of events.

`DIFFERENCES` has what is different, each with its reason; DESIGN.md shows it, and a test holds the two together.
All of it: ``make differential``.  ``make test`` runs a part of the large tables, the same for the same seed.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_for
from tests.qmp.sides import CLUSTER, SIZE, Ours, Record, Side, Theirs

ALL = os.environ.get("SHMCBW_DIFFERENTIAL") == "all"
SEED = int(os.environ.get("SHMCBW_SEED", "0") or 0) or random.SystemRandom().randrange(1 << 32)

Script = Callable[[Side], Any]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ours, Theirs]]:
    ours, theirs = Ours(tmp_path_factory.mktemp("ours")), Theirs(tmp_path_factory.mktemp("theirs"))
    with ours.monitor, theirs.monitor:
        yield ours, theirs


def both(sides: tuple[Ours, Theirs], script: Script) -> tuple[tuple[Any, Record], tuple[Any, Record]]:
    """Run a script on both sides: what it returned, and its record, of each."""
    found = []
    for side in sides:
        with side.script() as record:
            result = script(side)
        found.append((result, record))
    ours, theirs = found
    return ours, theirs


def same(sides: tuple[Ours, Theirs], script: Script) -> Any:
    """Run a script on both sides; they must agree on everything.  What it returned."""
    (our_result, our_record), (their_result, their_record) = both(sides, script)
    assert our_record.replies == their_record.replies
    assert our_record.of_jobs() == their_record.of_jobs(but_never_started=True)
    assert our_result == their_result
    return our_result


#: So that a slow job is one that has not copied all in its first chunk, and errors come at a known cluster.
IN_ORDER = {"max-workers": 1, "max-chunk": CLUSTER}


def part(cases: list[Any], count: int) -> list[Any]:
    """All cases for `make differential`, else some of them."""
    if ALL:
        return cases
    return random.Random(SEED).sample(cases, min(count, len(cases)))


def test_the_seed_of_the_parts_is_told() -> None:
    print(f"SHMCBW_SEED={SEED}")


# -- sync x bitmap x bitmap-mode x outcome -----------------------------------------------------------------------------

SYNCS = ("full", "top", "none", "incremental", "bitmap")
MODES = (None, "on-success", "never", "always")
OUTCOMES = ("success", "cancel", "error")
MATRIX = [
    (sync, bitmap, mode, outcome)
    for sync in SYNCS
    for bitmap in (None, "b", "nope")
    for mode in MODES
    for outcome in OUTCOMES
    if outcome == "success" or bitmap != "nope"
]


@pytest.mark.parametrize(("sync", "bitmap", "mode", "outcome"), part(MATRIX, 10))
def test_sync_bitmap_and_mode(
    sides: tuple[Ours, Theirs], sync: str, bitmap: str | None, mode: str | None, outcome: str
) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        for cluster in (2, 3, 8):
            assert side.write(cluster)
        # Background copying goes up from cluster 0, one at a time: 8 is the third of the bitmap's.
        by_bitmap = sync in ("bitmap", "incremental")
        fail_at = None
        if outcome == "error":
            fail_at = 8 if side.name == "qemu" or not by_bitmap else 2
        target = side.target(fail_at=fail_at)
        options: dict[str, Any] = {"bitmap": bitmap, "bitmap-mode": mode}
        kind, _ = side.ask(
            "blockdev-backup",
            job_id="j",
            device="n",
            target="t",
            sync=sync,
            auto_finalize=False,
            auto_dismiss=False,
            x_perf=IN_ORDER,
            **{key: value for key, value in options.items() if value is not None},
        )
        if kind == "error":
            return side.bitmaps()
        if sync == "none" or outcome == "error":
            if outcome == "success":
                side.write(3, 0x33)
                side.ask("job-cancel", id="j")
        else:
            side.wait("j", "pending")
            assert side.write(3, 0x33) and side.write(9, 0x33)
            during = side.bitmaps()
            assert during["b"]["busy"] is (bitmap is not None)
            side.ask("job-cancel" if outcome == "cancel" else "job-finalize", id="j")
        if sync == "none" and outcome != "success":
            side.ask("job-cancel", id="j")
        side.wait("j", "concluded")
        jobs = side.jobs()["j"]
        after = side.bitmaps()
        side.ask("job-dismiss", id="j")
        # What is in the target, where it is a finished backup.
        content = target.read_bytes() if outcome == "success" and sync != "none" else None
        return after, {key: jobs.get(key) for key in ("status", "error", "io-status")}, content

    same(sides, script)


# -- every verb in every state -----------------------------------------------------------------------------------------

VERBS = (
    "job-pause",
    "job-resume",
    "job-cancel",
    "job-complete",
    "job-finalize",
    "job-dismiss",
    "block-job-pause",
    "block-job-resume",
    "block-job-cancel",
    "block-job-complete",
    "block-job-finalize",
    "block-job-dismiss",
    "block-job-set-speed",
)
STATES = ("none", "running", "paused", "stopped", "waiting", "pending", "concluded", "failed", "cancelled")
BY_ID = ("block-job-finalize", "block-job-dismiss")


def bring_to(side: Side, state: str) -> None:
    """A job ``j`` in a state; ``stopped`` is paused by an error."""
    side.image()
    if state == "none":
        return
    side.target(fail_at=3 if state in ("stopped", "failed") else None)
    options: dict[str, Any] = {}
    if state in ("running", "paused"):
        options["speed"] = 1
    if state == "stopped":
        options["on-target-error"] = "stop"
    job = {"device": "n", "target": "t", "sync": "full", "auto-finalize": False, "auto-dismiss": False}
    job |= {"x-perf": IN_ORDER, **options}
    if state == "waiting":
        # Its partner runs on.
        side.image("n2", seed=2)
        side.target("t2")
        partner = {**job, "job-id": "k", "device": "n2", "target": "t2", "speed": 1}
        side.ask(
            "transaction",
            actions=[
                {"type": "blockdev-backup", "data": {**job, "job-id": "j"}},
                {"type": "blockdev-backup", "data": partner},
            ],
            properties={"completion-mode": "grouped"},
        )
        side.wait("j", "waiting")
        return
    side.ask("blockdev-backup", **{**job, "job-id": "j"})
    if state == "paused":
        side.ask("job-pause", id="j")
        # Not the event: QEMU also pauses jobs by itself, for a moment (D1).
        wait_for(lambda: side.jobs()["j"]["status"] == "paused", "the job is paused")
    elif state == "stopped":
        side.client.wait_event("BLOCK_JOB_ERROR")
        side.wait("j", "paused")
    elif state == "running":
        side.wait("j", "running")
    elif state == "failed":
        side.wait("j", "concluded")
    else:
        side.wait("j", "pending")
        if state == "concluded":
            side.ask("job-finalize", id="j")
            side.wait("j", "concluded")
        elif state == "cancelled":
            side.ask("job-cancel", id="j")
            side.wait("j", "concluded")


@pytest.mark.parametrize("state", part(list(STATES), 3))
def test_every_verb_in_a_state(sides: tuple[Ours, Theirs], state: str) -> None:
    for verb in VERBS:

        def script(side: Side, verb: str = verb) -> Any:
            bring_to(side, state)
            member = "id" if verb in BY_ID or verb.startswith("job-") else "device"
            extra = {"speed": 0} if verb == "block-job-set-speed" else {}
            kind, _ = side.ask(verb, **{member: "j"}, **extra)
            if kind == "return" and verb.endswith("pause"):
                wait_for(lambda: side.jobs()["j"]["status"] == "paused", "the job is paused")
            if kind == "return" and verb.endswith(("cancel", "finalize")):
                side.wait("j", "concluded")
            if kind == "return" and verb.endswith("set-speed") and state == "running":
                side.wait("j", "pending")
            if kind == "return" and verb.endswith("resume"):
                side.ask("block-job-set-speed", device="j", speed=0)
                # What stopped it is still there.
                side.wait("j", "paused" if state == "stopped" else "pending")
            return {job: each["status"] for job, each in side.jobs().items()}

        if state == "stopped" and verb.endswith("resume"):
            continue
        same(sides, script)


@pytest.mark.parametrize(
    ("auto_finalize", "auto_dismiss", "outcome"),
    part(list(itertools.product([True, False], [True, False], ["success", "error", "cancel"])), 4),
)
def test_automatic_steps(sides: tuple[Ours, Theirs], auto_finalize: bool, auto_dismiss: bool, outcome: str) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target(fail_at=3 if outcome == "error" else None)
        side.ask(
            "blockdev-backup",
            job_id="j",
            device="n",
            target="t",
            sync="full",
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
            x_perf=IN_ORDER,
            **({"speed": 1} if outcome == "cancel" else {}),
        )
        if outcome == "cancel":
            side.wait("j", "running")
            side.ask("block-job-cancel", device="j")
        elif outcome == "success" and not auto_finalize:
            side.client.wait_event("BLOCK_JOB_PENDING")
            side.ask("block-job-finalize", id="j")
        side.wait("j", "null" if auto_dismiss else "concluded")
        jobs = {job: (each["status"], each.get("error")) for job, each in side.jobs().items()}
        side.ask("job-dismiss", id="j")
        return jobs

    same(sides, script)


@pytest.mark.parametrize(
    ("action", "which"),
    part(list(itertools.product(["report", "stop", "enospc", "auto"], ["on-target-error", "on-source-error"])), 3),
)
def test_error_actions(sides: tuple[Ours, Theirs], action: str, which: str) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target(fail_at=3)
        arguments = {"job-id": "j", "device": "n", "target": "t", "sync": "full", "auto-dismiss": False}
        side.ask("blockdev-backup", **{**arguments, which: action})
        stops = action == "stop" and which == "on-target-error"
        side.wait("j", "paused" if stops else "concluded")
        error = side.client.wait_event("BLOCK_JOB_ERROR")
        job = side.jobs()["j"]
        return error, {key: job.get(key) for key in ("status", "io-status", "paused", "busy", "error")}

    same(sides, script)


# -- transactions ------------------------------------------------------------------------------------------------------


def backup_action(number: str = "", **options: Any) -> dict[str, Any]:
    data = {
        "job-id": f"j{number}",
        "device": f"n{number}",
        "target": f"t{number}",
        "sync": "full",
        "auto-dismiss": False,
        "x-perf": IN_ORDER,
        **options,
    }
    return {"type": "blockdev-backup", "data": data}


def bitmap_action(verb: str, name: str, number: str = "", **options: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": f"n{number}", "name": name, **options}}


ABORT = {"type": "abort", "data": {}}


@pytest.mark.parametrize(
    "actions",
    [
        [ABORT],
        [bitmap_action("add", "new"), backup_action(), ABORT],
        [bitmap_action("clear", "b"), bitmap_action("disable", "b"), ABORT],
        [bitmap_action("remove", "b"), bitmap_action("add", "b"), ABORT],
        [bitmap_action("add", "b")],
        [bitmap_action("add", "new"), bitmap_action("add", "new")],
        [bitmap_action("add", "new"), bitmap_action("clear", "nope")],
        [backup_action(), backup_action(**{"job-id": "9"})],
        [bitmap_action("add", "new"), bitmap_action("disable", "b")],
        [bitmap_action("remove", "b"), bitmap_action("add", "b", granularity=4096)],
        [bitmap_action("add", "new", disabled=True), bitmap_action("enable", "new")],
        [
            bitmap_action("add", "new", disabled=True),
            {"type": "block-dirty-bitmap-merge", "data": {"node": "n", "target": "new", "bitmaps": ["b"]}},
            bitmap_action("clear", "b"),
        ],
    ],
)
def test_a_transaction_is_all_or_nothing(sides: tuple[Ours, Theirs], actions: list[dict[str, Any]]) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target()
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        assert side.write(4)
        side.ask("transaction", actions=actions)
        return side.bitmaps(), sorted(side.jobs())

    same(sides, script)


def test_a_bitmap_that_is_cleared_beside_a_backup_begins_at_its_cut(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        side.image()
        target = side.target()
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        assert side.write(4)
        actions = [bitmap_action("clear", "b"), bitmap_action("add", "c"), backup_action()]
        side.ask("transaction", actions=actions)
        side.wait("j", "concluded")
        assert side.write(5)
        return side.bitmaps(), target.read_bytes()

    same(sides, script)


@pytest.mark.parametrize(
    ("mode", "outcome", "auto_finalize"),
    part(list(itertools.product(["individual", "grouped"], ["success", "cancel", "error"], [True, False])), 4),
)
def test_two_images_in_a_transaction(sides: tuple[Ours, Theirs], mode: str, outcome: str, auto_finalize: bool) -> None:
    def script(side: Side) -> Any:
        for number in "12":
            side.image(f"n{number}", seed=int(number))
            side.ask("block-dirty-bitmap-add", node=f"n{number}", name="b")
            assert side.write(4, node=f"n{number}")
        side.target("t1")
        side.target("t2", fail_at=3 if outcome == "error" else None, image="n2")
        shared = {"bitmap": "b", "bitmap-mode": "on-success", "auto-finalize": auto_finalize}
        # The first one has to have come to its end before the second one ends.
        second = {"speed": 1} if outcome != "success" else {}
        actions = [backup_action("1", **shared), backup_action("2", **shared, **second)]
        side.ask("transaction", actions=actions, properties={"completion-mode": mode})
        if outcome == "success":
            if not auto_finalize:
                side.wait("j1", "pending")
                side.wait("j2", "pending")
                side.ask("job-finalize", id="j1")
                if mode == "individual":
                    side.ask("job-finalize", id="j2")
        else:
            side.wait("j1", "waiting" if mode == "grouped" else ("pending" if not auto_finalize else "concluded"))
            if outcome == "error":
                side.ask("block-job-set-speed", device="j2", speed=0)
            else:
                side.ask("job-cancel", id="j2")
            if mode == "individual" and not auto_finalize:
                side.ask("job-finalize", id="j1")
        side.wait("j1", "concluded")
        side.wait("j2", "concluded")
        jobs = {job: (each["status"], each.get("error")) for job, each in side.jobs().items()}
        return side.bitmaps("n1"), side.bitmaps("n2"), jobs

    same(sides, script)


# -- snapshots ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "fault", "timeout"),
    part(
        [
            (policy, *fault)
            for policy in ("break-guest-write", "break-snapshot")
            for fault in (("", 0), ("error", 0), ("hang", 1), ("hang", 0))
        ],
        3,
    ),
)
def test_what_gives_way_when_old_data_cannot_be_copied(
    sides: tuple[Ours, Theirs], policy: str, fault: str, timeout: int
) -> None:
    def script(side: Side) -> Any:
        side.add_snapshot(policy, timeout=timeout, fault=fault)
        before = side.read_snapshot(5)
        written = side.write(5)
        after = side.read_snapshot(5)
        other = side.read_snapshot(6)
        return written, before, after, other

    same(sides, script)


def test_a_snapshot_is_the_source_of_a_backup(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        side.add_snapshot("break-guest-write", timeout=0, fault="")
        assert side.write(3) and side.write(8, 0x22)
        target = side.target()
        arguments = {"device": "access", "target": "t", "sync": "full", "auto-finalize": False}
        side.ask("blockdev-backup", **arguments)
        side.ask("blockdev-backup", **arguments, **{"job-id": "j", "bitmap": "b", "bitmap-mode": "always"})
        side.ask("blockdev-backup", **arguments, **{"job-id": "j"})
        side.wait("j", "pending")
        assert side.write(9, 0x33)
        side.ask("job-finalize", id="j")
        side.wait("j", "null")
        return target.read_bytes()

    assert same(sides, script) == random.Random(1).randbytes(SIZE)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused_backups() -> list[dict[str, Any]]:
    base: dict[str, Any] = {"job-id": "j", "device": "n", "target": "t", "sync": "full"}
    changes: list[dict[str, Any]] = [
        {"device": "nope"},
        {"target": "nope"},
        {"target": "n"},
        {"target": "small"},
        {"job-id": "9bad"},
        {"job-id": ""},
        {"compress": True},
        {"x-perf": {"max-workers": 0}},
        {"x-perf": {"max-workers": 1 << 31}},
        {"x-perf": {"max-chunk": 4096}},
        {"x-perf": {"max-chunk": -1}},
        {"x-perf": {"max-workers": "many"}},
        {"x-perf": 5},
        {"x-perf": {"bogus": 1}},
        {"filter-node-name": "n"},
        {"filter-node-name": "9"},
        {"speed": "fast"},
        {"speed": 1.5},
        {"speed": 1 << 63},
        {"sync": "weird"},
        {"sync": 5},
        {"on-source-error": "x"},
        {"bitmap-mode": "x"},
        {"job-id": None},
        {"bogus": 1},
        {"sync": "incremental", "target": "small"},
        {"sync": "full", "target": "small", "compress": True, "job-id": "9"},
        {"target": "small", "x-perf": {"max-workers": 0}},
        {"target": "small", "job-id": "9", "filter-node-name": "9"},
        {"job-id": "9", "filter-node-name": "9"},
        {"job-id": "9", "x-perf": {"max-chunk": 1}},
    ]
    return [{**base, **change} for change in changes]


def test_wrong_backups_are_refused_in_the_same_words(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target()
        side.target("small", size=SIZE // 2)
        for arguments in refused_backups():
            side.client.request({"execute": "query-jobs"})
            side.ask("blockdev-backup", **arguments)
        return sorted(side.jobs())

    same(sides, script)


def test_a_busy_target_or_id_is_refused_in_the_same_words(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target()
        side.target("t2")
        side.ask("blockdev-backup", job_id="j", device="n", target="t", sync="none", filter_node_name="flt")
        side.ask("blockdev-backup", job_id="k", device="n", target="t", sync="full")
        side.ask("blockdev-backup", job_id="j", device="n", target="t2", sync="full")
        for node in ("n", "t", "flt", "nope"):
            side.ask("blockdev-del", node_name=node)
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        side.ask("job-cancel", id="j")
        side.wait("j", "null")
        side.ask("blockdev-del", node_name="flt")
        return sorted(each["node-name"] for each in side.client.execute("query-named-block-nodes"))

    same(sides, script)


BITMAP_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"node": "nope", "name": "b"}),
    ("add", {"node": "n", "name": ""}),
    ("add", {"node": "n", "name": "x" * 1024}),
    ("add", {"node": "n", "name": "x", "granularity": 1000}),
    ("add", {"node": "n", "name": "x", "granularity": 256}),
    ("add", {"node": "n", "name": "x", "granularity": -1}),
    ("add", {"node": "n", "name": "x", "granularity": 1 << 32}),
    ("add", {"node": "n", "name": "b"}),
    ("add", {"node": "n", "name": "fine", "granularity": 512}),
    ("add", {"node": "n", "name": "coarse", "granularity": 1 << 20, "disabled": True}),
    ("remove", {"node": "n", "name": "x"}),
    ("clear", {"node": "n", "name": "x"}),
    ("enable", {"node": "n", "name": "x"}),
    ("disable", {"node": "nope", "name": "x"}),
    ("merge", {"node": "n", "target": "x", "bitmaps": ["b"]}),
    ("merge", {"node": "n", "target": "b", "bitmaps": ["x"]}),
    ("merge", {"node": "n", "target": "b", "bitmaps": [5]}),
    ("merge", {"node": "n", "target": "b", "bitmaps": [{"node": "nope", "name": "b"}]}),
    ("merge", {"node": "n", "target": "b", "bitmaps": [{"node": "n"}]}),
    ("merge", {"node": "n", "target": "coarse", "bitmaps": ["b", "fine"]}),
    ("merge", {"node": "n", "target": "b", "bitmaps": [{"node": "n", "name": "coarse"}]}),
    ("disable", {"node": "n", "name": "b"}),
    ("disable", {"node": "n", "name": "b"}),
    ("enable", {"node": "n", "name": "b"}),
    ("clear", {"node": "n", "name": "b"}),
    ("remove", {"node": "n", "name": "coarse"}),
]


def test_bitmap_commands_do_and_say_the_same(sides: tuple[Ours, Theirs]) -> None:
    """Also L12: bitmaps are merged across granularities, both ways."""

    def script(side: Side) -> Any:
        side.image()
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        assert side.write(4)
        states = []
        for verb, arguments in BITMAP_CALLS:
            side.ask(f"block-dirty-bitmap-{verb}", **arguments)
            if verb == "disable":
                assert side.write(6)
            states.append(side.bitmaps())
        return states

    same(sides, script)


def test_bitmaps_in_use_are_refused_in_the_same_words(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        side.image()
        side.target()
        side.target("t2")
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        side.ask("block-dirty-bitmap-add", node="n", name="c")
        shared = {"device": "n", "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "speed": 1}
        shared["x-perf"] = IN_ORDER
        side.ask("blockdev-backup", **{**shared, "job-id": "j", "target": "t"})
        for verb in ("remove", "clear", "enable", "disable"):
            side.ask(f"block-dirty-bitmap-{verb}", node="n", name="b")
        side.ask("block-dirty-bitmap-merge", node="n", target="b", bitmaps=["c"])
        side.ask("block-dirty-bitmap-merge", node="n", target="c", bitmaps=["b"])
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        side.ask("blockdev-backup", **{**shared, "job-id": "k", "target": "t2"})
        return sorted(side.jobs())

    same(sides, script)


# -- what differs ------------------------------------------------------------------------------------------------------


def test_a_negative_speed_is_refused_before_there_is_a_job(sides: tuple[Ours, Theirs]) -> None:
    """D3."""

    def script(side: Side) -> Any:
        side.image()
        side.target()
        return side.ask("blockdev-backup", job_id="j", device="n", target="t", sync="full", speed=-1)

    (ours, our_record), (theirs, their_record) = both(sides, script)
    assert ours == theirs
    assert (our_record.of_jobs(), their_record.of_jobs()) == ({}, {"j": ["created", "null"]})


@pytest.mark.parametrize("outcome", ["error", "cancel"])
def test_a_target_is_what_it_was_unless_its_backup_is_complete(sides: tuple[Ours, Theirs], outcome: str) -> None:
    """D4."""

    def script(side: Side) -> Any:
        source = side.image()
        target = side.target(fail_at=3 if outcome == "error" else None)
        options = {"speed": 1} if outcome == "cancel" else {}
        side.ask("blockdev-backup", job_id="j", device="n", target="t", sync="full", x_perf=IN_ORDER, **options)
        if outcome == "cancel":
            side.wait("j", "running")
            # Copied for a writer, so it is in the target for sure.
            assert side.write(0)
            side.ask("job-cancel", id="j")
        side.wait("j", "null")
        return target.read_bytes() == bytes(SIZE), source.stat().st_size

    (ours, _), (theirs, _) = both(sides, script)
    assert ours[0] and not theirs[0]


def test_an_increment_does_not_go_over_what_is_not_its_base(sides: tuple[Ours, Theirs]) -> None:
    """D5."""

    def script(side: Side) -> Any:
        side.image()
        target = side.target()
        target.write_bytes(b"something else".ljust(SIZE, b"."))
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        reply = side.ask("blockdev-backup", job_id="j", device="n", target="t", sync="incremental", bitmap="b")
        return reply[0]

    (ours, _), (theirs, _) = both(sides, script)
    assert (ours, theirs) == ("error", "return")


def test_a_chain_goes_into_one_target_in_place(sides: tuple[Ours, Theirs]) -> None:
    def script(side: Side) -> Any:
        source = side.image()
        target = side.target()
        side.ask("block-dirty-bitmap-add", node="n", name="b")
        for number in range(3):
            sync = {"sync": "incremental"} if number else {"sync": "full", "bitmap-mode": "on-success"}
            side.ask("blockdev-backup", **{"job-id": f"j{number}", "device": "n", "target": "t", "bitmap": "b", **sync})
            side.wait(f"j{number}", "null")
            assert target.read_bytes() == source.read_bytes()
            assert side.write(3 + number, 0x40 + number)
        return side.bitmaps()

    same(sides, script)


def test_only_a_snapshot_can_be_accessed(sides: tuple[Ours, Theirs]) -> None:
    """D7."""

    def script(side: Side) -> Any:
        side.image()
        return side.ask("blockdev-add", driver="snapshot-access", node_name="access", file="n")[0]

    (ours, _), (theirs, _) = both(sides, script)
    assert (ours, theirs) == ("error", "return")


def test_a_character_device_is_no_image(sides: tuple[Ours, Theirs]) -> None:
    """D18."""

    def script(side: Side) -> Any:
        return side.ask("blockdev-add", driver="host_device", node_name="null", filename="/dev/null")[0]

    (ours, _), (theirs, _) = both(sides, script)
    assert (ours, theirs) == ("error", "return")


def test_commands_that_qemu_has_and_its_storage_daemon_has_not(sides: tuple[Ours, Theirs]) -> None:
    """D19."""

    def script(side: Side) -> Any:
        return [side.ask(command)[0] for command in ("query-status", "query-name", "query-version", "query-block")]

    (ours, _), (theirs, _) = both(sides, script)
    assert ours == ["return"] * 4 and theirs == ["error", "error", "return", "return"]


def test_the_image_itself_is_not_discarded(sides: tuple[Ours, Theirs]) -> None:
    """D20."""
    ours, _ = sides
    with ours.script():
        ours.image()
        ours.target()
        arguments = {"job_id": "j", "device": "n", "target": "t", "sync": "full"}
        refused = ours.client.refusal("blockdev-backup", **arguments, discard_source=True)
        assert refused.startswith("discard-source would discard the image itself")
        ours.client.execute("blockdev-backup", **arguments, x_perf={"use-copy-range": True})
        ours.wait("j", "null")


def test_every_difference_is_in_the_design_and_has_its_test() -> None:
    root = Path(__file__).resolve().parents[2]
    table = re.findall(r"^\| (D\d+) \|", (root / "shmcbw" / "DESIGN.md").read_text(), re.MULTILINE)
    assert table == [f"D{number}" for number in range(1, len(table) + 1)]
    named = {name for path in Path(__file__).parent.glob("*.py") for name in re.findall(r"\bD\d+\b", path.read_text())}
    assert named == set(table)
