"""The torture tool: a short run of it, its schedule, its judge, and that it finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shmcbw.workers.stamps import BLOCK_SIZE, DATA, NEVER_NS, ZERO, Layout, LogWriter, Unit, make_unit
from shmcbw.workers.stamps import Log as StampLog
from tools.torturing.judge import History, Judgement, agree, judge
from tools.torturing.plan import first_decisions

ROOT = Path(__file__).resolve().parents[2]


def torture(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the tool: its exit status and its JSON object."""
    command = [sys.executable, "tools/torture.py", "--json", "--seed", "1", "--images", "1", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, found


def kinds(found: dict[str, Any]) -> set[str]:
    return {failure["kind"] for failure in found["failures"]}


# -- the tool ----------------------------------------------------------------------------------------------------------


def test_a_short_torture_finds_nothing_wrong() -> None:
    for seconds in (6, 12, 24):
        status, found = torture("--seconds", str(seconds))
        assert found["failures"] == []
        assert status == 0
        # On a busy machine little is done in a few seconds.
        if "right" in found.get("reads", {}):
            break
    assert (found["mismatches"], found["hangs"], found["leaks"], found["errors"]) == (0, 0, 0, 0)
    assert found["cycles"] > 5
    assert found["reads"]["right"] > 0
    assert found["cuts"]["taken"] > 0


def test_a_write_past_the_filter_and_litter_are_found() -> None:
    status, found = torture("--seconds", "2", "--rate", "1", "--sabotage", "bypass", "--sabotage", "litter")
    assert status == 1
    assert found["mismatches"] > 0
    assert any("/dev/shm" in failure["what"] for failure in found["failures"] if failure["kind"] == "leak")
    assert any("shmcbw-partial" in failure["what"] for failure in found["failures"] if failure["kind"] == "leak")


def test_a_reader_that_shows_the_source_is_found() -> None:
    status, found = torture("--seconds", "2", "--rate", "1", "--sabotage", "blind")
    assert status == 1
    assert "mismatch" in kinds(found)


def test_a_writer_that_stands_still_is_found() -> None:
    status, found = torture("--seconds", "3", "--rate", "0.3", "--cbw-timeout", "0.1", "--sabotage", "sleep")
    assert status == 1
    assert "hang" in kinds(found)


def test_a_group_whose_members_are_cut_one_after_the_other_is_found() -> None:
    status, found = torture("--seconds", "4", "--images", "2", "--rate", "1", "--sabotage", "apart")
    assert status == 1
    assert any("no instant" in failure["what"] for failure in found["failures"])


def test_the_same_seed_gives_the_same_schedule() -> None:
    assert first_decisions("1 0", 2, 6, 200) == first_decisions("1 0", 2, 6, 200)
    assert first_decisions("1 0", 2, 6, 200) != first_decisions("1 1", 2, 6, 200)


# -- the judge ---------------------------------------------------------------------------------------------------------


class World:
    """An image of one unit for each of two writers, and a clock that only this class moves."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(2 * BLOCK_SIZE * 48, 2, 7, DATA)
        self.units = [self.layout.units_of(writer)[0] for writer in range(2)]
        self.now_ns = 0
        self.paths = [directory / f"writer-{writer}.log" for writer in range(2)]
        self.logs = [LogWriter(path, self._tick) for path in self.paths]
        self.image = bytearray(b"".join(make_unit(self.layout, unit, 0) for unit in self.layout.units))
        self.killed: list[dict[int, int]] = [{}, {}]
        self.refused: list[set[int]] = [set(), set()]

    def _tick(self) -> int:
        self.now_ns += 10
        return self.now_ns

    def begin(self, writer: int, incarnation: int = 0, kind: int = DATA) -> bytes:
        """Log that a write begins; its bytes."""
        unit, log = self.units[writer], self.logs[writer]
        data = make_unit(self.layout, unit, log.sequence, incarnation) if kind == DATA else bytes(unit.length)
        log.begin(unit, kind, incarnation)
        return data

    def store(self, writer: int, data: bytes, blocks: float | None = None) -> None:
        """Store all of a write, or its first blocks."""
        unit = self.units[writer]
        length = unit.length if blocks is None else int(blocks * BLOCK_SIZE)
        self.image[unit.offset : unit.offset + length] = data[:length]

    def write(self, writer: int, kind: int = DATA) -> None:
        self.store(writer, self.begin(writer, kind=kind))
        self.logs[writer].end()

    def kill(self, writer: int, incarnation: int = 0) -> None:
        self.killed[writer][incarnation] = self._tick()

    def copy(self) -> tuple[bytes, tuple[int, int]]:
        """The image as it is now, and when that is."""
        begin = self._tick()
        return bytes(self.image), (begin, self._tick())

    def wrong(
        self,
        data: bytes,
        cut: tuple[int, int],
        inaccessible: list[tuple[int, int]] | None = None,
        sizes: Sequence[int] = (),
    ) -> list[str]:
        return self.judged(data, inaccessible, cut, sizes).wrong

    def judged(
        self,
        data: bytes,
        inaccessible: list[tuple[int, int]] | None = None,
        cut: tuple[int, int] = (0, NEVER_NS),
        sizes: Sequence[int] = (),
    ) -> Judgement:
        histories = [
            History(StampLog.read(path, self.layout), killed, frozenset(refused))
            for path, killed, refused in zip(self.paths, self.killed, self.refused, strict=True)
        ]
        return judge(data, histories, self.layout, cut, inaccessible or [], sizes)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    assert all(unit.blocks > 1 for unit in world.units)
    yield world
    for log in world.logs:
        log.close()


def test_a_copy_of_one_instant_is_right_whatever_is_written_before_and_after(world: World) -> None:
    world.write(0)
    world.write(1, ZERO)
    copy = world.copy()
    world.write(1)
    world.write(0, ZERO)
    assert world.wrong(*copy) == []


def test_a_copy_of_two_instants_is_wrong(world: World) -> None:
    world.write(0)
    first, cut = world.copy()
    world.write(0)
    world.write(1)
    second, _ = world.copy()
    end = world.units[0].offset + world.units[0].length
    mixed = first[:end] + second[end:]
    assert len(world.wrong(mixed, (0, NEVER_NS))) == 1
    assert world.wrong(second, (0, NEVER_NS)) == []
    assert world.wrong(second, cut) != [], "right by itself, but of another time than the cut"


def test_a_write_that_was_begun_at_the_cut_may_be_there_or_not(world: World) -> None:
    before, _ = world.copy()
    data = world.begin(0)
    _, cut = world.copy()
    world.store(0, data)
    after, _ = world.copy()
    world.logs[0].end()
    assert world.wrong(before, cut) == []
    assert world.wrong(after, cut) == []


@pytest.mark.parametrize("blocks", [1, 1.5])
def test_a_part_of_a_write_is_right_only_after_its_writer_was_killed(world: World, blocks: float) -> None:
    data = world.begin(0)
    world.store(0, data, blocks)
    alive = world.copy()
    world.kill(0)
    dead = world.copy()
    assert "torn" not in str(world.wrong(*dead))
    assert world.wrong(*dead) == []
    assert world.wrong(*alive) != [], "its writer lived: a cut has all of it or nothing"


def test_a_part_of_a_write_is_wrong_once_another_one_is_there(world: World) -> None:
    world.store(0, world.begin(0), 1)
    world.kill(0)
    part, _ = world.copy()
    world.store(0, world.begin(0, incarnation=1))
    world.logs[0].end()
    _, later = world.copy()
    assert world.wrong(part, later) != []


def test_all_of_an_unfinished_write_is_right_from_its_beginning_on(world: World) -> None:
    world.store(0, world.begin(0))
    copy = world.copy()
    world.kill(0)
    assert world.wrong(*copy) == []


def test_a_refused_write_must_not_be_there(world: World) -> None:
    before, _ = world.copy()
    data = world.begin(0)
    world.refused[0].add(1)
    world.write(1)
    world.write(1)
    absent = world.copy()
    assert world.wrong(*absent) == []
    world.store(0, data)
    assert "refused" in str(world.wrong(*world.copy()))
    assert before != absent[0]


def test_a_copy_has_a_size_of_its_instant_and_shows_no_less_than_was_there(world: World) -> None:
    small = world.units[0].offset + world.units[0].length
    assert all(world.layout.units[0] is not unit for unit in world.units[1:]), "the other one's units come later"
    world.write(0)
    data, cut = world.copy()
    assert world.wrong(data[:small], cut, sizes=[small, len(data)]) == []
    assert "bytes" in str(world.wrong(data[:small], cut, sizes=[len(data)]))
    world.write(1)
    data, cut = world.copy()
    assert world.wrong(data[:small], cut, sizes=[small, len(data)]) != [], "somebody had written beyond its end"
    assert world.wrong(data, cut, sizes=[small, len(data)]) == []


def test_copies_of_two_images_agree_if_no_write_of_one_is_there_without_an_earlier_one_of_the_other(
    world: World,
) -> None:
    before, _ = world.copy()
    world.write(0)
    world.write(1)
    after, _ = world.copy()
    first, second = (world.judged(data).bounds for data in (before, after))
    end = world.units[0].offset + world.units[0].length
    only_the_second = world.judged(before[:end] + after[end:], [(0, end)])
    assert agree(first)
    assert agree(second)
    assert not agree([*first, *only_the_second.bounds]), "the second write is there, the first one is not"


def test_blocks_of_no_write_are_wrong(world: World) -> None:
    data, cut = world.copy()
    unit = world.units[1]
    for wrong in (bytes(unit.length), b"x" * unit.length, make_unit(world.layout, unit, 9)):
        copy = data[: unit.offset] + wrong + data[unit.offset + unit.length :]
        assert len(world.wrong(copy, cut)) == 1
        assert world.wrong(copy, cut, [(unit.offset, unit.offset + unit.length)]) == [], "could not be read"


def test_a_unit_in_anothers_place_is_wrong(world: World) -> None:
    data, cut = world.copy()
    moved = Unit(0, 0, world.units[0].offset, world.units[0].blocks)
    other = make_unit(Layout(world.layout.size_bytes, 2, 8, DATA), moved, 0)
    copy = data[: moved.offset] + other + data[moved.offset + moved.length :]
    assert "another place" in str(world.wrong(copy, cut))
    assert "bytes" in str(world.wrong(data[:-1], cut))
