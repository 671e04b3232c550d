"""kill -9 of a coordinator at every step of a backup with a bitmap: nothing is lost, nothing says what is not so."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.image import Identity, ImageFile
from shmcbw.segment import SHM, attach, segment_name
from tests.chains import assert_never_wrong, change, restored
from tests.conftest import wait_for
from tests.owner import Owner

CLUSTER = 65536
SIZE = 24 * CLUSTER
SEED = int(os.environ.get("SHMCBW_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)

POINTS = [
    "increment.held",
    "coordinator.target",
    "coordinator.bitmap",
    "coordinator.preparing",
    "coordinator.prepared",
    "coordinator.odd",
    "coordinator.published",
    "coordinator.even",
    "increment.filtered",
    "coordinator.complete",
    "increment.sealed",
    "coordinator.synced",
    "target.manifest",
    "coordinator.named",
    "coordinator.freed",
    "journal.written",
    "journal.renamed",
]
#: Of the journal: at its first, second and third time of being written.
STEPS = [(point, skip) for point in POINTS for skip in ((0, 1, 2) if point.startswith("journal") else (0,))]
ROUNDS = [(point, skip, in_place) for point, skip in STEPS for in_place in (False, True)]
if os.environ.get("SHMCBW_MATRIX") != "all":
    ROUNDS = sorted(random.Random(SEED).sample(ROUNDS, 3))


class Service:
    """A coordinator that is started again whenever it has died."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.owner = Owner(image)
        assert self.owner.answer() is not None

    def ask(self, **command: Any) -> Any:
        answer = self.owner.ask(**command)
        assert answer is not None
        assert "ok" in answer, answer
        return answer["ok"]

    def bitmap(self, call: str, *arguments: object, **how: object) -> Any:
        return self.ask(do="bitmap", call=call, **{"with": arguments, "how": how})

    def dirty(self) -> set[int]:
        return {
            cluster
            for offset, length in self.bitmap("extents", "b")
            for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER))
        }

    def arm(self, point: str, specification: str) -> None:
        file = ImageFile.open(self.image, writable=False)
        segment = attach(file)
        failpoints.arm(segment.memory, point, specification)
        segment.close()
        file.close()

    def restart(self) -> list[str]:
        """The targets of the jobs that go on."""
        self.owner.end()
        self.owner = Owner(self.image)
        answer = self.owner.answer()
        assert answer is not None
        targets: list[str] = answer["ok"]
        return targets

    def back_up(self, target: Path, **how: object) -> None:
        """To its end, however often that takes."""
        for _ in range(5):
            answer = self.owner.ask(do="backup", target=str(target), how=how)
            assert answer is None or "ok" in answer, answer
            if answer is not None and self.owner.ask(do="wait") is not None:
                assert target.exists()
                return
            assert_never_wrong(target.parent)
            if str(target) in self.restart():
                self.ask(do="wait")
                return
        raise AssertionError("five coordinators in a row have died")


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def service(image: Path) -> Iterator[Service]:
    service = Service(image)
    try:
        yield service
        service.ask(do="close")
        service.owner.process.wait(20)
    finally:
        service.owner.end()


@pytest.mark.parametrize(("point", "skip", "in_place"), ROUNDS)
def test_a_coordinator_that_is_killed_at_any_step_loses_no_change(
    service: Service, image: Path, tmp_path: Path, point: str, skip: int, in_place: bool
) -> None:
    directory = tmp_path / "backups"
    directory.mkdir()
    with shmcbw.open(image) as disk:
        service.bitmap("add", "b")
        service.back_up(directory / "base", sync="full", bitmap="b", bitmap_mode="on-success")
        chain = [directory / "base"]
        for cluster in (1, 5, 6):
            disk.pwrite(os.urandom(100), cluster * CLUSTER)
        disk.pwrite_zeroes(2 * CLUSTER, 8 * CLUSTER)
        at_cut = image.read_bytes()
        target = directory / "base" if in_place else directory / "increment"
        service.arm(point, f"kill@{skip}*1")
        answer = service.owner.ask(do="backup", target=str(target), how={**HOW, "in_place": in_place})
        if answer is not None:
            answer = service.owner.ask(do="wait")
        assert_never_wrong(directory)
        if answer is None:
            goes_on = str(target) in service.restart()
            found = service.bitmap("query")[0]
            assert not found.get("inconsistent")
            assert goes_on or not found["busy"]
            if goes_on:
                service.ask(do="wait")
            elif not is_finished(service, target, {1, 5, 6, 8, 9}):
                service.back_up(target, **HOW, in_place=in_place)
        assert service.dirty() == set()
        chain += [] if in_place else [target]
        assert restored(chain, tmp_path / "out") == at_cut
        disk.pwrite(b"later", 20 * CLUSTER)
        assert service.dirty() == {20}
        service.back_up(directory / "second", **HOW)
        assert restored([*chain, directory / "second"], tmp_path / "out") == image.read_bytes()
    assert_never_wrong(directory)
    assert not list(directory.glob("*partial"))


