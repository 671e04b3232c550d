"""Manifests: which clusters a target holds, with a checksum of each; one sidecar file, ``TARGET.shmcbw``.

A manifest is made by the copy workers, cluster by cluster, while they copy; it says what a backup is an increment of,
so that a chain can be checked before it is restored, and lets `verify` find what a disk has done to a backup since.

    offset 0      header, 4096 bytes: `FIELDS` below
    offset 4096   one word of 8 bytes for each cluster of the image, little-endian:
                    0        the kind's own default: of a full backup "reads as zeroes", of an increment "not in it"
                    1        reads as zeroes (a hole in the target)
                    2        not in it
                    16..     XXH3-64 of the cluster's bytes (those below 16 stand 16 higher)

The default keeps the file sparse: 128 MiB for 1 TiB of data in clusters of 64 KiB (0.012 %), next to nothing for an
image of holes or an increment of a few clusters.  XXH3-64 finds what disks and cables do; it is no seal against a
person who wants to deceive (SHA-256 was rejected: the copy itself is faster than it).

**No manifest ever describes a target wrongly, whatever dies.**  A word of its own in the header, the state, is changed
by one write of 8 bytes:

    BEING MADE   under the name TARGET.shmcbw.shmcbw-partial: nobody but its job takes it for anything
    CHANGING     of an existing target that a job brings forward: neither its old content nor the new one
    NAMING       stored before the target gets its name: right for the one file whose inode it names, for no other
    FINISHED     stored after it: right for the file beside it
    REST         of a job that failed with bitmap-mode always: right for TARGET.shmcbw-partial, which shows no instant

Two files can't get their names at once.  The manifest is first, as NAMING: so an increment is never without one, and
one that was cut short is right for nothing but the finished file.  Rejected: a mark in the target (every reader of raw
images would have to know it), extended attributes (lost by most ways to copy a file), the target's time in the manifest
(the same).
"""

from __future__ import annotations

import array
import errno
import logging
import os
import struct
from dataclasses import dataclass, field, fields, replace

import xxhash

from shmcbw.errors import ManifestError
from shmcbw.image import Identity, close_descriptor, read_fully
from shmcbw.points import Point
from shmcbw.snapshots import PARTIAL_SUFFIX as PARTIAL_SUFFIX

log = logging.getLogger("shmcbw")

SUFFIX = ".shmcbw"
MAGIC = b"shmcbw m"
VERSION = 1
HEADER_BYTES = 4096
WORD_BYTES = 8

FULL, INCREMENT = 1, 2
KINDS = {FULL: "full", INCREMENT: "increment"}

BEING_MADE, CHANGING, NAMING = b"BEINGMAD", b"CHANGING", b"NAMING  "
FINISHED, REST = b"FINISHED", b"REST    "
STATES = (BEING_MADE, CHANGING, NAMING, FINISHED, REST)
STATE_OFFSET = 16

DEFAULT, ZERO, ABSENT, CHECKSUM_MIN = 0, 1, 2, 16

#: offset, format (struct), name, meaning
FIELDS = (
    (0, "8s", "magic", "`shmcbw m`"),
    (8, "I", "version", "1"),
    (12, "I", "kind", "1 full, 2 increment"),
    (16, "8s", "state", "above; not part of the header's checksum"),
    (24, "Q", "image_size", "bytes"),
    (32, "Q", "cluster_size", "bytes"),
    (40, "Q", "cut_time_ns", "wall clock"),
    (48, "16s", "segment", "of the cut: uuid of the control segment"),
    (64, "I", "epoch", "of the cut; with the one before, its point (`points.py`)"),
    (72, "16s", "since_segment", "of an increment: the point that it counts from; zero: nobody knows"),
    (88, "I", "since_epoch", ""),
    (92, "I", "since_rest", "not 0: what an unfinished job left, by its number"),
    (96, "Q", "target_device", "identity of the file it was made for"),
    (104, "Q", "target_inode", ""),
    (112, "Q", "data_clusters", "words that are checksums"),
    (120, "Q", "zero_clusters", ""),
    (128, "Q", "absent_clusters", ""),
    (136, "16s", "table_digest", "XXH3-128 of all words"),
    (152, "I", "rest", "not 0: it shows no instant, see the state REST; the number of the job"),
    (4088, "Q", "header_checksum", "XXH3-64 of bytes 0..4088 with the state as zeroes"),
)
_CHUNK_WORDS = 1 << 17


