"""The journal: what a coordinator must find again after its death and has no word for in the control segment.

    /dev/shm/shmcbw-<device>-<inode>.state       one JSON object
    /dev/shm/shmcbw-<device>-<inode>.state.new   the next one, while it is written

Its writer is the coordinator alone, by the lock on byte 0, so one temporary name is enough.  It is replaced as a whole
by a rename: whoever dies, the old or the new document is there.  It carries the segment's uuid; one with another uuid
is of another generation: ignored and removed.  A document that says nothing has no file, so the file's being there
tells that a coordinator has something to come back for (`segment.in_use`).  It goes when the segment goes.

Top-level keys are sections, each an object with one owner: ``jobs``, ``bitmaps``, ``nodes``.  What is read is
input of an untrusted party.  The rule: a file that is not an object of JSON with our uuid is removed and the journal
begins empty; a section that is no object is emptied; entries of a section are checked by its owner, who drops those
that make no sense.  Each of these is logged.

Rejected: words in the segment (a layout for each new field), SQLite (a lock and a journal of its own, for one writer).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shmcbw.errors import ForeignSegmentError, naming
from shmcbw.failpoints import hit, index_of
from shmcbw.image import close_descriptor
from shmcbw.layout import Header
from shmcbw.segment import JOURNAL_SUFFIX, SHM, Segment

log = logging.getLogger("shmcbw")

_WRITTEN, _RENAMED = index_of("journal.written"), index_of("journal.renamed")

#: Errors that say nothing of the file: who starts in spite of one would forget what a later start can read.
OF_THE_MOMENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EIO}

SECTIONS = ("jobs", "bitmaps", "nodes")
SIZE_MAX_BYTES = 16 << 20


class Journal:
    """The journal of one image; its segment's coordinator lock is held by the caller's process.

    `change` is the way to write from any thread.  `document` is plain data as JSON knows it: objects with string keys.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lock = threading.RLock()
        self._uuid = bytes(segment.memory[Header.uuid.offset : Header.uuid.offset + Header.uuid.size]).hex()
        remove_file(segment, JOURNAL_SUFFIX + ".new")
        self._stored = self._read()
        self.document: dict[str, Any] = self._parse(self._stored)

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """``with journal.change() as document``: changes are stored at the end of the block.

        If the block or the storing fails, the document is again what is stored: take nothing out of it to keep.
        """
        with self._lock:
            try:
                yield self.document
                self.store()
            except BaseException:
                self.document = self._parse(self._stored)
                raise

    def store(self) -> None:
        """Replace the file by what `document` says, at once and as a whole.

        OSError (/dev/shm is full, or somebody else's file is in the way): the file is what it was.
        """
        with self._lock:
            if not any(self.document.values()):
                remove_file(self._segment, JOURNAL_SUFFIX)
                self._stored = b""
                return
            text = json.dumps({"uuid": self._uuid, **self.document}, allow_nan=False).encode()
            if len(text) > SIZE_MAX_BYTES:
                raise ValueError(f"the journal of {self._segment.name} has {len(text)} bytes, {SIZE_MAX_BYTES} at most")
            replace_file(self._segment, JOURNAL_SUFFIX, text)
            self._stored = text

    def _read(self) -> bytes:
        try:
            return read_file(self._segment, JOURNAL_SUFFIX, SIZE_MAX_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            if error.errno in OF_THE_MOMENT:
                raise
            log.warning("the journal of %s is ignored: %s", self._segment.name, error)
            return b""

    def _parse(self, text: bytes) -> dict[str, Any]:
        document: dict[str, Any] = {section: {} for section in SECTIONS}
        if not text:
            return document
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.pop("uuid", None) != self._uuid:
                raise ValueError("it is not this segment's")
        except (ValueError, RecursionError) as error:
            log.warning("the journal of %s is removed: %s", self._segment.name, error)
            remove_file(self._segment, JOURNAL_SUFFIX)
            self._stored = b""
            return document
        for section, content in found.items():
            if isinstance(content, dict):
                document[section] = content
            else:
                log.warning("the journal of %s: %r is no object and is dropped", self._segment.name, section)
        return document


def peek(segment: Segment, section: str) -> dict[str, Any]:
    """A section as its coordinator has stored it, for somebody else: reads, and changes nothing.

    Empty if there is no journal, or none of this segment; what is in it is to be checked.
    """
    uuid = bytes(segment.memory[Header.uuid.offset : Header.uuid.offset + Header.uuid.size]).hex()
    try:
        found = json.loads(read_file(segment, JOURNAL_SUFFIX, SIZE_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    content = found.get(section) if isinstance(found, dict) and found.get("uuid") == uuid else None
    return content if isinstance(content, dict) else {}


def replace_file(segment: Segment, suffix: str, data: bytes) -> None:
    """Store ``data`` beside the segment, under its name and a suffix, in the place of what is there.

    A rename: readers and survivors of a death find the old or the new content.  Owner, group and mode are those of
    the segment.
    OSError: nothing has changed.
    """
    final = file_path(segment, suffix)
    with naming(final, "can't be stored"):
        _replace(segment, suffix, data, final)


def _replace(segment: Segment, suffix: str, data: bytes, final: str) -> None:
    temporary = final + ".new"
    status = os.fstat(segment.fd)
    remove_file(segment, suffix + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            mine = os.fstat(fd)
            if (mine.st_uid, mine.st_gid) != (status.st_uid, status.st_gid):
                os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
        finally:
            close_descriptor(fd)
        hit(segment.failpoints, _WRITTEN)
        os.rename(temporary, final)
    except BaseException:
        remove_file(segment, suffix + ".new")
        raise
    hit(segment.failpoints, _RENAMED)


def read_file(segment: Segment, suffix: str, size_max_bytes: int) -> bytes:
    """What `replace_file` has stored.

    FileNotFoundError: nothing.  ForeignSegmentError: it is not a file of the segment's owner, or it is too long.
    """
    path = file_path(segment, suffix)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        status, owner = os.fstat(fd), os.fstat(segment.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != owner.st_uid:
            raise ForeignSegmentError(errno.EPERM, f"{path} belongs to uid {status.st_uid}, not to the segment's owner")
        if status.st_size > size_max_bytes:
            raise ForeignSegmentError(errno.EFBIG, f"{path} has {status.st_size} bytes, {size_max_bytes} at most")
        # No more: what is asked for is allocated, however short the file.
        return file.read(status.st_size)


def remove_file(segment: Segment, suffix: str) -> None:
    """Remove what `replace_file` has stored; it may be gone, or be somebody else's."""
    try:
        os.unlink(file_path(segment, suffix))
    except (FileNotFoundError, PermissionError):
        pass


def list_files(segment: Segment, prefix: str) -> list[str]:
    """The suffixes of the files beside the segment that begin with ``prefix``."""
    name = segment.name[1:]
    return [file.removeprefix(name) for file in os.listdir(SHM) if file.startswith(name + prefix)]


def file_path(segment: Segment, suffix: str) -> str:
    """Where a file of a segment lies; the suffix begins with a dot."""
    return f"{SHM}{segment.name}{suffix}"