HOW: dict[str, object] = {"sync": "incremental", "bitmap": "b"}


def is_finished(service: Service, target: Path, changed: set[int]) -> bool:
    """Whether the job had ended before the kill.  If not, the bitmap has all that it had."""
    if service.dirty() == set():
        assert target.exists()
        return True
    assert service.dirty() >= changed
    return False


#: Journal: the first one is the job's result, then the file of a set, then the journal with the new bitmap.
RESTS = [("increment.sealed", 0), *(("journal.renamed", skip) for skip in range(3)), ("coordinator.freed", 0)]
REST_ROUNDS = [(point, skip, in_place) for point, skip in RESTS for in_place in (False, True)]
if os.environ.get("SHMCBW_MATRIX") != "all":
    REST_ROUNDS = sorted(random.Random(SEED).sample(REST_ROUNDS, 2))


@pytest.mark.parametrize(("point", "skip", "in_place"), REST_ROUNDS)
def test_a_kill_while_a_cancelled_job_keeps_its_rest_loses_no_change(
    service: Service, image: Path, tmp_path: Path, point: str, skip: int, in_place: bool
) -> None:
    """Bitmap-mode always: the bitmap may forget what was copied only when that is safe."""
    directory = tmp_path / "backups"
    directory.mkdir()
    always = {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "always"}
    with shmcbw.open(image) as disk:
        service.bitmap("add", "b")
        service.back_up(directory / "base", sync="full", bitmap="b", bitmap_mode="on-success")
        for cluster in (1, 5, 6):
            disk.pwrite(os.urandom(100), cluster * CLUSTER)
        target = directory / "base" if in_place else directory / "increment"
        service.ask(do="backup", target=str(target), how={**always, "in_place": in_place, "speed": 1})
        # Copied for the writer, so it counts as copied, and as written since.
        disk.pwrite(b"since", 5 * CLUSTER)
        service.arm(point, f"kill@{skip}*1")
        answer = service.owner.ask(do="cancel")
        if answer is None:
            goes_on = str(target) in service.restart()
            if goes_on:
                service.ask(do="cancel")
        assert_never_wrong(directory)
        assert service.dirty() >= {5}
        # The rest, if it was left, is completed by the same bitmap.
        service.back_up(target, **always, in_place=in_place)
        chain = [directory / "base"] if in_place else [directory / "base", target]
        assert restored(chain, tmp_path / "out") == image.read_bytes()
    assert not list(directory.glob("*partial"))


def test_a_paused_increment_is_paused_in_the_next_coordinator_and_ends_right(
    service: Service, image: Path, tmp_path: Path
) -> None:
    """What is not in the bitmap was marked before; that is not done again, and nothing begins by it."""
    directory = tmp_path / "backups"
    directory.mkdir()
    target = directory / "increment"
    with shmcbw.open(image) as disk:
        service.bitmap("add", "b")
        service.back_up(directory / "base", sync="full", bitmap="b", bitmap_mode="on-success")
        for cluster in (1, 5, 6):
            disk.pwrite(b"x", cluster * CLUSTER)
        at_cut = image.read_bytes()
        service.ask(do="backup", target=str(target), how={**HOW, "speed": 1})
        service.ask(do="pause")
        wait_for(lambda: service.ask(do="statuses")[str(target)] == "paused", "it is paused")
        assert service.restart() == [str(target)]
        assert service.ask(do="statuses")[str(target)] == "paused"
        assert service.bitmap("query")[0]["busy"]
        disk.pwrite(b"later", 9 * CLUSTER)
        service.ask(do="speed", speed=0)
        service.ask(do="resume")
        service.ask(do="wait")
    assert restored([directory / "base", target], tmp_path / "out") == at_cut
    assert service.dirty() == {9}


