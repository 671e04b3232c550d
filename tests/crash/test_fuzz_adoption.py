"""Untrusted memory, at random, with nobody there to see it: a coordinator is killed, somebody overwrites words of what
it left, also of its journal, and the next one starts.

It adopts, or discards by rule and says so; where processes still use what can't be adopted it refuses to start, names
that, and starts when they have ended.  Snapshots that were hit break; no backup is silently wrong.
"""

from __future__ import annotations

import collections
import itertools
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

import shmcbw
from shmcbw.errors import ShmcbwError
from shmcbw.image import ImageFile
from shmcbw.segment import Segment, attach
from tests.conftest import segment_file, wait_for
from tests.crash.onlooker import look_forever
from tests.crash.scribbler import REGIONS, Scribbler, garble, journal_files
from tests.crash.test_fuzz import ADDRESS_SPACE_BYTES, SECONDS, SEED, assert_no_crash
from tests.owner import Owner
from tests.processes import CONTEXT, limit_address_space, state

SIZE = 4 << 20
CLUSTER = 65536
#: Where the writer counts: an instant never shows the second ahead of the first, nor behind by more than one.
FIRST, SECOND = 0, 9 * CLUSTER
PATIENCE_S = 40.0


def count_stubbornly(path: str) -> None:
    """Write 1, 2, 3, … first at FIRST, then at SECOND; goes on where the image is, whatever ends a handle."""
    limit_address_space(ADDRESS_SPACE_BYTES)
    parent = os.getppid()
    first, second = counts(Path(path).read_bytes())
    steps = itertools.chain([(second + 1, SECOND)] if first > second else [], _steps(first))
    count, place = next(steps)
    while os.getppid() == parent:
        try:
            with shmcbw.open(path) as disk:
                while os.getppid() == parent:
                    disk.pwrite(count.to_bytes(8, "little"), place)
                    count, place = next(steps)
        except (ShmcbwError, OSError):
            time.sleep(0.01)


def _steps(count: int) -> Iterator[tuple[int, int]]:
    for number in itertools.count(count + 1):
        yield from ((number, FIRST), (number, SECOND))


def counts(content: bytes) -> tuple[int, int]:
    first, second = (int.from_bytes(content[place : place + 8], "little") for place in (FIRST, SECOND))
    return first, second


class Place:
    """An image, whoever serves, writes and looks at it, and what is known of its backups."""

    def __init__(self, image: Path, chance: random.Random, stack: ExitStack) -> None:
        self.image, self.directory = image, image.parent
        self.chance = chance
        with image.open("r+b") as file:
            for place in (FIRST, SECOND):
                file.seek(place)
                file.write(bytes(8))
        self.content = image.read_bytes()
        (self.directory / "content").write_bytes(self.content)
        self.logs = 0
        self.seen: collections.Counter[str] = collections.Counter()
        #: Backups of which somebody may have said COPIED falsely.
        self.doubtful: set[str] = set()
        self.taken = 0
        self.owner: Owner | None = None
        stack.callback(self.end)
        self.writer: SpawnProcess | None = None
        self.looker: SpawnProcess | None = None

    # -- who there is ----------------------------------------------------------------------------------------------

    @property
    def log(self) -> Path:
        return self.directory / f"log{self.logs}"

    def start_owner(self) -> bool:
        """The next coordinator: whether it serves; if not, it has said why, in an error that was thought of."""
        self.logs += 1
        limit = {"OWNER_ADDRESS_SPACE_BYTES": str(ADDRESS_SPACE_BYTES), "SHMCBW_FAILPOINTS": ""}
        self.owner = Owner(self.image, OWNER_LOG=str(self.log), OWNER_STATE_DIR=str(self.directory / "state"), **limit)
        if self.hear() is not None:
            return True
        assert self.owner.process.wait(10) == 1, self.log.read_text()
        self.owner.end()
        self.owner = None
        return False

    def hear(self) -> dict[str, Any] | None:
        assert self.owner is not None
        assert self.owner.process.stdout is not None
        ready = select.select([self.owner.process.stdout], [], [], PATIENCE_S)[0]
        assert ready, f"the coordinator hangs: {self.log.read_text()}"
        return self.owner.answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.owner is not None
        self.owner.send(**command)
        answer = self.hear()
        assert answer is not None, f"the coordinator died over {command}: {self.log.read_text()}"
        return answer

    def start_clients(self) -> None:
        if self.writer is None:
            self.writer = CONTEXT.Process(target=count_stubbornly, args=(str(self.image),))
            self.writer.start()
        if self.looker is None:
            looking = str(self.image), str(self.directory / "content"), f"{self.chance.random()}", ADDRESS_SPACE_BYTES
            self.looker = CONTEXT.Process(target=look_forever, args=looking)
            self.looker.start()

    def end_writer(self) -> None:
        self._end(self.writer)
        self.writer = None

    @staticmethod
    def _end(process: SpawnProcess | None) -> None:
        if process is not None:
            process.kill()
            process.join()
            process.close()

    def kill_owner(self, *, workers: bool) -> None:
        """Kill the coordinator, perhaps with its workers."""
        assert self.owner is not None
        children = psutil.Process(self.owner.pid).children()
        self.owner.end()
        self.owner = None
        for child in children if workers else []:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        if workers:
            wait_for(lambda: all(state(child.pid) in "ZX" for child in children), "the workers are dead")

    def end(self) -> None:
        self._end(self.writer)
        self._end(self.looker)
        if self.owner is not None:
            self.owner.end()

    # -- what is judged --------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Each file that has a backup's name is an instant, unless nobody can see what was done to it."""
        for path in self.directory.glob("out*"):
            if path.suffix == ".shmcbw-partial" or path.name in self.doubtful:
                continue
            found = path.read_bytes()
            first, second = counts(found)
            assert first - second in (0, 1), f"{path.name} shows no instant: {first}, {second}"
            for place in (FIRST, SECOND):
                found = found[:place] + bytes(8) + found[place + 8 :]
            assert found == self.content, f"{path.name} is silently wrong"
            self.seen["right"] += 1
            path.unlink()


