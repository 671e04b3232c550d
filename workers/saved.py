"""Persistent bitmaps on disk: one file for each image in a state directory, for the time when nobody serves the image.

    <state directory>/<sha-256 of the image's path, 32 digits>.bitmaps     one JSON object

While the image is served, the file is marked in use by its segment, synced before anybody can write, and holds names
only.  It is trusted if it was saved at a clean end (no writer left, the image synced) and the image still has the size,
the time of change and the birth that it had then.  Whatever else is found makes its bitmaps inconsistent: they can only
be removed, and what should be an increment has to be a full backup.

After a kill of anything the bitmaps are in the segment and its journal, which the next coordinator adopts; the file is
looked at only where there is no segment: after a clean end, and after a reboot.  If writers stay attached when the
coordinator ends, the segment lives on, and the file stays marked.

A block device tells no time of change, so its bitmaps can't be persistent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import stat
import zlib
from typing import Any

from shmcbw.dirty import DirtyBitmap
from shmcbw.errors import BitmapError, naming
from shmcbw.image import ImageFile, close_descriptor
from shmcbw.points import Point
from shmcbw.segment import boot_id

from .bitmaps import pack_set, set_bytes_max, unpack_set

log = logging.getLogger("shmcbw")

VERSION = 1
SIZE_MAX_BYTES = 1 << 30


class SavedBitmaps:
    """The file of one image.  Its writer is the image's coordinator."""

    def __init__(self, directory: str | os.PathLike[str], image: ImageFile, path: str) -> None:
        self._directory = os.fspath(directory)
        self._image = image
        self._image_path = os.path.realpath(path)
        name = hashlib.sha256(os.fsencode(self._image_path)).hexdigest()[:32]
        self.path = os.path.join(self._directory, name + ".bitmaps")

    def load(self) -> dict[str, DirtyBitmap]:
        """What was saved, for a segment that begins now; what can't be trusted is inconsistent.

        ForeignSegmentError, OSError: the file can't be read.  One that makes no sense is said, and holds nothing.
        """
        document = self._read()
        if document is None:
            return {}
        doubt = self._doubt(document)
        found: dict[str, DirtyBitmap] = {}
        for name, entry in document["bitmaps"].items():
            try:
                found[name] = self._from_json(name, entry, trusted=doubt is None)
            except (ValueError, TypeError, KeyError, zlib.error) as error:
                log.warning("bitmap %r in %s is inconsistent: %s", name, self.path, error)
                found[name] = DirtyBitmap(name, 65536, start=None, persistent=True, inconsistent=True)
        if doubt is not None and found:
            log.warning("the bitmaps in %s are inconsistent: %s", self.path, doubt)
        return found

    def _doubt(self, document: dict[str, Any]) -> str | None:
        """Why the file can't be trusted."""
        user = document["in_use"]
        if user is not None:
            again = isinstance(user, dict) and user.get("boot") == boot_id().hex()
            return "they were in use when " + ("everything that used them ended" if again else "the machine stopped")
        was, now = document["image"], self._describe_image()
        changed = [what for what in now if not isinstance(was, dict) or was.get(what) != now[what]]
        return f"the image's {changed[0]} has changed while nobody served it" if changed else None

    def _describe_image(self) -> dict[str, Any]:
        with naming(self._image_path, "its bitmaps can't be saved or trusted"):
            status = os.fstat(self._image.fd)
        return {"size": self._image.size_bytes, "mtime_ns": status.st_mtime_ns, "birth_ns": self._image.birth_ns}

    def mark(self, segment: str | None, bitmaps: dict[str, DirtyBitmap]) -> None:
        """Mark the file in use by a segment (None: of one that is being made); there is one if a bitmap is persistent.

        OSError: it could not be marked and synced; then the bitmaps must not be used.
        """
        names = {name: {"granularity": each.granularity} for name, each in bitmaps.items() if each.persistent}
        with naming(self._image_path, "its bitmaps can't be marked as in use"):
            boot = boot_id().hex()
        self._write({"segment": segment, "boot": boot}, names)

    def save(self, bitmaps: dict[str, DirtyBitmap]) -> None:
        """After a clean end: nobody can write the image through shmcbw any more.  OSError: the file stays marked."""
        persistent = {name: each for name, each in bitmaps.items() if each.persistent}
        if persistent:
            # What is dirty in mappings gets its time of change when it is written out.
            with naming(self._image_path, "can't be synced"):
                os.fsync(self._image.fd)
        self._write(None, {name: self._to_json(each) for name, each in persistent.items()})

    def check_image(self) -> None:
        """BitmapError if an image's bitmaps can't be persistent."""
        if self._image.identity.inode == 0:
            raise BitmapError(f"Can't store persistent bitmaps of {self._image_path}: a block device tells no changes")

    def _to_json(self, bitmap: DirtyBitmap) -> dict[str, Any]:
        return {
            "granularity": bitmap.granularity,
            "recording": bitmap.start is not None,
            "since": str(bitmap.since) if bitmap.since is not None else None,
            "until": str(bitmap.until) if bitmap.until is not None else None,
            "inconsistent": bitmap.inconsistent,
            "set": base64.b64encode(zlib.compress(pack_set(bitmap.kept), 1)).decode() if bitmap.kept else None,
        }

    def _from_json(self, name: str, entry: Any, *, trusted: bool) -> DirtyBitmap:
        granularity = entry["granularity"]
        if type(granularity) is not int:
            raise ValueError(f"its granularity is {granularity!r}")
        if not trusted or entry["inconsistent"]:
            return DirtyBitmap(name, granularity, start=None, persistent=True, inconsistent=True)
        kept = None
        if entry["set"] is not None:
            packed, size_bytes = base64.b64decode(entry["set"], validate=True), self._image.size_bytes
            kept = unpack_set(zlib.decompressobj().decompress(packed, set_bytes_max(size_bytes)), size_bytes)
        return DirtyBitmap(
            name,
            granularity,
            # Nothing was written before the first epoch of a segment, which is 2.
            start=1 if entry["recording"] else None,
            since=Point.parse(entry["since"]) if entry["since"] is not None else None,
            until=Point.parse(entry["until"]) if entry["until"] is not None else None,
            persistent=True,
            kept=kept,
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
                log.warning("%s is ignored: others may have written it", self.path)
                return None
            if status.st_size > SIZE_MAX_BYTES:
                log.warning("%s is ignored: it has %d bytes, %d at most", self.path, status.st_size, SIZE_MAX_BYTES)
                return None
            # What is asked for is allocated, however short the file.
            text = file.read(status.st_size)
        try:
            document = json.loads(text)
            if not isinstance(document, dict) or document["version"] != VERSION:
                raise ValueError("it is of another version")
            if not isinstance(document["bitmaps"], dict) or "in_use" not in document or "image" not in document:
                raise ValueError("it is no list of bitmaps")
        except (ValueError, KeyError, RecursionError) as error:
            log.warning("%s is ignored: %s", self.path, error)
            return None
        return document

    def _write(self, in_use: dict[str, Any] | None, bitmaps: dict[str, Any]) -> None:
        """Replace the file, synced; without bitmaps there is none."""
        with naming(self.path, "the bitmaps of its image can't be saved"):
            self._replace(in_use, bitmaps)

    def _replace(self, in_use: dict[str, Any] | None, bitmaps: dict[str, Any]) -> None:
        if not bitmaps:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
            return
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        document = {
            "version": VERSION,
            "path": self._image_path,
            "image": self._describe_image(),
            "in_use": in_use,
            "bitmaps": bitmaps,
        }
        temporary = self.path + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, self.path)
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            close_descriptor(directory)
