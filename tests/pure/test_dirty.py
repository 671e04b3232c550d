"""Dirty bitmaps against a model in plain Python: sets of granule numbers, and writes that are told to every bitmap."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from shmcbw import _core
from shmcbw.bitmap import COPIED, PENDING, SKIPPED
from shmcbw.dirty import DirtyBitmap, DirtySet, EpochMap, check_granularity
from shmcbw.errors import BitmapError
from shmcbw.points import Point

SEGMENT = "ab" * 16
GRANULARITIES = st.sampled_from([512, 1024, 2048, 4096, 8192, 65536])
CLUSTERS = st.sampled_from([512, 1024, 4096])
SIZES = st.integers(1, 90_000)


def granules_of(offset: int, length: int, granularity: int) -> set[int]:
    """What a range of bytes touches, said as plainly as possible."""
    return {byte // granularity for byte in (*range(offset, offset + length, 512), offset + length - 1)}


def regrain(granules: set[int], granularity: int, to: int, size: int) -> set[int]:
    found: set[int] = set()
    for granule in granules:
        offset = granule * granularity
        found |= granules_of(offset, min(granularity, size - offset), to)
    return found


def members(found: DirtySet) -> set[int]:
    return {granule for granule in range(found.granules) if granule * found.granularity in found}


@st.composite
def sets(draw: st.DrawFn, size: int | None = None) -> tuple[DirtySet, set[int]]:
    size = size or draw(SIZES)
    made = DirtySet(size, draw(GRANULARITIES))
    model: set[int] = set()
    for _ in range(draw(st.integers(0, 6))):
        offset = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, size - offset))
        made.add(offset, length)
        model |= granules_of(offset, length, made.granularity)
    return made, model


# -- sets --------------------------------------------------------------------------------------------------------------


@given(sets())
def test_a_range_is_added_rounded_outward_and_counted_in_whole_granules(case: tuple[DirtySet, set[int]]) -> None:
    made, model = case
    assert members(made) == model
    assert made.count_bytes() == len(model) * made.granularity


@given(sets(), st.data())
def test_extents_are_the_runs_of_dirty_bytes_and_end_at_the_image(
    case: tuple[DirtySet, set[int]], data: st.DataObject
) -> None:
    made, model = case
    offset = data.draw(st.integers(0, made.size_bytes))
    end = data.draw(st.integers(offset, made.size_bytes))
    expected: list[tuple[int, int]] = []
    for granule in sorted(model):
        first = max(granule * made.granularity, offset)
        stop = min((granule + 1) * made.granularity, end)
        if first >= stop:
            continue
        if expected and sum(expected[-1]) == first:
            expected[-1] = (expected[-1][0], stop - expected[-1][0])
        else:
            expected.append((first, stop - first))
    assert list(made.extents(offset, end)) == expected


def test_more_extents_than_one_look_finds_are_all_found() -> None:
    made = DirtySet(512 * 300_000, 512, bytes([0b01010101]) * (300_000 // 8))
    assert list(made.extents()) == [(512 * granule, 512) for granule in range(0, 300_000, 2)]


@given(st.data(), SIZES)
def test_a_merge_adds_the_other_set_rounded_outward_at_any_two_granularities(data: st.DataObject, size: int) -> None:
    (one, one_model), (other, other_model) = data.draw(sets(size)), data.draw(sets(size))
    before = other.copy()
    one.merge(other)
    assert members(one) == one_model | regrain(other_model, other.granularity, one.granularity, size)
    assert other == before


@given(sets(), GRANULARITIES)
def test_equal_sets_of_equal_granularity_have_equal_hashes_and_others_have_not(
    case: tuple[DirtySet, set[int]], granularity: int
) -> None:
    made, model = case
    other = made.regrained(granularity)
    assert members(other) == regrain(model, made.granularity, granularity, made.size_bytes)
    whole_words = bytes(other.bits).ljust(-(-len(other.bits) // 8) * 8, b"\0")
    assert other.regrained(granularity).sha256() == other.sha256() == hashlib.sha256(whole_words).hexdigest()
    changed = other.copy()
    changed.add(0, made.size_bytes)
    assert (changed == other) == (len(members(other)) == other.granules) == (changed.sha256() == other.sha256())


@given(sets(), SIZES)
def test_a_resized_set_keeps_what_is_still_there_and_is_clean_behind(
    case: tuple[DirtySet, set[int]], size: int
) -> None:
    made, model = case
    assert members(made.resized(size)) == {
        granule for granule in model if granule * made.granularity < min(size, made.size_bytes)
    }


@given(SIZES, CLUSTERS, GRANULARITIES, st.data())
def test_clusters_that_are_not_copied_are_added(size: int, cluster: int, granularity: int, data: st.DataObject) -> None:
    count = -(-size // cluster)
    states = bytearray(data.draw(st.lists(st.sampled_from([PENDING, 3, 239, COPIED, 243]), min_size=count)))
    made = DirtySet(size, granularity)
    made.add_uncopied(states, cluster)
    wanted = {index for index, state in enumerate(states[:count]) if state < COPIED}
    assert members(made) == regrain(wanted, cluster, granularity, size)


@pytest.mark.parametrize("granularity", [0, 1, 256, 513, 3 << 9, -512, 1 << 32])
def test_a_granularity_that_is_no_power_of_two_from_512_on_is_refused(granularity: int) -> None:
    with pytest.raises(BitmapError, match=r"^Granularity must be power of 2 and at least 512$"):
        check_granularity(granularity)


@pytest.mark.parametrize("name", ["", "x" * 1024])
def test_names_are_not_empty_and_shorter_than_1024(name: str) -> None:
    expected = "Bitmap name too long: " + name if name else "Bitmap name cannot be empty"
    with pytest.raises(BitmapError, match=f"^{expected}$"):
        DirtyBitmap(name, 512, start=None)
    DirtyBitmap("x" * 1023, 512, start=None)


def test_bits_beyond_the_image_do_not_count() -> None:
    assert DirtySet(512 * 3, 512, b"\xff").count_bytes() == 512 * 3


# -- bitmaps -----------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A bitmap as a set of granules of its unit, told of every write."""

    unit: int
    recording: bool
    granules: set[int] = field(default_factory=set)


