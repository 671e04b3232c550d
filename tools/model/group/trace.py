"""The words of a state of two images, for people."""

from __future__ import annotations

from tools.model.group.state import (
    ENTRY,
    EPOCH,
    FATE,
    LEADER,
    TOLD,
    WORD,
    WRITER_EPOCH,
    WRITER_MARK,
    WRITER_SEEN,
    Entry,
    Fate,
    GroupLayout,
    Told,
    Word,
)
from tools.model.state import name_of

FATES = {0: "open", Fate.TAKEN: "taken as right", Fate.GONE: "gone", Fate.TAKEN | Fate.GONE: "taken as right, and gone"}


def group_words(at: GroupLayout, state: bytes) -> dict[str, str]:
    """The words of a state by name, as text."""
    found = {"told of the cut": name_of(Told, state[TOLD])}
    for image, base in enumerate(at.image):
        who = f"image {image}{' (leader)' if image == LEADER else ''}"
        found[f"epoch of {who}"] = f"{state[base + EPOCH]} ({'drained' if state[base + EPOCH] & 1 else 'open'})"
        found[f"entry of {who}"] = name_of(Entry, state[base + ENTRY])
        found[f"group word of {who}"] = name_of(Word, state[base + WORD])
        found[f"snapshot of {who}"] = FATES[state[base + FATE]]
        for slot in range(len(at.writer)):
            found[f"stores of writer {slot + 1} to {who}"] = str(state[at.stores[image][slot]])
            found[f"... in the cut of {who}, writer {slot + 1}"] = str(state[at.cut[image][slot]])
    for slot, w in enumerate(at.writer):
        found[f"epoch remembered by writer {slot + 1}"] = str(state[w + WRITER_EPOCH])
        for image in range(len(at.image)):
            found[f"slot {slot + 1} of image {image}"] = "in flight" if state[w + WRITER_MARK + image] else "clear"
            found[f"slot {slot + 1} of image {image} drained"] = "yes" if state[w + WRITER_SEEN + image] else "no"
    return found
