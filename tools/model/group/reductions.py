"""States of the world of two images that behave alike are visited once: arguments as in ``tools.model.reductions``."""

from __future__ import annotations

from tools.model.group.protocol import GroupProtocol
from tools.model.group.state import COORDINATOR, IMAGES, WRITER_BYTES, WRITER_MARK, WRITER_SEEN, Coordinator


class GroupReductions:
    """The reductions that fit one protocol."""

    def __init__(self, protocol: GroupProtocol) -> None:
        self.layout = protocol.layout
        self.alike = len(set(protocol.scenario.writers)) == 1

    def normal(self, state: bytes) -> bytes:
        """*A slot is seen clear at once*, as in the world of one image."""
        if state[COORDINATOR] != Coordinator.DRAIN:
            return state
        new = bytearray(state)
        for w in self.layout.writer:
            for image in IMAGES:
                if not state[w + WRITER_MARK + image]:
                    new[w + WRITER_SEEN + image] = 1
        return bytes(new)

    def representative(self, state: bytes) -> bytes:
        """*Writers with the same program are interchangeable*: put them in order, with what their stores left."""
        if not self.alike:
            return state
        at = self.layout
        rows = (*at.stores, *at.cut)
        slots = [
            (state[w : w + WRITER_BYTES], bytes(state[row[slot]] for row in rows)) for slot, w in enumerate(at.writer)
        ]
        ordered = sorted(slots)
        if slots == ordered:
            return state
        new = bytearray(state)
        for slot, (words, history) in enumerate(ordered):
            new[at.writer[slot] : at.writer[slot] + WRITER_BYTES] = words
            for row, value in zip(rows, history, strict=True):
                new[row[slot]] = value
        return bytes(new)
