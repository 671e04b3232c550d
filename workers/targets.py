"""Target files: checked before the cut, kept under another name until they are right.

A backup grows as ``TARGET.shmcbw-partial`` and gets its name when it is complete and synced; scratch never does.  So
whatever dies, a file called TARGET is a finished backup (or the one that was there before); a user needs no tool to
tell, and ``overwrite`` never leaves him with neither.  A mark inside the file was rejected: every tool that reads raw
images would have to know it.  A block device has no name to hold back, so it is refused as a target.

A target may have a manifest (`manifest.py`), which grows beside it as ``TARGET.shmcbw.shmcbw-partial``.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from shmcbw import _core
from shmcbw.errors import ImageError, ManifestError, TargetRefusedError
from shmcbw.image import Identity, ImageFile, close_descriptor
from shmcbw.layout import PATH_SIZE
from shmcbw.snapshots import open_target

from .copying import check_target
from .manifest import CHANGING, FINISHED, REST, SUFFIX, Description, Manifest, sidecar
from .manifest import PARTIAL_SUFFIX as PARTIAL_SUFFIX

log = logging.getLogger("shmcbw")

#: While it is made.  As long as the other one: a name that fits with one fits with both.
PROBING_SUFFIX = ".shmcbw-probing"
SUFFIXES = (PARTIAL_SUFFIX, PROBING_SUFFIX)

_files: weakref.WeakSet[TargetFile] = weakref.WeakSet()


class TargetFile:
    """A target under preparation: an open, sized, sparse, locked file.

    ``path`` is where it will be, ``working_path`` where it is.
    """

    def __init__(self, path: str, working_path: str, fd: int, identity: Identity, *, overwrite: bool = False) -> None:
        self.path = path
        self.working_path = working_path
        self.fd = fd
        self.identity = identity
        self.overwrite = overwrite
        self.manifest: Manifest | None = None
        #: Not finished, and not to be removed.
        self.stays = False
        _files.add(self)

    @classmethod
    def create(
        cls,
        path: str,
        image: ImageFile,
        *,
        overwrite: bool,
        full: bool,
        named: bool = True,
        description: Description | None = None,
    ) -> TargetFile:
        """Check and create; TargetRefusedError with nothing changed.

        ``path`` comes from `resolve`.  ``full``: all of the image will be written.  ``named``: it will get its name
        in the end; unless it may overwrite, that must be possible without replacing another file.  ``description``: it
        gets a manifest that says this.
        """
        mode = _check_existing(path, image, overwrite)
        _check_space(path, image, full)
        check_sidecar(path)
        working = path + PARTIAL_SUFFIX
        # Like cp: the source's permission bits, cut by the umask.
        permissions = stat.S_IMODE(os.fstat(image.fd).st_mode) & 0o666 | 0o600
        fd = _create_file(path, image, permissions, probe=named and not overwrite)
        try:
            os.ftruncate(fd, image.size_bytes)
            if mode is not None:
                os.fchmod(fd, mode)
            made = cls(path, working, fd, Identity.of(os.fstat(fd)), overwrite=overwrite)
        except OSError as error:
            _take_back(working, fd)
            raise TargetRefusedError(error.errno, f"target {path}: {error.strerror}") from error
        if description is not None:
            try:
                made.add_manifest(description, image, mode or permissions)
            except BaseException:
                made.remove()
                made.close()
                raise
        return made

    def add_manifest(self, description: Description, image: ImageFile, permissions: int) -> None:
        """Begin a manifest; TargetRefusedError."""
        final = sidecar(self.path)
        name = final + PARTIAL_SUFFIX
        try:
            try:
                os.stat(name, follow_symlinks=False)
                _remove_abandoned(name, final, image)
            except FileNotFoundError:
                pass
            self.manifest = Manifest.create(name, replace(description, target=self.identity), permissions)
            fcntl.flock(self.manifest.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, TargetRefusedError):
                raise
            raise TargetRefusedError(error.errno, f"target {self.path}: {name}: {error.strerror}") from error

    @classmethod
    def adopt(
        cls,
        working_path: str,
        identity: Identity,
        size_bytes: int,
        *,
        overwrite: bool,
        complete: bool,
        manifest: bool = False,
    ) -> TargetFile | None:
        """The target of a dead coordinator; None if it is gone.

        All of this comes from memory that others can write.  OSError if the file can't be what it is said to be, see
        `open_target`, is another user's, or has a name that is not ours.
        ``complete``: then it may be under its final name already, or under both.
        ``manifest``: it had one, which must be there too.
        """
        final = working_path.removesuffix(PARTIAL_SUFFIX)
        for name in (final, working_path) if complete else (working_path,):
            try:
                fd = open_target(name, working_path, identity, size_bytes, os.O_RDWR)
            except FileNotFoundError:
                continue
            if fd is not None:
                found = cls(final, name, fd, identity, overwrite=overwrite)
                try:
                    found._take_over(working_path, manifest=manifest)
                except BaseException:
                    found.close()
                    raise
                return found
        return None

    def _take_over(self, working_path: str, *, manifest: bool) -> None:
        status = os.fstat(self.fd)
        names = sum(is_file(name, self.identity) for name in (working_path, self.path))
        if status.st_uid != os.geteuid() or status.st_nlink != names:
            raise OSError(
                errno.EUCLEAN, f"{self.working_path} belongs to uid {status.st_uid} and has {status.st_nlink} names"
            )
        fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if self.working_path == self.path and is_file(working_path, self.identity):
            # Died between giving it its name and taking the other one away.
            os.unlink(working_path)
        if manifest:
            self.manifest = Manifest.adopt(self.path, self.identity)
            if self.manifest is None:
                raise ManifestError(f"the manifest of the unfinished {self.working_path} is gone")
            fcntl.flock(self.manifest.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def is_named(self) -> bool:
        """Whether it is where it will be."""
        return self.working_path == self.path

    def sync(self, size_bytes: int) -> None:
        """`sync_file` of this target."""
        sync_file(self.fd, size_bytes)

    def finish(self, reached: Callable[[], None] = lambda: None) -> None:
        """Give the complete and synced file its name; FileExistsError if one has appeared there meanwhile.

        Its manifest, sealed as NAMING, gets its name first, and is FINISHED when both have theirs.  An older manifest
        under the name goes before the older file does.  ``reached``: called when the manifest has its name.

        OSError from the sync of the directory: the file has its name, which a power failure may still take away.
        """
        # First what can fail with nothing changed.
        directory = self._open_directory()
        try:
            if self.working_path != self.path:
                self._rename(reached)
            with _complete("its manifest does not say so"):
                if self.manifest is not None and self.manifest.state != FINISHED:
                    self.manifest.set_state(FINISHED)
            _sync_directory(directory)
        finally:
            close_descriptor(directory)

    def _rename(self, reached: Callable[[], None]) -> None:
        if not is_file(self.working_path, self.identity):
            raise OSError(errno.ESTALE, f"{self.working_path} was replaced while it was written")
        if not self.overwrite and os.path.lexists(self.path):
            raise FileExistsError(errno.EEXIST, "a file has appeared there meanwhile", self.path)
        self._name_manifest(reached)
        if self.overwrite:
            os.rename(self.working_path, self.path)
        else:
            rename_without_replacing(self.working_path, self.path)
        self.working_path = self.path

    def _name_manifest(self, reached: Callable[[], None]) -> None:
        final = sidecar(self.path)
        if self.manifest is None:
            _remove_stale(final)
        elif self.manifest.path != final:
            os.rename(self.manifest.path, final)
            self.manifest.path = final
            reached()

    def _open_directory(self) -> int:
        return os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def sync_directory(self) -> None:
        directory = self._open_directory()
        try:
            os.fsync(directory)
        finally:
            close_descriptor(directory)

    def remove(self) -> None:
        """Remove what is not finished, if it still is our file.  What can't be removed stays, and the log says so."""
        if self.stays:
            return
        _remove_own(self.working_path, self.identity)
        self.remove_manifest()

    def give_back(self) -> None:
        """There was no cut: everything as it was."""
        self.remove()

    def remove_manifest(self) -> None:
        """Remove the manifest of what is not finished."""
        if self.manifest is None or self.manifest.state == FINISHED:
            return
        try:
            identity = Identity.of(os.fstat(self.manifest.fd))
        except OSError as error:
            log.warning("the unfinished %s can't be removed: %s", self.manifest.path, error.strerror)
            return
        _remove_own(self.manifest.path, identity)

    def close(self) -> None:
        if self.manifest is not None:
            self.manifest.close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            close_descriptor(fd)


