"""Jobs as QEMU has them: states, verbs, events in their order, error actions, turns, transactions."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import shmcbw
from shmcbw import failpoints
from shmcbw.workers import Backup, Coordinator, Job, JobTransaction, backup_group
from shmcbw.workers.job_states import CONCLUDED, PAUSED, PENDING, RUNNING, VERBS, WAITING
from tests.conftest import wait_for

SIZE = 4 << 20
CLUSTER = 65536
SEED = int(os.environ.get("SHMCBW_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)


class Events(list[tuple[str, dict[str, Any]]]):
    """What a coordinator has told, in order."""

    def __call__(self, name: str, data: dict[str, Any]) -> None:
        self.append((name, data))

    def words(self, job_id: str = "j") -> list[str]:
        """States of a job by their names, other events of it as they are called."""
        found = []
        for name, data in list(self):
            if data.get("id", data.get("device")) == job_id:
                found.append(data["status"] if name == "JOB_STATUS_CHANGE" else name)
        return found

    def named(self, name: str) -> list[dict[str, Any]]:
        return [data for event, data in list(self) if event == name]


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def events() -> Events:
    return Events()


@contextmanager
def serving(image: Path, events: Events | None = None, **options: Any) -> Iterator[Coordinator]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHMCBW_FAILPOINTS", "segment")
        with Coordinator(image, workers=options.pop("workers", 1), on_event=events, **options) as coordinator:
            yield coordinator


def arm(coordinator: Coordinator, name: str, specification: str) -> None:
    failpoints.arm(coordinator.segment.memory, name, specification)


def reaches(job: Job, status: str) -> None:
    wait_for(lambda: job.status == status, f"{job!r} is {status}", 20)


# -- the order of events -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto_finalize", [True, False])
@pytest.mark.parametrize("auto_dismiss", [True, False])
def test_a_successful_job_tells_what_qemus_would(
    image: Path, tmp_path: Path, events: Events, auto_finalize: bool, auto_dismiss: bool
) -> None:
    expected = ["created", "running", "waiting", "pending"]
    with serving(image, events) as coordinator:
        job = coordinator.backup(
            tmp_path / "out", job_id="j", auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, max_workers=1
        )
        if not auto_finalize:
            reaches(job, PENDING)
            expected += ["BLOCK_JOB_PENDING"]
            wait_for(lambda: events.words() == expected, "all is told")
            assert not (tmp_path / "out").exists()
            job.finalize()
        job.wait(20)
        expected += ["BLOCK_JOB_COMPLETED", "concluded"]
        if auto_dismiss:
            wait_for(lambda: job.status == "null", "dismissed")
            expected += ["null"]
            assert coordinator.jobs == []
        else:
            assert events.words() == expected
            assert coordinator.jobs == [job]
            job.dismiss()
            expected += ["null"]
        assert events.words() == expected
        assert coordinator.jobs == []
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    ended = events.named("BLOCK_JOB_COMPLETED")
    assert ended == [{"type": "backup", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}]


def test_a_failed_job_tells_the_error_and_what_was_done_about_it(image: Path, tmp_path: Path, events: Events) -> None:
    with serving(image, events) as coordinator:
        arm(coordinator, "worker.copying", "errno:EIO")
        job = coordinator.backup(tmp_path / "out", job_id="j", auto_dismiss=True)
        with pytest.raises(shmcbw.JobFailedError, match="copy of cluster"):
            job.wait(20)
        wait_for(lambda: job.status == "null", "dismissed")
    order = ["created", "running", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    assert events.words() == order
    assert events.named("BLOCK_JOB_ERROR") == [{"device": "j", "operation": "write", "action": "report"}]
    assert events.named("BLOCK_JOB_COMPLETED")[0]["error"] == os.strerror(errno.EIO)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("state", [RUNNING, PAUSED, PENDING])
def test_a_cancelled_job_tells_so_whatever_state_it_was_in(
    image: Path, tmp_path: Path, events: Events, state: str
) -> None:
    with serving(image, events) as coordinator:
        speed = 0 if state == PENDING else 1
        job = coordinator.backup(tmp_path / "out", job_id="j", speed=speed, auto_finalize=False, auto_dismiss=False)
        if state == PAUSED:
            job.pause()
        reaches(job, state)
        before = len(events)
        job.cancel()
        told = [data.get("status", name) for name, data in events[before:]]
        assert told == ([RUNNING] if state == PAUSED else []) + ["aborting", "BLOCK_JOB_CANCELLED", "concluded"]
        with pytest.raises(shmcbw.JobCancelledError):
            job.wait(0)
        assert job.describe()["error_text"] == os.strerror(errno.ECANCELED)
        with pytest.raises(
            shmcbw.JobStateError, match="Job 'j' in state 'concluded' cannot accept command verb 'cancel'"
        ):
            job.cancel()
        assert not list(tmp_path.glob("out*"))
        job.dismiss()


def test_a_snapshot_that_breaks_ends_its_job_although_it_is_paused(image: Path, tmp_path: Path, events: Events) -> None:
    with serving(image, events) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", job_id="j", speed=1, auto_dismiss=False)
        job.pause()
        arm(coordinator, "worker.copying", "errno:ENOSPC")
        disk.pwrite(b"x", 3 * CLUSTER)
        with pytest.raises(shmcbw.SnapshotBrokenError):
            job.wait(20)
        assert events.words() == ["created", RUNNING, PAUSED, RUNNING, "aborting", "BLOCK_JOB_COMPLETED", CONCLUDED]
        (told,) = events.named("SNAPSHOT_BROKEN")
        assert (told["errno"], told["offset"], told["job"]) == (errno.ENOSPC, 3 * CLUSTER, "j")
        # What fails for a writer is none of the job's errors.
        assert events.named("BLOCK_JOB_ERROR") == []


# -- pause, resume, speed ----------------------------------------------------------------------------------------------


def test_a_paused_job_copies_for_writers_only_and_goes_on_when_resumed(image: Path, tmp_path: Path) -> None:
    expected = image.read_bytes()
    with serving(image, workers=2) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(tmp_path / "out", speed=1)
        job.pause()
        job.set_speed(0)
        disk.pwrite(b"x" * 10, 5 * CLUSTER)
        progress = job.progress()
        assert (progress.copied_for_writers_bytes, progress.copied_in_background_bytes) == (CLUSTER, 0)
        with pytest.raises(TimeoutError):
            job.wait(0.3)
        assert job.progress() == progress
        assert job.describe()["paused"]
        with pytest.raises(shmcbw.JobStateError, match="Job is already paused"):
            job.pause()
        job.resume()
        with pytest.raises(shmcbw.JobStateError, match="Can't resume a job that was not paused"):
            job.resume()
        job.wait(20)
    assert (tmp_path / "out").read_bytes() == expected


def test_a_limit_of_one_byte_a_second_moves_nothing(image: Path, tmp_path: Path) -> None:
    with serving(image, workers=2) as coordinator:
        job = coordinator.backup(tmp_path / "out", speed=1)
        with pytest.raises(TimeoutError):
            job.wait(0.5)
        assert job.progress().current_bytes == 0
        job.set_speed(0)
        job.wait(20)


# -- error actions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "operation"), [("EIO", "write"), ("ENOSPC", "write"), ("EFAULT", "read")])
def test_an_error_stops_a_job_that_is_to_stop_and_resume_tries_again(
    image: Path, tmp_path: Path, events: Events, number: str, operation: str
) -> None:
    """A write from a mapping that can't be read says EFAULT: the source's error.

    One worker: a second one's error of before the failpoint was disarmed may be told after the resume, and stops again.
    """
    actions = {f"on_{'source' if operation == 'read' else 'target'}_error": "stop"}
    with serving(image, events, workers=1) as coordinator:
        arm(coordinator, "worker.copying", f"errno:{number}@2")
        job = coordinator.backup(tmp_path / "out", job_id="j", auto_dismiss=False, **actions)  # type: ignore[arg-type]
        reaches(job, PAUSED)
        assert events.words()[2:] == ["BLOCK_JOB_ERROR", PAUSED]
        assert events.named("BLOCK_JOB_ERROR") == [{"device": "j", "operation": operation, "action": "stop"}]
        assert job.describe()["io_status"] == ("nospace" if number == "ENOSPC" else "failed")
        with pytest.raises(shmcbw.JobStateError, match="already paused"):
            job.pause()
        arm(coordinator, "worker.copying", "")
        job.resume()
        assert job.describe()["io_status"] == "ok"
        job.wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_the_action_for_the_target_is_not_the_one_for_the_source(image: Path, tmp_path: Path, events: Events) -> None:
    with serving(image, events) as coordinator:
        arm(coordinator, "worker.copying", "errno:EFAULT")
        job = coordinator.backup(tmp_path / "out", job_id="j", on_target_error="stop", on_source_error="report")
        with pytest.raises(shmcbw.JobFailedError):
            job.wait(20)
    assert events.named("BLOCK_JOB_ERROR") == [{"device": "j", "operation": "read", "action": "report"}]


@pytest.mark.parametrize(("number", "action"), [("ENOSPC", "stop"), ("EIO", "report")])
@pytest.mark.parametrize("chosen", ["enospc", "auto"])
def test_enospc_and_auto_stop_only_for_want_of_space(
    image: Path, tmp_path: Path, events: Events, number: str, action: str, chosen: str
) -> None:
    with serving(image, events) as coordinator:
        arm(coordinator, "worker.copying", f"errno:{number}")
        job = coordinator.backup(tmp_path / "out", job_id="j", on_target_error=chosen)
        wait_for(lambda: events.named("BLOCK_JOB_ERROR"), "the error is told")
        assert events.named("BLOCK_JOB_ERROR")[0]["action"] == action
        reaches(job, PAUSED if action == "stop" else CONCLUDED)


def test_ignored_errors_are_tried_again_and_told_once_a_second_with_their_number(
    image: Path, tmp_path: Path, events: Events
) -> None:
    with serving(image, events) as coordinator:
        arm(coordinator, "worker.copying", "errno:EIO")
        job = coordinator.backup(tmp_path / "out", job_id="j", on_target_error="ignore")
        wait_for(lambda: len(events.named("BLOCK_JOB_ERROR")) == 2, "a second event", 20)
        arm(coordinator, "worker.copying", "")
        job.wait(20)
        first, second = events.named("BLOCK_JOB_ERROR")[:2]
    assert first == {"device": "j", "operation": "write", "action": "ignore", "x-shmcbw-count": 1}
    assert 1 <= second["x-shmcbw-count"] < 20
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


def test_what_fails_for_a_writer_goes_by_the_policy_and_never_to_the_jobs_actions(
    image: Path, tmp_path: Path, events: Events
) -> None:
    with serving(image, events) as coordinator, shmcbw.open(image) as disk:
        job = coordinator.backup(
            tmp_path / "out", job_id="j", speed=1, on_cbw_error="break-guest-write", on_target_error="stop"
        )
        arm(coordinator, "worker.copying", "errno:EIO")
        with pytest.raises(shmcbw.CopyFailedError):
            disk.pwrite(b"x", 0)
        assert job.status == RUNNING
        assert events.named("BLOCK_JOB_ERROR") == []
        arm(coordinator, "worker.copying", "")
        job.set_speed(0)
        job.wait(20)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


# -- max-workers, max-chunk --------------------------------------------------------------------------------------------


def test_no_more_than_max_workers_copy_in_the_background_at_once(image: Path, tmp_path: Path) -> None:
    with serving(image, workers=4) as coordinator:
        # Whoever holds claims is stopped there for a while: more than one would be seen.
        arm(coordinator, "worker.background", "delay:30")
        job = coordinator.backup(tmp_path / "out", max_workers=1, max_chunk=4 * CLUSTER)
        held: list[int] = [0]

        def ended() -> bool:
            entry = job._entry
            if entry is not None:
                try:
                    held.append(len(set(entry.bitmap.memory[:]) - {0, 240, 241, 242, 243}))
                except ValueError:
                    pass  # let go at this moment
            return job.status == CONCLUDED

        wait_for(ended, "it ends", 30)
        chunks = sum(worker["background_chunks"] for worker in coordinator.status()["workers"])
    assert max(held) == 1
    assert chunks >= SIZE // (4 * CLUSTER)


def test_the_turn_of_a_killed_worker_is_given_back(image: Path, tmp_path: Path) -> None:
    with serving(image, workers=2) as coordinator:
        arm(coordinator, "worker.background", "kill*1")
        coordinator.backup(tmp_path / "out", max_workers=1).wait(30)
    assert (tmp_path / "out").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"job_id": "9bad"}, "Invalid job ID '9bad'"),
        ({"max_workers": 0}, "max-workers must be between 1 and 2147483647"),
        ({"max_workers": 1 << 31}, "max-workers must be between 1 and 2147483647"),
        ({"max_chunk": -1}, r"max-chunk must be zero \(which means no limit\) or positive"),
        ({"max_chunk": 4096}, r"Required max-chunk \(4096\) is less than backup cluster size \(65536\)"),
        ({"on_source_error": "panic"}, "on_source_error"),
    ],
)
def test_a_parameter_that_makes_no_sense_is_refused_with_nothing_changed(
    image: Path, tmp_path: Path, wrong: dict[str, Any], text: str
) -> None:
    with serving(image) as coordinator:
        with pytest.raises(ValueError, match=text):
            coordinator.backup(tmp_path / "out", **wrong)
        assert coordinator.jobs == []
        assert coordinator.journal.document["jobs"] == {}


def test_an_id_is_given_once(image: Path, tmp_path: Path) -> None:
    with serving(image) as coordinator:
        coordinator.backup(tmp_path / "out", job_id="j", speed=1)
        with pytest.raises(ValueError, match="Job ID 'j' already in use"):
            coordinator.backup(tmp_path / "other", job_id="j")
        assert not list(tmp_path.glob("other*"))
        assert list(coordinator.journal.document["jobs"]) == ["j"]


# -- transactions ------------------------------------------------------------------------------------------------------


@contextmanager
def two(
    make_image: Callable[..., Path], tmp_path: Path, events: Events, **options: Any
) -> Iterator[tuple[list[Coordinator], list[Job], list[Path]]]:
    """Jobs a and b over two images that end together; b copies nothing until it is told to."""
    images = [make_image(SIZE, f"{name}.img") for name in "ab"]
    targets = [tmp_path / f"{name}.out" for name in "ab"]
    with serving(images[0], events) as a, serving(images[1], events) as b:
        together = JobTransaction()
        backups = [
            Backup(owner, target, job_id=name, speed=speed, transaction=together, **options)
            for owner, target, name, speed in zip((a, b), targets, "ab", (0, 1), strict=True)
        ]
        yield [a, b], backup_group(backups), targets


def test_jobs_that_end_together_wait_for_each_other(
    make_image: Callable[..., Path], tmp_path: Path, events: Events
) -> None:
    with two(make_image, tmp_path, events) as (_, jobs, targets):
        reaches(jobs[0], WAITING)
        assert not targets[0].exists()
        jobs[1].set_speed(0)
        for job in jobs:
            job.wait(20)
        order = [(data.get("id") or data["device"], data.get("status", name)) for name, data in events]
        assert order.index(("b", WAITING)) < order.index(("a", PENDING)) < order.index(("a", CONCLUDED))
        assert order.index(("b", PENDING)) < order.index(("a", CONCLUDED))
        assert all(target.exists() for target in targets)


@pytest.mark.parametrize("how", ["cancel the one that waits", "cancel the other", "a failure"])
def test_one_that_fails_or_is_cancelled_ends_them_all(
    make_image: Callable[..., Path], tmp_path: Path, events: Events, how: str
) -> None:
    with two(make_image, tmp_path, events) as (coordinators, jobs, targets):
        reaches(jobs[0], WAITING)
        if how == "a failure":
            arm(coordinators[1], "worker.copying", "errno:EIO")
            jobs[1].set_speed(0)
        else:
            jobs[how == "cancel the other"].cancel()
        for job in jobs:
            with pytest.raises((shmcbw.JobCancelledError, shmcbw.JobFailedError)):
                job.wait(20)
        assert events.words("a")[2:] == [WAITING, "aborting", "BLOCK_JOB_CANCELLED", CONCLUDED]
        if how == "a failure":
            assert isinstance(jobs[1].error, shmcbw.JobFailedError)
            assert events.words("b")[2:] == ["BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", CONCLUDED]
        assert not [path for target in targets for path in target.parent.glob(f"{target.name}*")]


def test_one_finalize_finalizes_all_that_end_together(
    make_image: Callable[..., Path], tmp_path: Path, events: Events
) -> None:
    with two(make_image, tmp_path, events, auto_finalize=False, auto_dismiss=False) as (_, jobs, targets):
        jobs[1].set_speed(0)
        for job in jobs:
            reaches(job, PENDING)
        assert not any(target.exists() for target in targets)
        jobs[0].finalize()
        for job in jobs:
            job.wait(0)
            job.dismiss()
        assert all(target.exists() for target in targets)


def test_a_transaction_is_used_once_unless_there_was_no_cut(image: Path, tmp_path: Path) -> None:
    with serving(image) as coordinator:
        together = JobTransaction()
        (tmp_path / "there").touch()
        with pytest.raises(shmcbw.TargetRefusedError):
            backup_group([Backup(coordinator, tmp_path / "there", transaction=together)])
        backup_group([Backup(coordinator, tmp_path / "out", transaction=together)])[0].wait(20)
        with pytest.raises(ValueError, match="once"):
            backup_group([Backup(coordinator, tmp_path / "again", transaction=together)])


# -- any verbs in any order --------------------------------------------------------------------------------------------


def test_verbs_in_any_order_do_what_the_table_says(image: Path, tmp_path: Path) -> None:
    """A job that copies nothing, or is pending: nobody but the verbs changes its state."""
    print(f"SHMCBW_SEED={SEED}")
    chance = random.Random(SEED)
    with serving(image) as coordinator:
        for turn in range(25):
            finished = chance.random() < 0.5
            job = coordinator.backup(
                tmp_path / f"out{turn}",
                job_id="j",
                speed=0 if finished else 1,
                auto_finalize=False,
                auto_dismiss=False,
                sync=chance.choice(["full", "top"]),
            )
            if finished:
                reaches(job, PENDING)
            for _ in range(8):
                verb = chance.choice(list(VERBS))
                before = job.status
                accepted = before in VERBS[verb]
                text = f"Job 'j' in state '{before}' cannot accept command verb '{verb}'"
                if verb == "pause" and before == PAUSED:
                    accepted, text = False, "Job is already paused"
                if verb == "resume" and before != PAUSED:
                    accepted, text = False, "Can't resume a job that was not paused"
                if verb == "change" and accepted:
                    accepted, text = False, "Job type does not support change"
                call: Callable[[], None] = {
                    "set-speed": lambda job=job: job.set_speed(1),
                }.get(verb, getattr(job, verb.replace("-", "_")))
                if not accepted:
                    with pytest.raises(shmcbw.JobStateError) as caught:
                        call()
                    assert str(caught.value) == text
                    assert job.status == before
                    continue
                call()
                leads_to = {"cancel": CONCLUDED, "pause": PAUSED, "resume": RUNNING, "finalize": CONCLUDED}
                assert job.status == {**leads_to, "dismiss": "null"}.get(verb, before)
            if job.status in VERBS["cancel"]:
                job.cancel()
            if job.status == CONCLUDED:
                job.dismiss()
            assert coordinator.jobs == []
            assert coordinator.journal.document["jobs"] == {}
