"""Stamps: the judge finds right what is one instant, and wrong all that is not (`workers/stamps.py`)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shmcbw.workers.stamps import (
    BLOCK_SIZE,
    DATA,
    NEVER_NS,
    UNIT_BLOCKS_MAX,
    ZERO,
    Layout,
    Log,
    LogWriter,
    Stamp,
    Unit,
    Verdict,
    check,
    make_block,
    make_image,
    make_unit,
    parse_block,
)

SIZE = 300 * BLOCK_SIZE
STEP_NS = 10


class World:
    """An image in memory, its writers' logs, and a clock that moves by STEP_NS with every record."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.layout = layout
        self.now_ns = 1000
        self._directory = directory
        make_image(directory / "world.img", layout)
        self.image = bytearray((directory / "world.img").read_bytes())
        self._logs = [LogWriter(directory / f"{writer}.log", self._tick) for writer in range(layout.writers)]

    def _tick(self) -> int:
        self.now_ns += STEP_NS
        return self.now_ns

    def unit(self, writer: int, which: int = 0) -> Unit:
        """One of a writer's units that have several blocks."""
        return [unit for unit in self.layout.units_of(writer) if unit.blocks > 3][which]

    def content(self, unit: Unit, kind: int = DATA) -> bytes:
        """What the writer's next write of the unit will store."""
        return make_unit(self.layout, unit, self._logs[unit.writer].sequence) if kind == DATA else bytes(unit.length)

    def write(self, unit: Unit, kind: int = DATA) -> None:
        data = self.content(unit, kind)
        self._logs[unit.writer].begin(unit, kind)
        self.store(unit, data)
        self._logs[unit.writer].end()

    def killed_write(self, unit: Unit, stored_bytes: int, kind: int = DATA) -> None:
        """A write whose writer was killed when that much was stored."""
        data = self.content(unit, kind)
        self._logs[unit.writer].begin(unit, kind)
        self.store(unit, data[:stored_bytes])

    def store(self, unit: Unit, data: bytes, at: int = 0) -> None:
        self.image[unit.offset + at : unit.offset + at + len(data)] = data

    def shown(self, unit: Unit, image: bytes | None = None) -> bytes:
        return bytes((image or self.image)[unit.offset : unit.offset + unit.length])

    def logs(self) -> list[Log]:
        return [Log.read(self._directory / f"{w}.log", self.layout) for w in range(self.layout.writers)]

    def check(self, copy: bytes | None = None) -> Verdict:
        """Judge a copy (default: the image as it is now)."""
        path = self._directory / "copy.img"
        path.write_bytes(self.image if copy is None else copy)
        return check(path, self.logs(), self.layout)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, Layout(SIZE, 2, 5))


@pytest.fixture
def zero_world(tmp_path: Path) -> World:
    return World(tmp_path, Layout(SIZE, 2, 5, ZERO))


# -- layout and blocks -------------------------------------------------------------------------------------------------


def test_units_tile_the_image_and_every_writer_has_some() -> None:
    layout = Layout(SIZE, 3, 1)
    position = 0
    for number, unit in enumerate(layout.units):
        assert (unit.number, unit.offset) == (number, position)
        assert 1 <= unit.blocks <= UNIT_BLOCKS_MAX
        position += unit.length
    assert position == SIZE
    assert {unit.writer for unit in layout.units} == {0, 1, 2}
    assert sum(len(layout.units_of(writer)) for writer in range(3)) == len(layout.units)


def test_a_layout_is_a_function_of_its_parameters() -> None:
    assert Layout(SIZE, 3, 1).units == Layout(SIZE, 3, 1).units
    assert Layout(SIZE, 3, 1).units != Layout(SIZE, 3, 2).units


