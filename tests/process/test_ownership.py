"""Who may own and who may attach; what is refused, and what a dead coordinator leaves."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw import segment as segments
from shmcbw.layout import Header, Word
from shmcbw.seals import header_seal
from shmcbw.segment import sweep
from shmcbw.workers import Coordinator
from tests.conftest import needs_root, segment_file, wait_for
from tests.processes import running, stop_all, write_forever

SHM = Path(segments.SHM)
SIZE = 4 << 20

OWNER = """
import sys, time
from shmcbw.workers import Coordinator
coordinator = Coordinator(sys.argv[1], workers=1)
if len(sys.argv) > 2:
    job = coordinator.backup(sys.argv[2], speed=1)
print("ready", flush=True)
time.sleep(60)
"""


def start_owner(image: Path, *arguments: str) -> subprocess.Popen[bytes]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(image), *arguments], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    owner.stdout.close()
    return owner


def write_creators_word(image: Path, word: Word, value: bytes) -> bytes:
    """Write a word as if the segment had been created with it; what was there."""
    with segment_file(image).open("r+b") as file, mmap.mmap(file.fileno(), Header.SIZE) as header:
        before = header[word.offset : word.offset + word.size]
        header[word.offset : word.offset + word.size] = value
        header[Header.seal.offset : Header.seal.offset + 4] = header_seal(header).to_bytes(4, "little")
    return before


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


def test_a_second_coordinator_is_refused_with_the_pid_of_the_first(image: Path) -> None:
    with Coordinator(image, workers=1):
        with pytest.raises(shmcbw.ShmcbwError, match=f"already.*{os.getpid()}"):
            Coordinator(image)


def test_of_coordinators_that_start_at_once_exactly_one_wins(image: Path) -> None:
    script = (
        "import sys, time\nfrom shmcbw.workers import Coordinator\nimport shmcbw\n"
        "try:\n    coordinator = Coordinator(sys.argv[1], workers=1)\n"
        "except shmcbw.ShmcbwError:\n    print('refused', flush=True)\n    sys.exit()\n"
        "print('owner', flush=True)\nsys.stdin.read()\ncoordinator.close()\n"
    )
    command = [sys.executable, "-c", script, str(image)]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.stdout.readline() if process.stdout else "" for process in started]
    for process in started:
        process.communicate()
    assert sorted(answers) == ["owner\n", "refused\n", "refused\n", "refused\n"]


def test_the_segment_is_private_by_default_and_the_groups_with_a_group(image: Path) -> None:
    with Coordinator(image, workers=1):
        modes = {path.stat().st_mode & 0o777 for path in SHM.glob("*shmcbw*") if segment_file(image).name in path.name}
        assert modes == {0o600}
    group = os.getgroups()[0] if os.getgroups() else os.getgid()
    previous = os.umask(0o077)
    try:
        with Coordinator(image, workers=1, group=group):
            files = [path for path in SHM.glob("*shmcbw*") if segment_file(image).name in path.name]
            assert {path.stat().st_mode & 0o777 for path in files} == {0o660}
            assert {path.stat().st_gid for path in files} == {group}
    finally:
        os.umask(previous)


def test_a_segment_of_another_user_is_refused(image: Path) -> None:
    needs_root("giving a file to another user")
    file = segment_file(image)
    file.write_bytes(bytes(8192))
    os.chown(file, 12345, 12345)
    try:
        with pytest.raises(shmcbw.ForeignSegmentError, match="uid 12345"):
            shmcbw.open(image)
        with pytest.raises(shmcbw.ForeignSegmentError, match="uid 12345"):
            Coordinator(image)
        assert file.exists()
    finally:
        file.unlink()


def test_a_segment_that_everybody_may_write_is_refused(image: Path) -> None:
    with Coordinator(image, workers=1):
        segment_file(image).chmod(0o666)
        with pytest.raises(shmcbw.ForeignSegmentError, match="everybody"):
            shmcbw.open(image)


def test_a_foreign_file_under_our_name_is_refused(image: Path) -> None:
    file = segment_file(image)
    file.write_bytes(b"not ours" * 1024)
    file.chmod(0o600)
    try:
        with pytest.raises(shmcbw.ForeignSegmentError, match="not a control segment"):
            shmcbw.open(image)
        with pytest.raises(shmcbw.ForeignSegmentError, match="not a control segment"):
            Coordinator(image)
        assert file.read_bytes() == b"not ours" * 1024
    finally:
        file.unlink()


def test_a_foreign_layout_version_is_refused(image: Path) -> None:
    with Coordinator(image, workers=1) as coordinator:
        with coordinator._lock:  # it would put its header right
            coordinator._segment.set_header(Header.version, 99)
            with pytest.raises(shmcbw.LayoutVersionError, match="version 99"):
                shmcbw.open(image)
            with pytest.raises(shmcbw.ShmcbwError, match="live processes"):
                Coordinator(image)


def test_an_unfinished_segment_of_a_dead_creator_is_discarded(image: Path) -> None:
    file = segment_file(image)
    file.write_bytes(b"")
    file.chmod(0o600)
    with pytest.raises(shmcbw.NoCoordinatorError, match="not finished"):
        shmcbw.open(image)
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)


def test_an_unfinished_segment_of_another_image_is_swept_when_it_is_old(
    image: Path, make_image: Callable[..., Path]
) -> None:
    file = segment_file(make_image(SIZE, "other.img"))
    file.write_bytes(bytes(8192))
    file.chmod(0o600)
    Coordinator(image, workers=1).close()
    assert file.exists(), "a coordinator may be making it at this moment"
    os.utime(file, (0, 0))
    Coordinator(image, workers=1).close()
    assert not file.exists()


def test_a_segment_from_before_the_boot_is_discarded(image: Path) -> None:
    owner = start_owner(image)
    stop_all([owner.pid])  # it would put its header right
    write_creators_word(image, Header.boot_id, bytes(16))
    with pytest.raises(shmcbw.ShmcbwError, match="last boot"):
        shmcbw.open(image)
    owner.kill()
    owner.wait()
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)


def test_an_image_that_was_resized_is_served_anew_and_the_orphans_are_sent_away(image: Path, tmp_path: Path) -> None:
    owner = start_owner(image, str(tmp_path / "out"))
    owner.kill()
    owner.wait()
    os.truncate(image, 2 * SIZE)
    with Coordinator(image, workers=1), shmcbw.open(image) as disk:
        disk.pwrite(b"x", 2 * SIZE - 1)
    assert not (tmp_path / "out").exists()


def test_an_image_that_only_has_the_inode_number_of_the_old_one_is_another_image(image: Path, tmp_path: Path) -> None:
    """The image was deleted with an unfinished backup, and a new file got its inode number: nothing is adopted."""
    owner = start_owner(image, str(tmp_path / "out"))
    stop_all([owner.pid])  # it would put its header right
    before = write_creators_word(image, Header.image_birth_ns, (1).to_bytes(8, "little"))
    assert int.from_bytes(before, "little") > 0
    owner.kill()
    owner.wait()
    with pytest.raises(shmcbw.ShmcbwError, match="inode number"):
        shmcbw.open(image)
    with Coordinator(image, workers=1) as coordinator:
        # What it was is told (test_restart.py), and nothing goes on.
        assert [job.status for job in coordinator.jobs] == ["concluded"]


def test_a_writer_in_a_segment_that_does_not_fit_any_more_is_not_overrun(image: Path) -> None:
    owner = start_owner(image)
    with shmcbw.open(image):
        owner.kill()
        owner.wait()
        os.truncate(image, 2 * SIZE)
        with pytest.raises(shmcbw.ShmcbwError, match="live processes hold it"):
            Coordinator(image, workers=1)


def test_orphaned_workers_leave_and_clean_up_after_the_grace_time(image: Path) -> None:
    owner = start_owner(image)
    owner.kill()
    owner.wait()
    with pytest.raises(shmcbw.NoCoordinatorError, match="ended or died"):
        shmcbw.open(image)
    wait_for(lambda: not segment_file(image).exists(), "the orphans remove the segment", 20)


def test_writers_go_on_when_the_coordinator_is_killed_and_are_adopted(image: Path, tmp_path: Path) -> None:
    owner = start_owner(image)
    with shmcbw.open(image) as disk:
        disk.pwrite(b"before", 0)
        owner.kill()
        owner.wait()
        disk.pwrite(b"orphan", 0)
        with Coordinator(image, workers=1) as coordinator:
            assert len(coordinator.status()["slots"]) == 1
            job = coordinator.backup(tmp_path / "out", speed=1)
            disk.pwrite(b"later!", 0)
            job.set_speed(0)
            job.wait(10)
    assert (tmp_path / "out").read_bytes()[:6] == b"orphan"


def test_a_backup_of_a_killed_coordinator_goes_on_and_ends_right(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    owner = start_owner(image, str(tmp_path / "out"))
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x" * 100_000, 500_000)
        owner.kill()
        owner.wait()
        disk.pwrite(b"y" * 100_000, 1_500_000)
        assert not (tmp_path / "out").exists()
        with Coordinator(image, workers=2) as coordinator:
            (job,) = coordinator.jobs
            disk.pwrite(b"z" * 100_000, 2_500_000)
            job.set_speed(0)
            job.wait(20)
            assert coordinator.status()["snapshots"] == []
    assert (tmp_path / "out").read_bytes() == expected


def test_a_handle_whose_segment_was_removed_meanwhile_attaches_anew(image: Path, tmp_path: Path) -> None:
    """No thread of it had a slot, so the next coordinator could not know of it: its next write must not bypass cuts."""
    owner = start_owner(image)
    opened: list[shmcbw.Disk] = []
    thread = threading.Thread(target=lambda: opened.append(shmcbw.open(image)))
    thread.start()
    thread.join()
    (disk,) = opened
    owner.kill()
    owner.wait()
    wait_for(lambda: not segment_file(image).exists(), "the orphans remove the segment", 20)
    with Coordinator(image, workers=1) as coordinator, coordinator.snapshot(tmp_path / "scratch") as snapshot:
        expected = snapshot.pread(SIZE, 0)
        disk.pwrite(b"new" * 1000, 0)
        assert snapshot.pread(SIZE, 0) == expected
        assert len(coordinator.status()["slots"]) == 1
        disk.close()


def test_an_adopted_backup_replaces_no_file_that_it_was_not_allowed_to(image: Path, tmp_path: Path) -> None:
    owner = start_owner(image, str(tmp_path / "out"))
    owner.kill()
    owner.wait()
    (tmp_path / "out").write_bytes(b"precious")
    with Coordinator(image, workers=1) as coordinator:
        (job,) = coordinator.jobs
        job.set_speed(0)
        with pytest.raises(shmcbw.JobFailedError):
            job.wait(20)
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_a_program_that_ends_without_closing_leaves_nothing(image: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom shmcbw.workers import Coordinator\n"
        "coordinator = Coordinator(sys.argv[1], workers=1)\ncoordinator.backup(sys.argv[2], speed=1)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(image), str(tmp_path / "out")], check=True, timeout=30)
    assert not segment_file(image).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk.img"]


def test_writers_that_come_and_go_do_not_keep_a_coordinator_from_starting(image: Path) -> None:
    script = (
        "import sys, shmcbw\nwhile True:\n    try:\n        shmcbw.open(sys.argv[1]).close()\n"
        "    except shmcbw.ShmcbwError:\n        pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(image)]) as writer:
        try:
            for _ in range(10):
                Coordinator(image, workers=1).close()
        finally:
            writer.kill()
    with Coordinator(image, workers=1):
        pass


def test_writers_stay_when_the_coordinator_closes_and_the_last_one_cleans_up(image: Path) -> None:
    with running(write_forever, str(image), 1) as writer:
        with Coordinator(image, workers=1) as coordinator:
            wait_for(lambda: any(s["writes"] > 10 for s in coordinator.status()["slots"]), "a writer", 20)
        assert segment_file(image).exists()
        with Coordinator(image, workers=1) as again:
            before = again.status()["slots"][0]["writes"]
            wait_for(lambda: again.status()["slots"][0]["writes"] > before, "it goes on")
            os.kill(writer.pid or 0, signal.SIGKILL)
            wait_for(lambda: again.status()["slots"] == [], "reaped", 2)
    with Coordinator(image, workers=1):
        disk = shmcbw.open(image)
    assert segment_file(image).exists()
    disk.pwrite(b"still", 0)
    disk.close()
    assert not segment_file(image).exists()


def test_a_full_dev_shm_is_an_error_at_creation_and_nothing_is_left(image: Path) -> None:
    """In a mount namespace of its own, with a /dev/shm that is too small for the segment."""
    needs_root("a small /dev/shm")
    script = (
        "import os, sys\nfrom shmcbw.workers import Coordinator\n"
        "try:\n    Coordinator(sys.argv[1], cluster_size=4096)\n"
        "except OSError as error:\n    print(error.errno, error.strerror, os.listdir('/dev/shm'))\n"
    )
    command = f'mount -t tmpfs -o size=64k none /dev/shm && exec {sys.executable} -c "$SCRIPT" {image}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env={**os.environ, "SCRIPT": script}, capture_output=True, text=True
    )
    assert done.stdout.startswith(f"28 {image}: can't be served: can't allocate"), done.stderr
    assert done.stdout.endswith("[]\n")


def test_the_next_coordinator_of_any_image_sweeps_what_nobody_can_need(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    """The coordinator has closed, its last writer was killed, the image was deleted: nobody is left to clean up."""
    gone, other = make_image(SIZE, "gone.img"), make_image(SIZE, "other.img")
    with running(write_forever, str(gone), 1) as writer:
        with Coordinator(gone, workers=1) as coordinator:
            wait_for(lambda: any(s["writes"] for s in coordinator.status()["slots"]), "a writer", 20)
        file = segment_file(gone)
        with Coordinator(other, workers=1):
            assert file.exists(), "a living writer's segment stays"
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
    assert file.exists()
    gone.unlink()
    with Coordinator(other, workers=1):
        # Another test's coordinator may be sweeping it at this very moment.
        wait_for(lambda: not file.exists(), "it is swept")


def test_orphans_of_a_deleted_image_leave_although_a_backup_is_unfinished(image: Path, tmp_path: Path) -> None:
    owner = start_owner(image, str(tmp_path / "out"))
    file = segment_file(image)
    owner.kill()
    owner.wait()
    image.unlink()
    wait_for(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(image) in (p.info["cmdline"] or [])],
        "the orphans leave",
        20,
    )
    # A dying process has no command line any more and may still hold its lock for a moment.
    wait_for(lambda: sweep() or not file.exists(), "nobody holds the segment", 5)
    assert not file.exists()


# -- the last one to leave ---------------------------------------------------------------------------------------------


class LeavesWhenSeen:
    """A segment as its last users see it when a writer leaves just after he was seen in it."""

    def __init__(self, segment: segments.Segment, disk: shmcbw.Disk) -> None:
        self._segment, self._disk = segment, disk

    def set_header(self, word: Word, value: int) -> None:
        self._segment.set_header(word, value)
        if word == Header.retired and value == 0:
            self._disk.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._segment, name)


def test_a_writer_that_leaves_while_its_coordinator_closes_leaves_no_segment(image: Path) -> None:
    coordinator = Coordinator(image, workers=1)
    disk = shmcbw.open(image)
    disk.pwrite(b"x", 0)
    coordinator._segment = LeavesWhenSeen(coordinator._segment, disk)  # type: ignore[assignment]
    coordinator.close()
    assert not segment_file(image).exists()


def test_two_writers_that_leave_at_once_leave_no_segment(image: Path) -> None:
    with Coordinator(image, workers=1):
        first, second = shmcbw.open(image), shmcbw.open(image)
        first.pwrite(b"x", 0)
        second.pwrite(b"y", 0)
    assert segment_file(image).exists()
    first._segment = LeavesWhenSeen(first._segment, second)  # type: ignore[arg-type, assignment]
    first.close()
    assert not segment_file(image).exists()