def checksum(data: bytes | memoryview) -> int:
    """The word of a cluster with these bytes."""
    found = xxhash.xxh3_64_intdigest(data)
    return found if found >= CHECKSUM_MIN else found + CHECKSUM_MIN


def sidecar(target: str) -> str:
    """The manifest of the target with this name."""
    return target + SUFFIX


@dataclass(frozen=True, slots=True)
class Description:
    """What a manifest says beside its words; sizes in bytes."""

    kind: int
    image_size: int
    cluster_size: int
    point: Point
    since: Point | None
    cut_time_ns: int = 0
    target: Identity = field(default_factory=lambda: Identity(0, 0))
    data_clusters: int = 0
    zero_clusters: int = 0
    absent_clusters: int = 0
    table_digest: bytes = bytes(16)

    @property
    def clusters(self) -> int:
        return -(-self.image_size // self.cluster_size)

    def pack(self, state: bytes) -> bytes:
        since = self.since or Point("0" * 32, 0)
        header = bytearray(HEADER_BYTES)
        values = {
            "magic": MAGIC,
            "version": VERSION,
            "kind": self.kind,
            "state": bytes(8),
            "segment": bytes.fromhex(self.point.segment),
            "epoch": self.point.epoch,
            "rest": int(self.point.rest),
            "since_segment": bytes.fromhex(since.segment),
            "since_epoch": since.epoch,
            "since_rest": int(since.rest),
            "target_device": self.target.device,
            "target_inode": self.target.inode,
            "header_checksum": 0,
        }
        for each in fields(self):
            values.setdefault(each.name, getattr(self, each.name))
        for offset, form, name, _ in FIELDS:
            struct.pack_into("<" + form, header, offset, values[name])
        struct.pack_into("<Q", header, 4088, xxhash.xxh3_64_intdigest(bytes(header[:4088])))
        header[STATE_OFFSET : STATE_OFFSET + 8] = state
        return bytes(header)

    @classmethod
    def unpack(cls, header: bytes, path: str) -> tuple[Description, bytes]:
        """(description, state); ManifestError if it is no whole header of a manifest that we know."""
        if len(header) < HEADER_BYTES or header[:8] != MAGIC:
            raise ManifestError(f"{path} is no manifest of shmcbw")
        found = {name: struct.unpack_from("<" + form, header, offset)[0] for offset, form, name, _ in FIELDS}
        if found["version"] != VERSION:
            raise ManifestError(f"{path} is a manifest of version {found['version']}, this shmcbw knows {VERSION}")
        plain = header[:STATE_OFFSET] + bytes(8) + header[STATE_OFFSET + 8 : 4088]
        sizes_fit = found["image_size"] and found["cluster_size"] and found["kind"] in KINDS
        if xxhash.xxh3_64_intdigest(plain) != found["header_checksum"] or found["state"] not in STATES or not sizes_fit:
            raise ManifestError(f"{path} is damaged: its header does not fit its checksum")
        since = None
        if any(found["since_segment"]):
            since = Point(found["since_segment"].hex(), found["since_epoch"], rest=found["since_rest"])
        state = found["state"]
        return cls(
            found["kind"],
            found["image_size"],
            found["cluster_size"],
            Point(found["segment"].hex(), found["epoch"], rest=found["rest"]),
            since,
            found["cut_time_ns"],
            Identity(found["target_device"], found["target_inode"]),
            found["data_clusters"],
            found["zero_clusters"],
            found["absent_clusters"],
            found["table_digest"],
        ), state


class Manifest:
    """An open manifest file.  ``words`` of it are read and written by cluster number."""

    def __init__(self, path: str, fd: int, description: Description, state: bytes) -> None:
        self.path = path
        self.fd = fd
        self.description = description
        self.state = state

    # -- reading ---------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> Manifest:
        """Open a manifest in any state; FileNotFoundError, OSError, ManifestError."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags)
        try:
            description, state = Description.unpack(read_fully(fd, HEADER_BYTES, 0), path)
            wanted = HEADER_BYTES + WORD_BYTES * description.clusters
            if (size := os.fstat(fd).st_size) != wanted:
                raise ManifestError(f"{path} is damaged: it has {size} bytes, not {wanted}")
            return cls(path, fd, description, state)
        except BaseException:
            close_descriptor(fd)
            raise

    @classmethod
    def of(cls, target: str) -> Manifest:
        """The manifest of a finished target, checked to be right for this file.

        ManifestError: there is none, it is damaged, or the target is not finished; the message says what to do.
        """
        path = sidecar(target)
        try:
            found = cls.open(path)
        except FileNotFoundError:
            raise ManifestError(f"{target} has no manifest ({path}): what it holds can't be checked") from None
        try:
            found._check_target(target)
            found.check_table()
        except BaseException:
            found.close()
            raise
        return found

    @classmethod
    def adopt(cls, target: str, identity: Identity) -> Manifest | None:
        """The manifest that a dead coordinator made for this very file, under whichever name; None if it is gone."""
        for path in (sidecar(target), sidecar(target) + PARTIAL_SUFFIX):
            try:
                found = cls.open(path, writable=True)
            except (OSError, ManifestError):
                continue
            if found.state != CHANGING and found.description.target == identity:
                return found
            found.close()
        return None

    @classmethod
    def of_rest(cls, working: str, target: str) -> Manifest:
        """The manifest of what a failed job with bitmap-mode always left under its working name."""
        found = cls.open(sidecar(target))
        if found.state != REST or Identity.of(os.stat(working)) != found.description.target:
            found.close()
            raise ManifestError(f"{found.path} is not the manifest of {working}")
        found.check_table()
        return found

    def _check_target(self, target: str) -> None:
        status = os.stat(target)
        if self.state == CHANGING:
            raise ManifestError(f"{target} is being brought forward, or the job that did so died: run that job again")
        if self.state == REST:
            raise ManifestError(f"{self.path} belongs to the unfinished {target}{PARTIAL_SUFFIX}, not to {target}")
        if self.state == BEING_MADE or (self.state == NAMING and Identity.of(status) != self.description.target):
            raise ManifestError(f"{self.path} belongs to a backup that did not get its name: take that backup again")
        if status.st_size != self.description.image_size:
            raise ManifestError(
                f"{target} has {status.st_size} bytes, its manifest says {self.description.image_size}: not its file"
            )

    def words(self, first: int, end: int) -> array.array[int]:
        """The words of clusters first..end, with the kind's default put in."""
        found = array.array("Q")
        length = WORD_BYTES * (end - first)
        data = read_fully(self.fd, length, HEADER_BYTES + WORD_BYTES * first)
        if len(data) != length:
            raise ManifestError(f"{self.path} was truncated")
        if not any(data):
            return array.array("Q", [self.default]) * (end - first)
        found.frombytes(data)
        for index in _positions(found, DEFAULT):
            found[index] = self.default
        return found

    @property
    def default(self) -> int:
        return ZERO if self.description.kind == FULL else ABSENT

    def check_table(self) -> None:
        """ManifestError if the words are not those that were there when it was finished.  Reads all of them."""
        _, digest = self._count()
        if digest != self.description.table_digest:
            raise ManifestError(f"{self.path} is damaged: its checksums do not fit their own checksum")

    def _count(self) -> tuple[tuple[int, int, int], bytes]:
        """(data, zero and absent clusters), digest of the table."""
        digest = xxhash.xxh3_128()
        zero = absent = 0
        clusters = self.description.clusters
        nothing = bytes(WORD_BYTES * _CHUNK_WORDS)
        for first in range(0, clusters, _CHUNK_WORDS):
            count = min(_CHUNK_WORDS, clusters - first)
            data = read_fully(self.fd, WORD_BYTES * count, HEADER_BYTES + WORD_BYTES * first)
            digest.update(data)
            if data == nothing:
                blank = count
                found = array.array("Q")
            else:
                found = array.array("Q", data)
                blank = found.count(DEFAULT)
            zero += found.count(ZERO) + (blank if self.default == ZERO else 0)
            absent += found.count(ABSENT) + (blank if self.default == ABSENT else 0)
        return (clusters - zero - absent, zero, absent), digest.digest()

    # -- writing ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str, description: Description, permissions: int) -> Manifest:
        """A new file, BEING MADE, with every word at its default; FileExistsError, OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, permissions)
        try:
            made = cls(path, fd, description, BEING_MADE)
            os.ftruncate(fd, HEADER_BYTES + WORD_BYTES * description.clusters)
            made._write_header()
            return made
        except BaseException:
            close_descriptor(fd)
            os.unlink(path)
            raise

    def copy_words(self, other: Manifest) -> None:
        """Take every word of a manifest of the same kind, and of the same image, which may have been smaller."""
        ours, theirs = self.description, other.description
        if ours.kind != theirs.kind or ours.cluster_size != theirs.cluster_size or ours.clusters < theirs.clusters:
            raise ValueError(f"{other.path} has other clusters than {self.path}")
        position, stop = HEADER_BYTES, HEADER_BYTES + WORD_BYTES * theirs.clusters
        while position < stop:
            try:
                position = os.lseek(other.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = min(os.lseek(other.fd, position, os.SEEK_HOLE), stop)
            while position < end:
                data = os.pread(other.fd, min(1 << 20, end - position), position)
                if not data:
                    raise ManifestError(f"{other.path} was truncated")
                _write_fully(self.fd, data, position)
                position += len(data)

    def put(self, first: int, words: array.array[int]) -> None:
        """Store the words of clusters from ``first`` on."""
        put_words(self.fd, first, words)

    def put_runs(self, first: int, end: int, word: int) -> None:
        """Store one word for each of the clusters first..end."""
        stored = DEFAULT if word == self.default else word
        while first < end:
            count = min(end - first, _CHUNK_WORDS)
            put_words(self.fd, first, array.array("Q", [stored]) * count)
            first += count

    def seal(self, state: bytes, **changes: object) -> None:
        """All words are stored: count and digest them, store the header with this state, and sync.  OSError."""
        (data, zero, absent), digest = self._count()
        self.description = replace(
            self.description,
            data_clusters=data,
            zero_clusters=zero,
            absent_clusters=absent,
            table_digest=digest,
            **changes,  # type: ignore[arg-type]
        )
        self.state = state
        self._write_header()
        os.fdatasync(self.fd)

    def set_state(self, state: bytes) -> None:
        """One write of 8 bytes, synced."""
        _write_fully(self.fd, state, STATE_OFFSET)
        os.fdatasync(self.fd)
        self.state = state

    def change(self, target: Identity) -> None:
        """CHANGING, of the file that is this now: a copied backup has another inode than the one that was made."""
        self.description = replace(self.description, target=target)
        self.state = CHANGING
        self._write_header()
        os.fdatasync(self.fd)

    def _write_header(self) -> None:
        _write_fully(self.fd, self.description.pack(self.state), 0)

    def close(self) -> None:
        if self.fd >= 0:
            close_descriptor(self.fd)
            self.fd = -1


def _positions(words: array.array[int], wanted: int) -> list[int]:
    return [index for index, word in enumerate(words) if word == wanted]


def put_words(fd: int, first: int, words: array.array[int]) -> None:
    """Store words into an open manifest; OSError.  A copy worker knows the file by its descriptor only."""
    _write_fully(fd, words.tobytes(), HEADER_BYTES + WORD_BYTES * first)


def _write_fully(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, "the manifest takes no more bytes")
        view = view[written:]
        offset += written


def table() -> str:
    """The header as a Markdown table."""
    lines = ["| offset | bytes | name | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| {offset} | {struct.calcsize(form)} | {name} | {text} |" for offset, form, name, text in FIELDS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