def test_a_coordinator_that_is_killed_over_a_change_of_a_bitmap_has_made_it_or_not(
    service: Service, image: Path, tmp_path: Path
) -> None:
    """At any step of storing it; what was written before the kill is in every bitmap that recorded it."""
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    changes: list[tuple[str, list[object], dict[str, object]]] = [
        ("disable", ["b"], {}),
        ("add", ["c"], {"granularity": 4096}),
        ("merge", ["c", ["b"]], {}),
        ("enable", ["b"], {}),
        ("clear", ["c"], {}),
        ("merge", ["b", ["c"]], {}),
        ("disable", ["c"], {}),
        ("remove", ["c"], {}),
    ]
    with shmcbw.open(image) as disk:
        service.bitmap("add", "b")
        for number, (call, arguments, how) in enumerate(changes):
            disk.pwrite(b"x", (number + 1) * CLUSTER)
            before = service.bitmap("query")
            # A set's file is stored first, where there is one.
            service.arm(chance.choice(("journal.written", "journal.renamed")), f"kill@{chance.randrange(2)}*1")
            answer = service.owner.ask(do="bitmap", call=call, **{"with": arguments, "how": how})
            if answer is not None:
                assert answer["ok"] is None
                service.owner.process.kill()
            service.arm("journal.written", "")
            service.arm("journal.renamed", "")
            service.restart()
            found = service.bitmap("query")
            assert not any(each["busy"] or each.get("inconsistent") for each in found)
            if found == before and answer is None:
                # Not made; made now, it is what it would have been then.
                service.bitmap(call, *arguments, **how)
            assert service.dirty() >= recorded(number), call
        assert [each["name"] for each in service.bitmap("query")] == ["b"]
        assert not list(Path(SHM).glob(f"{segment_name(Identity.of(os.stat(image)))[1:]}.d*.new"))


def recorded(number: int) -> set[int]:
    """What "b" must hold after change `number` of the test above: it does not record from the first to the fourth."""
    return {1} | set(range(5, number + 2))


def test_base_and_increments_are_the_image_at_every_cut_whatever_is_killed(
    service: Service, image: Path, tmp_path: Path
) -> None:
    """Random writes, zeroes and discards before and while backups run; every other coordinator is killed over one."""
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    directory = tmp_path / "backups"
    directory.mkdir()
    service.bitmap("add", "b", granularity=chance.choice((4096, CLUSTER, 4 * CLUSTER)))
    chain: list[Path] = []
    cuts: list[bytes] = []
    with shmcbw.open(image) as disk:
        for number in range(7):
            change(disk, chance, chance.randrange(8))
            target = directory / f"backup{number}"
            # Nothing is written from here to the cut, whoever takes it.
            cuts.append(image.read_bytes())
            how = HOW if chain else {"sync": "full", "bitmap": "b", "bitmap_mode": "on-success"}
            chain.append(target)
            if chance.random() < 0.5:
                service.owner.send(do="backup", target=str(target), how=how)
                time.sleep(chance.random() * 0.15)
                goes_on = str(target) in service.restart()
                assert_never_wrong(directory)
                if goes_on:
                    change(disk, chance, 3)
                    service.ask(do="wait")
                elif target.exists() and not service.dirty():
                    continue
                else:
                    service.back_up(target, **how)
            else:
                service.ask(do="backup", target=str(target), how=how)
                change(disk, chance, 3)
                service.ask(do="wait")
        for end in range(1, len(chain) + 1):
            assert restored(chain[:end], tmp_path / "out") == cuts[end - 1], f"cut {end - 1}"
    assert_never_wrong(directory)
