"""The journal: old or new whoever dies, of this segment or ignored, gone when the segment goes."""

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
from shmcbw.image import Identity, ImageFile
from shmcbw.layout import Worker
from shmcbw.segment import attach, has_journal, segment_name, sweep
from shmcbw.workers import Coordinator
from shmcbw.workers.journal import Journal
from tests.conftest import needs_root, wait_for

SHM = Path("/dev/shm")
SIZE = 1 << 20

#: A coordinator that stores each of its arguments in turn, says so, and waits to be killed.
STORER = """
import sys
from shmcbw.workers import Coordinator
coordinator = Coordinator(sys.argv[1], workers=1)
for value in sys.argv[2:]:
    with coordinator.journal.change() as document:
        document["nodes"]["value"] = value
print("stored", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def journal_file(image: Path) -> Path:
    return SHM / f"{segment_name(Identity.of(os.stat(image)))[1:]}.state"


def store_and_die(image: Path, *values: str, failpoint: str = "") -> bool:
    """Whether a coordinator got as far as storing all of the values before it was killed."""
    storer = subprocess.Popen(
        [sys.executable, "-c", STORER, str(image), *values],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "SHMCBW_FAILPOINTS": failpoint},
    )
    assert storer.stdout is not None and storer.stdin is not None
    stored = storer.stdout.readline() == b"stored\n"
    storer.kill()
    storer.wait()
    storer.stdin.close()
    storer.stdout.close()
    return stored


def forget(coordinator: Coordinator) -> None:
    with coordinator.journal.change() as document:
        document["nodes"].clear()


def test_what_was_stored_is_there_after_a_kill_and_gone_with_the_segment(image: Path) -> None:
    assert store_and_die(image, "one", "two")
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.journal.document["nodes"] == {"value": "two"}
        forget(coordinator)
        assert not journal_file(image).exists()
    with Coordinator(image, workers=1) as coordinator:
        assert not any(coordinator.journal.document.values())


@pytest.mark.parametrize(("step", "found"), [("written", "old"), ("renamed", "new")])
def test_a_death_at_any_step_leaves_the_old_or_the_new_one(image: Path, step: str, found: str) -> None:
    assert not store_and_die(image, "old", "new", failpoint=f"journal.{step}=kill@1")
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.journal.document["nodes"] == {"value": found}
        assert not journal_file(image).with_name(journal_file(image).name + ".new").exists()
        forget(coordinator)


def test_a_failed_store_changes_nothing(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "journal.written=errno:ENOSPC@1*1")
    with Coordinator(image, workers=1) as coordinator:
        with coordinator.journal.change() as document:
            document["nodes"]["value"] = 1
        with pytest.raises(OSError, match="No space"), coordinator.journal.change() as document:
            document["nodes"]["value"] = 2
        assert coordinator.journal.document["nodes"] == {"value": 1}
        assert json.loads(journal_file(image).read_text())["nodes"] == {"value": 1}
        with pytest.raises(ZeroDivisionError), coordinator.journal.change() as document:
            document["nodes"]["value"] = 1 // 0
        assert coordinator.journal.document["nodes"] == {"value": 1}
        forget(coordinator)


def test_a_segment_with_a_journal_is_swept_only_when_its_image_is_gone(image: Path) -> None:
    file = journal_file(image)
    assert store_and_die(image, "something")
    opened = ImageFile.open(image, writable=False)
    segment = attach(opened)
    opened.close()
    for worker_id in range(1, segment.geometry.worker_count + 1):
        if pid := segment.worker(worker_id, Worker.pid):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(segment.locked, range(1, segment.geometry.worker_count + 1))), "the orphans are dead")
    assert segment.name not in sweep()
    image.unlink()
    assert segment.name in sweep()
    assert not file.exists()
    segment.close()


def test_the_last_writer_to_leave_keeps_a_segment_with_a_journal(image: Path) -> None:
    assert store_and_die(image, "something")
    with Coordinator(image, workers=1) as coordinator:
        disk = shmcbw.open(image)
        disk.pwrite(b"x", 0)
        coordinator.close()
        disk.close()
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.journal.document["nodes"] == {"value": "something"}
        forget(coordinator)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b"\xff" * 100,
        b"[" * 100_000,
        json.dumps({"uuid": "0" * 32, "nodes": {"value": 1}}).encode(),
        json.dumps({"nodes": {"value": 1}}).encode(),
    ],
    ids=["empty", "cut off", "no object", "no text", "too deep", "another uuid", "no uuid"],
)
def test_what_is_not_this_segments_journal_is_removed(image: Path, content: bytes) -> None:
    file = journal_file(image)
    file.write_bytes(content)
    with Coordinator(image, workers=1) as coordinator:
        assert not any(coordinator.journal.document.values())
        assert content == b"" or not file.exists()
        # And so is one that comes while the segment is there.
        file.write_bytes(content)
        assert not any(Journal(coordinator._segment).document.values())
        file.unlink(missing_ok=True)


def test_a_section_that_is_no_object_is_emptied_and_the_others_stay(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        with coordinator.journal.change() as document:
            document["nodes"]["value"] = 1
        stored: dict[str, Any] = json.loads(journal_file(image).read_text())
        stored["jobs"] = 7
        journal_file(image).write_text(json.dumps(stored))
        assert Journal(coordinator._segment).document == {"jobs": {}, "bitmaps": {}, "nodes": {"value": 1}}
        forget(coordinator)


def test_somebody_elses_file_is_ignored_and_keeps_nothing_alive(image: Path) -> None:
    needs_root("giving a file to another user")
    file = journal_file(image)
    with Coordinator(image, workers=1) as coordinator:
        with coordinator.journal.change() as document:
            document["nodes"]["value"] = 1
        os.chown(file, 12345, 12345)
        assert not has_journal(coordinator._segment)
        assert not any(Journal(coordinator._segment).document.values())
        forget(coordinator)


def test_it_has_the_segments_mode_and_group(image: Path) -> None:
    group = os.getgroups()[0] if os.getgroups() else os.getgid()
    with Coordinator(image, workers=1, group=group) as coordinator:
        with coordinator.journal.change() as document:
            document["nodes"]["value"] = 1
        status = journal_file(image).stat()
        assert (status.st_mode & 0o777, status.st_gid) == (0o660, group)
        forget(coordinator)
