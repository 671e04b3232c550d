"""A coordinator dies, or is stopped, at every step of a resize: writers go on, and a restart needs no manual step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.failpoints import POINTS
from shmcbw.image import ImageFile
from shmcbw.invariants import check
from shmcbw.layout import Header
from shmcbw.segment import attach
from shmcbw.status import describe_segment
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import running, state, write_forever

OLD = (1 << 20) + 5000
NEW = 2 << 20
STEPS = [point.name for point in POINTS if point.protocol == "resize"]


def writes(disk: shmcbw.Disk) -> int:
    return int(sum(slot["writes"] for slot in describe_segment(disk._attached())["slots"]))


@pytest.mark.parametrize(("step", "action"), [*((step, "kill") for step in STEPS), (STEPS[2], "stop")])
def test_a_resize_ends_forward_or_back_whoever_dies(
    make_image: Callable[..., Path], tmp_path: Path, step: str, action: str
) -> None:
    image = make_image(OLD)
    owner = Owner(image)
    assert owner.answer() is not None
    try:
        with shmcbw.open(image) as disk, running(write_forever, str(image), 1, 4096, OLD):
            wait_for(lambda: writes(disk), "the writer writes", 20)
            disk.pwrite(b"kept", OLD - 4)
            failpoints.arm(disk._attached().memory, step, f"{action}*1")
            owner.send(do="resize", size=NEW)
            if action == "stop":
                wait_for(lambda: state(owner.pid) == "T", "the coordinator is stopped", 20)
            else:
                owner.process.wait(20)
            written = writes(disk)
            wait_for(lambda: writes(disk) > written + 100, "the writer goes on meanwhile", 20)
            disk.pwrite(b"more", OLD - 8)
            if action == "stop":
                os.kill(owner.pid, signal.SIGCONT)
                assert owner.answer() == {"ok": None}
            else:
                owner.end()
                owner = Owner(image)
                assert owner.answer() is not None

            grown = step in ("resize.grown", "resize.committed") or action == "stop"
            expected = NEW if grown else OLD
            assert (disk.size_bytes, os.stat(image).st_size) == (expected, expected)
            file = ImageFile.open(image, writable=False)
            segment = attach(file)
            try:
                assert segment.header(Header.resize_to) == 0
                assert os.fstat(segment.fd).st_size == segment.geometry.segment_size
                assert check(segment) == []
            finally:
                segment.close()
                file.close()

            assert owner.ask(do="resize", size=3 << 20) == {"ok": None}
            assert disk.pread(8, OLD - 8) == b"morekept"
            disk.pwrite(b"end", (3 << 20) - 3)
            assert "ok" in (owner.ask(do="backup", target=str(tmp_path / "out")) or {})
            disk.pwrite(b"!!!", (3 << 20) - 3)
            assert owner.ask(do="wait") == {"ok": None}
            data = (tmp_path / "out").read_bytes()
            assert (len(data), data[-3:], data[OLD - 8 : OLD]) == (3 << 20, b"end", b"morekept")
        assert owner.ask(do="close") == {"ok": None}
        owner.process.wait(20)
    finally:
        owner.end()
