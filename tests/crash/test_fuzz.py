"""Untrusted memory, at random: somebody overwrites words of the shared memory while everything runs.

Who scribbles is this process; coordinator and workers are another one's, a writer a third's.  Nobody crashes or hangs,
no file beside source and target is touched, and what is finished is right or says that it is not.  Afterwards a fresh
coordinator starts, and nothing is left.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmcbw import _core
from shmcbw.bitmap import Bitmap, bitmap_serials
from shmcbw.image import ImageFile
from shmcbw.layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Worker
from shmcbw.segment import Segment, attach
from shmcbw.workers import Coordinator
from tests.owner import Owner
from tests.processes import running, write_forever

SIZE = 4 << 20
WRITTEN = 1 << 20  # the writer's part of the image
SEED = int(os.environ.get("SHMCBW_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
#: Of each region; `make fuzz` takes longer.
SECONDS = float(os.environ.get("SHMCBW_FUZZ_SECONDS", "1.5"))
REGIONS = ["header", "workers", "slots", "snapshots", "epoch map", "cluster bytes", "all"]


class Scribbler:
    """Overwrites words of one region, with values that are more often wrong in an interesting way."""

    def __init__(self, segment: Segment, region: str, chance: random.Random) -> None:
        geometry = segment.geometry
        self._segment = segment
        self._chance = chance
        #: Not the failpoints: nobody here looks at them.
        ranges = {
            "header": (0, Header.failpoints.offset),
            "workers": (geometry.workers_offset, geometry.worker_count * Worker.SIZE),
            "slots": (geometry.slots_offset, 4 * Slot.SIZE),
            "snapshots": (geometry.snapshots_offset, SNAPSHOT_COUNT * Snapshot.SIZE),
            "epoch map": (geometry.epoch_map_offset, 4 * geometry.clusters),
        }
        self._ranges = [ranges[region]] if region in ranges else list(ranges.values()) if region == "all" else []
        self._bytes = region in ("cluster bytes", "all")

    def _value(self) -> int:
        chance = self._chance
        edge = chance.choice([0, 1, 2, 7, 8, 9, 63, 64, 65, 239, 240, 243, 2**12, 2**31, 2**32 - 4, 2**32 - 1])
        return chance.choice([edge, edge + 1, edge - 1, chance.getrandbits(32), 1 << chance.randrange(32)]) % 2**32

    def scribble(self) -> None:
        if self._bytes and (not self._ranges or self._chance.random() < 0.3):
            for serial in bitmap_serials(self._segment):
                try:
                    bitmap = Bitmap.attach(self._segment, serial)
                except OSError:
                    continue
                bitmap.memory[self._chance.randrange(bitmap.clusters)] = self._value() % 256
                bitmap.close()
            return
        if self._ranges:
            offset, length = self._chance.choice(self._ranges)
            # Half of the time among the first words of the region, where more of them are in use.
            length = min(length, 512) if self._chance.random() < 0.5 else length
            _core.store_u32(self._segment.memory, offset + 4 * self._chance.randrange(length // 4), self._value())


@pytest.mark.parametrize("region", REGIONS)
def test_nobody_crashes_hangs_or_touches_other_files(
    make_image: Callable[..., Path], tmp_path: Path, region: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled():
        print(f" SHMCBW_SEED={SEED}", end="")
    chance = random.Random(f"{SEED} {region}")
    image = make_image(SIZE)
    content = image.read_bytes()
    guards = {tmp_path / name: os.urandom(SIZE) for name in ("guard", "guard.shmcbw-partial")}
    for path, data in guards.items():
        path.write_bytes(data)
        path.chmod(0o600)
        os.utime(path, (1, 1))
    owner = Owner(image, SHMCBW_FAILPOINTS="")
    file = ImageFile.open(image, writable=False)
    taken = 0
    try:
        assert owner.answer() is not None
        segment = attach(file)
        with running(write_forever, str(image), 1, 4096, WRITTEN) as writer:
            scribbler = Scribbler(segment, region, chance)
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                target = tmp_path / f"out{taken}"
                for command in ({"do": "backup", "target": str(target)}, {"do": "results"}):
                    owner.send(**command)
                    for _ in range(30):
                        scribbler.scribble()
                        time.sleep(0.001)
                    answer = owner.answer()
                    assert answer is not None, "the coordinator has died"
                    assert "error" not in answer or not re.search("Assertion|Index|Key|Overflow|Stop", answer["error"])
                    assert command["do"] == "backup" or "ok" in answer, f"a job hangs: {answer}"
                taken += 1
            # A writer that an error has ended is fine; it is told by its exit status, never by a signal.
            assert writer.exitcode is None or writer.exitcode >= 0
        segment.close()
        owner.send(do="close")
        assert owner.answer() is not None
        assert owner.process.wait(30) == 0
    finally:
        file.close()
        owner.end()
    # A fresh coordinator needs no manual step, and its backup is right.
    with Coordinator(image, workers=1) as coordinator:
        coordinator.backup(tmp_path / "last").wait(30)
    now = image.read_bytes()
    assert (tmp_path / "last").read_bytes() == now
    assert now[WRITTEN:] == content[WRITTEN:], "what no writer wrote is what it was"
    for path, data in guards.items():
        assert path.read_bytes() == data
        assert os.stat(path).st_mtime == 1
    for number in range(taken):
        target = tmp_path / f"out{number}"
        if target.exists():
            assert os.stat(target).st_size == SIZE
            if region != "cluster bytes" and region != "all":
                # A byte that says COPIED falsely can't be seen by anybody.
                assert target.read_bytes()[WRITTEN:] == content[WRITTEN:]
