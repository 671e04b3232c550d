"""Stamps: images whose every byte says which write it is from, logs of those writes, and the judge of copies.

Owns three formats and one rule.  Starts no process and touches no shared memory: whoever writes (the demo, the torture
tool) makes blocks and log records here, and whoever has a copy of the image has it judged here, from the logs alone.

**Layout.**  The image is cut into units, runs of 1 to 48 blocks of 4096 bytes.  Each unit belongs to one writer, and
neighbours to different ones, so writers share clusters and units straddle them.  A write covers one whole unit: all
its blocks carry the same sequence, and a copy that has part of a write shows it.

**Block**, little-endian.  The checksum covers all behind it, the pattern depends on all numbers of the stamp.

    offset  size  name
    0       4     magic "stmp"
    4       4     checksum      crc32 of bytes 8..4096
    8       8     image         the layout's seed
    16      8     offset        of this block in the image
    24      8     sequence      of the write in its writer's log; 0 is the initial content
    32      4     writer
    36      4     epoch         the caller's: e.g. which process of a writer that was started again
    40      4056  pattern       8 bytes, 507 times

**Log**, one file per writer, only appended to, by one ``os.write`` per record: a killed process loses nothing.

    offset  size  name
    0       8     ns            CLOCK_MONOTONIC, which all processes of a machine share
    8       8     sequence      1, 2, 3... without a gap, counted by BEGIN records
    16      4     unit
    20      4     epoch
    24      1     record        BEGIN (before the write) or END (after it has returned)
    25      1     kind          DATA or ZERO: a zero-write or a discard
    26      6     0

A BEGIN without an END is an unfinished write: its writer was killed, or the write was refused.  It may be there, or
not, or in part, byte by byte, for as long as no later write has covered its unit.

**The rule.**  What a unit shows bounds the instant: not before that write began, not after the next finished write of
that unit had returned.  A copy is right iff some instant is within the bounds of all units of all writers.  (A unit of
zeroes may be any of its zero-writes, so its bounds are several intervals.)  When there is none, the instant that most
units agree on is taken, and the others are strays.

Rejected: comparing with a second copy of the image kept in memory (it has the very problem that is tested); one record
updated in place (an ``os.write`` costs 1 µs of a write's 100).
"""

from __future__ import annotations

import errno
import os
import random
import struct
import time
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

BLOCK_SIZE = 4096
UNIT_BLOCKS_MAX = 48
DATA, ZERO = 1, 2
BEGIN, END = 1, 2
NEVER_NS = 2**63 - 1

_MAGIC = b"stmp"
_CHECKSUM = struct.Struct("<4sI")
_STAMP = struct.Struct("<QQQII")
_PATTERN_SIZE = 8
_PATTERN_COUNT = (BLOCK_SIZE - _CHECKSUM.size - _STAMP.size) // _PATTERN_SIZE
_ZERO_BLOCK = bytes(BLOCK_SIZE)
_RECORD = struct.Struct("<QQIIBB6x")

_Interval = tuple[int, int]


# -- layout ------------------------------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """A run of blocks that is always written as a whole, by one writer."""

    number: int
    writer: int
    offset: int
    blocks: int

    @property
    def length(self) -> int:
        return self.blocks * BLOCK_SIZE