def sync_file(fd: int, size_bytes: int) -> None:
    """fdatasync, by an open file that was there all along: the first failure is final, never tried again.

    OSError, too, if the file has not the size of the image any more.
    """
    os.fdatasync(fd)
    # Last: a sync may take long.
    check_target(fd, size_bytes)


def _close_in_child() -> None:
    """A forked child must not keep its parent's lock on a target."""
    for file in list(_files):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


def _check_existing(path: str, image: ImageFile, overwrite: bool) -> int | None:
    """Refuse a target that can't be; returns the permission bits of one that will be replaced."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TargetRefusedError(error.errno, f"target {path}: {error.strerror}") from error
    if stat.S_ISBLK(status.st_mode):
        if Identity.of(status) == image.identity:
            raise TargetRefusedError(errno.EINVAL, f"target {path} is the source")
        raise TargetRefusedError(
            errno.EINVAL, f"target {path} is a block device: it has no name to hold back while it is unfinished"
        )
    if not stat.S_ISREG(status.st_mode):
        raise TargetRefusedError(errno.EINVAL, f"target {path} is not a regular file")
    if Identity.of(status) == image.identity:
        raise TargetRefusedError(errno.EINVAL, f"target {path} is the source (the same file, or a hard link of it)")
    if not overwrite:
        raise TargetRefusedError(errno.EEXIST, f"target {path} exists; allow overwrite to replace it")
    if status.st_size != image.size_bytes:
        raise TargetRefusedError(
            errno.EINVAL, f"target {path} has {status.st_size} bytes, the source {image.size_bytes}: not its backup"
        )
    if not os.access(path, os.W_OK):
        raise TargetRefusedError(errno.EACCES, f"target {path} is not writable")
    return stat.S_IMODE(status.st_mode)


def _check_space(path: str, image: ImageFile, full: bool) -> None:
    directory = os.path.dirname(path)
    try:
        space = os.statvfs(directory)
    except OSError as error:
        raise TargetRefusedError(error.errno, f"target {path}: its directory: {error.strerror}") from error
    free = space.f_bavail * space.f_frsize
    allocated = min(image.size_bytes, os.fstat(image.fd).st_blocks * 512) if full else 0
    needed = max(allocated, space.f_frsize)
    if free < needed:
        raise TargetRefusedError(
            errno.ENOSPC, f"target {path}: {needed} bytes are needed, {free} are free on its file system"
        )


def is_file(path: str, identity: Identity) -> bool:
    """Whether the name leads to this very file; OSError if nobody can say."""
    try:
        return Identity.of(os.stat(path)) == identity
    except (FileNotFoundError, NotADirectoryError, ImageError):
        return False


def _sync_directory(directory: int) -> None:
    with _complete("its directory can't be synced: after a power failure it may not be there"):
        try:
            os.fsync(directory)
        except OSError as error:
            # EINVAL: what a file system says that can't sync directories.
            if error.errno != errno.EINVAL:
                raise


@contextmanager
def _complete(but: str) -> Iterator[None]:
    """An OSError of what comes after the name says that the target has it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"it is complete and has its name, but {but} ({error.strerror})") from error


