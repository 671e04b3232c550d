"""The judge: from the logs of all writers, was this copy of an image exactly one instant?

Independent of the engine, and of the demo's judge in two rules that need to know who died when:

*A partial write is for the dead.*  A cut lies wholly before or after each write of a living writer, so a unit that
shows a part of an unfinished write bounds the instant to after the kill of its writer was sent.  A unit that shows all
of an unfinished write may be of any time from its beginning on.

*A refused write is not there.*  What policy break-guest-write refused has changed nothing.

Beside the units the cut itself bounds the instant: between the call that took it and that call's return, or the death
of the coordinator that made it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from shmcbw.workers.stamps import (
    BLOCK_SIZE,
    DATA,
    NEVER_NS,
    ZERO,
    Layout,
    Log,
    Stamp,
    Unit,
    make_block,
    make_unit,
    parse_block,
)

Interval = tuple[int, int]


@dataclass(frozen=True)
class History:
    """One writer's log, with what it can't say: which incarnations were killed when, which writes were refused."""

    log: Log
    killed_ns: dict[int, int] = field(default_factory=dict)
    refused: frozenset[int] = frozenset()

    def partial_from(self, sequence: int) -> int:
        """From when on an unfinished write may be there in part."""
        return self.killed_ns.get(self.log.epochs[sequence], NEVER_NS)

    def until(self, sequence: int, of_unit: array[int]) -> int:
        """When at the latest a later write of the unit was there."""
        for later in of_unit[bisect_right(of_unit, sequence) :]:
            if self.log.finished(later):
                return self.log.ends_ns[later]
        return NEVER_NS


@dataclass(frozen=True)
class Judgement:
    """``wrong``: why it is no single instant, empty if it is one.  ``window``: where that instant is.

    partial: units that show a part of a dead writer's last write.  bounds: the intervals that it is in, a list for each
    that says so.
    """

    wrong: list[str]
    window: Interval
    partial: int = 0
    bounds: list[list[Interval]] = field(default_factory=list)

    @property
    def right(self) -> bool:
        return not self.wrong


def judge(
    data: bytes,
    histories: Sequence[History],
    layout: Layout,
    cut: Interval = (0, NEVER_NS),
    inaccessible: Sequence[Interval] = (),
    sizes: Sequence[int] = (),
) -> Judgement:
    """Judge a copy of the whole image, ``histories[writer]``.

    cut: when it was taken.  inaccessible: byte ranges [begin, end) that could not be read; units in them do not count.
    sizes: what the image may have had at the cut, if it grows to the layout's size.
    """
    sizes = sizes or (layout.size_bytes,)
    if len(data) not in sizes:
        return Judgement([f"it has {len(data)} bytes, the image {' or '.join(map(str, sizes))}"], (1, 0))
    wrong: list[str] = []
    partial = 0
    bounds: list[tuple[str, list[Interval]]] = [("the cut", [cut])]
    for unit in layout.units:
        end = unit.offset + unit.length
        if any(first < end and unit.offset < last for first, last in inaccessible):
            continue
        history, shown = histories[unit.writer], data[unit.offset : end]
        if end > len(data):
            # It was not there yet, so nobody had written it.
            bounds.append((_name(unit), [(0, history.until(0, history.log.of_unit(unit.number)))]))
            continue
        found = _bounds_of_whole(shown, unit, history, layout)
        if not found:
            found = _bounds_of_partial(shown, unit, history, layout)
            partial += bool(found)
        if not found:
            found = f"is torn: {_describe(shown, unit, history.log, layout)}"
        if isinstance(found, str):
            wrong.append(f"{_name(unit)}: {found}")
        else:
            bounds.append((_name(unit), found))
    agreeing, window = _most_agreed([intervals for _, intervals in bounds])
    if agreeing < len(bounds):
        for name, intervals in bounds:
            miss = min(max(low - window[1], window[0] - high) for low, high in intervals)
            if miss > 0:
                wrong.append(f"{name} is {miss / 1e6:.3f} ms off the instant that {agreeing} of {len(bounds)} agree on")
    return Judgement(wrong, window, partial, [intervals for _, intervals in bounds])


def agree(bounds: Sequence[Sequence[Interval]]) -> bool:
    """Whether there is an instant that all of these allow, of however many copies of however many images."""
    return _most_agreed(bounds)[0] == len(bounds)


def _name(unit: Unit) -> str:
    return f"unit {unit.number} of writer {unit.writer} (bytes {unit.offset}..{unit.offset + unit.length})"


def _bounds_of_whole(data: bytes, unit: Unit, history: History, layout: Layout) -> list[Interval] | str:
    """When the unit may have looked so, or why it never did; nothing if it is not all of one write."""
    log, of_unit = history.log, history.log.of_unit(unit.number)
    shown = parse_block(data[:BLOCK_SIZE])
    if shown is not None and _logged(shown, unit, log):
        sequence = shown.sequence
        if data == make_unit(layout, unit, sequence, log.epochs[sequence]):
            if sequence in history.refused:
                return f"shows write {sequence}, which was refused"
            return [(log.begins_ns[sequence], history.until(sequence, of_unit))]
    if data.count(0) == len(data):
        zeroes = [
            (log.begins_ns[sequence], history.until(sequence, of_unit))
            for sequence in of_unit
            if log.kinds[sequence] == ZERO and sequence not in history.refused
        ]
        return zeroes or "is zeroes, and nobody has zeroed it"
    return []


def _logged(stamp: Stamp, unit: Unit, log: Log) -> bool:
    sequence = stamp.sequence
    return sequence <= log.writes and (sequence == 0 or log.units[sequence] == unit.number)


def _bounds_of_partial(data: bytes, unit: Unit, history: History, layout: Layout) -> list[Interval]:
    """When a unit may have looked so because somebody died in a write; nothing if it never may."""
    log, of_unit = history.log, history.log.of_unit(unit.number)
    intervals = []
    for index, base in enumerate(of_unit):
        if base in history.refused:
            continue
        chain = [base]
        for later in of_unit[index + 1 :]:
            if log.finished(later):
                break
            if later not in history.refused:
                chain.append(later)
        if len(chain) == 1:
            continue
        newest = _newest_in(data, chain, unit, log, layout)
        if newest is not None:
            low, high = history.partial_from(newest), history.until(base, of_unit)
            if low <= high and low != NEVER_NS:
                intervals.append((low, high))
    return intervals


def _newest_in(data: bytes, chain: list[int], unit: Unit, log: Log, layout: Layout) -> int | None:
    """How far into a chain of writes one must go to find each byte in one of them; None if that does not do."""
    needed = 0
    for at in range(0, unit.length, BLOCK_SIZE):
        block = data[at : at + BLOCK_SIZE]
        made: list[bytes] = []
        for index, sequence in enumerate(chain):
            made.append(_block(sequence, unit, unit.offset + at, log, layout))
            if block == made[-1] or _is_mixed(block, made):
                needed = max(needed, index)
                break
        else:
            return None
    return chain[needed]


def _block(sequence: int, unit: Unit, offset: int, log: Log, layout: Layout) -> bytes:
    if log.kinds[sequence] != DATA:
        return bytes(BLOCK_SIZE)
    return make_block(Stamp(layout.seed, offset, sequence, unit.writer, log.epochs[sequence]))


def _is_mixed(block: bytes, made: list[bytes]) -> bool:
    return all(byte in known for byte, *known in zip(block, *made, strict=True))


def _most_agreed(bounds: Sequence[Sequence[Interval]]) -> tuple[int, Interval]:
    """How many agree at most on an instant, and the first window of such instants."""
    # At one instant what begins comes before what ends.
    edges = sorted(edge for intervals in bounds for low, high in _merged(intervals) for edge in ((low, 0), (high, 1)))
    best = count = 0
    window, rising = (1, 0), False
    for ns, ends in edges:
        if not ends:
            count += 1
            if count > best:
                best, window, rising = count, (ns, NEVER_NS), True
        else:
            if rising and count == best:
                window, rising = (window[0], ns), False
            count -= 1
    return best, window


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _describe(data: bytes, unit: Unit, log: Log, layout: Layout) -> str:
    """Whose blocks a torn unit has."""
    runs: list[tuple[str, int]] = []
    for at in range(0, unit.length, BLOCK_SIZE):
        block = data[at : at + BLOCK_SIZE]
        stamp = parse_block(block)
        if stamp is None:
            what = "zeroes" if block.count(0) == BLOCK_SIZE else "no stamp"
        elif stamp.image != layout.seed or stamp.offset != unit.offset + at or stamp.writer != unit.writer:
            what = f"a block of another place ({stamp})"
        elif not _logged(stamp, unit, log):
            what = f"write {stamp.sequence}, not logged for this unit"
        else:
            what = f"write {stamp.sequence}{'' if log.finished(stamp.sequence) else ' (unfinished)'}"
        if runs and runs[-1][0] == what:
            runs[-1] = (what, runs[-1][1] + 1)
        else:
            runs.append((what, 1))
    return ", ".join(f"{blocks} blocks of {what}" for what, blocks in runs)
