"""DESIGN.md shows every failpoint in place, what a death there leaves, and which step of the model it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import shmcbw
from shmcbw.failpoints import POINTS

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = (Path(shmcbw.__file__).parent / "DESIGN.md").read_text().partition("## Failpoints\n")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in CHAPTER.splitlines() if line[:3] == "| `"]


def steps_of_the_model() -> set[str]:
    command = [sys.executable, "-m", "tools.model", "--steps"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}


def test_the_table_has_every_failpoint_with_its_step_in_order() -> None:
    assert [(name.strip("`"), step) for name, step, _, _ in ROWS] == [(point.name, point.step) for point in POINTS]


def test_every_row_says_what_a_death_there_leaves() -> None:
    assert all(len(row) == 4 and row[3] for row in ROWS)


def test_every_failpoint_is_a_step_of_the_model_or_says_that_it_is_none() -> None:
    steps = steps_of_the_model()
    for name, _, cell, _ in ROWS:
        assert cell == "—" or set(re.findall(r"`([a-z_.]+)`", cell)) <= steps, name
        assert cell, name


def test_every_step_of_the_model_has_a_failpoint_or_is_named_as_one_without() -> None:
    named = {step for _, _, cell, _ in ROWS for step in re.findall(r"`([a-z_.]+)`", cell)}
    without = set(re.findall(r"`([a-z_.]+)`", CHAPTER.partition("Steps of the model without a point:")[2]))
    assert named & without == set()
    assert named | without == steps_of_the_model()
