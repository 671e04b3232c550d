"""What must hold in the world of two images. All of them are promises (``tools.model.properties``).

======== ============ ==================================================================
property what         how it is asked here
======== ============ ==================================================================
INSTANT  promise, I9  if both snapshots may be taken as right, what they show is one
                      instant: of an ordered pair the second is never there without
                      the first, nor the first of the next without the second
ALL      promise, I9  if one may be, or was, taken as right, the other was not dropped
TOLD     promise      the cut's caller hears failure: none is ever taken as right
WRITERS  promise      a live writer always has a step of its own: nobody can block it
END      promise, I8  when nobody has a step left: writers are through, the gates are
                      open, the entries free, each snapshot was taken or is gone
======== ============ ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tools.model.group.protocol import GroupProtocol
from tools.model.group.state import ENTRY, FATE, FAULT, IMAGES, TOLD, Entry, Fate, Fault, Told

GroupProperty = Callable[[GroupProtocol, bytes], str]
"""Says what is wrong in a state; empty if nothing is."""


def is_taken(protocol: GroupProtocol, state: bytes, image: int) -> bool:
    """Whether the image's snapshot was taken as right, or anybody who attaches now may do so."""
    at = protocol.image[image]
    return bool(state[at + FATE] & Fate.TAKEN) or (state[at + ENTRY] == Entry.ACTIVE and protocol.counts(state, image))


def instant(protocol: GroupProtocol, state: bytes) -> str:
    if not all(is_taken(protocol, state, image) for image in IMAGES):
        return ""
    for writer, images in enumerate(protocol.scenario.writers):
        seen = [state[protocol.layout.cut[image][writer]] for image in IMAGES]
        # How many of its stores, in its order, the two cuts show: what they show must be what some number of them left.
        if not any(seen == [images[:number].count(image) for image in IMAGES] for number in range(len(images) + 1)):
            return f"writer {writer + 1}: the cuts show {seen[0]} of its stores to image 0 and {seen[1]} to image 1"
    return ""


def all_or_none(protocol: GroupProtocol, state: bytes) -> str:
    for image in IMAGES:
        gone = state[protocol.image[1 - image] + FATE] & Fate.GONE
        if gone and is_taken(protocol, state, image):
            return f"the snapshot of image {image} counts, that of image {1 - image} is gone"
    return ""


def told(protocol: GroupProtocol, state: bytes) -> str:
    if state[TOLD] == Told.FAILURE:
        for image in IMAGES:
            if is_taken(protocol, state, image):
                return f"the cut reported failure and the snapshot of image {image} counts"
    return ""


def writers(_protocol: GroupProtocol, state: bytes) -> str:
    return "a live writer can be blocked for ever" if state[FAULT] == Fault.BLOCKED else ""


def end(_protocol: GroupProtocol, state: bytes) -> str:
    return "nobody can go on and something is left to do" if state[FAULT] == Fault.UNFINISHED else ""


GROUP_PROPERTIES: Final[dict[str, GroupProperty]] = {
    "INSTANT": instant,
    "ALL": all_or_none,
    "TOLD": told,
    "WRITERS": writers,
    "END": end,
}
