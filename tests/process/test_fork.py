"""Handles and fork: the child's handle attaches anew, and nothing of the parent is held by a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw.layout import Slot
from shmcbw.status import describe_segment
from shmcbw.workers import Coordinator
from tests.conftest import wait_for
from tests.crash.world import attached
from tests.processes import continue_all, stop_all

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


def test_a_child_forked_while_another_thread_waits_for_a_copy_writes_and_the_parent_goes_on(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    """The child's handle has no part in the parent's wait: its want, its slot, the calls that are inside."""
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator.snapshot(tmp_path / "scratch") as snapshot:
            before = snapshot.pread(SIZE, 0)
            pids = [worker["pid"] for worker in coordinator.status()["workers"]]
            stop_all(pids)
            writer = threading.Thread(target=disk.pwrite, args=(b"parent" * 100, 0))
            writer.start()
            wait_for(lambda: any(slot["wanted_clusters"] for slot in coordinator.status()["slots"]), "it waits")

            def child() -> None:
                assert disk.pread(1, 0) == before[:1]
                continue_all(pids)
                disk.pwrite(b"child!", 500_000)
                disk.close()

            with warnings.catch_warnings():
                # Python warns of a fork with threads; that is what is tried.
                warnings.simplefilter("ignore", DeprecationWarning)
                assert in_child(child) == 0
            writer.join(20)
            assert (disk.pread(6, 0), disk.pread(6, 500_000)) == (b"parent", b"child!")
            assert snapshot.pread(SIZE, 0) == before
        assert len(coordinator.status()["slots"]) == 1, "the thread that has ended gave its own back"


def test_a_child_that_is_killed_in_a_write_of_its_own_leaves_the_parents_slot_alone(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1, drain_limit=5) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"parent", 0)
        pid = os.fork()
        if pid == 0:
            disk.pwrite(b"child!", 100)
            (slot,) = disk._slots
            disk._attached().set_slot(slot, Slot.in_flight, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        job = coordinator.backup(tmp_path / "out")
        disk.pwrite(b"later!", 0)
        job.wait(20)
        wait_for(lambda: len(coordinator.status()["slots"]) == 1, "the child's slot is reaped")
        assert disk.statistics()["writes"] == 2
    assert (tmp_path / "out").read_bytes()[:6] == b"parent"


def test_generations_of_children_each_write_with_a_slot_of_their_own(make_image: Callable[..., Path]) -> None:
    """A child's child, while its parent and grandparent have the handle open."""
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        disk.pwrite(b"0", 0)

        def child() -> None:
            disk.pwrite(b"1", 1)

            def grandchild() -> None:
                disk.pwrite(b"2", 2)
                assert len(coordinator_slots(image)) == 3

            assert in_child(grandchild) == 0
            disk.pwrite(b"3", 3)

        assert in_child(child) == 0
        disk.pwrite(b"4", 4)
        assert disk.pread(5, 0) == b"01234"
        # They ended without closing.
        wait_for(lambda: len(coordinator.status()["slots"]) == 1, "reaped")


def coordinator_slots(image: Path) -> list[int]:
    """The pids that hold slots, as anybody may see them."""
    with attached(image) as segment:
        return [slot["pid"] for slot in describe_segment(segment)["slots"]]


def test_a_write_goes_on_in_parent_and_child_when_a_handler_forks_in_the_middle_of_it(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    """It waits for a copy; the child attaches anew and waits for its own, with a slot of its own."""
    image = make_image(SIZE)
    children: list[int] = []
    us = os.getpid()

    def fork(*_: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            children.append(os.fork())
        if children[-1] == 0:
            # Also before the interrupted write goes on.
            disk.pwrite(b"handler", 500_000)

    before = signal.signal(signal.SIGUSR1, fork)
    try:
        with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
            with coordinator.snapshot(tmp_path / "scratch") as snapshot:
                expected = snapshot.pread(SIZE, 0)
                pids = [worker["pid"] for worker in coordinator.status()["workers"]]
                stop_all(pids)

                def interrupt() -> None:
                    wait_for(lambda: any(s["wanted_clusters"] for s in coordinator.status()["slots"]), "it waits")
                    os.kill(us, signal.SIGUSR1)
                    wait_for(lambda: len(coordinator.status()["slots"]) == 2, "the child has a slot")
                    continue_all(pids)

                thread = threading.Thread(target=interrupt)
                thread.start()
                disk.pwrite(b"both" * 100, 0)
                if os.getpid() != us:
                    # The child, out of the same call.
                    good = (disk.pread(4, 0), disk.pread(7, 500_000), disk.statistics()["writes"])
                    disk.close()
                    os._exit(0 if good == (b"both", b"handler", 2) else 1)
                thread.join()
                assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
                assert disk.statistics()["writes"] == 1
                assert disk.statistics()["wait_max_ns"] < 20e9
                assert snapshot.pread(SIZE, 0) == expected
            wait_for(lambda: len(coordinator.status()["slots"]) == 1, "the child's slot is free")
    finally:
        signal.signal(signal.SIGUSR1, before)