class BitmapsAgainstAModel(RuleBasedStateMachine):
    """Every operation at a boundary of its own: then a bitmap is exactly its model, not only a superset."""

    bitmaps = Bundle("bitmaps")

    @initialize(size=SIZES, cluster=CLUSTERS)
    def image(self, size: int, cluster: int) -> None:
        self.memory = bytearray(16 + 4 * -(-size // cluster))
        self.epochs = EpochMap(self.memory, 16, size, cluster)
        self.epoch = 2
        self.models: dict[str, tuple[DirtyBitmap, Model]] = {}

    def boundary(self) -> Point:
        self.epoch += 2
        return Point(SEGMENT, self.epoch - 1)

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        size, cluster = self.epochs.size_bytes, self.epochs.cluster_size
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, min(size - offset, 10_000)))
        touched = granules_of(offset, length, cluster)
        for index in touched:
            self.memory[16 + 4 * index : 20 + 4 * index] = self.epoch.to_bytes(4, "little")
        for _, model in self.models.values():
            if model.recording:
                model.granules |= regrain(touched, cluster, model.unit, size)

    @rule(target=bitmaps, granularity=GRANULARITIES, disabled=st.booleans())
    def add(self, granularity: int, disabled: bool) -> str:
        name, start = f"b{self.epoch}", self.boundary()
        bitmap = DirtyBitmap(
            name, granularity, start=None if disabled else start.epoch, since=None if disabled else start
        )
        self.models[name] = (bitmap, Model(max(granularity, self.epochs.cluster_size), not disabled))
        return name

    @rule(name=bitmaps)
    def clear(self, name: str) -> None:
        bitmap, model = self.models[name]
        bitmap.clear(self.boundary())
        model.granules.clear()

    @rule(name=bitmaps)
    def enable(self, name: str) -> None:
        bitmap, model = self.models[name]
        bitmap.enable(self.boundary())
        model.recording = True

    @rule(name=bitmaps)
    def disable(self, name: str) -> None:
        bitmap, model = self.models[name]
        bitmap.disable(self.epochs, Point(SEGMENT, self.epoch - 1))
        model.recording = False

    @rule(name=bitmaps, others=st.lists(bitmaps, min_size=1, max_size=3))
    def merge(self, name: str, others: list[str]) -> None:
        bitmap, model = self.models[name]
        bitmap.merge(self.epochs, [self.models[other][0] for other in others], Point(SEGMENT, self.epoch - 1))
        for _, other in [self.models[other] for other in others]:
            model.granules |= regrain(other.granules, other.unit, model.unit, self.epochs.size_bytes)

    @rule(
        name=bitmaps,
        mode=st.sampled_from(["on-success", "never", "always"]),
        success=st.booleans(),
        since=st.data(),
    )
    def job(self, name: str, mode: str, success: bool, since: st.DataObject) -> None:
        """A job from its cut to its end, with a write and an uncopied cluster in between."""
        bitmap, model = self.models[name]
        cut, old = self.boundary(), set(model.granules)
        model.granules.clear()
        self.write(since)
        left = since.draw(st.sets(st.sampled_from(sorted(old)))) if old else set()
        uncopied = DirtySet(self.epochs.size_bytes, model.unit)
        for granule in left:
            offset = granule * model.unit
            uncopied.add(offset, min(model.unit, self.epochs.size_bytes - offset))
        bitmap.finish(mode, success, cut, uncopied)
        if mode == "never" or (mode == "on-success" and not success):
            model.granules |= old
        elif not success:
            model.granules |= left

    @rule(name=consumes(bitmaps))
    def remove(self, name: str) -> None:
        del self.models[name]

    @precondition(lambda self: hasattr(self, "models"))
    @invariant()
    def every_bitmap_is_its_model(self) -> None:
        for bitmap, model in self.models.values():
            found = bitmap.dirty(self.epochs)
            assert members(found) == model.granules
            size = self.epochs.size_bytes
            counted = regrain(model.granules, model.unit, bitmap.granularity, size)
            described = bitmap.describe(self.epochs)
            assert described["count"] == len(counted) * bitmap.granularity
            assert described["recording"] == model.recording
            assert bitmap.sha256(self.epochs) == found.regrained(bitmap.granularity).sha256()


