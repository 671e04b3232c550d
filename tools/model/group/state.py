"""One state of the world of two images: which byte is which word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_EPOCH: Final = 2
IMAGES: Final = (0, 1)
LEADER: Final = 0
"""The image whose entry leads the group."""


class Entry:
    """State word of the group's entry in an image's snapshot table."""

    FREE: Final = 0
    PREPARED: Final = 1
    ACTIVE: Final = 2
    BROKEN: Final = 3
    ABANDONED: Final = 4


class Word:
    """Group word of that entry. NONE: the entry is of no group, or of another one by now."""

    NONE: Final = 0
    OPEN: Final = 1
    COMMITTED: Final = 2


class Fate:
    """History, bits: what became of an image's snapshot."""

    TAKEN: Final = 1
    """Somebody who may do so has taken it as right: the cut's caller, or an adopter."""
    GONE: Final = 2
    """It was dropped, and nobody will ever have it."""


class Told:
    """History: what the caller of the cut may have heard."""

    NOTHING: Final = 0
    SUCCESS: Final = 1
    FAILURE: Final = 2


class Coordinator:
    """The step the coordinator of both images does next; where it says so, for the image AT."""

    PREPARE: Final = 0
    CLOSE: Final = 1
    """AT."""
    DRAIN: Final = 2
    PUBLISH: Final = 3
    """AT."""
    COMMIT: Final = 4
    TELL: Final = 5
    OPEN: Final = 6
    """AT."""
    FINISH: Final = 7
    """The backups end, in any order, and their entries are freed."""
    BREAK: Final = 8
    """AT; this and what follows: the cut has failed."""
    ABANDON: Final = 9
    """AT."""
    FAIL_OPEN: Final = 10
    """AT."""
    FREE: Final = 11
    """AT."""
    DONE: Final = 12
    DEAD: Final = 13
    LATE: Final = 14
    """Mutations only."""


class Adopter:
    """The step the adopter of an image does next."""

    LOCK: Final = 0
    OPEN: Final = 1
    ASK: Final = 2
    HEARD_NO: Final = 3
    HEARD_YES: Final = 4
    JUDGE: Final = 5
    FINISH: Final = 6
    DONE: Final = 7
    LATE: Final = 8
    """Mutations only."""


class Writer:
    """The step a writer does next."""

    MARK: Final = 0
    READ_EPOCH: Final = 1
    GATE: Final = 2
    OPEN: Final = 3
    STORE: Final = 4
    DONE: Final = 5


class Fault:
    """History: what a step found wrong."""

    NONE: Final = 0
    BLOCKED: Final = 1
    UNFINISHED: Final = 2


# Header: offsets from the start of the state.
KILLS: Final = 0
FAULT: Final = 1
TOLD: Final = 2
COORDINATOR: Final = 3
AT: Final = 4
HEADER_BYTES: Final = 5

# Image: offsets from its start. Stores and cut hold, for each writer, how often it has stored to the image: now, and
# when the entry was published.
EPOCH: Final = 0
ENTRY: Final = 1
WORD: Final = 2
FATE: Final = 3
ADOPTER: Final = 4
STORES: Final = 5

# Writer: offsets from its start. Its slots' marks and whether the coordinator has seen them clear, by image.
WRITER_DONE: Final = 1
WRITER_EPOCH: Final = 2
WRITER_MARK: Final = 3
WRITER_SEEN: Final = 5
WRITER_BYTES: Final = 7


@dataclass(frozen=True)
class GroupScenario:
    """Who takes part: for each writer, the images it stores to, one after the other; ``kills`` of coordinators.

    A writer that stores to 0, 1 writes an ordered pair: at no instant has image 1 more of its stores than image 0.
    """

    name: str
    writers: tuple[tuple[int, ...], ...]
    kills: int = 1

    @property
    def size(self) -> str:
        order = ", ".join("then ".join(f"{image} " for image in images).strip() for images in self.writers)
        return f"2 images, writers to images {order}; {self.kills} kills"


class GroupLayout:
    """Where the words are in the states of one scenario."""

    def __init__(self, scenario: GroupScenario) -> None:
        writers = len(scenario.writers)
        self._kills = scenario.kills
        image_bytes = STORES + 2 * writers
        self.image = [HEADER_BYTES + image_bytes * image for image in IMAGES]
        self.stores = [[at + STORES + w for w in range(writers)] for at in self.image]
        self.cut = [[at + STORES + writers + w for w in range(writers)] for at in self.image]
        first = HEADER_BYTES + image_bytes * len(IMAGES)
        self.writer = [first + WRITER_BYTES * w for w in range(writers)]
        self.size_bytes = first + WRITER_BYTES * writers

    def first_state(self) -> bytes:
        """Nothing written, no snapshot, all processes alive and idle."""
        state = bytearray(self.size_bytes)
        state[KILLS] = self._kills
        for at in self.image:
            state[at + EPOCH] = FIRST_EPOCH
        return bytes(state)
