"""The writer API: what each operation does to the image, and its refusals."""

from __future__ import annotations

import array
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shmcbw
from shmcbw.workers import Coordinator

SIZE = 1 << 20


@pytest.fixture
def image(make_image: Callable[..., Path]) -> Path:
    return make_image(SIZE)


@pytest.fixture
def coordinator(image: Path) -> Iterator[Coordinator]:
    with Coordinator(image, workers=1, slots=4) as coordinator:
        yield coordinator


@pytest.fixture
def disk(coordinator: Coordinator) -> Iterator[shmcbw.Disk]:
    with shmcbw.open(coordinator.path) as disk:
        yield disk


def test_a_write_is_in_the_file_and_can_be_read_back(disk: shmcbw.Disk) -> None:
    assert disk.pwrite(b"hello", 12345) == 5
    assert disk.pread(7, 12344)[1:6] == b"hello"
    assert Path(disk.path).read_bytes()[12345:12350] == b"hello"


@pytest.mark.parametrize(
    "data", [b"abcd", bytearray(b"abcd"), memoryview(b"xabcdx")[1:5], array.array("I", [0x64636261])]
)
def test_any_bytes_like_object_can_be_written(disk: shmcbw.Disk, data: bytes) -> None:
    assert disk.pwrite(data, 3) == 4
    assert disk.pread(4, 3) == b"abcd"


def test_a_buffer_that_is_not_contiguous_is_refused(disk: shmcbw.Disk) -> None:
    with pytest.raises(BufferError):
        disk.pwrite(memoryview(b"abcdefgh")[::2], 0)


def test_pread_into_fills_the_buffer(disk: shmcbw.Disk) -> None:
    disk.pwrite(b"0123456789", 100)
    buffer = bytearray(6)
    assert disk.pread_into(buffer, 102) == 6
    assert buffer == b"234567"


@pytest.mark.parametrize("operation", ["pwrite_zeroes", "pdiscard"])
@pytest.mark.parametrize(("count", "offset"), [(1, 0), (4096, 4096), (100_000, 777), (SIZE, 0)])
def test_zeroes_are_exactly_where_they_were_asked_for(
    disk: shmcbw.Disk, operation: str, count: int, offset: int
) -> None:
    before = disk.pread(SIZE, 0)
    assert getattr(disk, operation)(count, offset) == count
    assert disk.pread(SIZE, 0) == before[:offset] + bytes(count) + before[offset + count :]