@pytest.mark.parametrize(("size_bytes", "writers"), [(0, 1), (BLOCK_SIZE + 1, 1), (BLOCK_SIZE, 2)])
def test_a_layout_that_can_not_be_is_refused(size_bytes: int, writers: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Layout(size_bytes, writers, 1)


def test_a_block_tells_its_stamp_and_every_byte_of_it_counts() -> None:
    stamp = Stamp(image=2**64 - 1, offset=2**40, sequence=123456, writer=7, epoch=2**32 - 1)
    block = make_block(stamp)
    assert len(block) == BLOCK_SIZE
    assert parse_block(block) == stamp
    for at in range(BLOCK_SIZE):
        changed = bytearray(block)
        changed[at] ^= 0x10
        assert parse_block(bytes(changed)) is None, f"byte {at} does not count"


@pytest.mark.parametrize("block", [b"", bytes(BLOCK_SIZE), make_block(Stamp(1, 2, 3, 4, 5))[:-1]])
def test_what_is_no_block_has_no_stamp(block: bytes) -> None:
    assert parse_block(block) is None


def test_blocks_of_different_stamps_differ_almost_everywhere() -> None:
    stamp = Stamp(1, 4096, 3, 4, 5)
    others = [Stamp(2, 4096, 3, 4, 5), Stamp(1, 8192, 3, 4, 5), Stamp(1, 4096, 4, 4, 5), Stamp(1, 4096, 3, 5, 5)]
    for other in others:
        pairs = zip(make_block(stamp), make_block(other), strict=True)
        assert sum(a != b for a, b in pairs) > BLOCK_SIZE // 8


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_tells_what_was_written_and_when(world: World) -> None:
    unit = world.unit(1)
    world.write(unit)
    world.write(unit, ZERO)
    world.killed_write(unit, 0)
    log = world.logs()[1]
    assert log.writes == 3
    assert list(log.of_unit(unit.number)) == [0, 1, 2, 3]
    assert list(log.kinds) == [DATA, DATA, ZERO, DATA]
    assert list(log.begins_ns) == [0, 1010, 1030, 1050]
    assert list(log.ends_ns) == [0, 1020, 1040, NEVER_NS]


def test_a_log_goes_on_where_a_killed_writer_stopped(tmp_path: Path) -> None:
    layout = Layout(SIZE, 1, 1)
    path = tmp_path / "0.log"
    first = LogWriter(path)
    first.begin(layout.units[0])
    first.close()
    with path.open("ab") as file:
        file.write(b"part of a record")
    assert Log.read(path, layout).writes == 1
    second = LogWriter(path)
    assert second.sequence == 2
    second.begin(layout.units[1], epoch=9)
    second.end()
    second.close()
    log = Log.read(path, layout)
    assert [log.finished(1), log.finished(2)] == [False, True]
    assert log.epochs[2] == 9


@pytest.mark.parametrize("change", ["lost record", "lost write", "other layout"])
def test_a_log_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    layout = Layout(SIZE, 1, 1)
    path = tmp_path / "0.log"
    log = LogWriter(path)
    for _ in range(3):
        log.begin(layout.units[-1])
        log.end()
    log.close()
    data = path.read_bytes()
    record = len(data) // 6
    if change == "lost record":
        path.write_bytes(data[: 2 * record] + data[3 * record :])
    elif change == "lost write":
        path.write_bytes(data[: 2 * record] + data[4 * record :])
    else:
        layout = Layout(BLOCK_SIZE, 1, 1)
    with pytest.raises(ValueError, match="does not follow"):
        Log.read(path, layout)


# -- what is right -----------------------------------------------------------------------------------------------------


def test_the_initial_content_is_right_from_the_beginning_until_the_first_write_has_returned(world: World) -> None:
    copy = bytes(world.image)
    assert world.check(copy).window == (0, NEVER_NS)
    world.write(world.unit(0))
    verdict = world.check(copy)
    assert verdict.right
    assert verdict.window == (0, 1020)
    assert (verdict.units, verdict.blocks) == (len(world.layout.units), 300)


def test_a_copy_of_one_instant_is_right_and_its_window_holds_the_instant(world: World) -> None:
    for writer in (0, 1, 0, 1):
        world.write(world.unit(writer))
    copy, cut_ns = bytes(world.image), world.now_ns
    world.write(world.unit(1))
    world.write(world.unit(0, 1))
    verdict = world.check(copy)
    assert verdict.right
    # From when the last write in it began until the first one that is not in it had returned.
    assert verdict.windows == ((cut_ns - STEP_NS, cut_ns + 2 * STEP_NS),)
    assert verdict.holds(cut_ns)
    assert not verdict.holds(cut_ns + 3 * STEP_NS)
    assert verdict.holds(cut_ns + 3 * STEP_NS, slack_ns=STEP_NS)
    assert verdict.as_dict()["right"] is True


def test_writes_that_overlap_may_be_seen_in_any_order(tmp_path: Path) -> None:
    world = World(tmp_path, Layout(SIZE, 2, 5))
    one, other = world.unit(0), world.unit(1)
    before = bytes(world.image)
    world._logs[0].begin(one)
    world._logs[1].begin(other)
    world.store(one, make_unit(world.layout, one, 1))
    only_one = bytes(world.image)
    world.store(other, make_unit(world.layout, other, 1))
    world._logs[0].end()
    world._logs[1].end()
    only_other = bytearray(world.image)
    only_other[one.offset : one.offset + one.length] = before[one.offset : one.offset + one.length]
    for copy in (before, only_one, bytes(only_other), bytes(world.image)):
        assert world.check(copy).right


# -- what is wrong -----------------------------------------------------------------------------------------------------


def _torn(world: World) -> None:
    unit = world.unit(0)
    world.write(unit)
    older = world.shown(unit)
    world.write(unit)
    world.store(unit, older[:BLOCK_SIZE])


def _torn_within_a_block(world: World) -> None:
    unit = world.unit(0)
    world.write(unit)
    older = world.shown(unit)
    world.write(unit)
    world.store(unit, older[: BLOCK_SIZE // 2])


def _flipped_bit(world: World) -> None:
    world.image[world.unit(1).offset + BLOCK_SIZE + 2000] ^= 1


def _zeroed_block(world: World) -> None:
    world.store(world.unit(1), bytes(BLOCK_SIZE), BLOCK_SIZE)


def _zeroed_unit(world: World) -> None:
    world.store(world.unit(1), bytes(world.unit(1).length))


def _swapped_blocks(world: World) -> None:
    unit = world.unit(1)
    data = world.shown(unit)
    world.store(unit, data[BLOCK_SIZE : 2 * BLOCK_SIZE] + data[:BLOCK_SIZE])


def _write_of_nobody(world: World) -> None:
    world.write(world.unit(0))
    world.store(world.unit(0), make_unit(world.layout, world.unit(0), 2))


def _write_of_another_unit(world: World) -> None:
    world.write(world.unit(0))
    world.store(world.unit(0, 1), make_unit(world.layout, world.unit(0, 1), 1))


def _stamps_of_a_zero_write(world: World) -> None:
    world.write(world.unit(0), ZERO)
    world.store(world.unit(0), make_unit(world.layout, world.unit(0), 1))


def _write_of_another_epoch(world: World) -> None:
    world.write(world.unit(0))
    world.store(world.unit(0), make_unit(world.layout, world.unit(0), 1, epoch=1))


def _write_of_another_image(world: World) -> None:
    other = Layout(SIZE, 2, 6)
    world.store(world.unit(0), b"".join(make_unit(other, unit, 0) for unit in other.units)[: world.unit(0).length])


@pytest.mark.parametrize(
    ("damage", "corrupt_blocks", "torn_units"),
    [
        (_torn, 0, 1),
        (_torn_within_a_block, 1, 0),
        (_flipped_bit, 1, 0),
        (_zeroed_block, 1, 0),
        (_zeroed_unit, -1, 0),
        (_swapped_blocks, 2, 0),
        (_write_of_nobody, -1, 0),
        (_write_of_another_unit, -1, 0),
        (_stamps_of_a_zero_write, -1, 0),
        (_write_of_another_epoch, -1, 0),
        (_write_of_another_image, -1, 0),
    ],
)
def test_a_unit_that_no_write_has_made_is_wrong(
    world: World, damage: Callable[[World], None], corrupt_blocks: int, torn_units: int
) -> None:
    """-1: all blocks of the unit."""
    assert world.check().right
    damage(world)
    verdict = world.check()
    assert not verdict.right
    if corrupt_blocks < 0:
        assert verdict.corrupt_blocks in (world.unit(0).blocks, world.unit(0, 1).blocks, world.unit(1).blocks)
    else:
        assert verdict.corrupt_blocks == corrupt_blocks
    assert verdict.torn_units == torn_units
    assert verdict.stray_units == 0


@pytest.mark.parametrize(("change", "corrupt_blocks"), [(-BLOCK_SIZE, 1), (-1, 1), (1, 1), (3 * BLOCK_SIZE, 3)])
def test_a_copy_of_another_size_is_wrong(world: World, change: int, corrupt_blocks: int) -> None:
    copy = bytes(world.image)
    verdict = world.check(copy[:change] if change < 0 else copy + bytes(change))
    assert not verdict.right
    assert verdict.corrupt_blocks == corrupt_blocks


def test_a_lost_write_is_a_stray(world: World) -> None:
    lost = world.unit(0)
    before = world.shown(lost)
    world.write(lost)
    lost_end_ns = world.now_ns
    world.write(world.unit(1))
    world.write(world.unit(1, 1))
    begin_ns = world.now_ns - STEP_NS
    assert world.check().right
    world.store(lost, before)
    verdict = world.check()
    assert not verdict.right
    assert (verdict.corrupt_blocks, verdict.torn_units, verdict.stray_units) == (0, 0, 1)
    assert verdict.worst_miss_ns == begin_ns - lost_end_ns == 3 * STEP_NS


def test_a_write_of_the_future_is_a_stray(world: World) -> None:
    for _ in range(3):
        world.write(world.unit(0))
        world.write(world.unit(1))
    copy = bytearray(world.image)
    for _ in range(3):
        world.write(world.unit(0))
        world.write(world.unit(1))
    assert world.check(bytes(copy)).right
    future = world.unit(1)
    copy[future.offset : future.offset + future.length] = world.shown(future)
    verdict = world.check(bytes(copy))
    assert not verdict.right
    assert verdict.stray_units == 1
    # It began with the 23rd record; the first write that is not in the copy had returned with the 14th.
    assert verdict.worst_miss_ns == 9 * STEP_NS


def test_two_halves_of_two_instants_are_strays(world: World) -> None:
    units = [world.unit(0), world.unit(0, 1), world.unit(1), world.unit(1, 1)]
    for unit in units:
        world.write(unit)
    first = bytes(world.image)
    for unit in units + units:
        world.write(unit)
    second = bytes(world.image)
    assert world.check(first).right
    assert world.check(second).right
    middle = sorted(units)[2].offset
    verdict = world.check(first[:middle] + second[middle:])
    assert not verdict.right
    assert (verdict.corrupt_blocks, verdict.torn_units) == (0, 0)
    assert verdict.stray_units == 2
    assert verdict.worst_miss_ns > 0


def test_a_writer_that_overtook_itself_is_a_stray(world: World) -> None:
    """The later of two writes of one writer is there, the earlier one is not."""
    before = bytes(world.image)
    first, second = world.unit(0), world.unit(0, 1)
    world.write(first)
    world.write(second)
    world.store(first, world.shown(first, before))
    assert world.check().stray_units == 1


# -- killed writers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 0.3, 1, 1.5, -1])
@pytest.mark.parametrize("kind", [DATA, ZERO])
def test_the_last_write_of_a_killed_writer_may_be_there_or_not_or_in_part(
    world: World, blocks: float, kind: int
) -> None:
    unit = world.unit(0)
    world.write(unit)
    world.killed_write(unit, unit.length if blocks < 0 else int(blocks * BLOCK_SIZE), kind)
    world.write(world.unit(1))
    assert world.check().right


def test_a_killed_write_can_not_be_there_before_it_began(world: World) -> None:
    other = world.unit(1)
    before = world.shown(other)
    world.write(other)
    world.killed_write(world.unit(0), BLOCK_SIZE)
    world.store(other, before)
    verdict = world.check()
    assert verdict.stray_units == 1
    assert verdict.worst_miss_ns == STEP_NS


def test_the_part_of_a_killed_write_is_gone_when_the_next_write_has_returned(world: World) -> None:
    unit = world.unit(0)
    world.killed_write(unit, BLOCK_SIZE + 10)
    copy = bytearray(world.image)
    world.write(unit)
    assert world.check(bytes(copy)).right
    assert world.check().right
    other = world.unit(1)
    world.write(other)
    copy[other.offset : other.offset + other.length] = world.shown(other)
    assert world.check(bytes(copy)).stray_units == 1


def test_two_killed_writes_in_a_row_may_both_be_there_in_part(world: World) -> None:
    unit = world.unit(0)
    world.write(unit)
    world.killed_write(unit, 2 * BLOCK_SIZE + 100)
    world.killed_write(unit, BLOCK_SIZE + 100)
    assert world.check().right


def test_a_part_of_a_killed_write_explains_no_other_damage(world: World) -> None:
    unit = world.unit(0)
    world.write(unit)
    older = world.shown(unit)
    world.write(unit)
    world.killed_write(unit, BLOCK_SIZE + 100)
    assert world.check().right
    damaged = bytearray(world.image)
    damaged[unit.offset + BLOCK_SIZE + 50] ^= 1
    assert world.check(bytes(damaged)).corrupt_blocks == 1
    world.store(unit, older[-BLOCK_SIZE:], unit.length - BLOCK_SIZE)
    assert not world.check().right


# -- zeroes ------------------------------------------------------------------------------------------------------------


def test_a_zeroed_unit_is_right_while_it_was_zero(world: World) -> None:
    unit, other = world.unit(0), world.unit(1)
    world.write(unit)
    world.write(unit, ZERO)
    zeroed = bytes(world.image)
    begin_ns = world.now_ns - STEP_NS
    world.write(unit)
    assert world.check(zeroed).windows == ((begin_ns, world.now_ns),)
    world.write(other)
    late = bytearray(zeroed)
    late[other.offset : other.offset + other.length] = world.shown(other)
    assert world.check(bytes(late)).stray_units == 1


def test_zeroes_may_be_of_any_time_when_the_unit_was_zero(zero_world: World) -> None:
    unit = zero_world.unit(0)
    copy = bytes(zero_world.image)
    assert not any(copy)
    zero_world.write(unit)
    first_end_ns = zero_world.now_ns
    zero_world.write(unit)
    zero_world.write(unit, ZERO)
    zero_begin_ns = zero_world.now_ns - STEP_NS
    zero_world.write(unit, ZERO)
    zero_world.write(unit)
    verdict = zero_world.check(copy)
    assert verdict.right
    assert verdict.windows == ((0, first_end_ns), (zero_begin_ns, zero_world.now_ns))
    assert not verdict.holds(first_end_ns + 1)


def test_a_torn_zero_write_is_wrong(zero_world: World) -> None:
    unit = zero_world.unit(0)
    zero_world.write(unit)
    assert zero_world.check().right
    zero_world.store(unit, bytes(BLOCK_SIZE))
    verdict = zero_world.check()
    assert (verdict.corrupt_blocks, verdict.torn_units) == (0, 1)


# -- against a slower judge --------------------------------------------------------------------------------------------


def _history(chance: random.Random, layout: Layout) -> list[tuple[int, int, int, Unit, int]]:
    """Writes (begin, instant, end, unit, kind) of all writers, each writer's one after the other."""
    writes = []
    for writer in range(layout.writers):
        now = chance.randrange(20)
        for _ in range(12):
            begin, instant, end = (now := now + chance.randrange(1, 9) for _ in range(3))
            writes.append(
                (begin, instant, end, chance.choice(layout.units_of(writer)), chance.choice((DATA, DATA, ZERO)))
            )
    return writes


@pytest.mark.parametrize("seed", range(40))
def test_the_verdict_is_that_of_trying_every_instant(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    layout = Layout(SIZE, 3, seed, chance.choice((DATA, ZERO)))
    writes = _history(chance, layout)
    shown: dict[int, list[tuple[int, int, int, bytes]]] = {
        unit.number: [(0, 0, 0, make_unit(layout, unit, 0) if layout.initial == DATA else bytes(unit.length))]
        for unit in layout.units
    }
    for writer in range(layout.writers):
        times = iter([at for write in writes if write[3].writer == writer for at in (write[0], write[2])])
        log = LogWriter(tmp_path / f"{writer}.log", times.__next__)
        for begin, instant, end, unit, kind in (write for write in writes if write[3].writer == writer):
            data = make_unit(layout, unit, log.sequence) if kind == DATA else bytes(unit.length)
            shown[unit.number].append((begin, instant, end, data))
            log.begin(unit, kind)
            log.end()
        log.close()
    logs = [Log.read(tmp_path / f"{writer}.log", layout) for writer in range(layout.writers)]
    cut = chance.randrange(1, 220)
    spread = chance.choice((0, 0, 3, 12))

    def at(unit: Unit, instant: int) -> bytes:
        return [data for _, point, _, data in shown[unit.number] if point <= instant][-1]

    copy = b"".join(at(unit, cut + chance.randint(-spread, spread)) for unit in layout.units)
    (tmp_path / "copy.img").write_bytes(copy)
    verdict = check(tmp_path / "copy.img", logs, layout)

    def possible(instant: int) -> bool:
        """Whether each unit shows a write that may have happened by then, the next of which may not have."""
        for unit in layout.units:
            data = copy[unit.offset : unit.offset + unit.length]
            history = [*shown[unit.number], (NEVER_NS, NEVER_NS, NEVER_NS, b"")]
            pairs = itertools.pairwise(history)
            if not any(this[3] == data and this[0] <= instant <= after[2] for this, after in pairs):
                return False
        return True

    instants = [instant for instant in range(400) if possible(instant)]
    assert verdict.right == bool(instants), f"seed {seed}"
    if spread == 0:
        assert verdict.right
        assert verdict.holds(cut)
    if instants:
        assert [instant for instant in range(400) if verdict.holds(instant)] == instants