BitmapsAgainstAModel.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestBitmapsAgainstAModel = BitmapsAgainstAModel.TestCase


# -- coverage: what an increment may be laid over ----------------------------------------------------------------------


def an_epoch_map() -> EpochMap:
    return EpochMap(bytearray(64 * 4), 0, 64 * 512, 512)


def point(epoch: int, *, rest: int = 0) -> Point:
    return Point(SEGMENT, epoch, rest=rest)


def recording(start: int) -> DirtyBitmap:
    return DirtyBitmap("b", 512, start=start, since=point(start))


def test_a_bitmap_covers_everything_since_it_was_made() -> None:
    assert recording(3).covers(point(9)) == point(3)


def test_a_job_that_succeeds_makes_it_cover_from_the_cut_on() -> None:
    bitmap = recording(3)
    bitmap.finish("on-success", True, point(9), None)
    assert bitmap.covers(point(11)) == point(9)
    bitmap.finish("on-success", False, point(13), None)
    assert bitmap.covers(point(15)) == point(9)


def test_what_always_leaves_after_a_failure_fits_its_own_rest_only() -> None:
    bitmap = recording(3)
    bitmap.finish("always", False, point(9), DirtySet(64 * 512, 512), 7)
    since = bitmap.covers(point(11))
    assert since == point(9, rest=7)
    assert not since.not_after(point(9))
    assert not point(3).not_after(since)
    assert not since.not_after(point(11))
    assert since.not_after(point(9, rest=7))
    assert not since.not_after(point(9, rest=8)), "what another job has left"


def test_a_disabled_bitmap_covers_up_to_the_last_boundary_only() -> None:
    bitmap, epochs = recording(3), an_epoch_map()
    bitmap.disable(epochs, point(7))
    assert bitmap.covers(point(7)) == point(3)
    assert bitmap.covers(point(9)) is None


