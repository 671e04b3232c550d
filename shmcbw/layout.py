"""The byte layout of the control segment: the one place that knows an offset.

Every word has one writer; the columns say who writes it and who reads it.  ``python -m shmcbw.layout`` prints the
tables that DESIGN.md shows.  All words are little-endian machine words of the same host; integers are unsigned.

Segment = header | workers | slots | snapshots | epoch map.  A snapshot's cluster bytes are a segment of their own
(`bitmap.py`).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from .clusters import CLUSTER_SIZE_MAX, CLUSTER_SIZE_MIN, cluster_count

MAGIC = int.from_bytes(b"shmcbw\r\n", "little")
VERSION = 3

SNAPSHOT_COUNT = 8
GROUP_MEMBERS_MAX = 128
SLOT_COUNT_MAX = 4096
WORKER_ID_MAX = 239
WORKER_COUNT_MIN = 8
HISTOGRAM_COUNT = 32
PATH_SIZE = 4096
TURN_COUNT = 240
FAILPOINT_COUNT = 127
IMAGE_SIZE_MAX = 1 << 62


class Word:
    """One word of a structure: byte offset in it, bytes (4, 8, or more for a byte string or an array)."""

    __slots__ = ("meaning", "offset", "reader", "size", "writer")

    def __init__(self, offset: int, size: int, writer: str, reader: str, meaning: str) -> None:
        self.offset = offset
        self.size = size
        self.writer = writer
        self.reader = reader
        self.meaning = meaning


class Header:
    """One per image, at offset 0."""

    SIZE = 4096
    magic = Word(0, 8, "creator", "all", "`shmcbw\\r\\n`; stored last, so a segment without it is not finished")
    version = Word(8, 4, "creator", "all", "layout version")
    retired = Word(12, 4, "coordinator lock", "all", "1: about to be unlinked, attach anew")
    uuid = Word(16, 16, "creator", "all", "generation of the segment")
    boot_id = Word(32, 16, "creator", "all", "the boot it was made in")
    image_device = Word(48, 8, "creator", "all", "identity of the image: st_dev, or st_rdev of a block device")
    image_inode = Word(56, 8, "creator", "all", "identity of the image: st_ino, 0 for a block device")
    image_size = Word(64, 8, "creator; coordinator lock", "all", "bytes; grows by a resize")
    cluster_size = Word(72, 4, "creator", "all", "bytes")
    slot_count = Word(76, 4, "creator", "all", "")
    worker_count = Word(80, 4, "creator", "all", "entries of the worker table; ids are 1..count")
    coordinator_pid = Word(96, 4, "coordinator lock", "all", "for messages; liveness is the lock")
    pool_generation = Word(100, 4, "coordinator lock", "workers", "a worker of an earlier generation leaves")
    next_serial = Word(104, 4, "coordinator lock", "coordinator", "serial number of the next snapshot")
    last_generation = Word(108, 4, "coordinator lock", "coordinator", "given out last; perhaps not the pool's yet")
    started_ns = Word(112, 8, "coordinator lock", "status", "wall clock of the coordinator's start")
    workers_replaced = Word(120, 8, "coordinator lock", "status", "copy workers that died and were replaced")
    slots_reaped = Word(128, 8, "coordinator lock", "status", "slots whose owner died")
    cuts = Word(136, 8, "coordinator lock", "status", "cuts taken")
    cuts_abandoned = Word(144, 8, "coordinator lock", "status", "cuts given up at their limit")
    epoch = Word(192, 4, "coordinator; compare-and-swap", "writers", "even: open, odd: drained section")
    drain_deadline_ns = Word(256, 8, "coordinator lock", "gated writers", "monotonic clock")
    image_birth_ns = Word(
        264, 8, "creator", "all", "when the image was made: inode numbers are used again.  0: unknown"
    )
    resize_to = Word(272, 8, "coordinator lock", "all", "bytes that the image gets by a resize under way.  0: none is")
    seal = Word(280, 4, "creator", "all", "checksum of what the creator has written (`seals.py`)")
    control = Word(320, 128, "coordinator lock", "clients", "a daemon's QMP socket, ends with NUL; empty: none")
    image_path = Word(512, 2560, "coordinator lock", "status", "for messages, ends with NUL")
    failpoints = Word(3072, 8 * (1 + FAILPOINT_COUNT), "who arms; who acts counts down", "all", "`failpoints.py`")


class Worker:
    """One per worker id, from 1 on."""

    SIZE = 256
    state = Word(0, 4, "worker (at its death: coordinator)", "writers", "0 away, 1 busy, 2 looking, 3 asleep")
    pid = Word(4, 4, "worker", "coordinator", "for messages; liveness is the lock")
    start_ticks = Word(8, 8, "worker", "coordinator", "field 22 of /proc/PID/stat")
    generation = Word(16, 4, "worker", "coordinator", "of the pool it belongs to")
    ready_serial = Word(32, 32, "worker", "coordinator", "u32 per snapshot: the serial whose target was tried to open")
    ready_errno = Word(64, 32, "worker", "coordinator", "u32 per snapshot: 0, or why that failed")
    wanted_chunks = Word(128, 8, "worker", "status", "copies that a writer waited for")
    ahead_chunks = Word(136, 8, "worker", "status", "copies ahead of a sequential writer")
    background_chunks = Word(144, 8, "worker", "status", "")
    errors = Word(152, 8, "worker", "status", "copies that failed")
    sleeps = Word(160, 8, "worker", "status", "")


class Slot:
    """One per writing thread; its owner holds the slot's lock.  `Owner` below: whoever holds that lock."""

    SIZE = 512
    in_flight = Word(0, 4, "owner", "coordinator", "1 from step 1 to the end of step 6")
    writes = Word(8, 8, "owner", "status", "")
    write_bytes = Word(16, 8, "owner", "status", "")
    first_touches = Word(24, 8, "owner", "status", "writes that marked a cluster")
    want_sequence = Word(64, 4, "owner", "workers", "odd while a range is wanted")
    asleep = Word(68, 4, "owner", "wakers", "1 while the owner may sleep on its semaphore")
    want_first = Word(72, 8, "owner", "workers", "cluster")
    want_end = Word(80, 8, "owner", "workers", "cluster, exclusive")
    error = Word(128, 8, "serving worker; owner resets", "owner", "sequence 20 | errno 12 | cluster 28 | snapshot 4")
    pid = Word(192, 4, "owner", "coordinator", "for messages; liveness is the lock.  0: free")
    start_ticks = Word(200, 8, "owner", "coordinator", "")
    thread_id = Word(208, 8, "owner", "status", "native id")
    wait_count = Word(216, 8, "owner", "status", "writes that waited for a copy")
    wait_total_ns = Word(224, 8, "owner", "status", "")
    wait_max_ns = Word(232, 8, "owner", "status", "")
    gate_count = Word(240, 8, "owner", "status", "rounds spent at the gate of a drained section")
    wait_histogram = Word(256, 8 * HISTOGRAM_COUNT, "owner", "status", "bucket b: 2^(b-1) <= ns < 2^b")