@dataclass(frozen=True)
class Layout:
    """Which unit is where and whose: a function of image size, number of writers and seed.

    The seed is also the image's id in the stamps.  ``initial`` is what sequence 0 looks like: stamps (DATA) or zeroes.
    """

    size_bytes: int
    writers: int
    seed: int
    initial: int = DATA
    units: tuple[Unit, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size_bytes <= 0 or self.size_bytes % BLOCK_SIZE:
            raise ValueError(f"a stamped image has whole blocks of {BLOCK_SIZE} bytes, not {self.size_bytes} bytes")
        chance = random.Random(self.seed)
        units: list[Unit] = []
        turn: list[int] = []
        block, end = 0, self.size_bytes // BLOCK_SIZE
        while block < end:
            if not turn:
                turn = chance.sample(range(self.writers), self.writers)
            blocks = min(chance.randint(1, UNIT_BLOCKS_MAX), end - block)
            units.append(Unit(len(units), turn.pop(), block * BLOCK_SIZE, blocks))
            block += blocks
        if len(units) < self.writers:
            raise ValueError(f"{self.size_bytes} bytes are {len(units)} units: too few for {self.writers} writers")
        object.__setattr__(self, "units", tuple(units))

    def units_of(self, writer: int) -> list[Unit]:
        return [unit for unit in self.units if unit.writer == writer]


# -- blocks ------------------------------------------------------------------------------------------------------------


class Stamp(NamedTuple):
    """What a block says about itself."""

    image: int
    offset: int
    sequence: int
    writer: int
    epoch: int


def make_block(stamp: Stamp) -> bytes:
    """The 4096 bytes of a stamp."""
    image, offset, sequence, writer, epoch = stamp
    mixed = (image ^ offset * 0x9E3779B97F4A7C15 ^ sequence * 0xBF58476D1CE4E5B9 ^ (writer << 32 | epoch)) * (
        0x94D049BB133111EB
    )
    pattern = (mixed & 0xFFFFFFFFFFFFFFFF).to_bytes(_PATTERN_SIZE, "little")
    body = _STAMP.pack(image, offset, sequence, writer, epoch) + pattern * _PATTERN_COUNT
    return _CHECKSUM.pack(_MAGIC, zlib.crc32(body)) + body


def parse_block(block: bytes) -> Stamp | None:
    """The stamp of a block, every byte of which is as it was made; None for anything else."""
    if len(block) != BLOCK_SIZE or not block.startswith(_MAGIC):
        return None
    stamp = Stamp._make(_STAMP.unpack_from(block, _CHECKSUM.size))
    return stamp if make_block(stamp) == block else None


def make_unit(layout: Layout, unit: Unit, sequence: int, epoch: int = 0) -> bytes:
    """The bytes of one DATA write."""
    end = unit.offset + unit.length
    return b"".join(
        [
            make_block(Stamp(layout.seed, offset, sequence, unit.writer, epoch))
            for offset in range(unit.offset, end, BLOCK_SIZE)
        ]
    )


def make_image(path: str | os.PathLike[str], layout: Layout) -> None:
    """Create the image with its initial content; FileExistsError if there is one."""
    with open(path, "xb") as file:
        file.truncate(layout.size_bytes)
        if layout.initial == DATA:
            for unit in layout.units:
                file.write(make_unit(layout, unit, 0))


# -- logs --------------------------------------------------------------------------------------------------------------


class LogWriter:
    """The writing end of one writer's log; goes on behind what an earlier process of that writer has logged."""

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        # Part of a record, where the disk was full.
        size = os.fstat(self._fd).st_size // _RECORD.size * _RECORD.size
        os.ftruncate(self._fd, size)
        last = os.pread(self._fd, _RECORD.size, size - _RECORD.size) if size else bytes(_RECORD.size)
        #: The sequence of the next write.
        self.sequence = _RECORD.unpack(last)[1] + 1
        self._open = (0, 0, 0, 0)

    def begin(self, unit: Unit, kind: int = DATA, epoch: int = 0) -> None:
        """Call right before the write of ``sequence``; the next one has another, also if this one fails."""
        self._open = (self.sequence, unit.number, epoch, kind)
        self._append(BEGIN)
        self.sequence += 1

    def end(self) -> None:
        """Call right after the write has returned; if it raised, don't: it may or may not be there."""
        self._append(END)

    def _append(self, record: int) -> None:
        sequence, unit, epoch, kind = self._open
        packed = _RECORD.pack(self._clock(), sequence, unit, epoch, record, kind)
        if os.write(self._fd, packed) != len(packed):
            raise OSError(errno.ENOSPC, "the log takes no more records")

    def close(self) -> None:
        os.close(self._fd)


class Log:
    """A log as read: arrays indexed by sequence, and the sequences of each unit.  Sequence 0 is the initial content."""

    def __init__(self, initial: int = DATA) -> None:
        self.units = array("I", [0])
        self.kinds = array("B", [initial])
        self.epochs = array("I", [0])
        self.begins_ns = array("Q", [0])
        #: NEVER_NS where the write is unfinished.
        self.ends_ns = array("Q", [0])
        self._of_unit: dict[int, array[int]] = {}

    @classmethod
    def read(cls, path: str | os.PathLike[str], layout: Layout) -> Log:
        """Read a log, also one that is being written; ValueError if it is none of this layout."""
        log = cls(layout.initial)
        with open(path, "rb") as file:
            data = file.read()
        # Behind that is part of a record: it is being written.
        whole = len(data) // _RECORD.size * _RECORD.size
        count = 0
        for ns, sequence, unit, epoch, record, kind in _RECORD.iter_unpack(memoryview(data)[:whole]):
            if record == BEGIN and sequence == count + 1 and unit < len(layout.units) and kind in (DATA, ZERO):
                count = sequence
                log.units.append(unit)
                log.kinds.append(kind)
                log.epochs.append(epoch)
                log.begins_ns.append(ns)
                log.ends_ns.append(NEVER_NS)
                log.of_unit(unit).append(sequence)
            elif record == END and sequence == count and unit == log.units[count]:
                log.ends_ns[count] = ns
            else:
                raise ValueError(f"{os.fspath(path)}: record {sequence} of unit {unit} does not follow {count}")
        return log

    @property
    def writes(self) -> int:
        return len(self.units) - 1

    def of_unit(self, unit: int) -> array[int]:
        """The sequences of a unit's writes, from 0 on."""
        found = self._of_unit.get(unit)
        if found is None:
            found = self._of_unit[unit] = array("Q", [0])
        return found

    def finished(self, sequence: int) -> bool:
        return self.ends_ns[sequence] != NEVER_NS


# -- the judge ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the logs say of a copy.

    units: all.  blocks: all.  corrupt_blocks: not as any logged write of this place made them, or missing.
    torn_units: parts of several writes.  windows: where the instant is that most units agree on, [first, last] in
    CLOCK_MONOTONIC ns, ascending; several where zeroes leave a choice, or where there is no such instant and as many
    units agree here as there.  stray_units: those that do not agree.  worst_miss_ns: how far at most they are from the
    first window.
    """

    units: int
    blocks: int
    corrupt_blocks: int
    torn_units: int
    stray_units: int
    worst_miss_ns: int
    windows: tuple[_Interval, ...]

    @property
    def right(self) -> bool:
        """Whether the copy is exactly one instant."""
        return not (self.corrupt_blocks or self.torn_units or self.stray_units)

    @property
    def window(self) -> _Interval:
        """First and last instant that the copy may be of; (1, 0) if no unit says anything."""
        return (self.windows[0][0], self.windows[-1][1]) if self.windows else (1, 0)

    def holds(self, instant_ns: int, slack_ns: int = 0) -> bool:
        """Whether the copy may be of this instant, within ``slack_ns``."""
        return any(low - slack_ns <= instant_ns <= high + slack_ns for low, high in self.windows)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"right": self.right, **asdict(self)}


def check(image: str | os.PathLike[str], logs: Sequence[Log], layout: Layout) -> Verdict:
    """Judge a copy of the image by the logs of all writers, ``logs[writer]``.  Reads the file once, from its start."""
    corrupt = torn = 0
    bounds: list[list[_Interval]] = []
    with open(image, "rb", buffering=0) as file:
        surplus = os.fstat(file.fileno()).st_size - layout.size_bytes
        corrupt += max(0, -(-surplus // BLOCK_SIZE))
        for unit in layout.units:
            found = _judge_unit(_read_fully(file.fileno(), unit), unit, logs[unit.writer], layout)
            if isinstance(found, list):
                bounds.append(found)
            elif found:
                corrupt += found
            else:
                torn += 1
    agreeing, windows = _most_agreed(bounds)
    return Verdict(
        units=len(layout.units),
        blocks=layout.size_bytes // BLOCK_SIZE,
        corrupt_blocks=corrupt,
        torn_units=torn,
        stray_units=len(bounds) - agreeing,
        worst_miss_ns=max((_miss(intervals, windows[0]) for intervals in bounds), default=0),
        windows=windows,
    )


def _read_fully(fd: int, unit: Unit) -> bytes:
    data = b""
    while len(data) < unit.length:
        more = os.pread(fd, unit.length - len(data), unit.offset + len(data))
        if not more:
            break
        data += more
    return data


def _judge_unit(data: bytes, unit: Unit, log: Log, layout: Layout) -> list[_Interval] | int:
    """The intervals in which the unit looked so, ascending and apart; or the number of corrupt blocks, 0 if torn."""
    history = log.of_unit(unit.number)
    sequence = _shown(data[:BLOCK_SIZE], unit, unit.offset, log, layout)
    if sequence is not None and data == make_unit(layout, unit, sequence, log.epochs[sequence]):
        return [_bounds(sequence, history, log)]
    if data.count(0) == unit.length:
        zeroes = [_bounds(sequence, history, log) for sequence in history if log.kinds[sequence] == ZERO]
        return _merge(zeroes) or unit.blocks
    blocks = [data[at : at + BLOCK_SIZE] for at in range(0, unit.length, BLOCK_SIZE)]
    found = _bounds_of_torn(blocks, unit, history, log, layout)
    if found:
        return found
    zero_known = any(log.kinds[sequence] == ZERO for sequence in history)
    return sum(
        _shown(block, unit, unit.offset + index * BLOCK_SIZE, log, layout) is None
        and not (zero_known and block == _ZERO_BLOCK)
        for index, block in enumerate(blocks)
    )


def _shown(block: bytes, unit: Unit, offset: int, log: Log, layout: Layout) -> int | None:
    """The sequence of the logged DATA write that made this block, or None."""
    stamp = parse_block(block)
    if stamp is None or stamp.sequence > log.writes:
        return None
    sequence = stamp.sequence
    logged = log.kinds[sequence] == DATA and (sequence == 0 or log.units[sequence] == unit.number)
    expected = Stamp(layout.seed, offset, sequence, unit.writer, log.epochs[sequence])
    return sequence if logged and stamp == expected else None


def _bounds(sequence: int, history: array[int], log: Log) -> _Interval:
    """From when a write began until the next finished one of that unit had returned."""
    for later in history[bisect_right(history, sequence) :]:
        if log.finished(later):
            return log.begins_ns[sequence], log.ends_ns[later]
    return log.begins_ns[sequence], NEVER_NS


def _bounds_of_torn(blocks: list[bytes], unit: Unit, history: array[int], log: Log, layout: Layout) -> list[_Interval]:
    """When a unit may have looked so because writes to it were unfinished; nothing if it never may."""
    intervals = []
    for index, base in enumerate(history):
        chain = [base]
        for later in history[index + 1 :]:
            if log.finished(later):
                break
            chain.append(later)
        if len(chain) == 1:
            continue
        newest = [_newest_needed(block, at, chain, unit, log, layout) for at, block in enumerate(blocks)]
        if None not in newest:
            needed = max(sequence for sequence in newest if sequence is not None)
            intervals.append((log.begins_ns[needed], _bounds(base, history, log)[1]))
    return _merge(intervals)


def _newest_needed(block: bytes, at: int, chain: list[int], unit: Unit, log: Log, layout: Layout) -> int | None:
    """How far into a chain of writes one must go to explain each byte of the block by one of them; None: no way."""
    made: list[bytes] = []
    for sequence in chain:
        stamp = Stamp(layout.seed, unit.offset + at * BLOCK_SIZE, sequence, unit.writer, log.epochs[sequence])
        made.append(make_block(stamp) if log.kinds[sequence] == DATA else _ZERO_BLOCK)
        if len(block) == BLOCK_SIZE and all(found in known for found, *known in zip(block, *made, strict=True)):
            return sequence
    return None


def _merge(intervals: Iterable[_Interval]) -> list[_Interval]:
    merged: list[_Interval] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _most_agreed(bounds: list[list[_Interval]]) -> tuple[int, tuple[_Interval, ...]]:
    """How many units agree at most on an instant, and where."""
    # Closed intervals: at one instant what begins comes before what ends.
    edges = sorted(edge for intervals in bounds for low, high in intervals for edge in ((low, 0), (high, 1)))
    best = count = start_ns = 0
    windows: list[_Interval] = []
    rising = False
    for ns, ends in edges:
        if ends:
            if rising and count >= best:
                if count > best:
                    best = count
                    windows.clear()
                windows.append((start_ns, ns))
            rising = False
            count -= 1
        else:
            rising = True
            start_ns = ns
            count += 1
    return best, tuple(windows)


def _miss(intervals: list[_Interval], window: _Interval) -> int:
    """How far a unit's intervals are from a window."""
    return min(max(low - window[1], window[0] - high, 0) for low, high in intervals)
