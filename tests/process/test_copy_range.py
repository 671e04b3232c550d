"""copy_file_range where it is asked for: the same bytes, and the usual way where it can't be done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shmcbw.bitmap import COPIED, ZERO
from shmcbw.layout import Snapshot
from shmcbw.workers import Coordinator
from shmcbw.workers.copying import CopyRange, Source, copy_run
from shmcbw.workers.verify import verify

SIZE = 1 << 20
K64 = 65_536


def copy(source: Source, fd: int, copy_range: CopyRange) -> list[tuple[int, int, int]]:
    """Copy all of it: what became of which clusters."""
    os.ftruncate(fd, SIZE)
    copied = copy_run(
        source,
        fd,
        0,
        SIZE // K64,
        cluster_size=K64,
        copied_state=COPIED,
        skip_holes=False,
        before_write=lambda: None,
        copy_range=copy_range,
    )
    assert copied.error is None
    return copied.runs


@pytest.mark.parametrize("file_system", ["the same", "another one"])
def test_a_run_is_copied_in_the_kernel_and_written_where_that_fails(
    tmp_path: Path, make_image: Callable[..., Path], file_system: str
) -> None:
    image = make_image(SIZE)
    with image.open("r+b") as file:
        file.seek(3 * K64)
        file.write(bytes(K64))
    source, copy_range = Source(str(image)), CopyRange()
    flags = os.O_RDWR | os.O_CREAT
    # A memfd is a file of a tmpfs.
    fd = os.open(tmp_path / "out", flags) if file_system == "the same" else os.memfd_create("out")
    try:
        assert copy(source, fd, copy_range) == [(0, 3, COPIED), (3, 4, ZERO), (4, 16, COPIED)]
        assert os.pread(fd, SIZE, 0) == image.read_bytes()
        if file_system == "the same":
            assert copy_range.copied_bytes == SIZE - K64
        elif not copy_range.works:
            # Newer kernels refuse it between kinds of file systems (EXDEV); once is enough.
            assert copy_range.copied_bytes == 0
    finally:
        os.close(fd)
        source.view.release()
        source.memory.close()
        source.file.close()


def test_it_is_given_up_for_good_after_one_failure(make_image: Callable[..., Path]) -> None:
    image = make_image(SIZE)
    copy_range = CopyRange()
    with image.open("rb") as source, image.open("rb") as unwritable, image.with_name("out").open("wb") as out:
        assert not copy_range.copy(source.fileno(), unwritable.fileno(), 0, K64)
        assert not copy_range.works
        assert not copy_range.copy(source.fileno(), out.fileno(), 0, K64)
        assert copy_range.copied_bytes == 0 and os.fstat(out.fileno()).st_size == 0


@pytest.mark.parametrize("manifest", [False, True])
def test_a_backup_by_copy_file_range_is_the_image_at_its_cut(
    tmp_path: Path, make_image: Callable[..., Path], manifest: bool
) -> None:
    image = make_image(SIZE)
    before = image.read_bytes()
    with Coordinator(image) as coordinator:
        job = coordinator.backup(tmp_path / "out", copy_range=True, manifest=manifest)
        assert coordinator.segment.snapshot(0, Snapshot.copy_range) == 1
        job.wait()
    assert (tmp_path / "out").read_bytes() == before
    if manifest:
        assert not verify(str(tmp_path / "out")).differing
