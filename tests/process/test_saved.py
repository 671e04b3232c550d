"""Persistent bitmaps: saved at a clean end, trusted only if nothing can have happened since."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import shmcbw
from shmcbw.image import ImageFile
from shmcbw.segment import attach, unlink_all
from shmcbw.workers import Coordinator
from shmcbw.workers.saved import SIZE_MAX_BYTES
from tests.chains import restored
from tests.conftest import wait_for
from tests.owner import Owner
from tests.process.test_increments import base, increment

CLUSTER = 65536
SIZE = 16 * CLUSTER


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def served(image: Path, state: Path | None) -> Coordinator:
    return Coordinator(image, workers=1, state_dir=state)


def dirty(coordinator: Coordinator) -> list[tuple[int, int]]:
    return list(coordinator.bitmaps.extents("b"))


def add_and_write(image: Path, state: Path) -> None:
    with served(image, state) as coordinator, shmcbw.open(image) as disk:
        coordinator.bitmaps.add("b", persistent=True)
        coordinator.bitmaps.add("passing")
        disk.pwrite(b"x", 3 * CLUSTER)


def document(state: Path) -> dict[str, object]:
    (path,) = state.glob("*.bitmaps")
    found: dict[str, object] = json.loads(path.read_text())
    return found


def assert_inconsistent(image: Path, state: Path) -> None:
    """Only its removal is allowed."""
    with served(image, state) as coordinator:
        (found,) = coordinator.bitmaps.query()
        assert (found["inconsistent"], found["recording"], found["persistent"]) == (True, False, True)
        with pytest.raises(shmcbw.BitmapError, match="is inconsistent and cannot be used"):
            coordinator.backup(image.parent / "out", sync="incremental", bitmap="b")
        coordinator.bitmaps.remove("b")
    assert not list(state.glob("*"))


def test_a_persistent_bitmap_is_there_again_after_a_clean_end(image: Path, state: Path) -> None:
    add_and_write(image, state)
    assert document(state)["in_use"] is None
    for _ in range(2):
        with served(image, state) as coordinator, shmcbw.open(image) as disk:
            assert [each["name"] for each in coordinator.bitmaps.query()] == ["b"]
            assert dirty(coordinator) == [(3 * CLUSTER, CLUSTER)]
            assert document(state)["in_use"] is not None
            disk.pwrite(b"x", 3 * CLUSTER)
    with served(image, state) as coordinator:
        coordinator.bitmaps.remove("b")
    assert not list(state.glob("*"))


def test_a_chain_goes_on_over_ends_of_the_coordinator(image: Path, state: Path, tmp_path: Path) -> None:
    with served(image, state) as coordinator:
        coordinator.bitmaps.add("b", persistent=True)
        chain = [base(coordinator, tmp_path / "full")]
    for number in range(3):
        with served(image, state) as coordinator:
            with shmcbw.open(image) as disk:
                disk.pwrite(os.urandom(100), number * CLUSTER)
            chain.append(increment(coordinator, tmp_path / f"increment{number}"))
            with shmcbw.open(image) as disk:
                disk.pwrite(os.urandom(100), (number + 8) * CLUSTER)
    with served(image, state) as coordinator:
        chain.append(increment(coordinator, tmp_path / "last"))
    assert restored(chain, tmp_path / "out") == image.read_bytes()


def test_an_image_that_was_changed_meanwhile_makes_it_inconsistent(image: Path, state: Path) -> None:
    add_and_write(image, state)
    with image.open("r+b") as file:
        file.write(b"y")
    assert_inconsistent(image, state)


def test_an_image_of_another_size_or_birth_makes_it_inconsistent(image: Path, state: Path) -> None:
    add_and_write(image, state)
    status = image.stat()
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_inconsistent(image, state)
    add_and_write(image, state)
    with image.open("ab") as file:
        file.write(b"y")
    assert_inconsistent(image, state)


def test_a_lost_segment_makes_it_inconsistent(image: Path, state: Path) -> None:
    """As after a reboot: the coordinator was killed, and its shared memory is gone."""
    owner = Owner(image, OWNER_STATE_DIR=str(state))
    assert owner.answer() is not None
    assert owner.ask(do="bitmap", call="add", **{"with": ["b"], "how": {"persistent": True}}) == {"ok": None}
    assert document(state)["in_use"] is not None
    workers = psutil.Process(owner.pid).children()
    owner.end()
    for worker in workers:
        worker.kill()
    wait_for(lambda: not any(map(psutil.Process.is_running, workers)), "the workers are gone")
    file = ImageFile.open(image, writable=False)
    segment = attach(file)
    unlink_all(segment.identity)
    segment.close()
    file.close()
    assert_inconsistent(image, state)


def test_a_killed_coordinator_leaves_it_valid_to_the_next(image: Path, state: Path) -> None:
    owner = Owner(image, OWNER_STATE_DIR=str(state))
    assert owner.answer() is not None
    owner.ask(do="bitmap", call="add", **{"with": ["b"], "how": {"persistent": True}})
    with shmcbw.open(image) as disk:
        disk.pwrite(b"x", 3 * CLUSTER)
        owner.end()
        disk.pwrite(b"x", 5 * CLUSTER)
    with served(image, state) as coordinator:
        assert dirty(coordinator) == [(3 * CLUSTER, CLUSTER), (5 * CLUSTER, CLUSTER)]
    with served(image, state) as coordinator:
        assert dirty(coordinator) == [(3 * CLUSTER, CLUSTER), (5 * CLUSTER, CLUSTER)]


def test_writers_that_stay_keep_it_in_their_segment_and_the_file_in_use(image: Path, state: Path) -> None:
    with served(image, state) as coordinator:
        coordinator.bitmaps.add("b", persistent=True)
        disk = shmcbw.open(image)
    disk.pwrite(b"x", 3 * CLUSTER)
    assert document(state)["in_use"] is not None
    with served(image, state) as coordinator:
        assert dirty(coordinator) == [(3 * CLUSTER, CLUSTER)]
        disk.close()
    assert document(state)["in_use"] is None


def test_writers_that_leave_when_nobody_serves_the_image_lose_nothing(image: Path, state: Path) -> None:
    """The journal keeps the segment for the next coordinator, also when nobody is in it any more."""
    with served(image, state) as coordinator:
        coordinator.bitmaps.add("b", persistent=True)
        disk = shmcbw.open(image)
    disk.pwrite(b"x", 3 * CLUSTER)
    disk.close()
    with served(image, state) as coordinator:
        assert dirty(coordinator) == [(3 * CLUSTER, CLUSTER)]


SENSELESS = ["", "[]", "{}", '{"version": 1, "bitmaps": [], "in_use": null, "image": {}}', "\xff"]


def test_a_file_that_makes_no_sense_holds_nothing(image: Path, state: Path) -> None:
    add_and_write(image, state)
    (path,) = state.glob("*.bitmaps")
    for text in SENSELESS:
        path.write_text(text, encoding="latin-1")
        with served(image, state) as coordinator:
            assert coordinator.bitmaps.query() == []


def test_only_as_much_is_read_as_there_is_and_what_is_too_long_holds_nothing(image: Path, state: Path) -> None:
    add_and_write(image, state)
    (path,) = state.glob("*.bitmaps")
    # Less than the longest that a file may be.
    limit = {"OWNER_STATE_DIR": str(state), "OWNER_ADDRESS_SPACE_BYTES": str(SIZE_MAX_BYTES // 2)}
    for size_bytes, found in ((path.stat().st_size, 1), (SIZE_MAX_BYTES + 1, 0), (1 << 40, 0)):
        os.truncate(path, size_bytes)
        owner = Owner(image, **limit)
        try:
            assert owner.answer() == {"ok": []}
            query = owner.ask(do="bitmap", call="query")
            assert query is not None
            assert len(query["ok"]) == found
            assert owner.ask(do="close") == {"ok": None}
            assert owner.process.wait(20) == 0
        finally:
            owner.end()
        path.touch(0o600)


def test_a_set_that_unpacks_to_more_than_the_image_has_is_inconsistent(image: Path, state: Path) -> None:
    add_and_write(image, state)
    (path,) = state.glob("*.bitmaps")
    found = json.loads(path.read_text())
    huge = zlib.compressobj(1)
    packed = b"".join(huge.compress(bytes(1 << 20)) for _ in range(700)) + huge.flush()
    found["bitmaps"]["b"]["set"] = base64.b64encode(packed).decode()
    path.write_text(json.dumps(found))
    owner = Owner(image, OWNER_STATE_DIR=str(state), OWNER_ADDRESS_SPACE_BYTES=str(512 << 20))
    try:
        assert owner.answer() == {"ok": []}
        query = owner.ask(do="bitmap", call="query")
        assert query is not None
        assert [each["inconsistent"] for each in query["ok"]] == [True]
        assert owner.ask(do="close") == {"ok": None}
        assert owner.process.wait(20) == 0
    finally:
        owner.end()


CHANGES: list[dict[str, object]] = [
    {"set": "AAAA"},
    {"set": None, "since": "x"},
    {"granularity": 3},
    {"granularity": "x"},
]


def test_an_entry_that_makes_no_sense_is_inconsistent(image: Path, state: Path) -> None:
    add_and_write(image, state)
    (path,) = state.glob("*.bitmaps")
    saved = path.read_text()
    for change in CHANGES:
        found = json.loads(saved)
        found["bitmaps"]["b"].update(change)
        path.write_text(json.dumps(found))
        assert_inconsistent(image, state)


def test_a_file_that_others_may_write_is_not_read(image: Path, state: Path) -> None:
    add_and_write(image, state)
    (path,) = state.glob("*.bitmaps")
    path.chmod(0o666)
    with served(image, state) as coordinator:
        assert coordinator.bitmaps.query() == []
