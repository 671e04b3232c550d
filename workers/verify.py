"""Verify: re-read a backup and compare it with the checksums that were taken while it was copied.

What is known to be zeroes is read too (holes are passed over where the file system tells them honestly).  A sample is
drawn from the clusters that hold something, by a seed, so that a finding can be repeated.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from shmcbw import _core
from shmcbw.clusters import byte_range
from shmcbw.image import HONEST_HOLES, close_descriptor, next_data, read_fully

from .manifest import CHECKSUM_MIN, KINDS, PARTIAL_SUFFIX, ZERO, Manifest, checksum

_CHUNK_CLUSTERS = 1 << 14
_EXTENTS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found; sizes in bytes.  ``differing``: (offset, length), at most 1000 of them."""

    path: str
    kind: str
    point: str
    since: str | None
    cut_time_ns: int
    size_bytes: int
    checked_bytes: int
    zero_bytes: int
    differing_bytes: int
    differing: list[tuple[int, int]]


def verify(
    target: str, *, sample: float = 1.0, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Verified:
    """Re-read a finished backup; ``sample`` is the fraction of its clusters to look at (0..1].

    ManifestError: nothing can be said of it.  OSError: it can't be read.  What differs is in the result.
    """
    if not 0 < sample <= 1:
        raise ValueError(f"sample: {sample} is not a part of all")
    final = os.path.realpath(target)
    rest = final.endswith(PARTIAL_SUFFIX)
    manifest = Manifest.of_rest(final, final.removesuffix(PARTIAL_SUFFIX)) if rest else Manifest.of(final)
    try:
        fd = os.open(final, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _Check(final, fd, manifest, sample, random.Random(seed)).run(progress)
        finally:
            close_descriptor(fd)
    finally:
        manifest.close()


class _Check:
    def __init__(self, path: str, fd: int, manifest: Manifest, sample: float, chance: random.Random) -> None:
        self.path = path
        self.fd = fd
        self.manifest = manifest
        self.sample = sample
        self.chance = chance
        self.honest_holes = _core.file_system(fd) in HONEST_HOLES
        self.checked = self.zero = self.differing = 0
        self.extents: list[tuple[int, int]] = []

    def run(self, progress: Callable[[int, int], None] | None) -> Verified:
        described = self.manifest.description
        for first in range(0, described.clusters, _CHUNK_CLUSTERS):
            end = min(first + _CHUNK_CLUSTERS, described.clusters)
            words = self.manifest.words(first, end)
            if words.count(ZERO) < end - first or not self._is_hole(first, end):
                for cluster, word in enumerate(words, first):
                    self._look(cluster, word)
            else:
                self.zero += byte_range(first, end, described.cluster_size, described.image_size)[1]
            if progress is not None:
                progress(byte_range(0, end, described.cluster_size, described.image_size)[1], described.image_size)
        return Verified(
            self.path,
            KINDS[described.kind],
            str(described.point),
            str(described.since) if described.since else None,
            described.cut_time_ns,
            described.image_size,
            self.checked,
            self.zero,
            self.differing,
            self.extents,
        )

    def _is_hole(self, first: int, end: int) -> bool:
        described = self.manifest.description
        offset, length = byte_range(first, end, described.cluster_size, described.image_size)
        return self.honest_holes and next_data(self.fd, offset, offset + length) >= offset + length

    def _look(self, cluster: int, word: int) -> None:
        if word < CHECKSUM_MIN and word != ZERO:
            return
        if self.sample < 1 and self.chance.random() >= self.sample:
            return
        described = self.manifest.description
        offset, length = byte_range(cluster, cluster + 1, described.cluster_size, described.image_size)
        if word == ZERO:
            self.zero += length
            if self._is_hole(cluster, cluster + 1):
                return
            data = read_fully(self.fd, length, offset)
            good = len(data) == length and not any(data)
        else:
            self.checked += length
            data = read_fully(self.fd, length, offset)
            good = len(data) == length and checksum(data) == word
        if good:
            return
        self.differing += length
        if self.extents and sum(self.extents[-1]) == offset:
            self.extents[-1] = (self.extents[-1][0], self.extents[-1][1] + length)
        elif len(self.extents) < _EXTENTS_KEPT:
            self.extents.append((offset, length))
