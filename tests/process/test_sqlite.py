"""A SQLite database that several processes write, in an image: every backup is right, and a plain copy is not.

The way in is the example `tools/examples/sqlite_vfs.py`; what is right is told by the books (`tests/bank.py`).
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import SpawnProcess
from pathlib import Path

import apsw
import pytest

from shmcbw.workers import Coordinator
from shmcbw.workers.jobs import Job
from tests import bank
from tests.conftest import wait_for
from tests.processes import CONTEXT, running
from tools.examples.sqlite_vfs import ImageFormatError, ImageVfs, at_rest, create, extract

K = 1024
TIMEOUT_S = 20.0
SEED = 20250


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bank.img"
    create(path, database_capacity=1 << 20)
    return path


@contextmanager
def served(image: Path) -> Iterator[Coordinator]:
    """Small clusters, and a cut that waits for a writer which has no CPU."""
    with Coordinator(image, cluster_size=4 * K, workers=2, drain_limit=10.0) as coordinator:
        bank.open_bank(str(image))
        yield coordinator


class Team:
    """Writer processes and their log."""

    def __init__(self, processes: list[SpawnProcess], words: memoryview) -> None:
        self._processes = processes
        self._words = words

    def begun(self) -> list[int]:
        """Commits that a backup from now on may hold, by writer."""
        return [self._words[2 * writer] for writer in range(bank.WRITERS)]

    def committed(self) -> list[int]:
        """Commits that a backup from now on must hold, by writer."""
        return [self._words[2 * writer + 1] for writer in range(bank.WRITERS)]

    def wait_commits(self, count: int) -> None:
        """Wait for ``count`` more commits of all writers together."""
        goal = sum(self.committed()) + count

        def reached() -> bool:
            assert all(process.is_alive() for process in self._processes), "a writer has failed"
            return sum(self.committed()) >= goal

        wait_for(reached, f"{count} commits", TIMEOUT_S)


@contextmanager
def team(image: Path, seed: int) -> Iterator[Team]:
    """As many processes as the bank has writers; all of them have committed something."""
    log = image.with_suffix(".log")
    bank.make_log(log)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(running(bank.transfer_forever, str(image), str(log), writer, seed + writer))
            for writer in range(bank.WRITERS)
        ]
        found = Team(processes, stack.enter_context(bank.opened_log(str(log))))
        wait_for(lambda: all(found.committed()), "a commit of every writer", TIMEOUT_S)
        yield found


def test_every_backup_at_a_random_moment_is_right(image: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    taken: list[tuple[Job, list[int], list[int]]] = []
    with served(image) as coordinator, team(image, seed) as writers:
        for number in range(12):
            writers.wait_commits(rng.randrange(1, 10))
            # Not to wait for anything: the moment is to be anywhere in a transaction.
            time.sleep(rng.uniform(0, 0.003))
            at_least = writers.committed()
            # Next to nothing is copied but what the writers overwrite, until three are under way.
            job = coordinator.backup(tmp_path / f"backup{number}.img", speed=1)
            taken.append((job, at_least, writers.begun()))
            if number >= 3:
                finish(taken[number - 3][0])
        writers.wait_commits(10)
        for job, _, _ in taken[-3:]:
            finish(job)
    for number, (job, at_least, at_most) in enumerate(taken):
        assert bank.books_in_backup(tmp_path / f"backup{number}.img").faults(at_least, at_most) == []
        assert job.progress().copied_for_writers_bytes > 0


def finish(job: Job) -> None:
    job.set_speed(0)
    job.wait(TIMEOUT_S)


def test_a_backup_of_an_application_at_rest_needs_no_journal(image: Path, tmp_path: Path) -> None:
    vfs = ImageVfs()
    taken: list[tuple[Path, list[int], list[int]]] = []
    with served(image) as coordinator, team(image, SEED) as writers, closing(vfs.connect(image)) as connection:
        for number in range(5):
            backup = tmp_path / f"backup{number}.img"
            at_least = writers.committed()
            job = coordinator.backup(backup, speed=1, quiesce=at_rest(connection))
            taken.append((backup, at_least, writers.begun()))
            writers.wait_commits(5)
            finish(job)
    for backup, at_least, at_most in taken:
        assert bank.books_in_backup(backup).faults(at_least, at_most) == []
        alone = backup.with_suffix(".alone")
        extract(backup, alone)
        assert not alone.with_name(f"{alone.name}-journal").exists()


def test_a_plain_copy_made_at_the_same_time_is_wrong(image: Path, tmp_path: Path) -> None:
    backup, plain = tmp_path / "backup.img", tmp_path / "plain.img"
    with served(image) as coordinator, team(image, SEED) as writers:
        at_least = writers.committed()
        job = coordinator.backup(backup)
        at_most = writers.begun()
        # In pieces from the beginning to the end, as cp does; life goes on between any two.
        with image.open("rb") as source, plain.open("wb") as target:
            while data := source.read(64 * K):
                target.write(data)
                writers.wait_commits(3)
        job.wait(TIMEOUT_S)
    assert bank.books_in_backup(backup).faults(at_least, at_most) == []
    try:
        faults = bank.books_in_backup(plain).faults(at_least, at_most)
    except (sqlite3.DatabaseError, ImageFormatError) as error:
        faults = [str(error)]
    print(faults)
    assert faults, "a copy without the filter was right: this test proves nothing"


# -- a cut inside a commit -----------------------------------------------------------------------------------------

WARM_UP = 5


@contextmanager
def stepper(image: Path, pragmas: str = "") -> Iterator[tuple[Pipe, SpawnProcess]]:
    """A process that stops after every store of one commit (bank.transfer_in_steps): its pipe and itself."""
    ours, theirs = CONTEXT.Pipe()
    arguments = (str(image), theirs, pragmas, WARM_UP, SEED)
    with ours, theirs, running(bank.transfer_in_steps, *arguments) as process:
        yield ours, process


def next_step(pipe: Pipe) -> str:
    assert pipe.poll(TIMEOUT_S), f"the writer did not come to its next step within {TIMEOUT_S} s"
    step = pipe.recv()
    assert isinstance(step, str)
    return step


def stop_between_two_pages(pipe: Pipe) -> None:
    """Page 1, the counter's and the poor account's page are stored, the rich one's is not."""
    pages = 0
    while pages < 3:
        pages += next_step(pipe) == "database"
        if pages < 3:
            pipe.send("go")


