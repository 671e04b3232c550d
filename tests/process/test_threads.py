"""Eight threads on one handle, while cuts are taken: each cut is one instant for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import shmcbw
from shmcbw.workers import Coordinator
from tests.conftest import wait_for

CLUSTER = 65_536
THREADS = 8
WIDTH = 7
SIZE = THREADS * WIDTH * CLUSTER
CUTS = 12


def write_waves(disk: shmcbw.Disk, thread: int, stop: threading.Event, counts: list[int]) -> None:
    """1 to each of its places in order, then 2, …: at any instant no place is ahead of one before it."""
    value = 0
    while not stop.is_set():
        value += 1
        for place in range(WIDTH):
            disk.pwrite(value.to_bytes(8, "little") * 512, (thread * WIDTH + place) * CLUSTER + 4096)
            counts[thread] += 1


def is_one_instant(data: bytes) -> bool:
    for thread in range(THREADS):
        offsets = [(thread * WIDTH + place) * CLUSTER + 4096 for place in range(WIDTH)]
        blocks = [data[offset : offset + 4096] for offset in offsets]
        values = [int.from_bytes(block[:8], "little") for block in blocks]
        whole = all(block == block[:8] * 512 for block in blocks)
        if not whole or values != sorted(values, reverse=True) or values[0] > values[-1] + 1:
            return False
    return True


def test_every_cut_under_eight_threads_of_one_disk_is_one_instant(
    make_image: Callable[..., Path], tmp_path: Path
) -> None:
    image = make_image(SIZE)
    image.write_bytes(bytes(SIZE))
    stop, counts = threading.Event(), [0] * THREADS
    with Coordinator(image, workers=2, drain_limit=10) as coordinator, shmcbw.open(image) as disk:
        threads = [threading.Thread(target=write_waves, args=(disk, number, stop, counts)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: all(counts), "all write", 20)
            for cut in range(CUTS):
                before = list(counts)
                if cut % 3 == 2:
                    coordinator.backup(tmp_path / f"out{cut}").wait(60)
                    data = (tmp_path / f"out{cut}").read_bytes()
                else:
                    with coordinator.snapshot(tmp_path / f"scratch{cut}") as snapshot:
                        data = snapshot.pread(SIZE, 0)
                assert is_one_instant(data), f"cut {cut}"
                wait_for(lambda before=before: all(map(int.__gt__, counts, before)), "all go on")  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert len(coordinator.status()["slots"]) == 1, "each thread gave its slot back at its end; ours is left"
    assert is_one_instant(image.read_bytes())
