"""Seals: checksums over the words that do not change after they were written.

A word that somebody overwrote by mistake is found before it is believed: by whoever attaches (header), by a worker that
opens a target and by a coordinator that adopts (snapshot entry).  A seal is no signature: who knows the layout can
make one.  So what a path in an entry may do to a file is limited beyond that (`targets.py`).
"""

from __future__ import annotations

from binascii import crc32

from .layout import Geometry, Header, Snapshot, Word, words

TYPE_CHECKING = False  # see failpoints.py
if TYPE_CHECKING:
    from mmap import mmap

#: Without the magic: it is stored last.
HEADER_WORDS = tuple(word for name, word in words(Header) if word.writer == "creator" and name not in ("magic", "seal"))
ENTRY_WORDS = (
    Snapshot.serial,
    Snapshot.policy,
    Snapshot.timeout_ns,
    Snapshot.sync,
    Snapshot.target_device,
    Snapshot.target_inode,
    Snapshot.job,
    Snapshot.overwrite,
    Snapshot.manifest,
    Snapshot.max_workers,
    Snapshot.max_chunk,
    Snapshot.in_place,
    Snapshot.copy_range,
    Snapshot.source,
    Snapshot.discard_source,
    Snapshot.target_path,
)


#: What is written first, before a target or a bitmap is made.
NAME_WORDS = (Snapshot.serial, Snapshot.in_place, Snapshot.target_path)


def _seal(memory: mmap, base: int, sealed: tuple[Word, ...]) -> int:
    value = 0
    for word in sealed:
        value = crc32(memory[base + word.offset : base + word.offset + word.size], value)
    return value


def header_seal(memory: mmap) -> int:
    """What the header's seal must be."""
    return _seal(memory, 0, HEADER_WORDS)


def entry_seal(memory: mmap, geometry: Geometry, index: int) -> int:
    """What the seal of a snapshot table entry must be."""
    return _seal(memory, geometry.snapshot(index, Snapshot.state), ENTRY_WORDS)


def name_seal(memory: mmap, geometry: Geometry, index: int) -> int:
    """What the seal must be while what the entry names is made."""
    return _seal(memory, geometry.snapshot(index, Snapshot.state), NAME_WORDS)
