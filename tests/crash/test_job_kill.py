"""kill -9 of the coordinator in any state of a job: the next one finds the job as it was."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.image import ImageFile
from shmcbw.segment import attach
from tests.conftest import wait_for
from tests.owner import Owner

SIZE = 4 << 20
SEED = int(os.environ.get("SHMCBW_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)


class Service:
    """A coordinator process over images, started again after each kill."""

    def __init__(self, *images: Path) -> None:
        self.images = images
        self.owner = Owner(*images)
        assert self.owner.answer() is not None

    def ask(self, **command: Any) -> Any:
        answer = self.owner.ask(**command)
        assert answer is not None and "ok" in answer, answer
        return answer["ok"]

    def restart(self) -> None:
        self.owner.end()
        self.owner = Owner(*self.images)
        assert self.owner.answer() is not None

    def jobs(self) -> dict[str, dict[str, Any]]:
        """By target; without what changes by itself while a job runs."""
        return {job["target"]: job for job in self.ask(do="jobs")}

    def arm(self, point: str, specification: str, image: int = 0) -> None:
        file = ImageFile.open(self.images[image], writable=False)
        segment = attach(file)
        failpoints.arm(segment.memory, point, specification)
        segment.close()
        file.close()

    def reaches(self, target: Path, status: str) -> dict[str, Any]:
        wait_for(lambda: self.jobs()[str(target)]["status"] == status, f"{target} is {status}", 20)
        return self.jobs()[str(target)]


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def service(image: Path) -> Iterator[Service]:
    yield from _served(image)


@pytest.fixture
def pair(make_image: Callable[..., Path]) -> Iterator[Service]:
    """Over two images."""
    yield from _served(*(make_image(SIZE, f"{name}.img") for name in "ab"))


def _served(*images: Path) -> Iterator[Service]:
    service = Service(*images)
    try:
        yield service
        service.ask(do="close")
        service.owner.process.wait(20)
    finally:
        service.owner.end()


KEPT = {"job_id": "j", "auto_dismiss": False}


def test_a_running_job_runs_on(service: Service, image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    service.ask(do="backup", target=str(tmp_path / "out"), speed=1, how=KEPT)
    before = service.jobs()
    service.restart()
    assert service.jobs() == before
    with shmcbw.open(image) as disk:
        disk.pwrite(b"later", 0)
    service.ask(do="speed", speed=0)
    service.ask(do="wait")
    assert (tmp_path / "out").read_bytes() == expected
    service.ask(do="verb", target=str(tmp_path / "out"), verb="dismiss")


def test_a_paused_job_stays_paused(service: Service, image: Path, tmp_path: Path) -> None:
    service.ask(do="backup", target=str(tmp_path / "out"), speed=1, how=KEPT)
    service.ask(do="verb", target=str(tmp_path / "out"), verb="pause")
    service.ask(do="speed", speed=0)
    before = service.jobs()
    for _ in range(2):
        service.restart()
        assert service.jobs() == before
        assert before[str(tmp_path / "out")]["paused"]
    service.ask(do="verb", target=str(tmp_path / "out"), verb="resume")
    service.ask(do="wait")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_job_that_an_error_has_stopped_stays_so_and_its_resume_tries_again(
    service: Service, image: Path, tmp_path: Path
) -> None:
    service.arm("worker.copying", "errno:ENOSPC@1")
    service.ask(do="backup", target=str(tmp_path / "out"), how={**KEPT, "on_target_error": "enospc"})
    before = service.reaches(tmp_path / "out", "paused")
    service.restart()
    service.arm("worker.copying", "")
    after = service.jobs()[str(tmp_path / "out")]
    assert (after["status"], after["io_status"]) == ("paused", "nospace")
    assert after["progress"] == before["progress"]
    service.ask(do="verb", target=str(tmp_path / "out"), verb="resume")
    service.ask(do="wait")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_pending_job_stays_pending_until_it_is_finalized(service: Service, image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    service.ask(do="backup", target=str(tmp_path / "out"), how={**KEPT, "auto_finalize": False})
    before = service.reaches(tmp_path / "out", "pending")
    service.restart()
    assert service.jobs() == {before["target"]: before}
    with shmcbw.open(image) as disk:
        disk.pwrite(b"later", 0)
    assert not (tmp_path / "out").exists()
    service.ask(do="verb", target=str(tmp_path / "out"), verb="finalize")
    assert (tmp_path / "out").read_bytes() == expected
    assert service.jobs()[before["target"]]["status"] == "concluded"


@pytest.mark.parametrize("outcome", ["success", "failure", "cancel"])
def test_a_concluded_job_stays_until_it_is_dismissed(service: Service, tmp_path: Path, outcome: str) -> None:
    if outcome == "failure":
        service.arm("worker.copying", "errno:EIO")
    service.ask(do="backup", target=str(tmp_path / "out"), speed=int(outcome == "cancel"), how=KEPT)
    if outcome == "cancel":
        service.ask(do="verb", target=str(tmp_path / "out"), verb="cancel")
    before = service.reaches(tmp_path / "out", "concluded")
    assert before["error_text"] == {"success": None, "failure": os.strerror(5), "cancel": os.strerror(125)}[outcome]
    service.restart()
    assert service.jobs() == {before["target"]: before}
    assert (tmp_path / "out").exists() == (outcome == "success")
    service.ask(do="verb", target=str(tmp_path / "out"), verb="dismiss")
    service.restart()
    assert service.jobs() == {}


def test_a_job_that_dismisses_itself_leaves_nothing(service: Service, image: Path, tmp_path: Path) -> None:
    service.ask(do="backup", target=str(tmp_path / "out"), how={"job_id": "j", "auto_dismiss": True})
    wait_for(lambda: service.jobs() == {}, "it is gone", 20)
    service.restart()
    assert service.jobs() == {}
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_a_job_that_waits_for_its_transaction_goes_on_waiting(pair: Service, tmp_path: Path) -> None:
    targets = [tmp_path / "a.out", tmp_path / "b.out"]
    pair.ask(do="group", targets=list(map(str, targets)), speeds=[0, 1], together=True, how=KEPT)
    pair.reaches(targets[0], "waiting")
    before = pair.jobs()
    pair.restart()
    assert pair.jobs() == before
    assert not targets[0].exists()
    pair.ask(do="verb", target=str(targets[1]), verb="set_speed", **{"with": [0]})
    pair.ask(do="wait")
    for target, image in zip(targets, pair.images, strict=True):
        assert target.read_bytes() == image.read_bytes()


#: The steps of two jobs that end together: journals (the first is that of the spec, before the cut), names, removals.
STEPS = [("journal.renamed", skip) for skip in range(1, 6)] + [("coordinator.named", 0), ("coordinator.freed", 0)]
ROUNDS = [(*step, image, cancel) for step in STEPS for image in (0, 1) for cancel in (False, True)]
if os.environ.get("SHMCBW_MATRIX") != "all":
    ROUNDS = random.Random(SEED).sample(ROUNDS, 3)


@pytest.mark.parametrize(("point", "skip", "image", "cancel"), ROUNDS)
def test_a_transaction_that_is_killed_at_any_step_ends_well_for_all_or_for_none(
    pair: Service, tmp_path: Path, point: str, skip: int, image: int, cancel: bool
) -> None:
    print(f"SHMCBW_SEED={SEED}")
    targets = [tmp_path / f"{name}.out" for name in "ab"]
    pair.arm(point, f"kill@{skip}*1", image)
    answer = pair.owner.ask(
        do="group", targets=list(map(str, targets)), speeds=[0, int(cancel)], together=True, how=KEPT
    )
    if answer is not None and cancel:
        answer = pair.owner.ask(do="verb", target=str(targets[0]), verb="cancel")
    if answer is not None:
        pair.owner.ask(do="results")
    pair.arm(point, "", image)
    pair.restart()
    found = pair.ask(do="results")
    assert len(found) in (0, 2)
    named = [target.exists() for target in targets]
    assert named in ([True, True], [False, False])
    assert set(found.values()) <= ({None} if named[0] else {"JobCancelledError", "JobFailedError"})
    assert not list(tmp_path.glob("*partial"))
