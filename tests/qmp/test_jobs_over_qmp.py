"""Jobs over QMP: what QEMU does worse, and what a kill of the daemon leaves."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from tests.conftest import wait_for
from tests.monitor import Connection, Monitored

MakeImage = Callable[..., Path]
SIZE = 1 << 20
CLUSTER = 65536


class Set:
    """A daemon with an image, a target, and a client."""

    def __init__(self, daemon: Monitored, image: Path, target: Path) -> None:
        self.daemon = daemon
        self.image = image
        self.target = target
        self.content = image.read_bytes()
        self.client = daemon.connect()
        self.client.execute("blockdev-add", driver="file", node_name="t", filename=str(target))

    def backup(self, **options: Any) -> None:
        """Start job ``j``."""
        arguments = {"device": "n", "target": "t", "sync": "full", "job-id": "j", **options}
        self.client.execute("blockdev-backup", **arguments)

    def again(self) -> Connection:
        """Kill the daemon, start it again, and connect."""
        self.daemon.kill()
        self.daemon.start()
        self.client = self.daemon.connect()
        return self.client

    def job(self) -> dict[str, Any]:
        (job,) = self.client.execute("query-block-jobs")
        found: dict[str, Any] = job
        return found

    def workers(self) -> list[int]:
        return [each["pid"] for each in self.client.execute("x-shmcbw-query-workers", node_name="n")]


@pytest.fixture
def set_(tmp_path: Path, make_image: MakeImage) -> Iterator[Set]:
    image, target = make_image(SIZE), tmp_path / "target.img"
    target.touch()
    os.truncate(target, SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        yield Set(daemon, image, target)


# -- a kill in each state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "paused", "pending", "concluded", "failed"])
def test_a_job_is_as_before_after_a_kill_of_the_daemon(set_: Set, state: str) -> None:
    options: dict[str, Any] = {"auto-finalize": False, "auto-dismiss": False, "filter-node-name": "flt"}
    client = set_.client
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    if state in ("running", "paused"):
        options["speed"] = 1
    if state == "failed":
        client.execute("x-shmcbw-set-failpoint", node_name="n", name="worker.copying", action="errno:EIO")
    set_.backup(**options, **{"bitmap": "b", "bitmap-mode": "on-success"})
    with shmcbw.open(set_.image) as disk:
        disk.pwrite(b"after the cut", 5 * CLUSTER)
    if state == "paused":
        client.execute("job-pause", id="j")
    elif state != "running":
        client.wait_status("j", "pending" if state in ("pending", "concluded") else "concluded")
    if state == "concluded":
        client.execute("job-finalize", id="j")
        client.wait_status("j", "concluded")
    before = set_.job()
    bitmaps = _bitmaps(client)
    client = set_.again()
    after = set_.job()
    moving = ("busy", "offset") if state == "running" else ("busy",)
    for name in moving:
        del before[name], after[name]
    assert after == before
    assert _bitmaps(client) == bitmaps
    if state in ("concluded", "failed"):
        # No job stands on it: it is forgotten, or can be removed.
        reply = client.ask("blockdev-del", node_name="t")
        assert "return" in reply or reply["error"]["desc"].startswith("Failed to find")
    else:
        assert "is busy" in client.refusal("blockdev-del", node_name="t")
        assert client.refusal("blockdev-del", node_name="flt") == "Node flt is in use"
        if state == "paused":
            client.execute("job-resume", id="j")
        client.execute("block-job-set-speed", device="j", speed=0) if state in ("running", "paused") else None
        wait_for(lambda: set_.job()["status"] == "pending", "it goes on to its end")
        client.execute("job-finalize", id="j")
        client.wait_status("j", "concluded")
    client.execute("job-dismiss", id="j")
    assert client.execute("query-jobs") == []
    expected = bytes(SIZE) if state == "failed" else set_.content
    assert set_.target.read_bytes() == expected
    count = _bitmaps(client)["b"]["count"]
    assert count == CLUSTER, "what was written since the cut; before it, nothing was"


@pytest.mark.parametrize("step", ["coordinator.prepared", "coordinator.published", "coordinator.even"])
def test_a_kill_around_a_jobs_cut_leaves_all_of_the_transaction_or_what_was_before(set_: Set, step: str) -> None:
    """Killed before the cut there was no job; behind it, when the job is `created` and nobody was told, there is one.
    The late changes to bitmaps are not made in either case: they hold more than they must, never less."""
    client = set_.client
    client.execute("block-dirty-bitmap-add", node="n", name="b")
    with shmcbw.open(set_.image) as disk:
        disk.pwrite(b"before", 5 * CLUSTER)
        content = set_.image.read_bytes()
        bitmaps = _bitmaps(client)
        client.execute("x-shmcbw-set-failpoint", node_name="n", name=step, action="kill*1")
        actions = [
            {"type": "block-dirty-bitmap-add", "data": {"node": "n", "name": "new"}},
            {"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}},
            {
                "type": "blockdev-backup",
                "data": {"device": "n", "target": "t", "sync": "full", "job-id": "j", "auto-dismiss": False},
            },
        ]
        with pytest.raises((EOFError, ConnectionError)):
            client.execute("transaction", actions=actions)
        client = set_.again()
        disk.pwrite(b"after", 6 * CLUSTER)
    found = _bitmaps(client)
    assert list(found) == ["b"], "what was to be added is not there"
    assert found["b"]["recording"] and found["b"]["count"] == bitmaps["b"]["count"] + CLUSTER
    jobs = client.execute("query-jobs")
    if step != "coordinator.prepared":
        assert [job["id"] for job in jobs] == ["j"]
        wait_for(lambda: client.execute("query-jobs")[0]["status"] == "concluded", "it goes on to its end")
        client.execute("job-dismiss", id="j")
        assert set_.target.read_bytes() == content
    else:
        assert jobs == []
        assert set_.target.read_bytes() == bytes(SIZE)
        assert "return" in client.ask("blockdev-add", driver="file", node_name="t", filename=str(set_.target))
        client.execute("transaction", actions=actions[1:])
        client.wait_status("j", "concluded")
        client.execute("job-dismiss", id="j")
        assert _bitmaps(client)["b"]["count"] == 0


def _bitmaps(client: Connection) -> dict[str, dict[str, Any]]:
    nodes = {each["node-name"]: each for each in client.execute("query-named-block-nodes")}
    return {each["name"]: each for each in nodes["n"].get("dirty-bitmaps", [])}


def test_jobs_are_left_to_the_next_daemon_with_detach_jobs(tmp_path: Path, make_image: MakeImage) -> None:
    image, target = make_image(SIZE), tmp_path / "target.img"
    target.touch()
    os.truncate(target, SIZE)
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n", "--detach-jobs") as daemon:
        set_ = Set(daemon, image, target)
        set_.backup(speed=1, **{"auto-dismiss": False})
        workers = set_.workers()
        with shmcbw.open(image) as disk:
            assert daemon.stop() == 0
            assert all(Path(f"/proc/{pid}").exists() for pid in workers), "the workers serve on"
            disk.pwrite(b"meanwhile", 3 * CLUSTER)
        daemon.start()
        set_.client = daemon.connect()
        assert set_.job()["status"] == "running"
        set_.client.execute("block-job-set-speed", device="j", speed=0)
        wait_for(lambda: set_.job()["status"] == "concluded", "it goes on to its end")
        set_.client.execute("job-dismiss", id="j")
        assert target.read_bytes() == set_.content


def test_nothing_is_kept_for_a_job_that_has_ended_by_itself(set_: Set) -> None:
    status = set_.image.stat()
    journal = Path(f"/dev/shm/shmcbw-{status.st_dev:x}-{status.st_ino:x}.state")
    set_.backup(speed=1)
    assert journal.exists()
    set_.client.execute("block-job-set-speed", device="j", speed=0)
    set_.client.wait_status("j", "null")
    wait_for(lambda: not journal.exists(), "there is nothing to come back for")


def test_jobs_are_cancelled_by_a_clean_end(set_: Set) -> None:
    set_.backup(speed=1)
    assert set_.daemon.stop() == 0
    assert set_.client.wait_event("BLOCK_JOB_CANCELLED")["device"] == "j"
    assert set_.target.read_bytes() == bytes(SIZE)
    assert sorted(path.name for path in set_.target.parent.iterdir()) == ["daemon.log", "disk.img", "target.img"]


# -- faults of QEMU that are not ours (qemu.md, section 10) ------------------------------------------------------------


def add_snapshot(set_: Set, **options: Any) -> None:
    arguments = {"driver": "copy-before-write", "node-name": "cbw", "file": "n", "target": "t", **options}
    set_.client.execute("blockdev-add", **arguments)
    set_.client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")


def timed_write(image: Path, cluster: int) -> tuple[float, OSError | None]:
    with shmcbw.open(image) as disk:
        started = time.monotonic()
        try:
            disk.pwrite(b"new", cluster * CLUSTER)
        except OSError as error:
            return time.monotonic() - started, error
        return time.monotonic() - started, None


@pytest.mark.parametrize("timeout", [5, 45] if os.environ.get("SHMCBW_DIFFERENTIAL") == "all" else [5])
@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_cbw_timeouts_are_what_they_say(set_: Set, timeout: int, policy: str) -> None:
    """D8, L1: in QEMU 7.2 a timeout of 5 s fires after 0.71 s, one of 45 s after 2.05 s.  D11, L7: a break is told."""
    add_snapshot(set_, **{"cbw-timeout": timeout, "on-cbw-error": policy})
    workers = set_.workers()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        waited, error = timed_write(set_.image, 3)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    assert timeout <= waited <= timeout * 1.05 + 1.0
    if policy == "break-guest-write":
        assert isinstance(error, TimeoutError)
        assert read_ok(set_)
        return
    assert error is None
    event = set_.client.wait_event("SNAPSHOT_BROKEN")
    assert (event["error"], event["offset"]) == ("Connection timed out", 3 * CLUSTER)
    assert abs(event["time"] - time.time()) < 60
    assert "Connection timed out at cluster 3" in set_.client.refusal(
        "x-shmcbw-snapshot-read", node_name="access", offset=0, length=1
    )
    (snapshot,) = set_.client.execute("x-shmcbw-query-snapshots", node_name="n")
    assert snapshot["broken"]["error"] == "Connection timed out" and snapshot["broken"]["cluster"] == 3


def read_ok(set_: Set) -> bool:
    found = set_.client.ask("x-shmcbw-snapshot-read", node_name="access", offset=3 * CLUSTER, length=16)
    return "return" in found


def test_a_write_does_not_wait_behind_queued_background_work(set_: Set) -> None:
    """L2: in QEMU a 4 KiB write waited 6.61 s, at default settings, behind what was queued for a slow target."""
    single_s = 0.25
    for point in ("worker.copying",):
        set_.client.execute("x-shmcbw-set-failpoint", node_name="n", name=point, action=f"delay:{int(single_s * 1000)}")
    set_.backup(speed=0, **{"x-perf": {"max-workers": 64}})
    waited, error = timed_write(set_.image, 15)
    assert error is None
    assert waited <= 3 * single_s + 0.5
    set_.client.execute("x-shmcbw-set-failpoint", node_name="n", name="worker.copying", action="")
    set_.client.wait_status("j", "null")
    assert set_.target.read_bytes() == set_.content


def test_ignored_errors_are_told_at_most_once_a_second_with_their_number(set_: Set) -> None:
    """D9, L5: in QEMU 540 events a second."""
    set_.client.execute("x-shmcbw-set-failpoint", node_name="n", name="worker.copying", action="errno:EIO")
    set_.backup(**{"on-target-error": "ignore"})
    set_.client.wait_event("BLOCK_JOB_ERROR", lambda data: data.get("x-shmcbw-count", 0) > 1)
    deadline = time.monotonic() + 2.5
    while time.monotonic() < deadline:
        try:
            set_.client.receive(deadline - time.monotonic())
        except TimeoutError:
            break
    stamps = [
        event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
        for event in set_.client.events
        if event["event"] == "BLOCK_JOB_ERROR"
    ]
    assert len(stamps) >= 2
    assert min(later - earlier for earlier, later in itertools.pairwise(stamps)) >= 0.9
    set_.client.execute("x-shmcbw-set-failpoint", node_name="n", name="worker.copying", action="")
    set_.client.wait_status("j", "null")
    assert set_.target.read_bytes() == set_.content


def test_a_low_speed_limits_the_first_chunk_too(set_: Set) -> None:
    """D10, L9: in QEMU speed=1 moves 1 MiB before it sleeps."""
    set_.backup(speed=1)
    wait_for(lambda: set_.job()["status"] == "running", "it runs")
    assert set_.job()["offset"] <= CLUSTER
    set_.client.execute("job-cancel", id="j")


def test_progress_moves_while_paused_since_writers_copy_on(set_: Set) -> None:
    """L8, kept; the counters tell the two apart."""
    set_.backup(speed=1)
    set_.client.execute("job-pause", id="j")
    before = set_.job()["offset"]
    timed_write(set_.image, 9)
    assert set_.job()["offset"] == before + CLUSTER
    described = set_.client.execute("x-shmcbw-query-job", id="j")["progress"]
    assert described["copied_for_writers_bytes"] == CLUSTER
    set_.client.execute("job-cancel", id="j")


def test_a_backup_has_nothing_that_job_change_changes(set_: Set) -> None:
    """D23."""
    client = set_.client
    assert client.refusal("job-change", id="j", type="backup") == "Job not found"
    assert client.ask("block-job-change", id="j", type="backup")["error"] == {
        "class": "DeviceNotActive",
        "desc": "Block job 'j' not found",
    }
    set_.backup(**{"auto-finalize": False, "auto-dismiss": False, "speed": 1})
    for command in ("job-change", "block-job-change"):
        assert client.refusal(command, id="j", type="backup") == "Job type does not support change"
        assert client.refusal(command, id="j", type="mirror") == "Parameter 'type' does not accept value 'mirror'"
    client.execute("block-job-set-speed", device="j", speed=0)
    client.wait_status("j", "pending")
    text = "Job 'j' in state 'pending' cannot accept command verb 'change'"
    assert client.refusal("job-change", id="j", type="backup") == text
    client.execute("job-cancel", id="j")


CLUSTER_SIZES = (
    (1 << 17, "min-cluster-size 131072 is above the image's cluster size 65536: serve it with --cluster-size 131072"),
    (3000, "min-cluster-size needs to be a power of 2"),
    (1 << 63, "min-cluster-size too large: 9223372036854775808 > 9223372036854775807"),
    (1 << 16, ""),
    (4096, ""),
    (0, ""),
)


def test_clusters_are_as_large_as_min_cluster_size_or_it_is_refused(set_: Set) -> None:
    """D22."""
    client = set_.client
    snapshot = {"driver": "copy-before-write", "node-name": "cbw", "file": "n", "target": "t"}
    for size, refusal in CLUSTER_SIZES:
        added = client.ask("blockdev-add", **snapshot, **{"min-cluster-size": size})
        if "return" in added:
            client.execute("blockdev-del", node_name="cbw")
        backup = {"device": "n", "target": "t", "sync": "full", "job-id": f"j{size}"}
        started = client.ask("blockdev-backup", **backup, **{"x-perf": {"min-cluster-size": size}})
        for reply in (added, started):
            assert bool(refusal) is ("error" in reply)
            assert reply.get("error", {}).get("desc", "").startswith(refusal)
        if not refusal:
            client.wait_status(f"j{size}", "null")


def test_cancel_is_for_jobs_that_have_not_ended(set_: Set) -> None:
    """L11."""
    set_.backup(**{"auto-finalize": False, "auto-dismiss": False})
    set_.client.wait_status("j", "pending")
    set_.client.execute("job-cancel", id="j")
    set_.client.wait_status("j", "concluded")
    assert "cannot accept command verb 'cancel'" in set_.client.refusal("job-cancel", id="j")
    set_.client.execute("job-dismiss", id="j")


def test_zeroes_of_the_source_cost_the_target_nothing(tmp_path: Path) -> None:
    """L10."""
    image, target = tmp_path / "disk.img", tmp_path / "target.img"
    for path in (image, target):
        path.touch()
        os.truncate(path, SIZE)
    with image.open("r+b") as file:
        file.write(bytes(SIZE // 2))
    with Monitored(tmp_path, "--image", f"filename={image},node-name=n") as daemon:
        set_ = Set(daemon, image, target)
        set_.backup()
        set_.client.wait_status("j", "null")
        assert target.stat().st_blocks == 0


# -- the command line as a client --------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shmcbw", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_line_asks_the_daemon_that_serves_the_image(set_: Set) -> None:
    out = set_.image.with_name("cli.img")
    done = run("backup", set_.image, out)
    assert done.returncode == 0, done.stderr
    assert "right as of the cut" in done.stdout
    assert out.read_bytes() == set_.content
    assert set_.client.execute("query-jobs") == [], "its job is dismissed"
    assert any(event["event"] == "BLOCK_JOB_COMPLETED" for event in _events(set_)), "the daemon did it"
    again = run("backup", set_.image, out)
    assert again.returncode != 0 and "exists" in again.stderr


def _events(set_: Set) -> list[dict[str, Any]]:
    set_.client.execute("query-version")
    return set_.client.events


def test_job_bitmap_and_snapshot_verbs(set_: Set) -> None:
    image = set_.image
    set_.backup(speed=1)
    assert "id j" in run("job", "list", image).stdout
    for verb in ("pause", "resume"):
        assert run("job", verb, image, "j").returncode == 0
    assert run("job", "set-speed", image, "j", "0").returncode == 0
    set_.client.wait_status("j", "null")
    assert run("job", "cancel", image, "j").stderr == "shmcbw job: Job not found\n"
    assert run("bitmap", "add", image, "b", "--granularity", "4K").returncode == 0
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", 0)
    listed = run("bitmap", "list", image)
    assert "b: " in listed.stdout, listed.stderr
    increment = image.with_name("increment.img")
    done = run("backup", image, increment, "--since", "b")
    assert done.returncode == 0, done.stderr
    assert increment.stat().st_blocks * 512 <= CLUSTER + 8192
    then = image.read_bytes()
    assert run("snapshot", "add", image, "before", image.with_name("scratch.img")).returncode == 0
    with shmcbw.open(image) as disk:
        disk.pwrite(b"y" * 1000, 2 * CLUSTER)
    command = [sys.executable, "-m", "shmcbw", "snapshot", "cat", str(image), "before"]
    assert subprocess.run(command, capture_output=True, timeout=60).stdout == then
    assert run("snapshot", "remove", image, "before").returncode == 0
    assert run("snapshot", "list", image).stdout == ""
    assert sorted(path.name for path in image.parent.glob("scratch*")) == []


def test_sync_auto_falls_back_to_a_full_backup_at_the_daemon_and_says_so(set_: Set) -> None:
    full, increment = set_.image.with_name("full"), set_.image.with_name("increment")
    first = run("backup", set_.image, full, "--sync", "auto", "--since", "nightly")
    assert first.returncode == 0 and "taking a full backup" in first.stderr
    assert full.read_bytes() == set_.content
    with shmcbw.open(set_.image) as disk:
        disk.pwrite(b"changed", 5 * CLUSTER)
    second = run("backup", set_.image, increment, "--sync", "auto", "--since", "nightly")
    assert second.returncode == 0 and "full" not in second.stderr
    assert increment.stat().st_blocks * 512 <= CLUSTER + 8192
    assert run("restore", full, increment, set_.image.with_name("restored")).returncode == 0
    assert set_.image.with_name("restored").read_bytes() == set_.image.read_bytes()


def test_where_no_daemon_serves_the_image_the_command_line_says_so(make_image: MakeImage) -> None:
    image = make_image(SIZE)
    done = run("job", "list", image)
    assert done.returncode == 3 and "no daemon serves it" in done.stderr


def test_an_interrupted_backup_is_cancelled_at_the_daemon(set_: Set) -> None:
    out = set_.image.with_name("cli.img")
    command = [sys.executable, "-m", "shmcbw", "backup", str(set_.image), str(out), "--speed", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: set_.client.execute("query-jobs"), "the daemon has a job", 30)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 6 and "cancelled" in errors
    wait_for(lambda: set_.client.execute("query-jobs") == [], "the job is cancelled and dismissed")
    assert not out.exists()


def test_a_backup_whose_daemon_is_killed_says_so_and_what_to_do(set_: Set) -> None:
    out = set_.image.with_name("cli.img")
    command = [sys.executable, "-m", "shmcbw", "backup", str(set_.image), str(out), "--speed", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: set_.client.execute("query-jobs"), "the daemon has a job", 30)
    (job,) = set_.client.execute("query-jobs")
    set_.daemon.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3 and str(set_.daemon.path) in errors
    assert "has gone" in errors and "shmcbw job list" in errors and f"to cancel {job['id']}" in errors
    set_.daemon.start()
    (there,) = set_.daemon.connect().execute("query-jobs")
    assert (there["id"], there["status"]) == (job["id"], "running")


# -- the daemon under many hands ---------------------------------------------------------------------------------------


def test_writers_backups_and_clients_at_once(set_: Set) -> None:
    """Three clients take backups and look while a writer writes; nothing is refused that should not be."""
    stop = threading.Event()

    def write() -> None:
        with shmcbw.open(set_.image) as disk:
            offset = 0
            while not stop.is_set():
                disk.pwrite(b"w" * 4096, offset % SIZE)
                offset += 4096 * 7

    writer = threading.Thread(target=write)
    writer.start()
    try:
        clients = [set_.daemon.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            path = set_.image.with_name(f"t{number}.img")
            path.touch()
            os.truncate(path, SIZE)
            client.execute("blockdev-add", driver="file", node_name=f"t{number}", filename=str(path))
        for _ in range(3):
            for number, client in enumerate(clients):
                arguments = {"device": "n", "target": f"t{number}", "sync": "full", "job-id": f"j{number}"}
                client.execute("query-block-jobs")
                client.execute("blockdev-backup", **arguments)
            for client in clients:
                for number in range(3):
                    client.wait_status(f"j{number}", "null")
                client.events.clear()
    finally:
        stop.set()
        writer.join()