class Snapshot:
    """One per snapshot; states are in `snapshots.py`."""

    SIZE = 8192
    state = Word(0, 8, "compare-and-swap", "all", "odd epoch of the cut << 32 | state")
    serial = Word(8, 4, "coordinator", "all", "names the bitmap's segment; never the same twice in a row")
    policy = Word(12, 4, "coordinator", "writers", "on_cbw_error: 0 break-snapshot, 1 break-guest-write")
    timeout_ns = Word(16, 8, "coordinator", "writers", "cbw_timeout, 0: none")
    sync = Word(24, 4, "coordinator", "workers", "0 full, 1 top, 2 none, 3 bitmap")
    seal = Word(28, 4, "coordinator", "workers, adopting coordinator", "checksum of the words that do not change")
    cut_epoch = Word(32, 4, "coordinator", "status", "the odd epoch of the cut")
    copy_range = Word(36, 4, "coordinator", "workers", "1: copy by copy_file_range, until that fails")
    cut_time_ns = Word(40, 8, "coordinator", "status", "wall clock")
    drained_ns = Word(48, 8, "coordinator", "status", "length of the drained section")
    source = Word(56, 4, "coordinator", "workers", "serial of the snapshot that it backs up; 0: the image")
    discard_source = Word(60, 4, "coordinator", "workers", "1: what is copied is let go of in that snapshot")
    broken = Word(64, 8, "compare-and-swap", "all", "sticky error: errno 12 bits | epoch tag 20 | cluster 32")
    broken_time_ns = Word(72, 8, "whoever broke it", "status", "wall clock")
    background_error = Word(
        80,
        8,
        "workers, compare-and-swap",
        "coordinator",
        "as `broken`, of a background copy; errno + 0x800: reading",
    )
    background = Word(88, 4, "coordinator", "workers", "1: copy in the background; 0: no, or paused")
    round = Word(92, 4, "coordinator", "workers", "changes when copying goes on after a pause or an error")
    cursor = Word(128, 8, "workers, compare-and-swap", "workers", "a hint: where the next background chunk begins")
    speed = Word(136, 8, "coordinator", "workers", "background bytes a second, 0: no limit")
    budget_ns = Word(144, 8, "workers, compare-and-swap", "workers", "monotonic time up to which speed is spent")
    target_device = Word(192, 8, "coordinator", "workers", "identity of the target")
    target_inode = Word(200, 8, "coordinator", "workers", "")
    job = Word(208, 4, "coordinator", "adopting coordinator", "0 none, 1 a backup job")
    overwrite = Word(212, 4, "coordinator", "adopting coordinator", "1: the finished target may replace another file")
    group = Word(216, 8, "compare-and-swap", "all", "id of the group 63 bits | 1: it is committed.  0: no group")
    group_device = Word(224, 8, "coordinator", "adopting coordinator", "where the group's leader is: image,")
    group_inode = Word(232, 8, "coordinator", "adopting coordinator", "")
    group_index = Word(240, 4, "coordinator", "adopting coordinator", "and entry of its table")
    group_count = Word(244, 4, "coordinator", "adopting coordinator", "leader: members, itself among them")
    max_workers = Word(248, 4, "coordinator", "workers", "background copies at once; 0: no limit")
    filtered = Word(252, 4, "coordinator", "adopting coordinator", "its serial: what a bitmap leaves out is SKIPPED")
    manifest = Word(256, 4, "coordinator", "workers", "1: checksums go to the manifest beside the target")
    in_place = Word(260, 4, "coordinator", "workers", "1: the target was there before: zeroes are punched into it")
    max_chunk = Word(264, 8, "coordinator", "workers", "bytes of a background copy, 0: no limit")
    turns = Word(
        272,
        TURN_COUNT,
        "workers, compare-and-swap",
        "workers",
        "a byte for each of max_workers: 0 free, or whose",
    )
    target_path = Word(512, PATH_SIZE, "coordinator", "workers", "where the data goes, ends with NUL")
    group_members = Word(
        4608, 24 * GROUP_MEMBERS_MAX, "coordinator", "adopting coordinator", "leader: device 8, inode 8, entry 8 each"
    )


