"""What the torture's judge makes of a backup of which there is no file: rounds written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from shmcbw.workers.stamps import DATA, LogWriter, make_image, make_unit
from tools.torturing.evidence import Evidence, Fate
from tools.torturing.figures import Figures
from tools.torturing.place import Place
from tools.torturing.plan import COORDINATOR, WRITER, image_plans

SECOND_NS = 1_000_000_000
TIMEOUT_S = 1.0
CUT_NS, KILLED_NS, END_NS = 10 * SECOND_NS, 20 * SECOND_NS, 90 * SECOND_NS
NAME = "backup-0-1"
#: What a coordinator logs when a job breaks.
SAID = f"WARNING <Job backup1 running to /somewhere/image0/targets/{NAME}>: [Errno 110] the snapshot is broken: ..."


class Round:
    """One image, one writer with one write, a backup whose call has returned, and nothing else of it."""

    def __init__(self, directory: Path) -> None:
        (plan,) = image_plans(
            "by hand",
            together=False,
            images=1,
            writers=1,
            readers=1,
            workers=1,
            size_bytes=1 << 18,
            cbw_timeout_s=TIMEOUT_S,
            sabotage=(),
        )
        self.plan = replace(plan, cbw_timeout_s=TIMEOUT_S, daemon=False)
        self.place = Place(directory / "image0")
        self.place.make()
        self.plan.save(self.place.plan)
        make_image(self.place.image, self.plan.layout)

    def write(self, begin_ns: int, end_ns: int) -> None:
        """The writer's only write."""
        times = iter((begin_ns, end_ns))
        layout = self.plan.layout
        unit = layout.units_of(0)[0]
        log = LogWriter(self.place.log(0), lambda: next(times))
        data = make_unit(layout, unit, log.sequence)
        log.begin(unit, DATA)
        log.end()
        log.close()
        with self.place.image.open("r+b") as file:
            file.seek(unit.offset)
            file.write(data)

    def judge(self, *, policy: str = "break-snapshot", killed: bool = True, said: str = "") -> Figures:
        fates = [
            Fate(WRITER, 0, 0, 0, None, END_NS, []),
            Fate(COORDINATOR, 0, 0, 0, KILLED_NS if killed else None, KILLED_NS, []),
            Fate(COORDINATOR, 0, 1, KILLED_NS, None, END_NS, []),
        ]
        self.place.fates.write_text(json.dumps({"processes": [asdict(fate) for fate in fates], "stalls": []}))
        size = self.plan.sizes[0]
        ready = {"event": "ready", "jobs": [], "snapshots": [], "size": size}
        call = {"event": "call", "kind": "backup", "name": NAME, "policy": policy, "group": None}
        cut = {"event": "cut", "name": NAME, "drained_ns": 1000}
        closing = {"event": "closing", "jobs": [], "snapshots": []}
        self._events(0, {"ns": SECOND_NS, **ready}, {"ns": CUT_NS - 1, **call}, {"ns": CUT_NS, **cut})
        self._events(1, {"ns": KILLED_NS + SECOND_NS, **ready}, {"ns": END_NS - 1, **closing})
        self.place.said(COORDINATOR, 0, 0).write_text(f"{said}\n")
        return Evidence(self.place).judge()

    def _events(self, incarnation: int, *events: dict[str, Any]) -> None:
        lines = [json.dumps(event) + "\n" for event in events]
        self.place.events(COORDINATOR, 0, incarnation).write_text("".join(lines))


@pytest.fixture
def played(tmp_path: Path) -> Round:
    return Round(tmp_path)


def what(figures: Figures) -> list[str]:
    return [failure["what"] for failure in figures.failures]


LOST = [f"{NAME} (break-snapshot) is lost: there is no such file"]
WAITED = (CUT_NS + SECOND_NS, CUT_NS + 2 * SECOND_NS)


def test_a_backup_that_broke_before_its_coordinator_was_killed_was_not_lost(played: Round) -> None:
    played.write(*WAITED)
    figures = played.judge(said=SAID)
    assert what(figures) == []
    assert figures.counts["backups.broken unseen"] == 1


def test_a_backup_of_which_no_coordinator_says_that_it_broke_is_lost(played: Round) -> None:
    played.write(*WAITED)
    assert what(played.judge()) == LOST
    assert what(played.judge(said=SAID.replace(NAME, f"{NAME}0"))) == LOST
    assert what(played.judge(said=SAID.replace("image0", "image1"))) == LOST


def test_a_backup_that_says_it_broke_and_for_which_nobody_waited_is_lost(played: Round) -> None:
    played.write(CUT_NS + SECOND_NS, CUT_NS + SECOND_NS + 1000)
    assert what(played.judge(said=SAID)) == LOST


@pytest.mark.parametrize("begin_ns", [CUT_NS - 2 * SECOND_NS, KILLED_NS + SECOND_NS])
def test_a_wait_before_the_cut_or_after_the_coordinators_death_excuses_nothing(played: Round, begin_ns: int) -> None:
    played.write(begin_ns, begin_ns + SECOND_NS)
    assert what(played.judge(said=SAID)) == LOST


def test_a_backup_whose_coordinator_lived_is_lost(played: Round) -> None:
    played.write(*WAITED)
    assert what(played.judge(said=SAID, killed=False)) == LOST


def test_a_backup_that_must_not_break_is_lost(played: Round) -> None:
    played.write(*WAITED)
    figures = played.judge(said=SAID, policy="break-guest-write")
    assert what(figures) == [LOST[0].replace("break-snapshot", "break-guest-write")]
