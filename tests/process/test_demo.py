"""The demo: it runs end to end, finds a wrong backup wrong, and leaves nothing behind however it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from shmcbw.workers import demo
from shmcbw.workers.demo import run_demo
from shmcbw.workers.stamps import BLOCK_SIZE, Layout, Log, Unit, Verdict, check, make_unit
from tests.conftest import wait_for

M = 1 << 20


class Kept:
    """What a demo has left in its directory, and a backup in it that can be damaged."""

    def __init__(self, directory: Path, result: dict[str, dict[str, int]]) -> None:
        self.directory = directory
        self.result = result
        self.layout = Layout(**result["layout"])
        self.logs = [Log.read(directory / f"writer-{w}.log", self.layout) for w in range(self.layout.writers)]
        self.backup = bytearray((directory / "backup.img").read_bytes())

    def check(self) -> Verdict:
        path = self.directory / "damaged.img"
        path.write_bytes(self.backup)
        return check(path, self.logs, self.layout)

    def bytes_of(self, unit: Unit) -> bytes:
        return bytes(self.backup[unit.offset : unit.offset + unit.length])

    def put(self, offset: int, data: bytes) -> None:
        self.backup[offset : offset + len(data)] = data

    def rewritten(self, log: Log, low_ns: int) -> tuple[Unit, int]:
        """A unit that was written twice well before the cut: the unit, and the first write of the two."""
        for unit in self.layout.units:
            if log is self.logs[unit.writer]:
                done = [sequence for sequence in log.of_unit(unit.number) if log.ends_ns[sequence] < low_ns]
                if len(done) > 2:
                    return unit, done[-2]
        raise AssertionError("no unit was written twice before the cut")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """One run for all that look at what it has left: directory, exit status, output."""
    directory = tmp_path_factory.mktemp("demo") / "kept"
    stream = io.StringIO()
    return directory, run_demo(16 * M, 3, 2, 1.5, str(directory), True, stream), stream.getvalue()


@pytest.fixture
def kept(run: tuple[Path, int, str]) -> Kept:
    return Kept(run[0], json.loads(run[2]))


def test_the_backup_is_right_and_json_says_so(run: tuple[Path, int, str]) -> None:
    directory, status, output = run
    result = json.loads(output)
    assert status == 0
    assert output.count("\n") == 1
    assert result["right"] is True
    assert result["backup"]["verdict"]["right"] is True
    assert result["backup"]["verdict"]["blocks"] == 16 * M // BLOCK_SIZE
    # None: somebody has set the clock while it ran.
    assert result["backup"]["cut_in_window"] in (True, None)
    assert result["backup"]["drained_ns"] > 0
    assert result["writes"]["count"] > 100
    assert result["waits"]["p50_ns"] <= result["waits"]["p99_ns"] <= result["waits"]["max_ns"]
    assert result["cp"]["error"] is None
    assert json.loads((directory / "demo.json").read_text()) == result
    assert {"disk.img", "backup.img", "cp.img", "writer-0.log", "writer-2.log"} <= set(os.listdir(directory))


def test_the_kept_backup_is_right_for_whoever_judges_it_again(kept: Kept) -> None:
    verdict = kept.check()
    assert verdict.right
    assert kept.result["backup"]["verdict"] == json.loads(json.dumps(verdict.as_dict()))


def test_a_backup_with_two_units_swapped_is_wrong(kept: Kept) -> None:
    same: dict[int, Unit] = {}
    for unit in kept.layout.units:
        other = same.setdefault(unit.blocks, unit)
        if other is not unit:
            break
    one_data, other_data = kept.bytes_of(unit), kept.bytes_of(other)
    kept.put(unit.offset, other_data)
    kept.put(other.offset, one_data)
    assert kept.check().corrupt_blocks == unit.blocks + other.blocks


def test_a_backup_with_a_unit_from_before_the_cut_is_wrong(kept: Kept) -> None:
    unit, sequence = kept.rewritten(kept.logs[1], kept.check().window[0])
    kept.put(unit.offset, make_unit(kept.layout, unit, sequence))
    verdict = kept.check()
    assert (verdict.corrupt_blocks, verdict.torn_units, verdict.stray_units) == (0, 0, 1)


def test_a_backup_with_units_from_after_the_cut_is_wrong(kept: Kept) -> None:
    """What the live image shows at the end, in every tenth unit: a copy that writers were not kept waiting for."""
    live = (kept.directory / "disk.img").read_bytes()
    for unit in kept.layout.units[::10]:
        kept.put(unit.offset, live[unit.offset : unit.offset + unit.length])
    verdict = kept.check()
    assert not verdict.right
    assert verdict.stray_units > 0


def test_a_backup_with_part_of_a_write_is_wrong(kept: Kept) -> None:
    cut_ns = kept.check().window[1]
    for unit in kept.layout.units:
        log = kept.logs[unit.writer]
        later = log.of_unit(unit.number)[-1]
        if unit.blocks > 1 and log.begins_ns[later] > cut_ns:
            break
    kept.put(unit.offset, make_unit(kept.layout, unit, later)[:BLOCK_SIZE])
    assert kept.check().torn_units == 1


def test_in_words_it_tells_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stream = io.StringIO()
    assert run_demo(8 * M, 2, 1, 0.5, None, False, stream) == 0
    assert stream.getvalue().endswith("The backup is right.\n")
    assert "writes were held for" in stream.getvalue()
    assert os.listdir(tmp_path) == []


def test_a_wrong_backup_is_an_exit_status_and_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the copies and the judge, the live image takes the place of the backup."""
    follow = demo._follow

    def sabotage(*arguments: object) -> None:
        follow(*arguments)  # type: ignore[arg-type]
        shutil.copyfile(tmp_path / "kept" / "disk.img", tmp_path / "kept" / "backup.img")

    monkeypatch.setattr(demo, "_follow", sabotage)
    stream = io.StringIO()
    assert run_demo(8 * M, 2, 1, 1.0, str(tmp_path / "kept"), False, stream) == 1
    assert stream.getvalue().rstrip().splitlines()[-2] == "The backup is WRONG."


