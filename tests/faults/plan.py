"""Which faults a run is given: every kind of call that was counted, with every errno that the kernel may answer.

What is counted is what the product really calls, so a system call that it will make one day is covered without an edit
here: a call that `ERRNOS` does not know fails with EIO.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from tests.faults.layer import FOR_GOOD, Fault, Kind

#: Beside EIO, which is the rule: what each call may answer where the machine is at fault (not its caller).
ERRNOS: dict[str, tuple[str, ...]] = {
    "open": ("EIO", "EMFILE", "ENOSPC", "EINTR"),
    "close": ("EIO",),
    "read": ("EIO", "EINTR", "short"),
    "pread": ("EIO", "EINTR", "short"),
    "write": ("EIO", "ENOSPC", "EINTR", "short"),
    "pwrite": ("EIO", "ENOSPC", "EINTR", "short"),
    "ftruncate": ("EIO", "ENOSPC", "EINTR"),
    "fallocate": ("EIO", "ENOSPC", "EINTR"),
    "posix_fallocate": ("EIO", "ENOSPC", "EINTR"),
    "fdatasync": ("EIO", "ENOSPC"),
    "fsync": ("EIO", "ENOSPC"),
    "mmap": ("ENOMEM", "ENFILE"),
    "dup": ("EMFILE",),
    "lock": ("ENOLCK", "EINTR"),
    "getlock": ("ENOLCK",),
    "flock": ("ENOLCK", "EINTR"),
    "link": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC", "EINVAL"),
    "statvfs": ("EIO", "EINTR"),
    "fstatvfs": ("EIO", "EINTR"),
    "fstatfs": ("EIO", "EINTR"),
    "opendir": ("EIO", "EMFILE"),
    "shm_open": ("EMFILE", "ENOSPC", "EINTR"),
    "shm_unlink": ("EACCES",),
    "sem_open": ("EMFILE", "ENOSPC", "EINTR"),
    "sem_unlink": ("EACCES",),
    "sem_wait": ("EINTR",),
    "sem_post": ("EOVERFLOW",),
    "pipe": ("EMFILE",),
    "accept": ("EMFILE", "ENFILE", "ENOMEM", "ECONNABORTED", "EINTR"),
    "recv": ("ECONNRESET", "ETIMEDOUT", "ENOMEM", "EINTR", "short"),
    "send": ("EPIPE", "ECONNRESET", "ENOBUFS", "EINTR", "short"),
    "getsockopt": ("ENOBUFS",),
    "setsockopt": ("ENOBUFS",),
    "shutdown": ("ENOTCONN",),
}

#: A signal for every call would be a program that does nothing but handle signals: in a row come so many.
INTERRUPTIONS = 100


def faults(counts: dict[Kind, int], chance: random.Random, *, some: int = 3) -> Iterator[Fault]:
    """All faults for kinds that were counted.  Of many calls of a kind: the first few, the last, some between."""
    for kind, count in sorted(counts.items()):
        firsts = {*range(some), count - 1} & set(range(count))
        rest = sorted(set(range(count)) - firsts)
        firsts.update(chance.sample(rest, min(some, len(rest))))
        for what in ERRNOS.get(kind.call, ("EIO",)):
            for first in sorted(firsts):
                yield Fault(kind, what, first, 1)
                yield Fault(kind, what, first, INTERRUPTIONS if what == "EINTR" else FOR_GOOD)


def part(every: Iterable[Fault], chance: random.Random) -> list[Fault]:
    """All of them in an order in which each beginning is a fair part: one of each kind, then another one of each…"""
    kinds: dict[Kind, list[Fault]] = {}
    for fault in every:
        kinds.setdefault(fault.kind, []).append(fault)
    for some in kinds.values():
        chance.shuffle(some)
    order = sorted(kinds)
    rounds: list[Fault] = []
    while order:
        chance.shuffle(order)
        rounds += [kinds[kind].pop() for kind in order]
        order = sorted(kind for kind in order if kinds[kind])
    return rounds
