"""The manifest: what is written is read, what is damaged is refused, and each state is right for its own file."""

from __future__ import annotations

import array
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw import layout
from shmcbw.errors import ManifestError
from shmcbw.image import Identity
from shmcbw.points import Point
from shmcbw.workers import manifest
from shmcbw.workers.manifest import (
    ABSENT,
    BEING_MADE,
    CHANGING,
    CHECKSUM_MIN,
    FINISHED,
    FULL,
    INCREMENT,
    NAMING,
    REST,
    ZERO,
    Description,
    Manifest,
    checksum,
    sidecar,
)

POINTS = st.builds(
    Point, st.sampled_from(["ab" * 16, "0" * 31 + "1"]), st.integers(0, 2**32 - 1), rest=st.integers(0, 2**32 - 1)
)
DESCRIPTIONS = st.builds(
    Description,
    st.sampled_from([FULL, INCREMENT]),
    st.integers(1, 2**62),
    st.sampled_from([4096, 65536]),
    POINTS,
    st.none() | POINTS,
    st.integers(0, 2**63),
    st.builds(Identity, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    *[st.integers(0, 2**64 - 1)] * 3,
    st.binary(min_size=16, max_size=16),
)
A_POINT = Point("ab" * 16, 5)


@given(DESCRIPTIONS, st.sampled_from(manifest.STATES))
def test_a_header_is_read_as_it_was_written(description: Description, state: bytes) -> None:
    assert Description.unpack(description.pack(state), "m") == (description, state)


@given(DESCRIPTIONS, st.integers(0, 8 * manifest.HEADER_BYTES - 1))
def test_a_header_with_any_bit_changed_is_refused(description: Description, bit: int) -> None:
    header = bytearray(description.pack(FINISHED))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ManifestError):
        Description.unpack(bytes(header), "m")


@given(st.binary(max_size=100_000))
def test_no_checksum_is_one_of_the_words_that_mean_something_else(data: bytes) -> None:
    assert CHECKSUM_MIN <= checksum(data) < 1 << 64


@given(
    st.sampled_from([FULL, INCREMENT]),
    st.lists(st.sampled_from([ZERO, ABSENT, 16, 2**64 - 1]) | st.integers(16, 2**64 - 1), min_size=1, max_size=50),
)
def test_words_are_read_as_they_were_put_and_counted(
    tmp_path_factory: pytest.TempPathFactory, kind: int, words: list[int]
) -> None:
    path = tmp_path_factory.mktemp("m") / "m"
    made = Manifest.create(str(path), Description(kind, 4096 * len(words), 4096, A_POINT, None), 0o600)
    for cluster, word in enumerate(words):
        if word < CHECKSUM_MIN:
            made.put_runs(cluster, cluster + 1, word)
        else:
            made.put(cluster, array.array("Q", [word]))
    made.seal(FINISHED)
    made.close()
    read = Manifest.open(str(path))
    read.check_table()
    assert list(read.words(0, len(words))) == words
    found = read.description
    assert (found.data_clusters, found.zero_clusters, found.absent_clusters) == (
        sum(word >= CHECKSUM_MIN for word in words), words.count(ZERO), words.count(ABSENT)
    )  # fmt: skip
    read.close()


@pytest.mark.parametrize(
    ("state", "own", "text"),
    [
        (FINISHED, False, ""),
        (NAMING, True, ""),
        (NAMING, False, "did not get its name"),
        (BEING_MADE, True, "did not get its name"),
        (CHANGING, True, "being brought forward"),
        (REST, True, "belongs to the unfinished"),
    ],
)
def test_each_state_is_right_for_its_own_file_only(tmp_path: Path, state: bytes, own: bool, text: str) -> None:
    """NAMING: it names the inode that it is right for."""
    target = tmp_path / "target"
    target.write_bytes(bytes(4096))
    identity = Identity.of(os.stat(target)) if own else Identity(1, 1)
    made = Manifest.create(sidecar(str(target)), Description(FULL, 4096, 4096, A_POINT, None, target=identity), 0o600)
    made.seal(state)
    made.close()
    if not text:
        Manifest.of(str(target)).close()
        return
    with pytest.raises(ManifestError, match=text):
        Manifest.of(str(target))


def test_the_design_shows_the_table_of_the_code() -> None:
    assert manifest.table() in (Path(layout.__file__).parent / "DESIGN.md").read_text()
