"""Points: instants of an image, which backups show and dirty bitmaps count from.

A point is an odd epoch of one control segment.  Epochs of one segment are ordered, so "what changed since point A" can
be laid over a backup of any later point B that is not after its own cut: what it does not hold did not change between A
and that cut, so neither between B and it.  Epochs of different segments can't be compared: there, only the same point
fits.

What a job with bitmap-mode always leaves when it fails shows no instant: some clusters are of its cut, the others
older.  It has the point of its cut and, as ``rest``, the number of that job; only what says "since that rest" can
complete it.
"""

from __future__ import annotations


class Point:
    """``segment``: the uuid of a control segment, 32 hex digits.  ``epoch``: odd.  ``rest``: 0 of an instant."""

    __slots__ = ("epoch", "rest", "segment")

    def __init__(self, segment: str, epoch: int, *, rest: int = 0) -> None:
        self.segment = segment
        self.epoch = epoch
        self.rest = rest

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that `str` wrote; ValueError if it is none."""
        segment, _, numbers = text.partition("@")
        epoch, slash, rest = numbers.partition("/rest")
        if len(segment) != 32 or not set(segment) <= set("0123456789abcdef"):
            raise ValueError(f"{text!r} names no segment")
        for number in (epoch, rest) if slash else (epoch,):
            if not number.isascii() or not number.isdigit() or not 0 <= int(number) < 1 << 32:
                raise ValueError(f"{text!r} has no epoch, or a wrong rest")
        return cls(segment, int(epoch), rest=int(rest or 0))

    def not_after(self, other: Point) -> bool:
        """Whether changes since this point, taken up to a later one, can be laid over a backup of ``other``."""
        if self.rest or other.rest:
            return self == other
        return self.segment == other.segment and self.epoch <= other.epoch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        return f"{self.segment}@{self.epoch}{f'/rest{self.rest}' if self.rest else ''}"

    def __repr__(self) -> str:
        return f"Point({self})"
