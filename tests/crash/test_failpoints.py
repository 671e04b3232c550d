"""Kill and stop at every failpoint: writers go on, backups end right, a restart needs no manual step.

One round: a coordinator, a first-touch writer that writes ordered pairs, a hot writer; a snapshot, a backup, reads of
the snapshot; a second cut.  Somebody dies (or is stopped for a while) at the point.  Then the coordinator is restarted
if it was the one, and everything is brought to its end.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import shmcbw
import shmcbw.workers
from shmcbw import _core, failpoints
from shmcbw.failpoints import POINTS
from shmcbw.image import ImageFile
from shmcbw.invariants import check
from shmcbw.layout import Header
from shmcbw.segment import Segment, attach
from shmcbw.status import describe_segment
from tests.conftest import wait_for
from tests.owner import Owner
from tests.processes import CONTEXT, write_forever, write_pairs_forever

SIZE = 4 << 20
MARKS = range(3 << 20, SIZE, 100_000)
FIRST, SECOND = 2 << 20, (2 << 20) + 300_000
#: All combinations take several minutes: `make matrix`.  Otherwise a part, the same for the same seed.
SEED = int(os.environ.get("SHMCBW_SEED", "1"))
PART = 20

#: Reached only when a process fails or is late: their tests are those of the policies, of the cut and of the journal.
ELSEWHERE = {"break.error", "break.state", "gate.entries", "journal.written", "journal.renamed"}
#: Those of groups: test_groups.py.
ELSEWHERE |= {point.name for point in POINTS if point.name.startswith("coordinator.group_")}
#: test_resize_kill.py, test_reader.py.
ELSEWHERE |= {point.name for point in POINTS if point.protocol in ("resize", "discard")}
EVERYWHERE = [(point.name, action) for point in POINTS if point.name not in ELSEWHERE for action in ("kill", "stop")]
if os.environ.get("SHMCBW_MATRIX") != "all":
    EVERYWHERE = sorted(random.Random(SEED).sample(EVERYWHERE, PART))


@contextmanager
def attached(image: Path) -> Iterator[Segment]:
    file = ImageFile.open(image, writable=False)
    segment = attach(file)
    try:
        yield segment
    finally:
        segment.close()
        file.close()


def is_spent(image: Path, name: str) -> bool:
    """Whether the point's one action has happened."""
    offset = Header.failpoints.offset + 8 * (1 + failpoints.index_of(name))
    try:
        with attached(image) as segment:
            return _core.load_u64(segment.memory, offset) == 0
    except shmcbw.ShmcbwError:
        return True


def arm(image: Path, name: str, specification: str) -> None:
    with attached(image) as segment:
        failpoints.arm(segment.memory, name, specification)


class Round:
    """The processes of one round, and what a test may ask of them."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.image = image
        self.directory = directory
        os.environ["SHMCBW_FAILPOINTS"] = "segment"
        self.owner = Owner(image)
        assert self.owner.answer() is not None
        self.writers = [
            CONTEXT.Process(target=write_pairs_forever, args=(str(image), FIRST, SECOND)),
            CONTEXT.Process(target=write_forever, args=(str(image), 1, 4096, 1 << 20)),
        ]
        for writer in self.writers:
            writer.start()
        os.environ.pop("SHMCBW_FAILPOINTS")
        self.disk = shmcbw.open(image)
        wait_for(self._writing, "the writers write", 20)
        for offset in MARKS:
            self.disk.pwrite(b"before", offset)

    def _writing(self) -> bool:
        with attached(self.image) as segment:
            slots = describe_segment(segment)["slots"]
        return len([slot for slot in slots if slot["writes"]]) == len(self.writers)

    def drive(self, **command: str) -> dict[str, object] | None:
        """A command to the coordinator; if it died, or is stopped over it, the next one takes over."""
        self.owner.send(**command)
        answer = self.answer()
        if answer is None:
            self.restart()
        return answer

    def answer(self) -> dict[str, object] | None:
        """The coordinator's next line, None if it died; whoever is stopped meanwhile goes on after a moment."""
        deadline = time.monotonic() + 20
        while not _readable(self.owner):
            self.wake_stopped()
            assert time.monotonic() < deadline, "the coordinator does not answer within 20 s"
        return self.owner.answer()

    def restart(self) -> None:
        for _ in range(3):
            self.owner.end()
            self.owner = Owner(self.image)
            if self.answer() is not None:
                return
        raise AssertionError("three coordinators in a row did not start")

    def wake_stopped(self) -> None:
        """Let whoever has been stopped go on after a moment."""
        for process in _family(self.owner, self.writers):
            try:
                if process.status() == psutil.STATUS_STOPPED:
                    time.sleep(0.15)
                    process.send_signal(signal.SIGCONT)
            except psutil.NoSuchProcess:
                pass

    def has_reached(self, name: str) -> bool:
        self.wake_stopped()
        return is_spent(self.image, name)

    def end(self) -> None:
        self.disk.close()
        for writer in self.writers:
            if writer.pid:
                try:
                    os.kill(writer.pid, signal.SIGCONT)
                except ProcessLookupError:
                    pass
            writer.kill()
            writer.join()
        self.owner.end()


def _readable(owner: Owner) -> bool:
    import select

    assert owner.process.stdout is not None
    return bool(select.select([owner.process.stdout], [], [], 0.05)[0])