def _remove_own(working: str, identity: Identity) -> None:
    """Remove an unfinished file of a snapshot that is ours, if it still is that file.  An error is only logged."""
    try:
        if is_file(working, identity):
            os.unlink(working)
    except OSError as error:
        log.warning("the unfinished %s can't be removed: %s", working, error.strerror)


def _take_back(name: str, fd: int) -> None:
    """Remove a file that we have just made, after an error that counts more than one of this."""
    try:
        os.unlink(name)
    except OSError as error:
        log.warning("the unfinished %s can't be removed: %s", name, error.strerror)
    close_descriptor(fd)


def resolve(path: str | os.PathLike[str]) -> str:
    """The name behind links: the final rename must replace the file, not a link to it."""
    final = os.path.realpath(os.fspath(path))
    if len(os.fsencode(final)) + len(SUFFIX) + len(PARTIAL_SUFFIX) >= PATH_SIZE:
        raise TargetRefusedError(errno.ENAMETOOLONG, f"target {final}: the path is too long")
    return final


def check_sidecar(path: str) -> None:
    """TargetRefusedError if the name of the target's manifest leads to something that must not be lost."""
    name = sidecar(path)
    try:
        found = Manifest.open(name)
    except FileNotFoundError:
        return
    except ManifestError as error:
        raise TargetRefusedError(
            errno.EEXIST, f"target {path}: the name of its manifest is taken: {error}; remove that file"
        ) from None
    except OSError as error:
        raise TargetRefusedError(error.errno, f"target {path}: {name}: {error.strerror}") from error
    found.close()
    if found.state in (CHANGING, REST) and is_file(path + PARTIAL_SUFFIX, found.description.target):
        what = "was being brought forward" if found.state == CHANGING else "is an increment with bitmap-mode always"
        raise TargetRefusedError(
            errno.EEXIST,
            f"target {path}: {path}{PARTIAL_SUFFIX} {what} and is not finished: go on with it in place, by the same "
            f"bitmap, or remove it and {name}",
        )