def exactly(count: int) -> list[int]:
    return [count, *[0] * (bank.WRITERS - 1)]


def test_a_cut_between_two_pages_of_a_commit_needs_the_journal_and_has_it(image: Path, tmp_path: Path) -> None:
    backup, alone = tmp_path / "backup.img", tmp_path / "alone.db"
    with served(image) as coordinator, stepper(image) as (pipe, _):
        stop_between_two_pages(pipe)
        job = coordinator.backup(backup, speed=1)
        pipe.send("go")
        while next_step(pipe) != "committed":
            pipe.send("go")
        finish(job)
        pipe.send("go")
    extract(backup, alone)
    alone.with_name("alone.db-journal").unlink()
    torn = bank.read_books(alone)
    assert torn.integrity == "ok"
    assert torn.total == bank.ACCOUNTS * bank.START - 1
    assert bank.books_in_backup(backup).faults(exactly(WARM_UP), exactly(WARM_UP), pairs=1) == []


@pytest.mark.parametrize(("journal_mode", "synchronous"), [("DELETE", "FULL"), ("PERSIST", "OFF")])
def test_a_cut_after_any_single_store_of_a_commit_is_right(
    image: Path, tmp_path: Path, journal_mode: str, synchronous: str
) -> None:
    pragmas = f"PRAGMA journal_mode={journal_mode}; PRAGMA synchronous={synchronous}"
    steps: list[str] = []
    jobs: list[Job] = []
    with served(image) as coordinator, stepper(image, pragmas) as (pipe, _):
        while "committed" not in steps:
            steps.append(next_step(pipe))
            jobs.append(coordinator.backup(tmp_path / f"backup{len(jobs)}.img", speed=1))
            if len(jobs) > 1:
                # The next store has come in between.
                finish(jobs[-2])
            pipe.send("go")
        finish(jobs[-1])
    counters = []
    for number in range(len(steps)):
        books = bank.books_in_backup(tmp_path / f"backup{number}.img")
        assert books.faults(exactly(WARM_UP), exactly(WARM_UP + 1), pairs=1) == [], f"at step {number}"
        counters.append(books.counters[0])
    assert steps.count("database") == 4
    assert steps.count("journal") > 10
    # One store, at the end, is the commit: no cut shows less after it, or more before.
    assert counters[:-2] == [WARM_UP] * (len(steps) - 2)
    assert counters[-1] == WARM_UP + 1


