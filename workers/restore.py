"""Restore: a base and its increments become the image at the last one's cut.

Everything is checked before a byte is written (manifests whole, the increments follow each other, sizes), and every
cluster while it is copied: a cluster whose checksum differs ends it, and nothing gets the name OUT.  Holes stay holes.

For each cluster the newest backup that holds it is asked.  An image that has grown meanwhile reads as zeroes beyond
its old end, where no increment says otherwise.  One step of a chain is right if the increment counts from a
point not after the one below shows, and was cut not before that (`points.py`).
"""

from __future__ import annotations

import array
import errno
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shmcbw.clusters import byte_range
from shmcbw.errors import ChainError, TargetRefusedError, VerificationError
from shmcbw.image import Identity, ImageFile, read_fully

from .copying import write_fully
from .manifest import (
    ABSENT,
    CHECKSUM_MIN,
    FULL,
    INCREMENT,
    NAMING,
    PARTIAL_SUFFIX,
    ZERO,
    Description,
    Manifest,
    checksum,
)
from .targets import TargetFile, resolve

_CHUNK_CLUSTERS = 1 << 14
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Restored:
    """What was written, in bytes, and which instant it is (wall clock)."""

    path: str
    size_bytes: int
    data_bytes: int
    cut_time_ns: int


class _Element:
    """A backup of the chain: its file and its manifest."""

    def __init__(self, path: str) -> None:
        self.path = path
        final = os.path.realpath(path)
        if final.endswith(PARTIAL_SUFFIX):
            self.manifest = Manifest.of_rest(final, final.removesuffix(PARTIAL_SUFFIX))
        else:
            self.manifest = Manifest.of(final)
        try:
            self.file = ImageFile.open(final, writable=False)
        except BaseException:
            self.manifest.close()
            raise

    @property
    def description(self) -> Description:
        return self.manifest.description

    def words(self, first: int, end: int) -> array.array[int]:
        """Those of its manifest, and its default for clusters that the image did not have then."""
        there = max(first, min(end, self.description.clusters))
        beyond = array.array("Q", [self.manifest.default]) * (end - there)
        return self.manifest.words(first, there) + beyond if there > first else beyond

    def close(self) -> None:
        self.manifest.close()
        self.file.close()


def restore(
    chain: Sequence[str],
    out: str,
    *,
    overwrite: bool = False,
    manifest: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Restored:
    """Restore a chain (base first) to ``out``, which is ``OUT.shmcbw-partial`` until it is complete and synced.

    ``overwrite``: an existing file of the image's size may be replaced.  ``manifest``: the result gets one, as a full
    backup of the last one's cut.  ``progress``: called with bytes done and all bytes.

    ManifestError, ChainError, TargetRefusedError: nothing has changed.  VerificationError: a backup is damaged, and
    nothing is called OUT.  OSError.
    """
    elements: list[_Element] = []
    try:
        for path in chain:
            elements.append(_Element(path))
        check_chain([(each.path, each.description) for each in elements])
        return _write(elements, resolve(out), overwrite, manifest, progress)
    finally:
        for each in elements:
            each.close()


def check_chain(chain: Sequence[tuple[str, Description]]) -> None:
    """ChainError unless the backups (path, description) are a base and increments that follow each other."""
    (base, first), last = chain[0], chain[-1]
    if first.kind != FULL:
        raise ChainError(
            f"{base} is an increment (since {first.since or 'nobody knows when'}): a chain begins with all"
        )
    for (below_path, below), (path, above) in itertools.pairwise(chain):
        if above.kind != INCREMENT:
            raise ChainError(f"{path} is a full backup: nothing can be below it")
        if above.image_size < below.image_size or above.cluster_size != below.cluster_size:
            raise ChainError(
                f"{path} is of an image of {above.image_size} bytes in clusters of {above.cluster_size}, "
                f"{below_path} of {below.image_size} in clusters of {below.cluster_size}"
            )
        if above.since is None:
            raise ChainError(f"{path} is of a bitmap that may have missed writes: it fits no base")
        if not above.since.not_after(below.point):
            raise ChainError(f"{path} holds what changed since {above.since}; {below_path} shows {below.point}")
        if below.point.segment == above.point.segment and below.point.epoch > above.point.epoch:
            raise ChainError(f"{path} shows an earlier time than {below_path}: it can't be laid over it")
    if last[1].point.rest:
        raise ChainError(f"{last[0]} was left by a job that failed and shows no instant: it needs its next increment")


def _write(
    elements: list[_Element],
    out: str,
    overwrite: bool,
    manifest: bool,
    progress: Callable[[int, int], None] | None,
) -> Restored:
    last = elements[-1].description
    if any(out == os.path.realpath(each.path) for each in elements):
        raise TargetRefusedError(errno.EINVAL, f"target {out} is part of the chain")
    described = replace(last, kind=FULL, since=None, target=Identity(0, 0)) if manifest else None
    target = TargetFile.create(out, elements[-1].file, overwrite=overwrite, full=True, description=described)
    try:
        written = 0
        for first in range(0, last.clusters, _CHUNK_CLUSTERS):
            end = min(first + _CHUNK_CLUSTERS, last.clusters)
            words, owners = _newest(elements, first, end)
            if words.count(ZERO) < end - first:
                written += _copy(elements, target, first, words, owners)
            if target.manifest is not None:
                target.manifest.put(first, words)
            if progress is not None:
                progress(byte_range(0, end, last.cluster_size, last.image_size)[1], last.image_size)
        target.sync(last.image_size)
        if target.manifest is not None:
            target.manifest.seal(NAMING)
        target.finish()
    except BaseException:
        target.remove()
        raise
    finally:
        target.close()
    return Restored(out, last.image_size, written, last.cut_time_ns)


def _newest(elements: list[_Element], first: int, end: int) -> tuple[array.array[int], list[int]]:
    """For clusters first..end: the word of the newest backup that holds it, and the index of that backup."""
    words = elements[0].words(first, end)
    owners = [0] * (end - first)
    for index, each in enumerate(elements[1:], 1):
        newer = each.words(first, end)
        if newer.count(ABSENT) == end - first:
            continue
        for position, word in enumerate(newer):
            if word != ABSENT:
                words[position] = word
                owners[position] = index
    if ABSENT in words:
        cluster = first + words.index(ABSENT)
        raise ChainError(f"no backup of the chain holds cluster {cluster}: {elements[0].path} is not a whole base")
    return words, owners


def _copy(elements: list[_Element], target: TargetFile, first: int, words: array.array[int], owners: list[int]) -> int:
    """Copy what is data, checked; the bytes written."""
    size = elements[0].description.cluster_size
    limit = max(1, _PIECE_BYTES // size)
    position = written = 0
    while position < len(words):
        if words[position] < CHECKSUM_MIN:
            position += 1
            continue
        stop = position + 1
        owner = owners[position]
        while stop < len(words) and stop - position < limit and words[stop] >= CHECKSUM_MIN and owners[stop] == owner:
            stop += 1
        image_size = elements[owner].description.image_size
        offset, length = byte_range(first + position, first + stop, size, image_size)
        data = memoryview(read_fully(elements[owner].file.fd, length, offset))
        for index in range(stop - position):
            if checksum(data[index * size : (index + 1) * size]) != words[position + index]:
                bad = byte_range(first + position + index, first + position + index + 1, size, image_size)
                raise VerificationError(
                    f"{elements[owner].path} is damaged: {bad[1]} bytes at {bad[0]} differ from their checksum", (bad,)
                )
        write_fully(target.fd, data, offset)
        written += length
        position = stop
    return written
