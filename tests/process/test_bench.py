"""The benchmarks run and say what they found; no time is asserted here.  What is asserted is not a time: a hot write
makes no system call."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmcbw.workers import Coordinator
from tools.bench import memory, system_calls
from tools.bench.__main__ import run
from tools.bench.figure import Figure, Spread
from tools.bench.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
FIGURE = {"measurement", "name", "unit", "value", "spread", "other", "other_value", "ratio", "target", "met", "note"}
MACHINE = {"cpu", "cpus", "memory_bytes", "kernel", "python", "tools", "places", "load_average", "load_average_after"}


def bench(*options: str) -> Any:
    command = [sys.executable, "-m", "tools.bench", "--quick", "--json", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("\n") == 1, "one object on one line"
    return json.loads(done.stdout, parse_constant=pytest.fail)


def test_the_benchmarks_say_what_they_found_and_on_what(tmp_path: Path) -> None:
    found = bench("--only", "hot", "--only", "imports", "--dir", str(tmp_path))
    assert set(found) == {"machine", "quick", "seconds", "failures", "busy", "figures"}
    assert found["quick"] is True
    assert found["failures"] == []
    assert set(found["machine"]) >= MACHINE
    assert set(found["busy"]) == {"hot", "imports"}
    assert {figure["measurement"] for figure in found["figures"]} == {"hot", "imports"}
    for figure in found["figures"]:
        assert set(figure) >= FIGURE
        assert figure["value"] is None or figure["value"] >= 0 or figure["unit"] == "ns"
    hot = [figure for figure in found["figures"] if figure["other"] == "mmap slice store"]
    assert hot and all(figure["ratio"] > 0 and figure["target"] for figure in hot)
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_that_can_not_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Plan) -> list[Figure]:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(memory, "measure", fail)
    figures: list[Figure] = []
    assert run(Plan(True, tmp_path), ["memory"], figures, {}) == ["memory: OSError: [Errno 28] no room"]
    assert figures == []


def test_wrong_usage_is_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "--only", "hot", "--dir", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "nowhere is no directory" in done.stderr


def test_a_hot_write_makes_no_system_call(make_image: Callable[..., Path]) -> None:
    if not system_calls.have_strace():
        reason = "strace is not installed: that a hot write makes no system call was NOT checked"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    image = make_image(1 << 20)
    with Coordinator(image, workers=1) as coordinator:
        assert dict(system_calls.count(image, 10_000)) == {}
        with coordinator.snapshot(image.with_name("scratch")):
            assert dict(system_calls.count(image, 10_000)) == {}
        assert dict(system_calls.count(image, 10, calls=7)) == {"getppid": 7}, "the counter counts"


def test_a_target_is_judged_by_the_figures_alone() -> None:
    def met(value: float | None, **options: Any) -> bool | None:
        return Figure("hot", "write", "ns", value, **options).met

    assert met(12, other_value=10, ratio_limit=1.2) is True
    assert met(13, other_value=10, ratio_limit=1.2) is False
    assert met(13, ratio_limit=1.2) is None, "nothing to compare with"
    assert met(0, limit=0) is True
    assert met(1, limit=0) is False
    assert met(None, limit=0) is None, "not measured"
    assert met(1) is None, "no target"


def test_percentiles_are_times_that_were_measured() -> None:
    spread = Spread.of(range(1000, 0, -1))
    assert (spread.count, spread.p50, spread.p99, spread.p999, spread.max) == (1000, 501, 991, 1000, 1000)
    assert Spread.of([5]) == Spread(1, 5, 5, 5, 5, 5)
