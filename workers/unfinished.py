"""Unfinished backups that nobody can go on with: discarded by rule, and told.

Their segment is of another boot, layout or image size, their image was deleted or replaced, or their target is gone.
Each is an error in the log and a failed job of the coordinator that found it.  What is left of it goes, where it surely
is that; a backup that is brought forward in place stays, for the next one to complete it.

They are found before their segment goes, and given up afterwards: only then is it sure that nobody works on them.  Of a
segment of another layout only this is known: a path in it that ends as unfinished targets do is one, or was.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
from dataclasses import dataclass

from shmcbw import states
from shmcbw.errors import JobFailedError
from shmcbw.image import Identity, close_descriptor
from shmcbw.layout import MAGIC, SNAPSHOT_COUNT, VERSION, Geometry, Header, Snapshot, Word
from shmcbw.seals import entry_seal, name_seal
from shmcbw.segment import open_shared_memory, segment_name

from .targets import PARTIAL_SUFFIX, is_file, remove_unheld

log = logging.getLogger("shmcbw")

_PATH = re.compile(rb"(/[^\0]{1,4095}" + re.escape(PARTIAL_SUFFIX.encode()) + rb")\0")


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A backup, or scratch, that a segment knows of.

    identity: None where the layout is not ours, or the entry was scribbled on.
    has_cut: its cut was taken, so somebody was promised something.
    """

    working_path: str
    identity: Identity | None
    has_cut: bool
    is_job: bool
    in_place: bool
    cut_time_ns: int
    image_size: int = 0

    @property
    def target(self) -> str:
        return self.working_path.removesuffix(PARTIAL_SUFFIX)


@dataclass(frozen=True, slots=True)
class Lost:
    """A backup that has failed so, and why."""

    backup: Unfinished
    error: JobFailedError


def find_unfinished(image: Identity) -> list[Unfinished]:
    """What the segment under an image's name knows of; an empty list if there is none."""
    try:
        fd = open_shared_memory(segment_name(image))
    except FileNotFoundError:
        return []
    try:
        size = os.fstat(fd).st_size
        if size < Header.SIZE:
            return []
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as memory:
            return unfinished_in(memory)
    finally:
        close_descriptor(fd)


def unfinished_in(memory: mmap.mmap) -> list[Unfinished]:
    """The same of a mapped segment."""
    try:
        if (_number(memory, 0, Header.magic), _number(memory, 0, Header.version)) == (MAGIC, VERSION):
            words = (Header.image_size, Header.cluster_size, Header.slot_count, Header.worker_count)
            geometry = Geometry(*(_number(memory, 0, word) for word in words))
            if geometry.segment_size <= len(memory):
                return _entries(memory, geometry)
    except ValueError:
        pass
    found = dict.fromkeys(match.group(1) for match in _PATH.finditer(memory))
    return [Unfinished(os.fsdecode(path), None, True, True, False, 0) for path in found]


def _entries(memory: mmap.mmap, geometry: Geometry) -> list[Unfinished]:
    found = []
    for index in range(SNAPSHOT_COUNT):
        base = geometry.snapshot(index, Snapshot.state) - Snapshot.state.offset
        state = _number(memory, base, Snapshot.state) & 0xFFFFFFFF
        if state == states.FREE:
            continue
        seal = _number(memory, base, Snapshot.seal)
        whole = seal == entry_seal(memory, geometry, index)
        whole = whole or (state == states.CREATING and seal == name_seal(memory, geometry, index))
        identity = Identity(_number(memory, base, Snapshot.target_device), _number(memory, base, Snapshot.target_inode))
        start = base + Snapshot.target_path.offset
        path = bytes(memory[start : start + Snapshot.target_path.size]).partition(b"\0")[0]
        found.append(
            Unfinished(
                os.fsdecode(path),
                identity if whole else None,
                state in (*states.LIVE, states.BROKEN, states.COMPLETE),
                bool(_number(memory, base, Snapshot.job)),
                bool(_number(memory, base, Snapshot.in_place)),
                _number(memory, base, Snapshot.cut_time_ns),
                geometry.image_size,
            )
        )
    return [each for each in found if each.working_path.endswith(PARTIAL_SUFFIX)]


def _number(memory: mmap.mmap, base: int, word: Word) -> int:
    return int.from_bytes(memory[base + word.offset : base + word.offset + word.size], "little")


def give_up(found: list[Unfinished], why: str) -> list[Lost]:
    """Nobody works on these any more, and nobody will: remove what is left, say so, and return the failed backups."""
    lost = []
    for each in found:
        if each.identity is not None:
            if each.has_cut and is_file(each.target, each.identity):
                # It had its name already: nothing is missing but the last step, which was to forget it.
                continue
            # The entry of one without a cut may have the words of the one before it.
            if not each.has_cut or is_file(each.working_path, each.identity):
                remove_unheld(each.working_path, each.image_size, keep_target=each.in_place)
        left = os.path.lexists(each.working_path)
        if not each.has_cut or (each.identity is None and not left):
            continue
        rest = f"; {each.working_path} is left of it" if left else ""
        if each.is_job:
            message = f"the unfinished backup to {each.target} has failed: {why}{rest}"
            log.error("%s", message)
            lost.append(Lost(each, JobFailedError(errno.ESTALE, message)))
        else:
            log.warning("the snapshot with scratch %s has ended: %s%s", each.working_path, why, rest)
    return lost
