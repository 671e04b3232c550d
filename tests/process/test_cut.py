"""The cut: taken or given up as a whole, within its limit, whoever stands in its way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw import _core, failpoints
from shmcbw.epochs import advance, epoch
from shmcbw.layout import Header
from shmcbw.workers import Coordinator
from shmcbw.workers.groups import Scratch, take_group
from tests.conftest import wait_for
from tests.processes import CONTEXT, hold_in_flight, running, write_forever

SIZE = 1 << 20


def test_a_stopped_writer_in_flight_holds_no_cut_beyond_its_limit(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1, drain_limit=0.2) as coordinator, shmcbw.open(image) as disk:
        with running(hold_in_flight, str(image)) as stopped:
            wait_for(lambda: any(s["in_flight"] for s in coordinator.status()["slots"]), "in flight")
            before = coordinator.status()
            started = time.monotonic()
            with pytest.raises(shmcbw.CutAbandonedError, match=f"pid {stopped.pid} ") as caught:
                coordinator.snapshot(tmp_path / "scratch")
            assert time.monotonic() - started >= 0.2
            assert caught.value.pids == (stopped.pid,)
            after = coordinator.status()
            assert after["snapshots"] == []
            assert after["epoch"] % 2 == 0
            assert after["counters"]["cuts"] == before["counters"]["cuts"]
            assert not (tmp_path / "scratch").exists()
            disk.pwrite(b"x", 0)
            os.kill(stopped.pid or 0, signal.SIGCONT)
            wait_for(lambda: not any(s["in_flight"] for s in coordinator.status()["slots"]), "flight ends")
            coordinator.snapshot(tmp_path / "scratch").close()


def test_a_dead_writer_in_flight_does_not_hold_a_cut(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1, drain_limit=5) as coordinator:
        with running(hold_in_flight, str(image)) as writer:
            wait_for(lambda: any(s["in_flight"] for s in coordinator.status()["slots"]), "in flight")
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
            snapshot = coordinator.snapshot(tmp_path / "scratch")
            assert snapshot.drained_ns < 4e9
            snapshot.close()


def test_a_gated_writer_ends_a_drained_section_that_is_past_its_deadline(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk, coordinator._lock:
        segment = coordinator._segment
        even = epoch(segment)
        segment.set_header(Header.drain_deadline_ns, time.monotonic_ns() + 100_000_000)
        advance(segment, even)
        started = time.monotonic()
        disk.pwrite(b"x", 0)
        assert 0.09 <= time.monotonic() - started < 5
        assert epoch(segment) == even + 2


def test_a_write_waits_at_the_gate_and_goes_on_when_it_opens(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk, coordinator._lock:
        segment = coordinator._segment
        even = epoch(segment)
        before = disk.pread(1, 0)
        segment.set_header(Header.drain_deadline_ns, time.monotonic_ns() + 60_000_000_000)
        advance(segment, even)
        writer = threading.Thread(target=disk.pwrite, args=(b"\xee", 0))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive(), "no data store begins while the epoch is odd (I5)"
        assert disk.pread(1, 0) == before
        advance(segment, even + 1)
        writer.join(10)
        assert disk.pread(1, 0) == b"\xee"
        assert disk.statistics()["gate_count"] > 0


def test_cuts_at_full_speed_under_writers_all_succeed(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(8 << 20)
    with Coordinator(image, workers=1, drain_limit=2) as coordinator:
        with running(write_forever, str(image), 1), running(write_forever, str(image), 2):
            wait_for(lambda: len([s for s in coordinator.status()["slots"] if s["writes"]]) == 2, "writers", 20)
            for turn in range(50):
                coordinator.snapshot(tmp_path / f"scratch{turn}").close()
            assert coordinator.status()["counters"]["cuts"] == 50


def test_the_core_waits_until_every_slot_was_quiet_once() -> None:
    memory = bytearray(64)
    _core.store_u32(memory, 16, 1)
    assert _core.wait_quiet(memory, 0, 16, 4, 0, 10_000_000) == 1
    assert _core.wait_quiet(memory, 0, 16, 4, 2, 10_000_000) is None
    timer = threading.Timer(0.05, _core.store_u32, (memory, 16, 0))
    timer.start()
    assert _core.wait_quiet(memory, 0, 16, 4, 0, 10_000_000_000) is None
    timer.join()


def test_a_cut_is_refused_when_the_epochs_are_used_up(make_image: Callable[..., Path], tmp_path: Path) -> None:
    image = make_image(SIZE)
    with Coordinator(image, workers=1) as coordinator, shmcbw.open(image) as disk:
        with coordinator._lock:
            coordinator._segment.own_epoch = 2**32 - 4
            coordinator._segment.set_header(Header.epoch, 2**32 - 4)
        with pytest.raises(shmcbw.ShmcbwError, match="32 bits"):
            coordinator.snapshot(tmp_path / "scratch")
        disk.pwrite(b"x", 0)
    assert CONTEXT.get_start_method() == "spawn"


@pytest.mark.parametrize("step", ["odd", "quiet", "published"])
@pytest.mark.parametrize("members", [1, 2])
def test_a_cut_that_is_interrupted_while_writers_are_held_opens_at_once(
    make_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, members: int
) -> None:
    """Between the odd and the even epoch, by whatever exception: nobody waits for the end of the limit, 10 s here."""
    monkeypatch.setenv("SHMCBW_FAILPOINTS", "segment")
    image = make_image(SIZE)
    before = image.read_bytes()
    with Coordinator(image, workers=1, drain_limit=10) as coordinator, shmcbw.open(image) as disk:
        failpoints.arm(coordinator.segment.memory, f"coordinator.{step}", "errno:EINTR*1")
        requests = [Scratch(coordinator, tmp_path / f"scratch{number}") for number in range(members)]
        started = time.monotonic()
        with pytest.raises(InterruptedError):
            take_group(requests)
        assert epoch(coordinator.segment) % 2 == 0
        disk.pwrite(b"x", 0)
        assert time.monotonic() - started < 5
        assert coordinator.status()["snapshots"] == [] and not list(tmp_path.glob("scratch*"))
        assert coordinator.status()["counters"]["cuts_abandoned"] == 1
        coordinator.backup(tmp_path / "out").wait()
        assert (tmp_path / "out").read_bytes() == b"x" + before[1:]
