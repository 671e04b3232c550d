"""The Nth call of an NBD server fails: its client gets an error or loses its connection, and never a wrong byte.

With the layer and the plan of `test_nth_call.py`; what is judged is in `tests/faults/guest.py`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmcbw.errors import SnapshotBrokenError
from shmcbw.reader import open_snapshot
from shmcbw.workers.nbd import wire
from tests.conftest import wait_for
from tests.faults.actor import SIZE_BYTES, Actor
from tests.faults.guest import BLOCK, Belief, Guest, Refused
from tests.faults.layer import Fault, Kind, Layer
from tests.faults.plan import faults, part
from tests.faults.round import good
from tests.nbd.client import Client

SEED = int(os.environ.get("SHMCBW_SEED", "1"))
EVERYTHING = os.environ.get("SHMCBW_NTH_CALL") == "all"
PART_S = 2.0
SIZE = SIZE_BYTES
#: Longer than anything that the server may take; and for a client that it has no descriptor for.
PATIENCE_S, IMPATIENCE_S = 20.0, 1.0


class Site:
    """A coordinator with a server of one process, in use for as long as faults are played."""

    def __init__(self, owner: Actor, layer: Layer, image: Path) -> None:
        self.owner = owner
        self.layer = layer
        self.image = image
        self.scratch = image.with_name("scratch")
        self.layer.watch(image, image.parent / "none", image.parent / "none")
        good(owner.play("start", image=str(image)))
        host, port = good(owner.play("listen"))
        self.address = (host, port)
        good(owner.play("export", name="other", writable=False))
        self.served = good(owner.play("served"))
        self.chance = random.Random(SEED)
        self._bystander = Client(self.address, "other")
        #: What both processes have when nobody is there but the bystander.
        self._held: list[list[str]] = []

    def play(self, fault: Fault | None) -> int:
        """How often the fault came to be; AssertionError: it ended illegally."""
        content = self.image.read_bytes()
        belief = Belief(content)
        good(self.owner.play("snapshot", scratch=str(self.scratch)))
        if fault is not None:
            self.layer.arm(fault)
        # Where no client can be taken it waits, until one can.
        impatient = fault is not None and (fault.kind.call == "accept" or fault.kind.touched == "door")
        try:
            self._export("disk")
            serial = self._export("snapshot")
            guest = Guest(self.address, belief, self.chance, IMPATIENCE_S if impatient else PATIENCE_S)
            for use in (guest.use_disk, guest.map_disk, lambda: guest.use_snapshot(content)):
                try:
                    use()
                except TimeoutError:
                    assert impatient, "the server does not answer"
                except (Refused, ConnectionError) as error:
                    if not self.layer.fired:
                        raise AssertionError(f"without a fault: {error!r}") from error
        finally:
            self.layer.disarm()
        # Without a fault everybody is served; the bystander may have been hit as well.
        self._check_bystander(belief)
        guest = Guest(self.address, belief, self.chance, PATIENCE_S)
        guest.use_disk()
        guest.map_disk()
        self._check_snapshot(serial, content)
        for name in ("disk", "snapshot"):
            good(self.owner.play("withdraw", name=name))
        belief.check(0, self.image.read_bytes(), "the image")
        good(self.owner.play("drop"))
        assert good(self.owner.play("violations")) == []
        self._look_for_leftovers()
        return self.layer.fired

    def _export(self, name: str) -> int:
        """Refused it changes nothing, and works as soon as the fault is gone."""
        answer = self.owner.play("export", name=name, writable=True)
        if not answer.good:
            assert self.layer.fired, f"without a fault: {answer}"
            assert str(self.image) in answer.message, f"it does not say what failed: {answer}"
            assert name not in good(self.owner.play("served"))["exports"]
            self.layer.disarm()
            answer = self.owner.play("export", name=name, writable=True)
        serial: int = good(answer)
        return serial

    def _check_bystander(self, belief: Belief) -> None:
        """It is answered, or its connection has ended."""
        try:
            error, found = self._bystander.ask(wire.READ, 0, SIZE)
        except ConnectionError:
            self._bystander.sock.close()
            self._bystander = Client(self.address, "other")
            error, found = self._bystander.ask(wire.READ, 0, SIZE)
        assert error == 0
        belief.check(0, found, "what the bystander reads")

    def _check_snapshot(self, serial: int, content: bytes) -> None:
        """Of its second half a guest may have let go."""
        try:
            with open_snapshot(self.image, serial) as snapshot:
                assert snapshot.pread(SIZE // 2, 0) == content[: SIZE // 2], "the snapshot is wrong"
        except SnapshotBrokenError:
            # A writer that can't get at a snapshot's cluster bytes breaks it, and writes.
            assert self.layer.fired, "without a fault"

    def _look_for_leftovers(self) -> None:
        wait_for(lambda: good(self.owner.play("clients", name="other")) == 1, "the others have left")
        assert good(self.owner.play("served")) == self.served, "the process died"
        if not self._held:
            self._held = self._holdings()
        wait_for(lambda: self._holdings() == self._held, f"{self._holdings()} is what it was: {self._held}")

    def _holdings(self) -> list[list[str]]:
        """Descriptors, without the numbers of sockets; it serves with as many threads as it likes."""
        return [holdings(self.owner.pid), *map(holdings, self.served["pids"])]

    def close(self) -> None:
        self._bystander.sock.close()
        good(self.owner.play("close"))


def holdings(pid: int) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0])
        except FileNotFoundError:
            continue
    return sorted(found)


@contextmanager
def site(image: Path, directory: Path) -> Iterator[Site]:
    layer = Layer(directory)
    log = directory / "stderr"
    owner = Actor(log, **layer.environment("coordinator"))
    try:
        place = Site(owner, layer, image)
        try:
            yield place
        finally:
            layer.disarm()
            place.close()
    finally:
        owner.end()
        layer.close()
    said = log.read_text()
    assert "Traceback" not in said, f"what a server says is for its users: {said[-2000:]}"


def play(image: Path, directory: Path, some: list[Fault], limit_s: float = float("inf")) -> list[Fault]:
    """Those that came to be, until the limit and one of them."""
    deadline = time.monotonic() + limit_s
    fired: list[Fault] = []
    wrong: list[str] = []
    left = iter(some)
    while True:
        with site(image, directory) as place:
            place.play(None)
            for fault in left:
                if fired and time.monotonic() > deadline:
                    break
                try:
                    if place.play(fault):
                        fired.append(fault)
                except AssertionError as error:
                    wrong.append(f"{fault}: {str(error).splitlines()[0]}")
                    print(wrong[-1], flush=True)
                    break  # to another process
            else:
                break
        if fired and time.monotonic() > deadline:
            break
    assert not wrong, "\n".join([f"SHMCBW_SEED={SEED}:", *wrong])
    return fired


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    path = make_image(SIZE)
    with path.open("r+b") as file:
        # A hole, and blocks that are all different.
        file.truncate(SIZE - 4 * BLOCK)
        file.truncate(SIZE)
    return path


def is_of_server(kind: Kind) -> bool:
    """Its processes' calls; of their parent's those by which clients come."""
    return kind.role == "server" or (kind.role == "coordinator" and kind.touched in ("socket", "door"))


@pytest.mark.timeout(3600 if EVERYTHING else 120)
def test_whichever_call_of_a_server_fails_no_client_gets_a_wrong_byte(image: Path, tmp_path: Path) -> None:
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    with site(image, tmp_path) as place:
        place.play(None)
        place.layer.watch(image, image.parent / "none", image.parent / "none")
        place.play(None)
        counts = {kind: count for kind, count in place.layer.counts().items() if is_of_server(kind)}
    expected = """
        coordinator accept socket, coordinator send door, server recv door, server recv socket, server send socket,
        server setsockopt socket, server close socket, server open source, server pread source, server mmap source,
        server fallocate source, server fdatasync source, server lseek source, server lock segment, server mmap segment
    """
    missing = {Kind(*words.split()) for words in expected.split(",")} - set(counts)
    assert not missing, "a layer that covers nothing would find no fault either"
    order = part(faults(counts, chance), chance)
    fired = play(image, tmp_path, order, float("inf") if EVERYTHING else PART_S)
    print(f"{len(fired)} faults of {len(order)} that were planned came to be")
    assert fired


def found(kind: str, what: str, first: int, times: int = 1, role: str = "server") -> Fault:
    return Fault(Kind(role, *kind.split()), what, first, times)


#: Faults that once ended wrongly, and how.
FOUND = [
    # The thread that takes clients died of it: nobody was served any more.
    found("setsockopt socket", "ENOBUFS", 0),
    found("recv door", "EIO", 0),
    found("close socket", "EIO", 0, role="coordinator"),
    # The reply to a request that had waited was lost: its client waited for ever.
    *(found("send socket", "ENOBUFS", number) for number in range(4, 7)),
    # No word of what can't be served.
    found("statx source", "EIO", 1),
    # What was open of an export that was refused stayed open.
    found("open source", "EMFILE", 2),
    # A thread that ended told of a slot that it could not unlock on standard error.
    *(found("lock segment", "ENOLCK", number) for number in range(4)),
]


def test_a_fault_of_a_server_that_once_ended_wrongly_ends_legally(image: Path, tmp_path: Path) -> None:
    assert play(image, tmp_path, FOUND) == FOUND