def _remove_stale(name: str) -> None:
    """Remove the manifest of an older file, which is about to be replaced by one without."""
    try:
        Manifest.open(name).close()
        os.unlink(name)
    except (OSError, ManifestError):
        pass


def open_unfinished(working: str, identity: Identity, size_bytes: int) -> int:
    """For a worker: open the unfinished target that an entry of the table names, with a shared lock; its descriptor.

    Beside the checks of `open_target` the coordinator's lock must be on it: who serves that file vouches for it.
    """
    fd = open_target(working, working, identity, size_bytes, os.O_RDWR)
    if fd is None:
        raise OSError(errno.ESTALE, f"{working} was replaced")
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return fd
        raise OSError(errno.EUCLEAN, f"{working} is no backup under way: nobody holds its lock")
    except OSError:
        close_descriptor(fd)
        raise


def _is_rest(status: os.stat_result, final: str) -> bool:
    """Whether a file can be what a dead backup of this user has left: not somebody else's, and without other names (it
    may be a finished backup then, or anything) but the two that an unfinished file has while it is made."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and status.st_nlink == sum(is_file(final + suffix, Identity.of(status)) for suffix in SUFFIXES)
    )


def remove_unheld(working: str, size_bytes: int, *, keep_target: bool = False) -> None:
    """Remove an unfinished file that a dead coordinator had just made, and its manifest: named as ours, the one empty
    or as long as the image, and held by nobody.  ``keep_target``: it was there before."""
    if not working.endswith(PARTIAL_SUFFIX):
        return
    manifest = sidecar(working.removesuffix(PARTIAL_SUFFIX)) + PARTIAL_SUFFIX
    for name in (manifest,) if keep_target else (working, _probing(working), manifest):
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            final = (manifest if name == manifest else working).removesuffix(PARTIAL_SUFFIX)
            if _is_rest(status, final) and (name == manifest or status.st_size in (0, size_bytes)):
                os.unlink(name)
        except OSError:
            pass
        finally:
            close_descriptor(fd)


def _probing(working: str) -> str:
    return working.removesuffix(PARTIAL_SUFFIX) + PROBING_SUFFIX


def rename_without_replacing(path: str, to: str) -> None:
    """Rename; FileExistsError where something has that name already (a plain rename would replace it)."""
    try:
        _core.rename_without_replacing(path, to)
        return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    # NFS and FUSE file systems know no flags of rename.  Died in between: both names are the same file, and whoever
    # finds it knows (`adopt`, `_remove_abandoned`).
    os.link(path, to)
    try:
        os.unlink(path)
    except OSError:
        os.unlink(to)
        raise


def _create_file(final: str, image: ImageFile, permissions: int, *, probe: bool) -> int:
    """Create the file under its working name, always anew: what a dead backup has left there is removed first.

    ``probe``: it gets that name in the same way as later the final one, so that a file system where it can't be done
    is found now and not after hours of copying.
    """
    working = final + PARTIAL_SUFFIX
    name = _probing(working) if probe else working
    try:
        fd = _create_anew(name, final, image, permissions)
    except OSError as error:
        if isinstance(error, TargetRefusedError):
            raise
        raise TargetRefusedError(error.errno, f"target {final}: {name}: {error.strerror}") from error
    try:
        # Shared by us, and by the workers through their own descriptors: an exclusive lock means that nobody is left.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not is_file(name, Identity.of(os.fstat(fd))):
            raise BlockingIOError
        if probe:
            _probe(name, final, image)
            name = working
            fd = _reopen(fd, working)
    except BlockingIOError:
        close_descriptor(fd)
        raise TargetRefusedError(errno.EBUSY, f"target {final}: another backup is writing {name}") from None
    except OSError as error:
        _take_back(name, fd)
        if isinstance(error, TargetRefusedError):
            raise
        raise TargetRefusedError(error.errno, f"target {final}: {name}: {error.strerror}") from error
    return fd


def _reopen(fd: int, working: str) -> int:
    """The same file by its new name, locked: some FUSE file systems have a lock of its own for each name."""
    again = os.open(working, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if Identity.of(os.fstat(again)) != Identity.of(os.fstat(fd)):
            raise BlockingIOError
        fcntl.flock(again, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        close_descriptor(again)
        raise
    close_descriptor(fd)
    return again


def _create_anew(name: str, final: str, image: ImageFile, permissions: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(name, flags, permissions)
    except FileExistsError:
        _remove_abandoned(name, final, image)
        return os.open(name, flags, permissions)


def _probe(name: str, final: str, image: ImageFile) -> None:
    working = final + PARTIAL_SUFFIX
    try:
        try:
            rename_without_replacing(name, working)
        except FileExistsError:
            _remove_abandoned(working, final, image)
            rename_without_replacing(name, working)
    except FileExistsError:
        raise TargetRefusedError(errno.EBUSY, f"target {final}: another backup is writing {working}") from None
    except OSError as error:
        if isinstance(error, TargetRefusedError):
            raise
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
            raise TargetRefusedError(error.errno, f"target {final}: {working}: {error.strerror}") from error
        raise TargetRefusedError(
            errno.EOPNOTSUPP,
            f"target {final}: its file system can neither rename without replacing nor link, so the finished backup "
            "could take the place of another file: allow overwrite, or choose another file system",
        ) from error


def _remove_abandoned(working: str, final: str, image: ImageFile) -> None:
    """Remove the partial file of a dead backup; refuse whatever is not surely that: the source, what `_is_rest`
    refuses, and what a backup is writing."""
    fd = os.open(working, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if not _is_rest(status, final) or Identity.of(status) == image.identity:
            raise TargetRefusedError(
                errno.EEXIST, f"target {final}: {working} is there and is not the rest of a backup of ours"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetRefusedError(errno.EBUSY, f"target {final}: another backup is writing {working}") from None
        os.unlink(working)
        # After a reboot this file is all that is left of a backup.
        log.warning("target %s: removed %s, which an earlier backup has left unfinished", final, working)
    finally:
        close_descriptor(fd)
