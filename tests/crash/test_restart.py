"""A coordinator dies: who goes on, who leaves, what the next one finds, and what is reported as lost."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import shmcbw
from shmcbw.bitmap import Bitmap
from shmcbw.epochs import epoch
from shmcbw.failpoints import POINTS
from shmcbw.image import ImageFile
from shmcbw.invariants import check
from shmcbw.layout import Header, Word, Worker
from shmcbw.seals import header_seal
from shmcbw.segment import attach, worker_byte
from shmcbw.snapshots import broken_error
from shmcbw.workers import Coordinator
from tests.conftest import needs_root, segment_file, wait_for
from tests.owner import ROOT, Owner
from tests.processes import stop_all

SIZE = 4 << 20
GRACE_S = 5.0


def workers_of(image: Path) -> list[int]:
    """The copy workers of an image, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "shmcbw.workers.copy_worker" in command and str(image) in command:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def wait_gone(pids: list[int]) -> None:
    """Wait until these orphans have left by themselves."""
    assert pids
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), "the orphans leave", 4 * GRACE_S)


def kill_owner(image: Path, *commands: dict[str, Any]) -> list[int]:
    """Have a coordinator do these and kill it; its orphans."""
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        for command in commands:
            answer = owner.ask(**command)
            assert answer is not None
            assert "ok" in answer, answer
        return workers_of(image)
    finally:
        owner.end()


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


# -- orphaned workers --------------------------------------------------------------------------------------------------


def test_orphans_serve_writers_while_a_snapshot_needs_them_and_leave_when_the_last_writer_has_gone(
    image: Path, tmp_path: Path
) -> None:
    expected = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        owner.ask(do="snapshot", scratch=str(tmp_path / "scratch"))
        with shmcbw.open(image) as disk:
            orphans = workers_of(image)
            assert len(orphans) == 2
            owner.end()
            end = time.monotonic() + GRACE_S + 2
            while time.monotonic() < end:
                # A first touch every now and then; each needs a worker, for no copying ahead meets every other cluster.
                disk.pwrite(b"later", disk.statistics()["writes"] * 131_072)
                time.sleep(0.25)
            assert all(map(psutil.pid_exists, orphans))
            assert disk.statistics()["wait_count"] == disk.statistics()["writes"]
        wait_gone(orphans)
        assert segment_file(image).exists(), "a coordinator may come back for the snapshot"
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        (snapshot,) = coordinator.snapshots
        assert snapshot.pread(SIZE, 0) == expected