def damage(place: Place, segment: Segment, region: str) -> None:
    """Overwrite some words of one region, or garble what the journal is made of."""
    chance = place.chance
    if region == "journal":
        for path in journal_files(segment):
            if chance.random() < 0.7:
                place.seen[garble(path, chance)] += 1
        return
    scribbler = Scribbler(segment, region, chance)
    for _ in range(chance.choice([1, 3, 30])):
        scribbler.scribble()
    if scribbler.says_copied:
        place.doubtful |= {f"out{number}" for number in range(place.taken)}


def do_something(place: Place) -> None:
    """A backup, of everything or of what has changed, and perhaps a snapshot; the coordinator may be killed over it."""
    chance = place.chance
    assert place.owner is not None
    if chance.random() < 0.3:
        place.ask(do="drop")
        place.ask(do="snapshot", scratch=str(place.directory / f"scratch{place.taken}"))
    if chance.random() < 0.5:
        how = {"persistent": chance.random() < 0.5}
        place.ask(do="bitmap", call="add", **{"with": [f"b{place.taken}"], "how": how})
    target, speed = str(place.directory / f"out{place.taken}"), chance.choice([0, 1, 4 << 20])
    place.taken += 1
    place.owner.send(do="backup", target=target, speed=speed)
    if chance.random() < 0.5:
        time.sleep(chance.random() * 0.05)
    else:
        place.hear()


def test_who_adopts_scribbled_memory_goes_on_or_discards_it_by_rule(
    make_image: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        place = Place(make_image(SIZE), random.Random(f"{SEED} adoption"), stack)
        deadline = time.monotonic() + 6 * SECONDS
        regions = itertools.cycle(place.chance.sample([*REGIONS, "journal"], len(REGIONS) + 1))
        assert place.start_owner()
        while time.monotonic() < deadline:
            place.start_clients()
            region = next(regions)
            file = ImageFile.open(place.image, writable=False)
            segment = attach(file)
            file.close()
            do_something(place)
            place.kill_owner(workers=place.chance.random() < 0.5)
            damage(place, segment, region)
            segment.close()
            place.seen[region] += 1
            start_again(place)
            for command in ({"do": "speed", "speed": 0}, {"do": "results"}):
                answer = place.ask(**command)
                assert "ok" in answer, f"after {region}: {answer}"
            place.judge()
            assert_no_crash(place.log)
        assert "ok" in place.ask(do="backup", target=str(place.directory / f"out{place.taken}"))
        assert "ok" in place.ask(do="results")
        place.judge()
        assert place.looker is not None
        assert place.looker.exitcode is None, "the onlooker has died over it"
        # Before it: one that is killed when nobody serves the image leaves the segment to the next coordinator.
        place.end_writer()
        assert place.ask(do="close") == {"ok": None}
        assert place.owner is not None
        assert place.owner.process.wait(30) == 0
    with capfd.disabled():
        print(f" SHMCBW_SEED={SEED} {dict(place.seen)}", end="")
    assert place.seen["right"] > 0, "at least the last one"


def start_again(place: Place) -> None:
    """The next coordinator, without a manual step where there need be none."""
    if place.start_owner():
        return
    said = place.log.read_text()
    if "live processes hold it: end them first" in said:
        place.seen["held"] += 1
    else:
        # Neither its first word nor its checksum says that it is ours.
        assert "is not a control segment of shmcbw" in said, said
        place.seen["foreign"] += 1
    place.end_writer()
    if "is not a control segment" in said:
        segment_file(place.image).unlink()
    assert place.start_owner(), place.log.read_text()
