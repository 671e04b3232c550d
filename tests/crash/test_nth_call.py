"""The Nth system call of a kind fails, once or from then on: the end is right, refused, or loudly broken.

`tests/faults` has the layer that makes calls fail, the plan of what to make fail, and the round with its judge.
`make faults` plays every fault; otherwise a part, the same for the same seed.  All of them take hours: with a directory
in SHMCBW_NTH_CALL_RECORD what was played is written down there, and a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.faults.actor import Actor
from tests.faults.layer import FOR_GOOD, Fault, Kind, Layer
from tests.faults.plan import faults, part
from tests.faults.record import Record
from tests.faults.round import Stage
from tests.faults.stages import KINDS, staged

SEED = int(os.environ.get("SHMCBW_SEED", "1"))
EVERYTHING = os.environ.get("SHMCBW_NTH_CALL") == "all"
RECORD = os.environ.get("SHMCBW_NTH_CALL_RECORD", "")
#: How long a scenario is played for otherwise, in seconds.
PART_S = 2.0
AT_LEAST = 2


def play(
    stage: Stage,
    some: Sequence[Fault],
    limit_s: float = float("inf"),
    at_least: int = AT_LEAST,
    record: Record | None = None,
) -> list[Fault]:
    """Play faults, until the limit and a few that came to be; those that did.  What is in the record is not played."""
    deadline = time.monotonic() + limit_s
    fired: list[Fault] = []
    wrong: list[str] = []
    for fault in some:
        if len(fired) + len(wrong) >= at_least and time.monotonic() > deadline:
            break
        if record is not None and fault in record:
            if record.fired(fault):
                fired.append(fault)
            continue
        try:
            came_to_be = stage.play(fault, SEED).fired > 0
        except AssertionError as error:
            wrong.append(f"{fault}: {(str(error) or repr(error)).splitlines()[0]}")
            if record is not None:
                record.wrong(fault, f"{error}\n{stage.said()}")
            continue
        if came_to_be:
            fired.append(fault)
        if record is not None:
            record.legal(fault, fired=came_to_be)
    assert not wrong, "\n".join([f"SHMCBW_SEED={SEED}, {stage.scenario}:", *wrong, stage.said()])
    return fired


@pytest.mark.timeout(4 * 3600 if EVERYTHING else 120)
@pytest.mark.parametrize("scenario", KINDS)
def test_whichever_system_call_fails_the_end_is_legal(tmp_path: Path, scenario: str) -> None:
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    with staged(tmp_path, scenario) as stage:
        counts = stage.play(None, SEED).counts
        # Around a death, which takes seconds, one call of each kind is enough.
        order = part(faults(counts, chance, some=1 if scenario == "dying" else 3), chance)
        at_least = 1 if scenario == "dying" else AT_LEAST
        record = Record(RECORD, scenario) if EVERYTHING and RECORD else None
        fired = play(stage, order, float("inf") if EVERYTHING else PART_S, at_least, record)
    print(f"{len(fired)} faults of {len(order)} that were planned came to be")
    assert fired


# -- what was found ----------------------------------------------------------------------------------------------------


def found(kind: str, what: str, first: int, times: int = FOR_GOOD) -> Fault:
    return Fault(Kind(*kind.split()), what, first, times)


#: Faults that once ended wrongly, and how.
FOUND = {
    "plain": [
        # What came after a close() that complained was not let go: descriptors, and with them locks, for good.
        found("coordinator close target", "EIO", 0),
        found("coordinator close segment", "EIO", 1),
        found("writer close segment", "EIO", 0, 1),
        # A start that was refused kept its lock: "a coordinator serves this image already", namely the one that failed.
        found("coordinator sem_open semaphore", "EMFILE", 6),
        found("coordinator stat segment", "EIO", 0),
        found("coordinator mmap segment", "ENOMEM", 0),
        found("coordinator getlock segment", "ENOLCK", 1),
        found("coordinator opendir names", "EMFILE", 0),
        # The unfinished file of a backup that was refused stayed.
        found("coordinator fstat target", "EIO", 0, 1),
        found("coordinator flock target", "ENOLCK", 0, 1),
        # The target had its name, and nothing said why the job had failed all the same; or it need not have had it yet.
        found("coordinator fsync directory", "EIO", 0, 1),
        found("coordinator open directory", "EMFILE", 0, 1),
        # One copy failed, and in looking why the worker died: its writer waited until its timeout.
        found("worker fstat source", "EIO", 18),
        # No word of what was refused, or on which file.
        found("worker open source", "EMFILE", 0),
        found("coordinator shm_open segment", "EMFILE", 0),
        found("writer lock segment", "ENOLCK", 0),
        # A slot without an owner, as long as the handle was open.
        found("writer stat semaphore", "EIO", 2, 1),
    ],
    "adopting": [
        # A start that was refused kept what it had adopted so far.
        found("worker dup source", "EMFILE", 0, 1),
        found("coordinator stat segment", "EIO", 0, 1),
        found("coordinator fstat source", "EIO", 3),
        # The job never ended.
        found("coordinator dup target", "EMFILE", 0),
        # The dead coordinator's job was forgotten, and its file stayed.
        found("coordinator open target", "EIO", 0),
        found("coordinator mmap bitmap", "ENOMEM", 14),
    ],
    "chain": [
        # The sum of a manifest was that of as much as one read gave: a finished increment that nobody could restore.
        found("coordinator pread manifest", "short", 1),
        # No word of what was refused.
        found("coordinator write journal", "ENOSPC", 0, 1),
        # The target had its name, and the job did not say so.
        found("coordinator fdatasync manifest", "EIO", 1, 1),
    ],
}


@pytest.mark.parametrize("scenario", FOUND)
def test_a_fault_that_once_ended_wrongly_ends_legally(tmp_path: Path, scenario: str) -> None:
    some = FOUND[scenario]
    if not EVERYTHING:
        some = random.Random(SEED).sample(some, -(-len(some) // 2))
    with staged(tmp_path, scenario) as stage:
        fired = play(stage, some)
    assert fired == some, "each of them comes to be"


def test_bitmaps_of_a_dead_coordinator_are_not_forgotten_because_their_journal_can_not_be_opened_now(
    tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    image = make_image(1 << 20)
    (tmp_path / "state").mkdir()
    state = str(tmp_path / "state")
    layer = Layer(tmp_path)
    layer.watch(image, tmp_path / "targets", tmp_path / "state")
    first, second = (Actor(tmp_path / "stderr", **layer.environment("coordinator")) for _ in range(2))
    try:
        assert first.play("start", image=str(image), state=state).good
        assert first.play("add_bitmap", name="b").good
        first.process.kill()
        first.process.wait()
        layer.arm(found("coordinator open journal", "EMFILE", 0))
        assert "Too many open files" in second.play("start", image=str(image), state=state).message
        layer.disarm()
        assert second.play("start", image=str(image), state=state).good
        assert second.play("bitmaps").value == {"b": True}
        assert second.play("remove_bitmap", name="b").good
        assert second.play("close").good
    finally:
        for actor in (first, second):
            actor.end()
        layer.close()


def test_a_persistent_bitmap_is_added_or_its_refusal_names_the_file_that_failed(
    tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    image = make_image(1 << 20)
    (tmp_path / "state").mkdir()
    layer = Layer(tmp_path)
    layer.watch(image, tmp_path / "targets", tmp_path / "state")
    coordinator = Actor(tmp_path / "stderr", **layer.environment("coordinator"))
    try:
        assert coordinator.play("start", image=str(image), state=str(tmp_path / "state")).good
        layer.arm(found("coordinator read process", "EIO", 0, 1))
        assert "boot_id" in coordinator.play("add_bitmap", name="b").message
        assert coordinator.play("bitmaps").value == {}
        # It was read, so what close() says does not matter.
        layer.arm(found("coordinator close process", "EIO", 0, 1))
        assert coordinator.play("add_bitmap", name="b").good
        assert layer.fired
        layer.arm(found("coordinator fstat source", "EIO", 0))
        answer = coordinator.play("add_bitmap", name="c")
        assert answer.good or str(image) in answer.message
        layer.disarm()
        for name in coordinator.play("bitmaps").value or {}:
            assert coordinator.play("remove_bitmap", name=name).good
        assert coordinator.play("close").good
    finally:
        coordinator.end()
        layer.close()


# -- the layer itself --------------------------------------------------------------------------------------------------


def test_the_layer_counts_the_calls_that_a_backup_is_made_of(tmp_path: Path) -> None:
    """A layer that covers nothing would find no fault either."""
    expected = """
        coordinator open source, coordinator pread source, coordinator open target, coordinator ftruncate target,
        coordinator flock target, coordinator fdatasync target, coordinator rename target, coordinator pread target,
        coordinator fallocate target, coordinator fsync directory, coordinator statvfs directory,
        coordinator shm_open segment, coordinator posix_fallocate segment, coordinator mmap segment,
        coordinator lock segment, coordinator getlock segment, coordinator posix_fallocate bitmap,
        coordinator shm_unlink bitmap, coordinator sem_open semaphore, coordinator sem_wait semaphore,
        worker open source, worker mmap source, worker lseek source, worker fstat source, worker open target,
        worker flock target, worker pwrite target, worker sync_file_range target, worker lock segment,
        worker mmap bitmap, worker sem_post semaphore, worker sem_wait semaphore,
        writer open source, writer mmap source, writer fallocate source, writer fdatasync source, writer lock segment,
        writer mmap segment, writer mmap bitmap, writer sem_post semaphore, writer sem_wait semaphore
    """
    with staged(tmp_path, "plain") as stage:
        counts = stage.play(None, SEED).counts
    missing = {Kind(*words.split()) for words in expected.split(",")} - set(counts)
    assert not missing


#: System calls, and the functions of libc that make them.
MADE_BY = {
    "openat": {"open", "opendir", "shm_open", "sem_open"},
    "newfstatat": {"stat", "fstat"},
    "fstat": {"fstat"},
    "link": {"link", "sem_open"},
    "rename": {"rename"},
    "renameat2": {"rename"},
    "unlink": {"unlink", "shm_unlink", "sem_unlink"},
    "fallocate": {"fallocate", "posix_fallocate"},
    "fcntl": {"dup", "lock", "getlock"},
    "mmap": {"mmap", "sem_open"},
    "pread64": {"pread"},
    "preadv": {"pread"},
    "preadv2": {"pread"},
    "pwrite64": {"pwrite"},
    "statfs": {"statvfs"},
    "fstatfs": {"fstatfs", "fstatvfs"},
}
#: Parts of opendir, readdir, closedir and sem_open, by a descriptor that only libc has.
WITHIN_LIBC = {
    *((name, "names") for name in ("getdents64", "newfstatat", "close")),
    *((name, "semaphore") for name in ("write", "newfstatat", "close")),
}
#: Harmless questions: of a path, of a terminal.
QUESTIONS = {"readlink", "ioctl", "execve"}
#: One call of libc is one system call, so their numbers are the same.
COUNTED = {
    ("pread64", "preadv", "preadv2"): "pread",
    ("pwrite64",): "pwrite",
    ("ftruncate",): "ftruncate",
    ("fdatasync",): "fdatasync",
}


def test_no_system_call_on_what_is_watched_gets_past_the_layer(tmp_path: Path) -> None:
    """Seen by strace, which sees the kernel's side."""
    if shutil.which("strace") is None:
        assert not os.environ.get("CI"), "CI must have strace"
        pytest.skip("NOT TESTED: strace is missing")
    with staged(tmp_path, "plain") as stage:
        log = tmp_path / "strace"
        pids = [stage.coordinator.pid, stage.writer.pid]
        command = ["strace", "-f", "-y", "-qq", "-s", "300", "-o", str(log), *(f"-p{pid}" for pid in pids)]
        with subprocess.Popen(command) as strace:
            try:
                for pid in pids:
                    wait_for(lambda pid=pid: _is_traced(pid), f"pid {pid} is traced")  # type: ignore[misc]
                round_ = stage.play(None, SEED)
            finally:
                strace.terminate()
    seen = _system_calls(log.read_text().splitlines(), str(round_.image), str(round_.targets))
    known = {(kind.call, kind.touched) for kind in round_.counts}
    unseen = {
        f"{name} on {touched}"
        for name, touched in seen
        if name not in QUESTIONS
        and (name, touched) not in WITHIN_LIBC
        and not any((call, touched) in known for call in MADE_BY.get(name, {name}))
    }
    assert not unseen
    for names, call in COUNTED.items():
        for touched in ("source", "target", "bitmap", "segment"):
            counted = sum(n for kind, n in round_.counts.items() if (kind.call, kind.touched) == (call, touched))
            assert sum(seen[name, touched] for name in names) == counted, f"{call} on {touched}"


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def _system_calls(lines: Sequence[str], image: str, targets: str) -> Counter[tuple[str, str]]:
    """How often each system call was made, by the first thing of ours that it names."""
    watched = {
        "source": rf"{re.escape(image)}(?![\w.-])",
        "target": rf"{re.escape(targets)}/[\w.-]+",
        "directory": rf"{re.escape(targets)}(?![\w/])",
        "semaphore": r"/dev/shm/sem\.shmcbw-[\w-]+",
        "bitmap": r"/dev/shm/shmcbw-[\w-]+\.\d+",
        "segment": r"/dev/shm/shmcbw-[\w-]+(?![\w.-])",
        "names": r"/dev/shm(?![\w/])",
    }
    thing = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in watched.items()))
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:
            continue
        # A descriptor's own file, if the call begins with one: what is behind it may be data.  Of an open by /proc the
        # answer says what it was.
        of_fd = re.match(r"\d+<([^>]*)>", call[2])
        named = thing.search(of_fd[1] if of_fd else call[2])
        if named is not None and named.lastgroup is not None:
            found[call[1], named.lastgroup] += 1
    return found