def test_a_gap_in_recording_ends_the_coverage_and_clear_begins_a_new_one() -> None:
    bitmap, epochs = recording(3), an_epoch_map()
    bitmap.disable(epochs, point(7))
    bitmap.enable(point(9))
    assert bitmap.covers(point(11)) is None
    bitmap.clear(point(13))
    assert bitmap.covers(point(15)) == point(13)


def test_disable_and_enable_at_one_boundary_leave_no_gap() -> None:
    bitmap, epochs = recording(3), an_epoch_map()
    bitmap.disable(epochs, point(7))
    bitmap.enable(point(7))
    assert bitmap.covers(point(9)) == point(3)


def test_bitmaps_of_neighbouring_times_merged_cover_both() -> None:
    """Checkpoints: one bitmap for each time between two of them, merged into a fresh one."""
    epochs = an_epoch_map()
    first, second = recording(3), recording(7)
    first.disable(epochs, point(7))
    merged = DirtyBitmap("m", 512, start=None)
    merged.merge(epochs, [second, first], point(11))
    assert merged.covers(point(11)) == point(3)
    assert merged.covers(point(13)) is None


def test_bitmaps_with_a_gap_between_them_merged_cover_no_more_than_one() -> None:
    epochs = an_epoch_map()
    first, second = recording(3), recording(9)
    first.disable(epochs, point(7))
    second.merge(epochs, [first], point(11))
    assert second.covers(point(11)) == point(9)


def test_an_inconsistent_bitmap_can_only_be_removed() -> None:
    bitmap, epochs = recording(3), an_epoch_map()
    bitmap.inconsistent = True
    assert bitmap.covers(point(5)) is None
    calls: list[Callable[[], None]] = [
        lambda: bitmap.clear(point(5)),
        lambda: bitmap.enable(point(5)),
        lambda: bitmap.disable(epochs, point(5)),
        lambda: bitmap.merge(epochs, [], point(5)),
        lambda: recording(3).merge(epochs, [bitmap], point(5)),
    ]
    for call in calls:
        with pytest.raises(BitmapError, match=r"^Bitmap 'b' is inconsistent and cannot be used$"):
            call()
    assert bitmap.describe(epochs)["inconsistent"] is True


def test_points_of_different_segments_fit_only_if_they_are_the_same() -> None:
    assert not Point("0" * 32, 3).not_after(point(5))
    assert Point.parse(str(point(5, rest=7))) == point(5, rest=7)
    for text in ("", "x", "a@1", "ab" * 16, "ab" * 16 + "@", "ab" * 16 + "@-1", "ab" * 16 + "@4294967296", "AB" * 16):
        with pytest.raises(ValueError):
            Point.parse(text)


def test_skipped_is_what_the_core_takes_for_it() -> None:
    states = bytearray([PENDING, PENDING, 5, COPIED])
    marks = b"".join(mark.to_bytes(4, "little") for mark in (0, 4, 0, 0))
    assert _core.skip_clean(states, 0, 4, marks, 0, 4, 9, 3, bytes(1), 4, 9) == 1
    assert states == bytes([SKIPPED, PENDING, 5, COPIED])


def test_the_dirty_extents_of_a_tebibyte_take_less_than_100_ms() -> None:
    """Of CPU time, the best of five: a busy machine must not decide.  One cluster of a hundred is dirty."""
    clusters = 1 << 24
    memory = bytearray(4 * clusters)
    marks = memoryview(memory).cast("I")
    for cluster in range(0, clusters, 100):
        marks[cluster] = 8
    epochs = EpochMap(memory, 0, 1 << 40, 1 << 16)
    bitmap = DirtyBitmap("b", 1 << 16, start=7)
    took = []
    for _ in range(5):
        started = time.process_time()
        found = sum(1 for _ in bitmap.dirty(epochs).extents())
        took.append(time.process_time() - started)
        assert found == -(-clusters // 100)
    assert min(took) <= 0.1
