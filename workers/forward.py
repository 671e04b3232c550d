"""A backup that is brought forward in place: an older backup becomes the image at a new cut, by its changed clusters.

    1  everything is checked: it is this bitmap's base, by its manifest; nobody else has it
    2  a new manifest begins, with the words of the old one
    3  the old manifest: CHANGING
    4  TARGET -> TARGET.shmcbw-partial
    5  the job: changed clusters are overwritten
    6  as any target: the new manifest takes the old one's place, then TARGET has its name again

From 3 to 6 there is no backup called TARGET; that is the price of not copying it.  If the job fails or everything dies,
the partial file and CHANGING stay, and the bitmap keeps its old bits.  All that was overwritten is among them, so
running the job again completes it.  Whatever else is asked of the two files is refused.

If the image has grown, so does the target, after 4; what is new reads as zeroes there, as a resize leaves it in the
image, and what was written since is in the bitmap.  A target that somebody has made larger before must be a hole there.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import mmap
import os
import stat
import time
from dataclasses import replace

from shmcbw.errors import ManifestError, TargetRefusedError
from shmcbw.image import Identity, ImageFile, close_descriptor, next_data, read_fully
from shmcbw.points import Point

from .manifest import (
    BEING_MADE,
    CHANGING,
    CHECKSUM_MIN,
    FINISHED,
    NAMING,
    PARTIAL_SUFFIX,
    REST,
    Description,
    Manifest,
    checksum,
    sidecar,
)
from .targets import TargetFile, is_file, rename_without_replacing

LET_GO_S = 2.0

log = logging.getLogger("shmcbw")


class ForwardFile(TargetFile):
    """An existing backup, under its working name; `TargetFile.finish` gives it its name back."""

    #: The state of its old manifest before us; None: a coordinator died over it.
    state_before: bytes | None = None
    #: Bytes before us.
    size_before: int = 0

    @classmethod
    def take(
        cls, path: str, image: ImageFile, since: Point | None, description: Description, *, overwrite: bool
    ) -> ForwardFile:
        """Check and take; TargetRefusedError with nothing changed.

        ``path`` comes from `resolve`.  ``since``: what the bitmap covers.  ``description``: of the cut that is to come.
        """
        try:
            old = Manifest.open(sidecar(path), writable=True)
        except FileNotFoundError:
            raise _refused(path, "it has no manifest: only a backup of this bitmap can be brought forward") from None
        except ManifestError as error:
            raise _refused(path, str(error)) from None
        except OSError as error:
            raise TargetRefusedError(error.errno, f"target {path}: {sidecar(path)}: {error.strerror}") from error
        try:
            taken = cls._open(path, old)
            taken.overwrite = overwrite
            try:
                _check(path, taken, image, old, since, description)
                permissions = stat.S_IMODE(os.fstat(taken.fd).st_mode)
                kind, origin = old.description.kind, old.description.since
                taken.add_manifest(replace(description, kind=kind, since=origin), image, permissions)
                assert taken.manifest is not None
                taken.manifest.copy_words(old)
                taken._lengthen_tail(old)
                taken.size_before = os.fstat(taken.fd).st_size
                taken.state_before = old.state
                old.change(taken.identity)
                taken._hide()
                if taken.size_before < image.size_bytes:
                    os.ftruncate(taken.fd, image.size_bytes)
            except BaseException:
                taken.give_back()
                taken.close()
                raise
            return taken
        finally:
            old.close()

    @classmethod
    def _open(cls, path: str, old: Manifest) -> ForwardFile:
        """The file itself, by whichever name it has."""
        names = [path]
        if old.state in (CHANGING, REST):
            names = [name for name in (path, path + PARTIAL_SUFFIX) if is_file(name, old.description.target)]
        for name in names:
            try:
                fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise TargetRefusedError(error.errno, f"target {name}: {error.strerror}") from error
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise _refused(path, "it is not a regular file")
                _wait_unheld(fd)
                # Shared, as its workers will: an exclusive lock means that nobody is left.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return cls(path, name, fd, Identity.of(os.fstat(fd)), overwrite=False)
            except BlockingIOError:
                close_descriptor(fd)
                raise TargetRefusedError(errno.EBUSY, f"target {path}: another job is writing {name}") from None
            except BaseException:
                close_descriptor(fd)
                raise
        raise TargetRefusedError(errno.ENOENT, f"target {path}: it is not there, so it can't be brought forward")

    def _lengthen_tail(self, old: Manifest) -> None:
        """The last cluster of an image that has grown was shorter: its checksum is that with zeroes behind it now."""
        assert self.manifest is not None
        size, cluster_size = old.description.image_size, old.description.cluster_size
        cluster, length = size // cluster_size, size % cluster_size
        new_length = min(cluster_size, self.manifest.description.image_size - cluster * cluster_size)
        if not length or length == new_length:
            return
        (word,) = old.words(cluster, cluster + 1)
        if word < CHECKSUM_MIN:
            return
        data = read_fully(self.fd, length, cluster * cluster_size)
        if checksum(data) == word:
            self.manifest.put(cluster, array.array("Q", [checksum(data + bytes(new_length - length))]))
        elif old.state != CHANGING:
            raise _refused(self.path, f"its last {length} bytes do not fit their checksum")
        # Else a job that failed has overwritten it: it is in the bitmap, and gets its word when it is copied.

    def _hide(self) -> None:
        working = self.path + PARTIAL_SUFFIX
        if self.working_path != working:
            try:
                rename_without_replacing(self.working_path, working)
            except FileExistsError:
                raise _refused(self.path, f"{working} is there already; it is not this backup") from None
            self.working_path = working
        self.sync_directory()

    def give_back(self) -> None:
        """Nothing was written into it: everything as it was before `take`."""
        self.remove_manifest()
        if self.state_before in (None, CHANGING):
            return
        if os.fstat(self.fd).st_size != self.size_before:
            os.ftruncate(self.fd, self.size_before)
        if self.state_before != REST and self.working_path != self.path:
            rename_without_replacing(self.working_path, self.path)
            self.working_path = self.path
        with_state = Manifest.open(sidecar(self.path), writable=True)
        with_state.set_state(self.state_before or CHANGING)
        with_state.close()

    def remove(self) -> None:
        """The job has failed: the file stays, for the next one to complete it."""
        if self.stays:
            return
        self.remove_manifest()
        log.warning(
            "%s is not finished and stays; nothing is lost: the same backup in place, by the same bitmap, completes it",
            self.working_path,
        )


def is_rest(path: str, point: Point | None) -> bool:
    """Whether what is under a target's working name is what a failed job has left, and its point is this one."""
    if point is None or not point.rest:
        return False
    try:
        found = Manifest.open(sidecar(path))
    except (OSError, ManifestError):
        return False
    found.close()
    unfinished = found.state in (REST, CHANGING) and is_file(path + PARTIAL_SUFFIX, found.description.target)
    return unfinished and found.description.point == point


