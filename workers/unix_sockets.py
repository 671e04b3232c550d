"""Listening unix sockets that only their owner may use: of the QMP server, and of NBD servers."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat

_PATH_BYTES_MAX = 107
_PROBE_TIMEOUT_S = 1.0


def listen(path: str, backlog: int) -> socket.socket:
    """A listening socket of mode 0600.  One that nobody listens on any more is replaced; anything else is not.

    The directory is locked meanwhile, so that of two servers that start at once one is told of the other.  OSError.
    """
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {_PATH_BYTES_MAX} bytes", path)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        _remove_stale(path)
        # Nobody can connect before listen(), so nobody meets another mode than this one.
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.EEXIST, "is there and is not a socket", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (TimeoutError, BlockingIOError):
            pass
    raise OSError(errno.EADDRINUSE, "another server listens there", path)


def place_of(path: str) -> tuple[int, int]:
    """(device, inode) of a socket's name, for `remove`."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def remove(path: str, place: tuple[int, int]) -> None:
    """Remove our socket's name, unless another server has taken it."""
    try:
        if place_of(path) == place:
            os.unlink(path)
    except FileNotFoundError:
        pass
