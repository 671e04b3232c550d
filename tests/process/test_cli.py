"""The command line: what it prints, its exit statuses, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw.failpoints import POINTS
from shmcbw.layout import Header
from shmcbw.workers import Coordinator
from tests.conftest import wait_for

SIZE = 4 << 20
COMMAND = [sys.executable, "-m", "shmcbw"]


def run(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done


def run_json(*arguments: str | Path, status: int = 0) -> Any:
    done = run(*arguments, "--json", status=status)
    assert done.stdout.count("\n") == 1, "one object on one line"
    return json.loads(done.stdout)


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def test_backup_is_right_and_says_what_it_did(image: Path, tmp_path: Path) -> None:
    done = run("backup", image, tmp_path / "out", "--workers", "1", "--cluster-size", "4K")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert "4 MiB" in done.stdout
    assert "writes were held for" in done.stdout
    again = run_json("backup", image, tmp_path / "out", "--overwrite")
    assert (again["status"], again["error"]) == ("concluded", None)
    assert again["progress"]["current_bytes"] == again["progress"]["total_bytes"] == SIZE


def test_writers_may_attach_while_a_backup_runs(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    command = [*COMMAND, "backup", str(image), str(tmp_path / "out"), "--speed", "4M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as backup:
        wait_for(lambda: (tmp_path / "out.shmcbw-partial").exists() and _served(image), "the backup runs", 20)
        with shmcbw.open(image) as disk:
            wait_for(lambda: disk._attached().header(Header.cuts), "the cut is taken")
            disk.pwrite(b"x" * 100_000, 1_000_000)
            assert backup.wait(30) == 0
            disk.pwrite(b"y", 0)
    assert (tmp_path / "out").read_bytes() == expected


def _served(image: Path) -> bool:
    try:
        shmcbw.open(image, read_only=True).close()
    except shmcbw.NoCoordinatorError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_a_backup_cleanly(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [*COMMAND, "backup", str(image), str(tmp_path / "out"), "--speed", "1K"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as backup:
        wait_for(lambda: _cuts(image) == 1, "the cut is taken", 20)
        backup.send_signal(number)
        _, errors = backup.communicate(timeout=20)
    assert backup.returncode == 6
    assert "cancelled" in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def _cuts(image: Path) -> int:
    try:
        with shmcbw.open(image, read_only=True) as disk:
            return disk._attached().header(Header.cuts)
    except shmcbw.NoCoordinatorError:
        return 0


def test_the_same_command_after_a_kill_goes_on_and_ends_right(image: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "backup", str(image), str(tmp_path / "out"), "--speed", "2M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as backup:
        wait_for(lambda: _cuts(image) == 1, "the cut is taken", 20)
        backup.kill()
    done = run("backup", image, tmp_path / "out", "--speed", "2M")
    assert "goes on" in done.stderr
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_several_images_are_backed_up_in_one_cut(make_image: Callable[..., Path], tmp_path: Path) -> None:
    images = [make_image(SIZE, f"{name}.img") for name in ("data", "log")]
    targets = [tmp_path / "data.bak", tmp_path / "log.bak"]
    found = run_json("backup", images[0], targets[0], images[1], targets[1])["jobs"]
    assert [job["target"] for job in found] == [str(target) for target in targets]
    assert found[0]["cut_time_ns"] == found[1]["cut_time_ns"]
    for image, target in zip(images, targets, strict=True):
        assert target.read_bytes() == image.read_bytes()
    again = run("backup", images[0], tmp_path / "new", images[1], targets[1], status=4)
    assert "overwrite" in again.stderr
    assert not (tmp_path / "new").exists()


def test_commands_run_around_the_cut_and_the_first_may_refuse_it(image: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    hooks = ("--pre-cut", f"echo before >> {log}", "--post-cut", f"echo after >> {log}")
    assert run_json("backup", image, out, *hooks)["status"] == "concluded"
    assert log.read_text() == "before\nafter\n"
    refused = run("backup", image, tmp_path / "none", "--pre-cut", "exit 3", *hooks[2:], status=7)
    assert "exit 3" in refused.stderr
    assert "exit status 3" in refused.stderr
    assert log.read_text() == "before\nafter\nafter\n"
    assert not list(tmp_path.glob("none*"))
    late = run("backup", image, tmp_path / "late", "--post-cut", "kill -9 $$", status=1)
    assert "signal 9" in late.stderr
    assert (tmp_path / "late").read_bytes() == image.read_bytes()


def test_the_same_command_after_a_kill_goes_on_with_all_images(make_image: Callable[..., Path], tmp_path: Path) -> None:
    images = [make_image(SIZE, f"{name}.img") for name in ("data", "log")]
    arguments = [str(path) for image in images for path in (image, image.with_suffix(".bak"))]
    with subprocess.Popen([*COMMAND, "backup", *arguments, "--speed", "1M"], stderr=subprocess.PIPE) as backup:
        wait_for(lambda: [_cuts(image) for image in images] == [1, 1], "the cut is taken", 20)
        backup.kill()
    done = run("backup", *arguments, "--speed", "2M")
    assert done.stderr.count("goes on") == 2
    for image in images:
        assert image.with_suffix(".bak").read_bytes() == image.read_bytes()


def test_refused_targets_have_their_status_and_a_reason(image: Path, tmp_path: Path) -> None:
    assert "is the source" in run("backup", image, image, status=4).stderr
    (tmp_path / "out").write_bytes(b"")
    assert "overwrite" in run("backup", image, tmp_path / "out", status=4).stderr
    error = run_json("backup", image, tmp_path / "out", "--overwrite", status=4)["error"]
    assert error["type"] == "TargetRefusedError"


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    done = run("backup", tmp_path / "none.img", tmp_path / "out", status=1)
    assert "none.img" in done.stderr
    assert "No such file" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("backup",),
        ("backup", "a", "b", "--speed", "fast"),
        ("backup", "a", "b", "--cluster-size", "3K"),
        ("backup", "a", "b", "--workers", "0"),
        ("backup", "a", "b", "--cbw-timeout", "-1"),
        ("backup", "a", "b", "--sync", "none"),
        ("backup", "a", "b", "c"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    run(*arguments, status=2)


def test_status_shows_writers_workers_and_snapshots(image: Path, tmp_path: Path) -> None:
    assert "no coordinator" in run("status", image, status=3).stderr
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
        with coordinator.snapshot(tmp_path / "scratch"):
            found = run_json("status", image)
            assert found["slots"][0]["pid"] == os.getpid()
            assert found["slots"][0]["writes"] == 1
            assert found["snapshots"][0]["state"] == "active"
            assert found["snapshots"][0]["clusters"]["pending"] == SIZE // 65_536
            assert found["coordinator_alive"]
            text = run("status", image).stdout
            for expected in (str(image), f"pid {os.getpid()}", "snapshot 0: active", "worker 1"):
                assert expected in text
            everything = run_json("status")["images"]
            assert any(each["image"]["path"] == str(image) for each in everything if "image" in each)


def test_check_finds_nothing_on_a_healthy_segment_and_names_what_is_broken(image: Path, tmp_path: Path) -> None:
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch"):
            disk.pwrite(b"x", 0)
            assert "hold" in run("check", image).stdout
            segment = coordinator._segment
            # A mark without a copy: what a filter that forgets step 4 would leave.
            position = segment.geometry.epoch_map_offset + 4 * 9
            segment.memory[position : position + 4] = (segment.header(Header.epoch)).to_bytes(4, "little")
            assert "I1: snapshot 0: cluster 9" in run("check", image, status=1).stdout
            violations = run_json("check", image, status=1)["violations"]
            assert [each["invariant"] for each in violations] == ["I1"]


def test_doctor_says_what_there_is() -> None:
    done = run("doctor")
    for name in ("Python", "posix_ipc", "/dev/shm", "core"):
        assert name in done.stdout
    checks = {each["name"]: each for each in run_json("doctor")["checks"]}
    assert checks["posix_ipc"]["good"]


def test_help_and_version() -> None:
    assert "exit status" in run("--help").stdout
    assert run("--version").stdout == f"shmcbw {shmcbw.__version__}\n"
    for command in ("demo", "backup", "status", "check", "doctor"):
        assert "--json" in run(command, "--help").stdout


def test_failpoints_are_listed_with_their_protocol_and_step() -> None:
    lines = run("failpoints").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [point.name for point in POINTS]
    listed = run_json("failpoints")["failpoints"]
    assert [(each["name"], each["protocol"], each["step"]) for each in listed] == [
        (point.name, point.protocol, point.step) for point in POINTS
    ]