def test_orphans_leave_when_nobody_needs_them_although_no_coordinator_returns(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    """Of one image the backup is copied, and only not finished; of the other one the cut was never taken."""
    copied, uncut = make_image(SIZE, "copied.img"), make_image(SIZE, "uncut.img")
    orphans = kill_owner(copied, {"do": "backup", "target": str(tmp_path / "out")})
    owner = Owner(uncut, SHMCBW_FAILPOINTS="coordinator.prepared=kill")
    try:
        assert owner.answer() is not None
        assert owner.ask(do="backup", target=str(tmp_path / "never")) is None
        owner.process.wait()
        wait_gone([*orphans, *workers_of(uncut)])
    finally:
        owner.end()
    with Coordinator(copied, workers=1) as coordinator:
        for job in coordinator.jobs:
            job.wait(20)
    assert (tmp_path / "out").read_bytes() == copied.read_bytes()
    with Coordinator(uncut, workers=1) as coordinator:
        assert coordinator.jobs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copied.img", "out", "uncut.img"]


def test_a_dead_coordinators_worker_that_dies_after_the_adoption_gives_its_claims_back(
    image: Path, tmp_path: Path
) -> None:
    """It was stopped with clusters claimed, so it could neither leave nor be told from one that copies."""
    expected = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        owner.ask(do="snapshot", scratch=str(tmp_path / "scratch"))
        orphans = workers_of(image)
        stop_all(orphans)
        owner.end()
        with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
            (entry,) = coordinator.status()["snapshots"]
            (stranger, *_) = [w for w in coordinator.status()["workers"] if w["pid"] in orphans]
            bitmap = Bitmap.attach(coordinator._segment, entry["serial"])
            bitmap.memory[3:6] = bytes([stranger["id"]]) * 3
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            disk.pwrite(b"x" * 65_536, 4 * 65_536)
            assert time.monotonic() - started < 15, "served long before cbw_timeout"
            assert [bitmap.state(cluster) for cluster in (3, 5)] == [0, 0]
            bitmap.close()
            wait_for(lambda: check(coordinator._segment) == [], "the dead are reaped")
            (snapshot,) = coordinator.snapshots
            assert snapshot.pread(len(expected), 0) == expected
    finally:
        owner.end()


# -- where it died -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["coordinator.odd", "coordinator.quiet", "coordinator.published"])
def test_a_writer_at_the_gate_of_a_dead_coordinator_gets_out_by_itself(image: Path, tmp_path: Path, point: str) -> None:
    """No coordinator returns: the epoch is odd when it dies.  Its limit (2 s) is not waited for, its lock tells."""
    owner = Owner(image, SHMCBW_FAILPOINTS=f"{point}=kill")
    try:
        assert owner.answer() is not None
        with shmcbw.open(image) as disk:
            disk.pwrite(b"before", 0)
            assert owner.ask(do="backup", target=str(tmp_path / "out"), speed=1) is None
            segment = disk._attached()
            assert epoch(segment) % 2 == 1
            started = time.monotonic()
            disk.pwrite(b"later!", 0)
            assert time.monotonic() - started < 1.5, "well before the limit of the drained section"
            assert epoch(segment) % 2 == 0
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        jobs = coordinator.jobs
        assert len(jobs) == (point == "coordinator.published"), "the cut was taken, or it never will be"
        for job in jobs:
            job.set_speed(0)
            job.wait(20)
            assert (tmp_path / "out").read_bytes()[:6] == b"before"
    assert not list(tmp_path.glob("*.shmcbw-*"))


@pytest.mark.parametrize("point", ["coordinator.complete", "coordinator.synced", "coordinator.named"])
def test_a_job_whose_coordinator_dies_while_it_finishes_it_is_finished_by_the_next(
    image: Path, tmp_path: Path, point: str
) -> None:
    owner = Owner(image, SHMCBW_FAILPOINTS=f"{point}=kill")
    try:
        assert owner.answer() is not None
        owner.ask(do="backup", target=str(tmp_path / "out"))
        assert owner.process.wait(20) == -signal.SIGKILL
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        for job in coordinator.jobs:
            job.wait(20)
            assert job.error is None
        assert coordinator.status()["snapshots"] == []
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "out"]


ADOPTION = [point.name for point in POINTS if point.protocol == "adoption"]


def test_coordinators_that_die_one_after_the_other_while_they_adopt_leave_all_to_the_next(
    image: Path, tmp_path: Path
) -> None:
    """One killed in the middle of a backup, then one at each step of adopting it, then one that adopts."""
    expected = image.read_bytes()
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        with shmcbw.open(image) as disk:
            owner.ask(do="backup", target=str(tmp_path / "out"), speed=1)
            disk.pwrite(b"x" * 100_000, 0)
            owner.end()
            for number, point in enumerate(ADOPTION, 1):
                adopter = Owner(image, SHMCBW_FAILPOINTS=f"{point}=kill")
                try:
                    assert adopter.answer() is None, point
                finally:
                    adopter.end()
                # Writers go on meanwhile, served by the orphans or by whoever was started.
                disk.pwrite(b"y" * 1000, number * 131_072)
            assert disk.statistics()["wait_max_ns"] < 10e9
            with Coordinator(image, workers=1) as coordinator:
                (job,) = coordinator.jobs
                job.set_speed(0)
                job.wait(20)
    finally:
        owner.end()
    assert (tmp_path / "out").read_bytes() == expected


