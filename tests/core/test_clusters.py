"""Claim, publish and scan over cluster bytes, against an oracle in plain Python."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw import _core
from shmcbw.bitmap import COPIED, PENDING

BYTES = st.binary(min_size=1, max_size=64).map(bytearray)
STATES = st.lists(st.sampled_from([0, 0, 0, 1, 7, 239, 240, 241, 242, 243]), min_size=1, max_size=64).map(bytearray)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[bytearray, int, int]:
    states = draw(STATES)
    first = draw(st.integers(0, len(states)))
    return states, first, draw(st.integers(first, len(states)))


@given(ranges(), st.integers(1, 239), st.integers(1, 70))
def test_claim_takes_the_first_pending_run(case: tuple[bytearray, int, int], worker: int, limit: int) -> None:
    states, first, end = case
    expected = bytearray(states)
    start = next((i for i in range(first, end) if states[i] == PENDING), None)
    claimed = _core.claim(states, first, end, worker, limit)
    if start is None:
        assert claimed is None
    else:
        stop = start
        while stop < end and expected[stop] == PENDING and stop - start < limit:
            expected[stop] = worker
            stop += 1
        assert claimed == (start, stop)
    assert states == expected


@given(ranges(), st.integers(0, 255), st.integers(0, 255))
def test_exchange_changes_exactly_the_bytes_that_held_the_state(
    case: tuple[bytearray, int, int], state: int, to: int
) -> None:
    states, first, end = case
    expected = bytearray(to if first <= i < end and b == state else b for i, b in enumerate(states))
    count = sum(states[i] == state for i in range(first, end))
    assert _core.exchange(states, first, end, state, to) == count
    assert states == expected


@given(ranges(), st.sampled_from([0, 3, 240, 255]))
def test_find_byte_and_run_agree_with_the_oracle(case: tuple[bytearray, int, int], value: int) -> None:
    states, first, end = case
    found = states.find(value, first, end)
    assert _core.find_byte(states, first, end, value) == (end if found < 0 else found)
    if first == end:
        with pytest.raises(ValueError):
            _core.run(states, first, end)
        return
    stop = first + 1
    while stop < end and states[stop] == states[first]:
        stop += 1
    assert _core.run(states, first, end) == (states[first], stop)


@given(BYTES)
def test_histogram_counts_every_byte(states: bytearray) -> None:
    assert _core.histogram(states, 0, len(states)) == [states.count(value) for value in range(256)]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 3, 240, 241])), min_size=1), st.integers(0, 9))
def test_find_uncopied_finds_the_first_cluster_written_after_the_epoch_and_not_copied(
    clusters: list[tuple[int, int]], epoch: int
) -> None:
    epoch_map = bytearray(b"".join(mark.to_bytes(4, "little") for mark, _ in clusters))
    bitmap = bytearray(byte for _, byte in clusters)
    expected = next((i for i, (mark, byte) in enumerate(clusters) if mark > epoch and byte < COPIED), None)
    assert _core.find_uncopied(epoch_map, 0, bitmap, len(clusters), epoch) == expected


@given(st.lists(st.sampled_from([0, 1, 7, 2**32 - 1]), min_size=1, max_size=20), st.integers(0, 9), st.data())
def test_find_marked_finds_the_first_cluster_of_a_range_that_is_marked_later(
    marks: list[int], epoch: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(marks)))
    end = data.draw(st.integers(first, len(marks)))
    epoch_map = bytearray(8) + b"".join(mark.to_bytes(4, "little") for mark in marks)
    expected = next((cluster for cluster in range(first, end) if marks[cluster] > epoch), None)
    assert _core.find_marked(epoch_map, 8, first, end, epoch) == expected


@given(st.lists(st.sampled_from([0, 1, 7, 2**32 - 1]), min_size=1, max_size=20), st.integers(0, 9))
def test_clamp_marks_lowers_the_later_ones_and_counts_them(marks: list[int], epoch: int) -> None:
    epoch_map = bytearray(b"".join(mark.to_bytes(4, "little") for mark in marks))
    assert _core.clamp_marks(epoch_map, 0, len(marks), epoch) == sum(mark > epoch for mark in marks)
    assert epoch_map == b"".join(min(mark, epoch).to_bytes(4, "little") for mark in marks)


@pytest.mark.parametrize(("first", "end"), [(0, 3), (3, 3), (2, 1), (0, 2**64 - 1)])
def test_marks_outside_the_map_are_value_errors(first: int, end: int) -> None:
    with pytest.raises(ValueError):
        _core.find_marked(bytearray(16), 8, first, end, 0)


@pytest.mark.parametrize(("first", "end"), [(0, 9), (9, 9), (5, 4), (0, 2**64 - 1), (2**63, 2**63)])
def test_ranges_outside_the_bitmap_are_value_errors(first: int, end: int) -> None:
    states = bytearray(8)
    for call in (
        lambda: _core.claim(states, first, end, 1, 1),
        lambda: _core.exchange(states, first, end, 0, 1),
        lambda: _core.find_byte(states, first, end, 0),
        lambda: _core.histogram(states, first, end),
        lambda: _core.run(states, first, end),
    ):
        with pytest.raises(ValueError):
            call()
    assert states == bytearray(8)


@pytest.mark.parametrize("worker", [0, 240, 256])
def test_only_worker_ids_can_claim(worker: int) -> None:
    with pytest.raises(ValueError):
        _core.claim(bytearray(8), 0, 8, worker, 1)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 4096, 65536])
def test_is_zero_sees_every_byte(length: int) -> None:
    memory = bytearray(length + 2)
    memory[0] = memory[-1] = 1
    assert _core.is_zero(memory, 1, length)
    for position in {0, length // 2, length - 1} if length else set():
        memory[1 + position] = 1
        assert not _core.is_zero(memory, 1, length)
        memory[1 + position] = 0