def test_zeroes_make_a_hole(disk: shmcbw.Disk) -> None:
    disk.flush()
    before = os.stat(disk.path).st_blocks
    disk.pwrite_zeroes(SIZE // 2, 0)
    assert os.stat(disk.path).st_blocks <= before - SIZE // 2 // 512


@pytest.mark.parametrize(
    ("count", "offset"), [(1, SIZE), (SIZE + 1, 0), (2, SIZE - 1), (1, 2**62), (1, -1), (1, 2**64), (2**63, 0)]
)
def test_out_of_range_is_refused_and_nothing_changes(disk: shmcbw.Disk, count: int, offset: int) -> None:
    before = disk.pread(SIZE, 0)
    for call in (
        lambda: disk.pread(count, offset),
        lambda: disk.pwrite_zeroes(count, offset),
        lambda: disk.pdiscard(count, offset),
        lambda: disk.pwrite(b"x" * min(count, SIZE + 1), offset),
        lambda: disk.pread_into(bytearray(min(count, SIZE + 1)), offset),
    ):
        if count == 2**63 and offset == 0 and call.__code__.co_names[0] in ("pwrite", "pread_into"):
            continue
        with pytest.raises(shmcbw.OutOfRangeError, match="bytes"):
            call()
    assert disk.pread(SIZE, 0) == before


def test_an_empty_write_does_nothing(disk: shmcbw.Disk) -> None:
    assert disk.pwrite(b"", 10) == 0
    assert disk.pread(0, SIZE) == b""
    assert disk.statistics()["writes"] == 0


def test_wrong_arguments_are_type_errors(disk: shmcbw.Disk) -> None:
    with pytest.raises(TypeError):
        disk.pwrite("text", 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        disk.pwrite(b"x", 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        disk.pwrite(b"x", 0, changed=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        disk.pwrite(b"x")  # type: ignore[call-arg]


def test_a_closed_disk_says_so(coordinator: Coordinator) -> None:
    disk = shmcbw.open(coordinator.path)
    disk.close()
    disk.close()
    assert disk.closed
    for call in (
        lambda: disk.pwrite(b"x", 0),
        lambda: disk.pread(1, 0),
        lambda: disk.pread_into(bytearray(1), 0),
        lambda: disk.pwrite_zeroes(1, 0),
        lambda: disk.pdiscard(1, 0),
        lambda: disk.pwrite(b"", 0),
        disk.flush,
    ):
        with pytest.raises(shmcbw.ClosedError):
            call()


def test_a_read_only_disk_reads_and_refuses_writes(coordinator: Coordinator) -> None:
    with shmcbw.open(coordinator.path, read_only=True) as disk:
        assert len(disk.pread(10, 0)) == 10
        with pytest.raises(shmcbw.ReadOnlyImageError) as caught:
            disk.pwrite(b"x", 0)
        assert caught.value.errno == errno.EBADF
        assert coordinator.status()["slots"] == []


def test_an_image_without_coordinator_is_refused(image: Path) -> None:
    with pytest.raises(shmcbw.NoCoordinatorError, match=r"disk\.img.*no coordinator"):
        shmcbw.open(image)


def test_a_missing_image_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        shmcbw.open(tmp_path / "none.img")


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="empty"):
        shmcbw.open(tmp_path / "empty")
    with pytest.raises(OSError, match="regular file"):
        shmcbw.open("/dev/null")


def test_the_image_is_found_under_any_of_its_names(coordinator: Coordinator, tmp_path: Path) -> None:
    os.link(coordinator.path, tmp_path / "hard")
    os.symlink(coordinator.path, tmp_path / "soft")
    for name in ("hard", "soft"):
        with shmcbw.open(tmp_path / name) as disk:
            disk.pwrite(name.encode(), 0)
    assert Path(coordinator.path).read_bytes()[:4] == b"soft"


def test_a_memfd_is_an_image() -> None:
    fd = os.memfd_create("image")
    os.ftruncate(fd, SIZE)
    path = f"/proc/self/fd/{fd}"
    with Coordinator(path, workers=1) as coordinator, shmcbw.open(path) as disk:
        disk.pwrite(b"abc", 5)
        snapshot_data = disk.pread(SIZE, 0)
        with coordinator.snapshot(f"/tmp/shmcbw-test-{os.getpid()}-{fd}") as snapshot:
            disk.pwrite(b"xyz", 5)
            assert snapshot.pread(SIZE, 0) == snapshot_data
    os.close(fd)


def test_eight_threads_write_with_a_slot_each_and_give_them_back(image: Path) -> None:
    with Coordinator(image, workers=1, slots=9) as coordinator, shmcbw.open(image) as disk:
        barrier, errors = threading.Barrier(9), []

        def write(thread: int) -> None:
            try:
                for i in range(200):
                    disk.pwrite(bytes([thread]) * 100, thread * 10_000 + i * 10)
                barrier.wait(10)
                barrier.wait(10)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=write, args=(t,)) for t in range(8)]
        for thread in threads:
            thread.start()
        barrier.wait(10)
        assert len(coordinator.status()["slots"]) == 9
        barrier.wait(10)
        for thread in threads:
            thread.join()
        assert not errors
        assert len(coordinator.status()["slots"]) == 1
        assert disk.statistics()["writes"] == 1600
        assert all(disk.pread(100, t * 10_000 + 199 * 10) == bytes([t]) * 100 for t in range(8))


def test_more_writing_threads_than_slots_are_refused(image: Path) -> None:
    with Coordinator(image, workers=1, slots=1), shmcbw.open(image) as disk:
        with pytest.raises(shmcbw.NoFreeSlotError, match="all 1 slots"):
            shmcbw.open(image)
        disk.pwrite(b"x", 0)


def test_a_thread_never_takes_the_slot_of_another_one_of_its_handle(image: Path) -> None:
    """Their lock is that of one open file; with one in-flight mark for two threads, cuts would be torn."""
    with Coordinator(image, workers=1, slots=2) as coordinator, shmcbw.open(image) as disk:
        first_has_written, done = threading.Event(), threading.Event()

        def hold_a_slot() -> None:
            disk.pwrite(b"x", 0)
            first_has_written.set()
            done.wait(20)

        thread = threading.Thread(target=hold_a_slot)
        thread.start()
        try:
            assert first_has_written.wait(20)
            refused: list[Exception] = []

            def write_without_a_slot() -> None:
                try:
                    disk.pwrite(b"y", 0)
                except shmcbw.NoFreeSlotError as error:
                    refused.append(error)

            third = threading.Thread(target=write_without_a_slot)
            third.start()
            third.join()
            assert refused, "two threads share a slot"
            assert disk.pread(1, 0) == b"x"
            assert len({slot["thread_id"] for slot in coordinator.status()["slots"]}) == 2
        finally:
            done.set()
            thread.join()


def test_statistics_count_writes_and_first_touches(disk: shmcbw.Disk) -> None:
    disk.pwrite(b"x" * 10, 0)
    disk.pwrite(b"x" * 10, 0)
    disk.pwrite(b"x" * 10, 70_000)
    disk.pwrite(disk.pread(10, 140_000), 140_000, unchanged=True)
    found = disk.statistics()
    assert (found["writes"], found["write_bytes"], found["first_touches"], found["wait_count"]) == (4, 40, 2, 0)


def test_properties(disk: shmcbw.Disk) -> None:
    assert disk.size_bytes == SIZE
    assert disk.cluster_size_bytes == 65536


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from("wzd"), st.integers(0, SIZE), st.integers(0, 200_000), st.integers(1, 255)),
        max_size=10,
    )
)
def test_any_sequence_of_operations_is_what_a_bytearray_would_do(
    disk: shmcbw.Disk, operations: list[tuple[str, int, int, int]]
) -> None:
    model = bytearray(disk.pread(SIZE, 0))
    for kind, offset, length, value in operations:
        length = min(length, SIZE - offset)
        if kind == "w":
            disk.pwrite(bytes([value]) * length, offset)
            model[offset : offset + length] = bytes([value]) * length
        else:
            (disk.pwrite_zeroes if kind == "z" else disk.pdiscard)(length, offset)
            model[offset : offset + length] = bytes(length)
    assert disk.pread(SIZE, 0) == model


def test_a_truncated_image_is_an_error_and_the_process_lives(disk: shmcbw.Disk) -> None:
    os.truncate(disk.path, 4096)
    with pytest.raises(OSError, match="truncated") as caught:
        disk.pwrite(b"x" * 100, 500_000)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="truncated"):
        disk.pread(100, 500_000)
    disk.pwrite(b"y" * 100, 0)
    assert disk.pread(100, 0) == b"y" * 100
    assert all(slot["in_flight"] == 0 for slot in shmcbw_status(disk))


def shmcbw_status(disk: shmcbw.Disk) -> list[dict[str, int]]:
    from shmcbw.status import describe_segment

    assert disk._segment is not None
    slots: list[dict[str, int]] = describe_segment(disk._segment)["slots"]
    return slots