def test_a_directory_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"data")
    with pytest.raises(ValueError, match="not empty"):
        run_demo(8 * M, 2, 1, 0.5, str(tmp_path), True, io.StringIO())
    assert os.listdir(tmp_path) == ["precious"]


# -- however it ends ---------------------------------------------------------------------------------------------------


@contextmanager
def _running(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process of its own, as the command line starts it, that would write for a minute."""
    code = "import sys; from shmcbw.workers.demo import run_demo; run_demo(8 << 20, 2, 1, 60, None, True, sys.stdout)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _writers(process: subprocess.Popen[str], temporary: Path) -> list[psutil.Process]:
    """Its writer processes, when both have begun to write."""
    wait_for(lambda: len(list(temporary.glob("*/writer-*.log"))) == 2, "the writers' logs")
    wait_for(lambda: all(log.stat().st_size for log in temporary.glob("*/writer-*.log")), "the first writes")
    return [child for child in psutil.Process(process.pid).children() if "shmcbw.workers.demo" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(tmp_path: Path, number: int) -> None:
    with _running(tmp_path) as process:
        children = _writers(process, tmp_path)
        assert len(children) == 2
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    # Python's way to end by an exception that nobody caught; the command line makes 130 of it.
    assert process.returncode == -signal.SIGINT
    assert os.listdir(tmp_path) == []
    assert not [child for child in children if child.is_running()]


def test_a_writer_that_fails_is_named_and_the_others_end(tmp_path: Path) -> None:
    with _running(tmp_path) as process:
        children = _writers(process, tmp_path)
        children[0].kill()
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert output == ""
    assert "ended, status -9: it said nothing" in errors
    assert os.listdir(tmp_path) == []
    assert not [child for child in children if child.is_running()]


def test_a_writer_tells_why_it_failed(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    make_image(8 * M)
    layout = Layout(8 * M, 1, 1)
    demo._Writers(tmp_path, layout, 1)
    command = [sys.executable, "-m", "shmcbw.workers.demo", str(tmp_path), "0"]
    writer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert writer.returncode == 1
    assert writer.stderr.startswith("NoCoordinatorError: ")
    assert "no coordinator serves this image" in writer.stderr


def test_writers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with _running(tmp_path) as process:
        children = _writers(process, tmp_path)
        process.kill()
        gone, alive = psutil.wait_procs(children, timeout=10)
    assert (len(gone), alive) == (2, [])