def _wait_unheld(fd: int) -> None:
    """Take the exclusive lock; BlockingIOError if somebody is at it.  Workers that have finished it let go soon."""
    deadline = time.monotonic() + LET_GO_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def _check(
    path: str, taken: TargetFile, image: ImageFile, old: Manifest, since: Point | None, description: Description
) -> None:
    status = os.fstat(taken.fd)
    base = old.description
    if taken.identity == image.identity:
        raise _refused(path, "it is the source")
    if old.state == BEING_MADE or (old.state in (NAMING, CHANGING, REST) and base.target != taken.identity):
        raise _refused(path, f"{old.path} is not its manifest")
    if status.st_nlink != 1:
        raise _refused(path, f"it has {status.st_nlink} names: all of them would be changed")
    if not base.image_size <= status.st_size <= image.size_bytes:
        raise _refused(
            path,
            f"it has {status.st_size} bytes and was made of an image of {base.image_size}, the source has "
            f"{image.size_bytes}: not its backup",
        )
    if old.state != CHANGING and _has_data_beyond(taken.fd, base.image_size, status.st_size):
        raise _refused(path, f"it was made larger, and there is data beyond the {base.image_size} bytes of the backup")
    if base.cluster_size != description.cluster_size:
        raise _refused(
            path, f"it was made with clusters of {base.cluster_size} bytes, this image has {description.cluster_size}"
        )
    if since is None:
        raise _refused(path, "the bitmap can't be sure to hold every change since any backup")
    if not since.not_after(base.point):
        raise _refused(path, f"it is not the bitmap's base (it shows {base.point}, the bitmap counts from {since})")
    if old.state in (FINISHED, NAMING):
        try:
            old.check_table()
        except ManifestError as error:
            raise _refused(path, str(error)) from None


def _has_data_beyond(fd: int, start: int, size_bytes: int) -> bool:
    """Whether a file has anything but a hole from ``start`` on, or zeroes in the block that is there anyway."""
    block_end = min(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, size_bytes)
    return any(read_fully(fd, block_end - start, start)) or next_data(fd, block_end, size_bytes) < size_bytes


def _refused(path: str, why: str) -> TargetRefusedError:
    return TargetRefusedError(errno.EINVAL, f"target {path} can't be brought forward: {why}")
