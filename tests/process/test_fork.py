"""Handles and fork: the child's handle attaches anew, and nothing of the parent is held by a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import wait_for

SIZE = 1 << 20


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked child; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_childs_handle_writes_with_a_slot_of_its_own(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"parent", 0)
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = snapshot.pread(SIZE, 0)

            def child() -> None:
                disk.pwrite(b"child!", 100)
                assert disk.pread(6, 0) == b"parent"
                assert disk.statistics()["writes"] == 1
                disk.close()

            assert in_child(child) == 0
            assert disk.pread(6, 100) == b"child!"
            disk.pwrite(b"again", 200)
            assert snapshot.pread(SIZE, 0) == before
        assert len(coordinator.status()["slots"]) == 1


def test_a_child_that_does_nothing_keeps_no_lock_of_a_dead_parent(make_image: Callable[..., Path]) -> None:
    """The parent dies first: its slot is free although the child lives on."""
    image = make_image(SIZE)
    script = (
        "import os, sys, time, shmcbw\n"
        "disk = shmcbw.open(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n"
        "print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    with Coordinator(image, workers=1) as coordinator:
        with subprocess.Popen([sys.executable, "-c", script, str(image)], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert len(coordinator.status()["slots"]) == 1
            parent.kill()
            parent.wait()
            wait_for(lambda: coordinator.status()["slots"] == [], "the dead parent's slot is reaped", 2)
            os.kill(child, signal.SIGKILL)


def test_a_closed_coordinator_in_the_child_is_not_the_parents(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator:

        def child() -> None:
            coordinator.close()
            with pytest.raises(shmcbw.ClosedError):
                coordinator.status()

        assert in_child(child) == 0
        coordinator.backup(tmp_path / "out").wait(10)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_child_of_the_coordinators_process_does_not_keep_its_lock(make_image: Callable[..., Path]) -> None:
    """The coordinator's process dies, a forked child of it lives: the next coordinator can start."""
    image = make_image(SIZE)
    script = (
        "import os, sys, time\n"
        "from shmcbw.workers import Coordinator\n"
        "coordinator = Coordinator(sys.argv[1], workers=1)\n"
        "child = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n"
        "print(child, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(image)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        owner.kill()
        owner.wait()
        with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
            disk.pwrite(b"x", 0)
            assert coordinator.status()["coordinator_alive"]
        os.kill(child, signal.SIGKILL)


def test_a_child_that_leaves_the_parents_with_block_drops_nothing(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            expected = disk.pread(SIZE, 0)
            job = coordinator.backup(tmp_path / "out", speed=1)

            def child() -> None:
                snapshot.close()
                for call in (job.cancel, job.progress, coordinator.status, lambda: job.set_speed(1)):
                    with pytest.raises(shmcbw.ClosedError):
                        call()
                coordinator.close()

            assert in_child(child) == 0
            disk.pwrite(b"x" * 100, 0)
            assert snapshot.pread(SIZE, 0) == expected
            job.set_speed(0)
            job.wait(10)
    assert (tmp_path / "out").read_bytes() == expected
