"""A bank in an image: money that moves between accounts, and books that show any cut that was no instant.

Coins move from the poor half of the accounts to the rich half, never back, so what a torn copy is wrong by can't cancel
out.  In every commit a writer moves PAIRS coins and counts itself one up:

    all balances together are ACCOUNTS * START;  what the rich half has got is PAIRS * all counters together;
    a writer's counter is at least what it had committed before the cut, at most what it had begun after it

Begun and committed are logged in a mapped file: for writer n the words 2n and 2n + 1.
"""

from __future__ import annotations

import mmap
import os
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import apsw

from tools.examples.sqlite_vfs import ImageVfs, Region, extract

ACCOUNTS = 800
START = 1000
PAIRS = 3
WRITERS = 4


def open_bank(image: str) -> None:
    """Make the tables, in an image that a coordinator serves."""
    vfs = ImageVfs()
    with closing(vfs.connect(image)) as connection:
        run(connection, "CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER, filler BLOB)")
        run(connection, "CREATE TABLE writers (id INTEGER PRIMARY KEY, counter INTEGER)")
        run(connection, "BEGIN")
        # Some ten accounts a page: the coins of one commit are on several.
        rows = [(account, START, bytes(400)) for account in range(ACCOUNTS)]
        connection.executemany("INSERT INTO accounts VALUES (?, ?, ?)", rows)
        connection.executemany("INSERT INTO writers VALUES (?, 0)", [(writer,) for writer in range(WRITERS)])
        run(connection, "COMMIT")


def run(connection: apsw.Connection, statement: str, values: Sequence[int] = ()) -> None:
    """Run to the end: apsw stops at the first row."""
    list(connection.execute(statement, values))


def transfer(connection: apsw.Connection, writer: int, rng: random.Random, pairs: int = PAIRS) -> None:
    """One commit."""
    run(connection, "BEGIN IMMEDIATE")
    run(connection, "UPDATE writers SET counter = counter + 1 WHERE id = ?", (writer,))
    for _ in range(pairs):
        run(connection, "UPDATE accounts SET balance = balance - 1 WHERE id = ?", (rng.randrange(ACCOUNTS // 2),))
        rich = rng.randrange(ACCOUNTS // 2, ACCOUNTS)
        run(connection, "UPDATE accounts SET balance = balance + 1 WHERE id = ?", (rich,))
    run(connection, "COMMIT")


# -- the books -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Books:
    """What a database says, read by a plain SQLite."""

    integrity: str
    total: int
    moved: int
    counters: list[int]

    def faults(self, at_least: Sequence[int], at_most: Sequence[int], pairs: int = PAIRS) -> list[str]:
        """All that is wrong; counters have to lie between two looks at the log, before and after the cut."""
        found = [] if self.integrity == "ok" else [f"integrity_check: {self.integrity}"]
        if self.total != ACCOUNTS * START:
            found.append(f"the sum is {self.total}, not {ACCOUNTS * START}")
        if self.moved != pairs * sum(self.counters):
            found.append(f"{self.moved} coins moved in {sum(self.counters)} commits of {pairs}")
        for writer, (low, counter, high) in enumerate(zip(at_least, self.counters, at_most, strict=True)):
            if not low <= counter <= high:
                found.append(f"writer {writer} is at {counter}, not in {low}..{high}")
        return found


def read_books(database: Path) -> Books:
    """Open a database as its user would: SQLite rolls back if there is a journal.  sqlite3.DatabaseError: it can't."""
    with closing(sqlite3.connect(database)) as connection:
        (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
        (total,) = connection.execute("SELECT sum(balance) FROM accounts").fetchone()
        (moved,) = connection.execute(
            "SELECT sum(balance - ?) FROM accounts WHERE id >= ?", (START, ACCOUNTS // 2)
        ).fetchone()
        counters = [counter for (counter,) in connection.execute("SELECT counter FROM writers ORDER BY id")]
    return Books(integrity, total, moved, counters)


def books_in_backup(backup: Path) -> Books:
    """The books in a backup, restored beside it."""
    database = backup.with_suffix(".db")
    extract(backup, database)
    return read_books(database)


# -- writer processes ----------------------------------------------------------------------------------------------


def make_log(path: Path) -> None:
    path.write_bytes(bytes(16 * WRITERS))


@contextmanager
def opened_log(path: str) -> Iterator[memoryview]:
    """The words of the log; each is one store of its writer."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        with memoryview(mapping) as raw, raw.cast("Q") as words:
            yield words


def transfer_forever(image: str, log: str, writer: int, seed: int) -> None:
    """Move money until killed; ends when its parent does.  Every other writer never syncs: a cut needs none."""
    parent, rng, vfs = os.getppid(), random.Random(seed), ImageVfs()
    with opened_log(log) as words, closing(vfs.connect(image)) as connection:
        run(connection, f"PRAGMA synchronous={'OFF' if writer % 2 else 'FULL'}")
        while os.getppid() == parent:
            words[2 * writer] += 1
            transfer(connection, writer, rng)
            words[2 * writer + 1] += 1


def transfer_in_steps(image: str, pipe: Pipe, pragmas: str, warm_up: int, seed: int) -> None:
    """Commit ``warm_up`` transfers of one coin, then one that stops after every store into the image.

    At each step it sends "database", "journal" or "size" (the next store is a size word) and goes on at any answer.
    At the end it sends "committed".
    """

    def step(what: str) -> None:
        pipe.send(what)
        pipe.recv()

    vfs, rng = stepping_vfs(step), random.Random(seed)
    with closing(vfs.connect(image)) as connection:
        run(connection, pragmas)
        for _ in range(warm_up):
            transfer(connection, 0, rng, pairs=1)
        vfs.armed = True
        transfer(connection, 0, rng, pairs=1)
        vfs.armed = False
        step("committed")


class SteppingVfs(ImageVfs):
    """A VFS that can be told to stop at each store; made by `stepping_vfs`."""

    armed = False


def stepping_vfs(step: Callable[[str], None]) -> SteppingVfs:
    """A VFS that calls ``step`` between any two stores into the image, while it is armed."""

    class SteppingRegion(Region):
        def write(self, data: bytes, offset: int) -> None:
            super().write(data, offset)
            if vfs.armed:
                step("journal" if self._name.endswith("-journal") else "database")

        def resize(self, size: int | None) -> None:
            if vfs.armed:
                step("size")
            super().resize(size)

    vfs = SteppingVfs()
    vfs.region = SteppingRegion
    return vfs
