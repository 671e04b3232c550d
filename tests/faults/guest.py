"""A guest that uses an image over NBD, and knows what each block of it may hold.

A request that was answered with success was done; one that was answered with an error, or not at all because the
connection ended, was done or not, each block of it by itself.
"""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import Iterator

from shmcbw.workers.nbd import wire
from tests.nbd.client import Client

BLOCK = 4096
ZEROES = bytes(BLOCK)
#: What a server may answer where its machine is at fault.
REFUSALS = {errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.ESHUTDOWN}


class Belief:
    """What each block may hold."""

    def __init__(self, content: bytes) -> None:
        self._may = [{block} for block in blocks_of(content)]

    def suspect(self, offset: int, data: bytes) -> None:
        """It may be written from now on."""
        for index, block in enumerate(blocks_of(data), offset // BLOCK):
            self._may[index].add(block)

    def settle(self, offset: int, data: bytes) -> None:
        """It is written."""
        for index, block in enumerate(blocks_of(data), offset // BLOCK):
            self._may[index] = {block}

    def check(self, offset: int, data: bytes, what: str) -> None:
        for index, block in enumerate(blocks_of(data), offset // BLOCK):
            assert block in self._may[index], f"{what}: block {index} holds {block[:32]!r}…, which nobody wrote"


class Refused(Exception):
    """A request got an error for an answer."""


class Guest:
    """Uses an export "disk" of an image and "snapshot" of a snapshot of it, over TCP.

    Its methods raise Refused, ConnectionError (the server has closed the connection) or TimeoutError.
    """

    def __init__(self, address: tuple[str, int], belief: Belief, chance: random.Random, timeout_s: float) -> None:
        self._address = address
        self._belief = belief
        self._chance = chance
        self._timeout_s = timeout_s
        self._count = 0

    def use_disk(self) -> None:
        """Reads, writes of all kinds, several requests at once, a flush."""
        with Client(self._address, "disk", self._timeout_s) as disk:
            size = disk.size_bytes
            places = iter(self._chance.sample(range(0, size, 4 * BLOCK), 12))
            self._read(disk, 0, size // 2)
            for flags in (0, wire.FLAG_FUA):
                self._change(disk, wire.WRITE, next(places), self._data(3), flags)
            self._change(disk, wire.WRITE_ZEROES, next(places), ZEROES * 2)
            self._change(disk, wire.TRIM, next(places), ZEROES * 4)
            self._write_at_once(disk, [(next(places), self._data(2)) for _ in range(4)])
            self._ask(disk, wire.CACHE, 0, size // 4)
            self._ask(disk, wire.FLUSH)
            self._read(disk, 0, size)
            disk.send(wire.DISCONNECT, 0)

    def use_snapshot(self, expected: bytes) -> None:
        """Read all, and let the end go; what it reads is what was there at the cut."""
        with Client(self._address, "snapshot", self._timeout_s) as old:
            for offset in range(0, len(expected), len(expected) // 4):
                found = self._ask(old, wire.READ, offset, len(expected) // 4)
                assert found == expected[offset : offset + len(found)], f"the snapshot is wrong at {offset}"
            self._ask(old, wire.TRIM, len(expected) // 2, len(expected) // 2)
            found = self._ask(old, wire.READ, 0, len(expected) // 2)
            assert found == expected[: len(found)], "the snapshot is wrong after a discard"
            old.send(wire.DISCONNECT, 0)

    def map_disk(self) -> None:
        """Where there is data; what is called zero is."""
        host, port = self._address
        command = ["nbdinfo", "--map", f"nbd://{host}:{port}/disk"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self._timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(str(error)) from None
        if done.returncode != 0:
            raise Refused(done.stderr)
        for offset, length, zero in extents(done.stdout):
            if zero:
                self._belief.check(offset, bytes(length), "an extent of zeroes")

    def _data(self, blocks: int) -> bytes:
        """Content that was never there before."""
        self._count += 1
        stamps = (f"guest {self._count} {self._chance.random()} block {index} ".encode() for index in range(blocks))
        return b"".join(stamp.ljust(BLOCK, b".") for stamp in stamps)

    def _read(self, disk: Client, offset: int, length: int) -> None:
        self._belief.check(offset, self._ask(disk, wire.READ, offset, length), "read")

    def _change(self, disk: Client, kind: int, offset: int, data: bytes, flags: int = 0) -> None:
        self._belief.suspect(offset, data)
        if kind == wire.WRITE:
            self._ask(disk, kind, offset, data=data, flags=flags)
        else:
            self._ask(disk, kind, offset, len(data), flags=flags)
        # A discard says that the content does not matter: it may have been left.
        if kind != wire.TRIM:
            self._belief.settle(offset, data)

    def _write_at_once(self, disk: Client, writes: list[tuple[int, bytes]]) -> None:
        """Their answers come in any order."""
        for cookie, (offset, data) in enumerate(writes):
            self._belief.suspect(offset, data)
            disk.send(wire.WRITE, cookie, offset, data=data)
        refused = []
        for _ in writes:
            cookie, error, _ = disk.reply()
            if error:
                refused.append(error)
            else:
                self._belief.settle(*writes[cookie])
        self._judge(*refused)

    def _ask(
        self, client: Client, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> bytes:
        error, found = client.ask(kind, offset, length, data, flags)
        self._judge(*([error] if error else []))
        return found

    def _judge(self, *errors: int) -> None:
        assert set(errors) <= REFUSALS, f"not an error of a machine: {errors}"
        if errors:
            raise Refused(f"errors {errors}")


def blocks_of(data: bytes) -> Iterator[bytes]:
    assert len(data) % BLOCK == 0
    return (data[offset : offset + BLOCK] for offset in range(0, len(data), BLOCK))


def extents(output: str) -> Iterator[tuple[int, int, bool]]:
    """Of nbdinfo's lines "offset length type description"; whether it is all zeroes."""
    for line in output.splitlines():
        offset, length, kind = map(int, line.split()[:3])
        yield offset, length, bool(kind & wire.STATE_ZERO)