def _family(owner: Owner, writers: list[CONTEXT.Process]) -> list[psutil.Process]:  # type: ignore[name-defined]
    found = []
    for pid in (owner.pid, *(writer.pid for writer in writers)):
        try:
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
    found += [p for p in psutil.process_iter(["cmdline"]) if "shmcbw.workers.copy_worker" in (p.info["cmdline"] or [])]
    return found


def is_one_instant(backup: Path) -> bool:
    """What was marked before the cut is there, and the pair was not torn."""
    data = backup.read_bytes()
    first, second = (int.from_bytes(data[offset : offset + 8], "little") for offset in (FIRST, SECOND))
    fresh = second > 1 << 60
    return all(data[o : o + 6] == b"before" for o in MARKS) and (fresh or first in (second, second + 1))


@pytest.mark.parametrize(("name", "action"), EVERYWHERE)
def test_at_every_point_anybody_may_die_or_stop(
    make_image: Callable[..., Path], tmp_path: Path, name: str, action: str
) -> None:
    image = make_image(SIZE)
    with image.open("r+b") as file:
        for offset in (FIRST, SECOND):
            file.seek(offset)
            file.write(bytes(8))
    world = Round(image, tmp_path)
    try:
        adopting = name.startswith("adopt.")
        if not adopting:
            # Slow copies and a long drained section: so that writers sleep, and come to the gate.
            arm(image, "worker.claimed", "delay:20*3")
            arm(image, "coordinator.quiet", "delay:30*2")
            arm(image, name, f"{action}*1")
        world.drive(do="snapshot", scratch=str(tmp_path / "scratch"))
        answer = world.drive(do="backup", target=str(tmp_path / "out"))
        taken = answer is not None and "ok" in answer
        if taken:
            for offset in MARKS:
                world.disk.pwrite(b"later!", offset)
        if adopting:
            arm(image, name, f"{action}*1")
            world.restart()
        world.drive(do="read")
        # A new writer comes: the points of attaching.
        late = CONTEXT.Process(target=write_forever, args=(str(image), 2, 4096, 1 << 20))
        os.environ["SHMCBW_FAILPOINTS"] = "segment"
        late.start()
        os.environ.pop("SHMCBW_FAILPOINTS")
        world.writers.append(late)
        if name == "coordinator.reaped":
            _kill_a_worker(world)
        world.drive(do="wait")
        world.drive(do="drop")
        wait_for(lambda: world.has_reached(name), f"{name} is reached", 10)
        world.wake_stopped()
        if world.owner.process.poll() is not None:
            world.restart()
        world.drive(do="wait")

        # All live writers make progress, the segment is sound, and what was promised holds.
        world.disk.pwrite(b"alive", 0)
        with attached(image) as segment:
            assert check(segment) == []
        if taken and (tmp_path / "out").exists():
            assert is_one_instant(tmp_path / "out")
        elif taken:
            assert action == "kill", "a backup whose cut was taken ends right"
        for offset in MARKS:
            world.disk.pwrite(b"before", offset)
        assert "ok" in (world.drive(do="backup", target=str(tmp_path / "again")) or {})
        for offset in MARKS:
            world.disk.pwrite(b"later!", offset)
        assert world.drive(do="wait") == {"ok": None}
        assert is_one_instant(tmp_path / "again")
        world.drive(do="drop")
        assert world.drive(do="close") == {"ok": None}
        world.owner.process.wait(20)
    finally:
        world.end()
    with shmcbw.workers.Coordinator(image, workers=1):
        pass
    left = {path.name for path in tmp_path.iterdir()} - {"disk.img", "out", "again"}
    assert not left


def _kill_a_worker(world: Round) -> None:
    for process in psutil.Process(world.owner.pid).children():
        process.kill()
        return


def test_the_points_of_the_core_are_the_first_of_the_list() -> None:
    source = (Path(shmcbw.__file__).parent / "_core" / "filter.c").read_text()
    body = source.partition("enum failpoint {")[2].partition("}")[0]
    names = [line.strip().rstrip(",").lower() for line in body.splitlines() if line.strip()][:-1]
    assert names == [point.name.replace(".", "_", 1) for point in POINTS[: len(names)]]


def test_a_process_that_was_not_told_to_look_ignores_the_segments_failpoints(make_image: Callable[..., Path]) -> None:
    """Whoever may write the segment can't stop a process that runs for real."""
    image = make_image(SIZE)
    with shmcbw.workers.Coordinator(image, workers=1), shmcbw.open(image) as disk:
        with attached(image) as segment:
            for point in POINTS:
                failpoints.arm(segment.memory, point.name, "kill")
            disk.pwrite(b"x", 0)
            failpoints.disarm_all(segment.memory)


@pytest.mark.parametrize("wrong", ["explode", "errno:ENOTHING", "delay:x", "kill@70000", "delay:99999999"])
def test_a_specification_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        failpoints.encode(wrong)


def test_errnos_come_from_the_nth_call_on_or_a_number_of_times() -> None:
    memory = bytearray(Header.SIZE)
    failpoints.arm(memory, "worker.copied", "errno:ENOSPC@2*1")
    where = (memory, Header.failpoints.offset)
    point = failpoints.index_of("worker.copied")
    failpoints.hit(where, point)
    failpoints.hit(where, point)
    with pytest.raises(OSError, match=r"worker\.copied") as caught:
        failpoints.hit(where, point)
    assert caught.value.errno == 28
    failpoints.hit(where, point)
