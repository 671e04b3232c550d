"""Cluster arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcbw.clusters import byte_range, check_cluster_size, cluster_count, inward, outward

SIZES = st.sampled_from([4096, 65536, 2 << 20])


@given(st.integers(0, 2**40), st.integers(0, 2**30), SIZES)
def test_outward_is_the_smallest_cover(offset: int, length: int, size: int) -> None:
    first, end = outward(offset, length, size)
    if length == 0:
        assert first == end
        return
    assert first * size <= offset < (first + 1) * size
    assert (end - 1) * size < offset + length <= end * size


@given(st.integers(1, 2**40), st.data(), SIZES)
def test_inward_is_the_largest_content(image: int, data: st.DataObject, size: int) -> None:
    offset = data.draw(st.integers(0, image))
    length = data.draw(st.integers(0, image - offset))
    first, end = inward(offset, length, size, image)
    assert first <= end
    for cluster in {first, end - 1} if first < end else set():
        start, bytes_ = byte_range(cluster, cluster + 1, size, image)
        assert offset <= start and start + bytes_ <= offset + length
    for cluster in (first - 1, end):
        if 0 <= cluster < cluster_count(image, size) and first < end:
            start, bytes_ = byte_range(cluster, cluster + 1, size, image)
            assert start < offset or start + bytes_ > offset + length


@pytest.mark.parametrize("image", [1, 4096, 4097, 65536, 65537])
def test_the_clusters_cover_the_image_once(image: int) -> None:
    total = sum(byte_range(c, c + 1, 4096, image)[1] for c in range(cluster_count(image, 4096)))
    assert total == image


@pytest.mark.parametrize("size", [0, 1, 2048, 5000, 4 << 20, -4096])
def test_a_bad_cluster_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cluster size"):
        check_cluster_size(size)
