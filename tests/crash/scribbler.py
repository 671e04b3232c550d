"""Who overwrites the shared memory at random: words of the control segment, cluster bytes, the files of the journal."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from shmcbw import _core
from shmcbw.bitmap import Bitmap, bitmap_serials
from shmcbw.layout import SNAPSHOT_COUNT, Header, Slot, Snapshot, Worker
from shmcbw.segment import JOURNAL_SUFFIX, SHM, Segment
from shmcbw.workers.journal import SIZE_MAX_BYTES

REGIONS = ["header", "workers", "slots", "snapshots", "epoch map", "cluster bytes", "all"]


class Scribbler:
    """Overwrites words of one region, with values that are more often wrong in an interesting way."""

    def __init__(self, segment: Segment, region: str, chance: random.Random) -> None:
        geometry = segment.geometry
        self._segment = segment
        self._chance = chance
        #: Not the failpoints: nobody here looks at them.
        ranges = {
            "header": (0, Header.failpoints.offset),
            "workers": (geometry.workers_offset, geometry.worker_count * Worker.SIZE),
            "slots": (geometry.slots_offset, 4 * Slot.SIZE),
            "snapshots": (geometry.snapshots_offset, SNAPSHOT_COUNT * Snapshot.SIZE),
            "epoch map": (geometry.epoch_map_offset, 4 * geometry.clusters),
        }
        self._ranges = [ranges[region]] if region in ranges else list(ranges.values()) if region == "all" else []
        #: Whether it may say COPIED of what is not, which nobody can see.
        self.says_copied = region in ("cluster bytes", "all")

    def _value(self) -> int:
        chance = self._chance
        edge = chance.choice([0, 1, 2, 7, 8, 9, 63, 64, 65, 239, 240, 243, 2**12, 2**31, 2**32 - 4, 2**32 - 1])
        return chance.choice([edge, edge + 1, edge - 1, chance.getrandbits(32), 1 << chance.randrange(32)]) % 2**32

    def scribble(self) -> None:
        if self.says_copied and (not self._ranges or self._chance.random() < 0.3):
            for serial in bitmap_serials(self._segment):
                try:
                    bitmap = Bitmap.attach(self._segment, serial)
                except OSError:
                    continue
                bitmap.memory[self._chance.randrange(bitmap.clusters)] = self._value() % 256
                bitmap.close()
            return
        if self._ranges:
            offset, length = self._chance.choice(self._ranges)
            # Half of the time among the first words of the region, where more of them are in use.
            length = min(length, 512) if self._chance.random() < 0.5 else length
            _core.store_u32(self._segment.memory, offset + 4 * self._chance.randrange(length // 4), self._value())


def journal_files(segment: Segment) -> list[Path]:
    """The journal of an image, and the sets of its bitmaps."""
    name = segment.name[1:]
    return [
        Path(SHM, file)
        for file in os.listdir(SHM)
        if file.startswith(name) and file.removeprefix(name)[:2] in (JOURNAL_SUFFIX[:2], ".d")
    ]


def garble(path: Path, chance: random.Random) -> str:
    """Make a file one that nobody has stored: what was done to it."""
    content = path.read_bytes()
    how = chance.choice(["bits", "bytes", "cut", "longer", "too long", "other JSON", "words"])
    if how == "bits" and content:
        place = chance.randrange(len(content))
        content = content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    elif how == "cut":
        content = content[: chance.randrange(len(content) + 1)]
    elif how == "longer":
        content += chance.randbytes(chance.randrange(1, 10_000))
    elif how == "other JSON":
        content = json.dumps(chance.choice([[], None, 7, "x", {}, [[]] * 1000, {"jobs": []}])).encode()
    elif how == "words":
        content = _with_other_words(content, chance)
    elif how == "bytes":
        content = chance.randbytes(len(content))
    path.write_bytes(content)
    if how == "too long":
        os.truncate(path, chance.choice([SIZE_MAX_BYTES + 1, 1 << 40]))
    return how


def _with_other_words(content: bytes, chance: random.Random) -> bytes:
    """A document of JSON with one of its values replaced; the same if it is none."""
    try:
        document = json.loads(content)
    except ValueError:
        return content
    place = document
    while isinstance(place, (dict, list)) and place:
        key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if key != "uuid" and (not isinstance(inner, (dict, list)) or not inner or chance.random() < 0.3):
            place[key] = chance.choice([None, -1, 2**70, 1.5, "", "x" * 5000, "../../x", [], {}, True])
            break
        place = inner
    return json.dumps(document).encode()