STRUCTURES = (Header, Worker, Slot, Snapshot)


def words(structure: type) -> Iterator[tuple[str, Word]]:
    """The (name, word) pairs of one of `STRUCTURES`, in order of offset."""
    found = [(name, word) for name, word in vars(structure).items() if isinstance(word, Word)]
    return iter(sorted(found, key=lambda pair: pair[1].offset))


class Geometry:
    """Where everything is in one control segment; a pure function of the four numbers (bytes and counts)."""

    def __init__(self, image_size: int, cluster_size: int, slot_count: int, worker_count: int) -> None:
        self.image_size = image_size
        self.cluster_size = cluster_size
        self.slot_count = slot_count
        self.worker_count = worker_count
        if not 0 < self.image_size <= IMAGE_SIZE_MAX:
            raise ValueError(f"image size {self.image_size} bytes is not in 1..{IMAGE_SIZE_MAX}")
        size = self.cluster_size
        if not CLUSTER_SIZE_MIN <= size <= CLUSTER_SIZE_MAX or size & (size - 1):
            raise ValueError(f"cluster size {size} bytes is not a power of two from 4 KiB to 2 MiB")
        if self.clusters >= 1 << 32:
            raise ValueError(f"{self.clusters} clusters do not fit 32 bits: use larger ones")
        if not 1 <= self.slot_count <= SLOT_COUNT_MAX:
            raise ValueError(f"slots: {self.slot_count} is not in 1..{SLOT_COUNT_MAX}")
        if not WORKER_COUNT_MIN <= self.worker_count <= WORKER_ID_MAX:
            raise ValueError(f"workers: {self.worker_count} is not in {WORKER_COUNT_MIN}..{WORKER_ID_MAX}")

    def resized(self, image_size: int) -> Geometry:
        """The same segment for an image of another size (bytes): only the epoch map, at its end, differs."""
        return Geometry(image_size, self.cluster_size, self.slot_count, self.worker_count)

    @property
    def clusters(self) -> int:
        return cluster_count(self.image_size, self.cluster_size)

    @property
    def workers_offset(self) -> int:
        return Header.SIZE

    @property
    def slots_offset(self) -> int:
        return self.workers_offset + self.worker_count * Worker.SIZE

    @property
    def snapshots_offset(self) -> int:
        return self.slots_offset + self.slot_count * Slot.SIZE

    @property
    def epoch_map_offset(self) -> int:
        return -(-(self.snapshots_offset + SNAPSHOT_COUNT * Snapshot.SIZE) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def segment_size(self) -> int:
        return self.epoch_map_offset + 4 * self.clusters

    @property
    def bitmap_size(self) -> int:
        return self.clusters

    def worker(self, worker_id: int, word: Word) -> int:
        """Offset of a word of the worker with this id (1..worker_count)."""
        if not 1 <= worker_id <= self.worker_count:
            raise ValueError(f"worker id {worker_id} is not in 1..{self.worker_count}")
        return self.workers_offset + (worker_id - 1) * Worker.SIZE + word.offset

    def slot(self, index: int, word: Word) -> int:
        """Offset of a word of a slot (0..slot_count-1)."""
        if not 0 <= index < self.slot_count:
            raise ValueError(f"slot {index} is not in 0..{self.slot_count - 1}")
        return self.slots_offset + index * Slot.SIZE + word.offset

    def snapshot(self, index: int, word: Word) -> int:
        """Offset of a word of a snapshot table entry (0..7)."""
        if not 0 <= index < SNAPSHOT_COUNT:
            raise ValueError(f"snapshot {index} is not in 0..{SNAPSHOT_COUNT - 1}")
        return self.snapshots_offset + index * Snapshot.SIZE + word.offset

    def core_layout(self) -> dict[str, int]:
        """What the core is handed: offsets of arrays in the segment, sizes of entries, offsets in an entry."""
        layout = {
            "epoch": Header.epoch.offset,
            "epoch_map": self.epoch_map_offset,
            "image_size": self.image_size,
            "cluster_size": self.cluster_size,
            "cluster_count": self.clusters,
            "slots": self.slots_offset,
            "slot_count": self.slot_count,
            "slot_size": Slot.SIZE,
            "slot_wait_histogram_count": HISTOGRAM_COUNT,
            "snapshots": self.snapshots_offset,
            "snapshot_count": SNAPSHOT_COUNT,
            "snapshot_size": Snapshot.SIZE,
            "workers": self.workers_offset,
            "worker_count": self.worker_count,
            "worker_size": Worker.SIZE,
        }
        for prefix, structure in (("slot", Slot), ("snapshot", Snapshot), ("worker", Worker)):
            layout.update({f"{prefix}_{name}": word.offset for name, word in words(structure)})
        return layout


def tables() -> str:
    """The layout as Markdown tables."""
    lines = []
    for structure in STRUCTURES:
        lines += [f"**{structure.__name__}**, {vars(structure)['SIZE']} bytes. {structure.__doc__}", ""]
        lines += ["| offset | bytes | name | written by | read by | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {word.offset} | {word.size} | {name} | {word.writer} | {word.reader} | {word.meaning} |"
            for name, word in words(structure)
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
