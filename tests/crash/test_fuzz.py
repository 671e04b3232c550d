"""Untrusted memory, at random: somebody overwrites words of the shared memory while everything runs.

Who scribbles is this process; coordinator and workers are another one's, a writer a third's, and a fourth looks at
status and snapshots.  Nobody crashes, hangs, or maps without bound; no file beside source and target is touched or
shown; what is finished is right or says that it is not.  Afterwards a fresh coordinator starts, and nothing is left.

With a coordinator that is killed meanwhile: `test_fuzz_adoption.py`.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shmcbw.errors import ShmcbwError
from shmcbw.image import ImageFile
from shmcbw.layout import Slot
from shmcbw.segment import attach
from tests.conftest import wait_for
from tests.crash.onlooker import look_forever
from tests.crash.scribbler import REGIONS, Scribbler
from tests.owner import Owner
from tests.processes import limit_address_space, running, write_forever

SIZE = 4 << 20
WRITTEN = 1 << 20  # the writer's part of the image
SEED = int(os.environ.get("SHMCBW_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
#: Of each region; `make fuzz` takes longer.
SECONDS = float(os.environ.get("SHMCBW_FUZZ_SECONDS", "1.5"))
#: What each process may map: about twice of what they need, and less than most sizes that a scribbled word can say.
ADDRESS_SPACE_BYTES = 512 << 20


def write_stubbornly(path: str, seed: int, end: int) -> None:
    """A writer that comes back when an error has ended it."""
    limit_address_space(ADDRESS_SPACE_BYTES)
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            write_forever(path, seed, 4096, end)
        except (ShmcbwError, OSError):
            time.sleep(0.01)


def assert_no_crash(log: Path) -> None:
    """What coordinator and workers said: no error that nobody thought of, no death by a signal."""
    text = log.read_text()
    found = re.search(r"Traceback|MemoryError|[Ff]atal|killed by signal|SystemError", text)
    assert found is None, text[-4000:]


@pytest.mark.parametrize("region", REGIONS)
def test_nobody_crashes_hangs_or_touches_other_files(
    make_image: Callable[..., Path], tmp_path: Path, region: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with capfd.disabled():
        print(f" SHMCBW_SEED={SEED}", end="")
    chance = random.Random(f"{SEED} {region}")
    image = make_image(SIZE)
    content = image.read_bytes()
    (tmp_path / "content").write_bytes(content)
    guards = {tmp_path / name: os.urandom(SIZE) for name in ("guard", "guard.shmcbw-partial")}
    for path, data in guards.items():
        path.write_bytes(data)
        path.chmod(0o600)
        os.utime(path, (1, 1))
    log, limit = tmp_path / "log", {"OWNER_ADDRESS_SPACE_BYTES": str(ADDRESS_SPACE_BYTES)}
    owner = Owner(image, OWNER_LOG=str(log), SHMCBW_FAILPOINTS="", **limit)
    file = ImageFile.open(image, writable=False)
    looking = str(image), str(tmp_path / "content"), f"{SEED} {region}", ADDRESS_SPACE_BYTES
    taken = 0
    try:
        assert owner.answer() is not None, log.read_text()
        segment = attach(file)
        writing = str(image), 1, WRITTEN
        with running(write_stubbornly, *writing) as writer, running(look_forever, *looking) as looker:
            wait_for(lambda: segment.slot(0, Slot.writes) > 0, "it writes")
            scribbler = Scribbler(segment, region, chance)
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                target, scratch = str(tmp_path / f"out{taken}"), str(tmp_path / "scratch")
                commands = [{"do": "backup", "target": target}, {"do": "results"}]
                if taken % 4 == 0:
                    # For the onlooker: one that stays for some time.
                    commands = [{"do": "drop"}, {"do": "snapshot", "scratch": scratch}, *commands]
                for command in commands:
                    owner.send(**command)
                    for _ in range(30):
                        scribbler.scribble()
                        time.sleep(0.001)
                    answer = owner.answer()
                    assert answer is not None, "the coordinator has died"
                    assert "error" not in answer or not re.search(
                        "Assertion|Index|Key|Overflow|Stop|Memory|Type|Attribute", answer["error"]
                    )
                    assert command["do"] != "results" or "ok" in answer, f"a job hangs: {answer}"
                taken += 1
            assert (writer.exitcode, looker.exitcode) == (None, None), "writer, onlooker: one has died over it"
        segment.close()
        owner.send(do="close")
        assert owner.answer() is not None
        assert owner.process.wait(30) == 0
        assert_no_crash(log)
    finally:
        file.close()
        owner.end()
    # A fresh coordinator needs no manual step, and its backup is right.
    fresh = Owner(image, OWNER_LOG=str(log), **limit)
    try:
        assert fresh.answer() == {"ok": []}, log.read_text()
        assert "ok" in (fresh.ask(do="backup", target=str(tmp_path / "last")) or {})
        assert fresh.ask(do="wait") == {"ok": None}
        assert fresh.ask(do="close") == {"ok": None}
        assert fresh.process.wait(30) == 0
    finally:
        fresh.end()
    now = image.read_bytes()
    assert (tmp_path / "last").read_bytes() == now
    assert now[WRITTEN:] == content[WRITTEN:], "what no writer wrote is what it was"
    for path, data in guards.items():
        assert path.read_bytes() == data
        assert os.stat(path).st_mtime == 1
    for number in range(taken):
        target_path = tmp_path / f"out{number}"
        if target_path.exists():
            assert os.stat(target_path).st_size == SIZE
            if not scribbler.says_copied:
                assert target_path.read_bytes()[WRITTEN:] == content[WRITTEN:]
