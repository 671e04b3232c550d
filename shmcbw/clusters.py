"""Cluster arithmetic: pure, and the only place that rounds.

``offset`` and ``length`` are bytes; ``first`` and ``end`` are cluster indexes, half-open; a size says its unit.
"""

from __future__ import annotations

CLUSTER_SIZE_MIN = 4096
CLUSTER_SIZE_MAX = 2 * 1024 * 1024
CLUSTER_SIZE_DEFAULT = 64 * 1024


def check_cluster_size(cluster_size: int) -> int:
    """Return ``cluster_size`` (bytes), or raise ValueError: a power of two from 4 KiB to 2 MiB."""
    if not CLUSTER_SIZE_MIN <= cluster_size <= CLUSTER_SIZE_MAX or cluster_size & (cluster_size - 1):
        raise ValueError(
            f"cluster size {cluster_size} bytes is no power of two from {CLUSTER_SIZE_MIN} to {CLUSTER_SIZE_MAX}"
        )
    return cluster_size


def cluster_count(size_bytes: int, cluster_size: int) -> int:
    """How many clusters an image of ``size_bytes`` has; the last one may be partial."""
    return -(-size_bytes // cluster_size)


def outward(offset: int, length: int, cluster_size: int) -> tuple[int, int]:
    """The clusters (first, end) that a byte range touches; an empty range touches none."""
    if length == 0:
        return offset // cluster_size, offset // cluster_size
    return offset // cluster_size, (offset + length - 1) // cluster_size + 1


def inward(offset: int, length: int, cluster_size: int, size_bytes: int) -> tuple[int, int]:
    """The clusters (first, end) that lie wholly inside a byte range.

    The partial last cluster is whole when the range reaches the end of the image.
    """
    first = -(-offset // cluster_size)
    stop = offset + length
    end = cluster_count(size_bytes, cluster_size) if stop >= size_bytes else stop // cluster_size
    return first, max(first, end)


def byte_range(first: int, end: int, cluster_size: int, size_bytes: int) -> tuple[int, int]:
    """The bytes (offset, length) of clusters first..end, cut off at the image's end."""
    offset = min(first * cluster_size, size_bytes)
    return offset, min(end * cluster_size, size_bytes) - offset