def test_a_writer_killed_inside_a_commit_is_rolled_back_by_the_next(image: Path, tmp_path: Path) -> None:
    backup, vfs = tmp_path / "backup.img", ImageVfs()
    with served(image) as coordinator:
        with stepper(image) as (pipe, process):
            stop_between_two_pages(pipe)
            process.kill()
            process.join()
        with closing(vfs.connect(image)) as connection:
            bank.transfer(connection, 1, random.Random(SEED), pairs=1)
        coordinator.backup(backup).wait(TIMEOUT_S)
    counters = [WARM_UP, 1, 0, 0]
    assert bank.books_in_backup(backup).faults(counters, counters, pairs=1) == []


# -- what the example refuses --------------------------------------------------------------------------------------


def test_a_change_that_a_backup_could_not_undo_is_refused(image: Path, tmp_path: Path) -> None:
    backup, vfs = tmp_path / "backup.img", ImageVfs()
    with served(image) as coordinator:
        for mode in ("MEMORY", "OFF", "WAL"):
            with closing(vfs.connect(image)) as connection:
                with pytest.raises((apsw.IOError, apsw.CantOpenError)):
                    bank.run(connection, f"PRAGMA journal_mode={mode}; UPDATE accounts SET balance = 0")
        coordinator.backup(backup).wait(TIMEOUT_S)
    assert bank.books_in_backup(backup).faults(exactly(0), exactly(0)) == []


def test_a_database_that_fills_its_region_gets_an_error_and_stays_whole(image: Path, tmp_path: Path) -> None:
    backup, vfs = tmp_path / "backup.img", ImageVfs()
    with served(image) as coordinator:
        with closing(vfs.connect(image)) as connection, pytest.raises(apsw.FullError):
            bank.run(connection, "CREATE TABLE ballast AS SELECT zeroblob(2000000) AS weight")
        coordinator.backup(backup).wait(TIMEOUT_S)
    assert bank.books_in_backup(backup).faults(exactly(0), exactly(0)) == []


def test_space_that_a_vacuum_frees_reads_as_zeroes_in_the_next_backup(image: Path, tmp_path: Path) -> None:
    before, after, vfs = tmp_path / "before.img", tmp_path / "after.img", ImageVfs()
    with served(image) as coordinator:
        with closing(vfs.connect(image)) as connection:
            job = coordinator.backup(before, speed=1)
            bank.run(connection, "UPDATE accounts SET filler = NULL")
            bank.run(connection, "VACUUM")
            finish(job)
        coordinator.backup(after).wait(TIMEOUT_S)
    for backup in (before, after):
        assert bank.books_in_backup(backup).faults(exactly(0), exactly(0)) == []
    size = after.with_suffix(".db").stat().st_size
    assert size < before.with_suffix(".db").stat().st_size // 4
    region = after.read_bytes()[64 * K :][: 1 << 20]
    assert not any(region[size:])


def test_extract_takes_neither_a_foreign_file_nor_a_place_that_is_taken(image: Path, tmp_path: Path) -> None:
    foreign, database = tmp_path / "foreign.img", tmp_path / "bank.db"
    foreign.write_bytes(bytes(1 << 20))
    with pytest.raises(ImageFormatError, match="no database image"):
        extract(foreign, database)
    database.with_name("bank.db-wal").touch()
    with pytest.raises(FileExistsError, match=r"bank\.db-wal exists"):
        extract(image, database)
    assert not database.exists()