# -- what can't go on --------------------------------------------------------------------------------------------------


def overwrite_header(image: Path, word: Word, value: bytes) -> None:
    """As if the segment had been created with this."""
    with segment_file(image).open("r+b") as file, mmap.mmap(file.fileno(), Header.SIZE) as header:
        header[word.offset : word.offset + word.size] = value
        header[Header.seal.offset : Header.seal.offset + 4] = header_seal(header).to_bytes(4, "little")


def discard_by(image: Path, rule: str) -> str:
    """Make a dead coordinator's segment one that can't be adopted; a word of the reason that must be told."""
    if rule == "resized":
        os.truncate(image, 2 * SIZE)
        return f"{SIZE} bytes"
    if rule == "rebooted":
        overwrite_header(image, Header.boot_id, bytes(16))
        return "last boot"
    if rule == "replaced":
        overwrite_header(image, Header.image_birth_ns, (1).to_bytes(8, "little"))
        return "inode number"
    overwrite_header(image, Header.version, (99).to_bytes(4, "little"))
    return "layout version 99"


RULES = pytest.mark.parametrize("rule", ["resized", "rebooted", "replaced", "relaid"])


@RULES
def test_a_backup_that_can_not_go_on_is_reported_as_failed_and_is_in_nobodys_way(
    image: Path, tmp_path: Path, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "out"
    if rule == "relaid":
        # Workers of another layout can't be told to leave: they leave by themselves.
        wait_gone(kill_owner(image, {"do": "backup", "target": str(target)}))
    else:
        kill_owner(image, {"do": "backup", "target": str(target), "speed": 1})
    reason = discard_by(image, rule)
    with Coordinator(image, workers=1) as coordinator, caplog.at_level(logging.WARNING, "shmcbw"):
        (job,) = coordinator.jobs
        assert (job.status, job.target) == ("concluded", str(target))
        assert isinstance(job.error, shmcbw.JobFailedError)
        for words in (str(target), reason):
            assert words in str(job.error)
        with pytest.raises(shmcbw.JobFailedError):
            job.wait(0)
        job.cancel()
        job.set_speed(7)
        (told,) = coordinator.status()["jobs"]
        assert (told["status"], told["target"]) == ("concluded", str(target))
        assert reason in told["error"]
        if rule != "relaid":
            assert not list(tmp_path.glob("*.shmcbw-*")), "nothing is left of it"
        coordinator.backup(target).wait(20)
        assert len(coordinator.jobs) == 2
    assert target.read_bytes() == image.read_bytes()
    assert any(record.levelno == logging.ERROR and reason in record.getMessage() for record in caplog.records)
    assert not list(tmp_path.glob("*.shmcbw-*"))


def test_a_backup_of_an_image_that_was_replaced_by_a_rename_is_told_at_once(image: Path, tmp_path: Path) -> None:
    """While the dead coordinator's workers still copy the old one, which has lost its name."""
    target, old = tmp_path / "out", segment_file(image)
    orphans = kill_owner(image, {"do": "backup", "target": str(target), "speed": 1})
    assert orphans
    new = tmp_path / "new.img"
    new.write_bytes(bytes(range(256)) * (SIZE // 256))
    new.replace(image)
    with Coordinator(image, workers=1) as coordinator:
        (job,) = coordinator.jobs
        assert (job.status, job.target) == ("concluded", str(target))
        assert "deleted or replaced" in str(job.error)
        assert not old.exists()
        assert not list(tmp_path.glob("*.shmcbw-*")), "nothing is left of it"
        coordinator.backup(target).wait(20)
    assert target.read_bytes() == image.read_bytes()
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.jobs == [], "the failed one was told, the other one is there"


def test_writers_of_an_image_that_was_replaced_keep_their_workers(image: Path, tmp_path: Path) -> None:
    old = segment_file(image)
    owner = Owner(image)
    try:
        assert owner.answer() is not None
        with shmcbw.open(image) as disk:
            assert owner.ask(do="backup", target=str(tmp_path / "out"), speed=1) is not None
            owner.end()
            new = tmp_path / "new.img"
            new.write_bytes(bytes(SIZE))
            new.replace(image)
            with Coordinator(image, workers=1) as coordinator:
                assert coordinator.jobs == []
                disk.pwrite(b"x", SIZE - 1)
                assert disk.statistics()["first_touches"] == 1
                assert disk._segment is not None
                assert broken_error(disk._segment, 0) is None, "an orphan has copied for it"
            assert old.exists()
    finally:
        owner.end()
    with Coordinator(image, workers=1) as coordinator:
        (job,) = coordinator.jobs
        assert "deleted or replaced" in str(job.error)
    assert not old.exists()


def test_scratch_of_a_snapshot_that_can_not_go_on_is_removed(image: Path, tmp_path: Path) -> None:
    kill_owner(image, {"do": "snapshot", "scratch": str(tmp_path / "scratch")})
    discard_by(image, "rebooted")
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.jobs == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img"]


def test_a_backup_that_had_its_name_already_is_no_failure(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    kill_owner_at_the_end(image, tmp_path / "out")
    discard_by(image, "resized")
    with Coordinator(image, workers=1) as coordinator:
        assert coordinator.jobs == []
    assert (tmp_path / "out").read_bytes() == expected


def kill_owner_at_the_end(image: Path, target: Path) -> None:
    owner = Owner(image, SHMCBW_FAILPOINTS="coordinator.named=kill")
    try:
        assert owner.answer() is not None
        owner.ask(do="backup", target=str(target))
        assert owner.process.wait(20) == -signal.SIGKILL
    finally:
        owner.end()


def test_a_backup_whose_target_has_gone_is_reported_as_failed(image: Path, tmp_path: Path) -> None:
    kill_owner(image, {"do": "backup", "target": str(tmp_path / "out"), "speed": 1})
    (tmp_path / "out.shmcbw-partial").unlink()
    with Coordinator(image, workers=1) as coordinator:
        (job,) = coordinator.jobs
        assert isinstance(job.error, shmcbw.JobFailedError)
        assert coordinator.status()["snapshots"] == []


SWEEP = """
import logging, os, sys
from pathlib import Path
from shmcbw.workers import Coordinator
from tests.crash.test_restart import kill_owner, wait_gone
image, other, target = map(Path, sys.argv[1:])
orphans = kill_owner(image, {"do": "backup", "target": str(target), "speed": 1})
image.unlink()
wait_gone(orphans)
logging.basicConfig(stream=sys.stdout)
Coordinator(other, workers=1).close()
print(os.listdir("/dev/shm"))
"""


def test_a_backup_of_a_deleted_image_is_told_by_whoever_sweeps(make_image: Callable[..., Path], tmp_path: Path) -> None:
    """With a /dev/shm of its own: any coordinator on the machine may be the one."""
    needs_root("a /dev/shm of its own")
    images = make_image(SIZE), make_image(SIZE, "other.img")
    script = 'mount -t tmpfs none /dev/shm && exec "$0" -c "$SWEEP" "$@"'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, *map(str, images), str(tmp_path / "out")]
    environment = {**os.environ, "SWEEP": SWEEP}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("[]\n"), done.stderr
    assert f"ERROR:shmcbw:the unfinished backup to {tmp_path / 'out'} has failed: its image {images[0]}" in done.stdout
    assert not list(tmp_path.glob("*.shmcbw-*"))


def test_what_a_reboot_left_beside_a_target_is_told_and_removed_by_the_next_backup_to_it(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a real reboot there is no segment any more, only the file."""
    (tmp_path / "out.shmcbw-partial").write_bytes(b"rest")
    with Coordinator(image, workers=1) as coordinator, caplog.at_level(logging.WARNING, "shmcbw"):
        coordinator.backup(tmp_path / "out").wait(20)
    assert any("out.shmcbw-partial" in record.getMessage() for record in caplog.records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "out"]


def test_the_command_line_tells_of_the_lost_backup_and_makes_the_new_one(image: Path, tmp_path: Path) -> None:
    kill_owner(image, {"do": "backup", "target": str(tmp_path / "out"), "speed": 1})
    discard_by(image, "resized")
    command = [sys.executable, "-m", "shmcbw", "backup", str(image), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"the unfinished backup to {tmp_path / 'out'} has failed" in done.stderr
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_an_id_that_a_dead_coordinators_worker_takes_at_the_last_moment_is_left_to_it(image: Path) -> None:
    """The coordinator stops when it has started its first worker; then somebody else is faster to take that id."""
    for _ in range(5):
        owner = Owner(image, SHMCBW_FAILPOINTS="coordinator.spawned=stop*1")
        try:
            wait_for(lambda: psutil.Process(owner.pid).status() == psutil.STATUS_STOPPED, "it stops", 20)  # noqa: B023
            file = ImageFile.open(image, writable=False)
            segment = attach(file)
            file.close()
            taken = segment.try_lock(worker_byte(1))
            os.kill(owner.pid, signal.SIGCONT)
            assert owner.answer() is not None
            if taken:
                ids = [segment.worker(worker_id, Worker.pid) != 0 for worker_id in (1, 2, 3)]
                # Before it closes: who holds an id keeps the segment.
                segment.close()
                assert ids == [False, True, True]
                assert owner.ask(do="close") is not None
                return
            segment.close()
        finally:
            owner.end()
    raise AssertionError("five times the worker was faster than this test")


def test_a_worker_that_a_dead_coordinator_started_too_late_takes_no_id(image: Path) -> None:
    """The next coordinator stops when it has started its first worker, before its generation is the pool's."""
    owner = Owner(image, SHMCBW_FAILPOINTS="coordinator.spawned=stop*1")
    try:
        wait_for(lambda: psutil.Process(owner.pid).status() == psutil.STATUS_STOPPED, "it stops", 20)
        with (
            contextlib.closing(ImageFile.open(image, writable=False)) as file,
            contextlib.closing(attach(file)) as segment,
        ):
            earlier = segment.header(Header.last_generation) - 1
            command = [sys.executable, "-P", "-m", "shmcbw.workers.copy_worker", str(image), "2", str(earlier)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            assert not segment.locked(worker_byte(2))
        os.kill(owner.pid, signal.SIGCONT)
        assert owner.answer() is not None
        assert owner.ask(do="close") is not None
    finally:
        owner.end()


def test_a_number_of_the_last_generation_that_was_overwritten_is_put_right(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        segment = coordinator.segment
        latest = segment.header(Header.last_generation)
        segment.set_header(Header.last_generation, latest + 7)
        wait_for(lambda: segment.header(Header.last_generation) == latest, "the coordinator looks")
        (worker,) = workers_of(image)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: workers_of(image) not in ([], [worker]), "another worker serves")


def test_a_backup_that_was_being_cancelled_is_not_reported_as_lost(image: Path, tmp_path: Path) -> None:
    """Its coordinator died between removing the unfinished target and freeing the entry: that was no loss."""
    owner = Owner(image, SHMCBW_FAILPOINTS="coordinator.removed=kill,worker.copying=delay:500")
    try:
        assert owner.answer() is not None
        assert "ok" in (owner.ask(do="backup", target=str(tmp_path / "out")) or {})
        owner.ask(do="close")
        assert owner.process.wait(20) == -signal.SIGKILL
    finally:
        owner.end()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"], "the target was removed"
    with Coordinator(image, workers=1) as coordinator:
        assert [job.error for job in coordinator.jobs] == []
        assert coordinator.status()["snapshots"] == []
