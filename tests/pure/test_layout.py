"""The layout: no two words overlap, all are aligned, and the core accepts it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw import _core, layout
from shmcbw.layout import STRUCTURES, Geometry, Header, Slot, words


@pytest.mark.parametrize("structure", STRUCTURES)
def test_words_are_aligned_and_do_not_overlap(structure: type) -> None:
    end = 0
    for name, word in words(structure):
        assert word.offset >= end, name
        assert word.offset % min(word.size, 8) == 0, name
        end = word.offset + word.size
    assert end <= vars(structure)["SIZE"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_word_names_its_writer_and_reader(structure: type) -> None:
    assert all(word.writer and word.reader for _, word in words(structure))


def test_words_that_different_sides_write_do_not_share_a_cache_line() -> None:
    owner = {word.offset // 64 for _, word in words(Slot) if word.writer == "owner"}
    assert Slot.error.offset // 64 not in owner
    others = {word.offset // 64 for name, word in words(Header) if name != "epoch"}
    assert Header.epoch.offset // 64 not in others


@given(st.integers(1, 1 << 43), st.sampled_from([4096, 65536, 1 << 21]), st.integers(1, 200), st.integers(8, 239))
def test_the_core_accepts_every_geometry(image: int, cluster: int, slots: int, workers: int) -> None:
    geometry = Geometry(image, cluster, slots, workers)
    handed = geometry.core_layout()
    assert geometry.segment_size == geometry.epoch_map_offset + 4 * geometry.clusters
    if geometry.segment_size < 1 << 20:
        _core.Copier(bytearray(geometry.segment_size), handed, 1).release()


@pytest.mark.parametrize("key", sorted(Geometry(1 << 20, 4096, 2, 8).core_layout()))
def test_the_core_refuses_a_layout_that_does_not_fit(key: str) -> None:
    geometry = Geometry(1 << 20, 4096, 2, 8)
    for wrong in (2**63, None):
        handed: dict[str, int] = geometry.core_layout()
        if wrong is None:
            del handed[key]
        else:
            handed[key] = wrong
        unused = {name for structure in STRUCTURES[1:] for name, _ in words(structure)}
        try:
            _core.Copier(bytearray(geometry.segment_size), handed, 1).release()
        except ValueError:
            continue
        assert key.split("_", 1)[1] in unused, f"the core took {key}={wrong}"


@pytest.mark.parametrize("bad", [(0, 4096, 1, 8), (1, 4095, 1, 8), (1, 4096, 0, 8), (1, 4096, 1, 7), (1, 4096, 1, 240)])
def test_numbers_out_of_bounds_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        Geometry(*bad)


def test_memory_per_image_is_four_bytes_a_cluster_and_a_small_constant() -> None:
    small, large = Geometry(65536, 65536, 64, 8), Geometry(1 << 40, 65536, 64, 8)
    assert large.segment_size - small.segment_size == 4 * (large.clusters - small.clusters)
    assert small.segment_size < 128 << 10
    assert large.bitmap_size == large.clusters


def test_the_tables_of_the_design_are_those_of_the_code() -> None:
    assert layout.tables().count("| offset |") == len(STRUCTURES)


def test_the_design_shows_the_tables_of_the_code() -> None:
    design = (Path(layout.__file__).parent / "DESIGN.md").read_text()
    assert layout.tables() in design
