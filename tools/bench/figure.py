"""A measured figure: ours, what it is compared with, and the target that it is judged by.

The verdict is computed from the numbers here and nowhere else, so no measurement can talk itself into a target.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shmcbw.sizes import format_ns, format_size


@dataclass(frozen=True, slots=True)
class Spread:
    """Single times in nanoseconds, summed up.  Of few times p999 is the longest."""

    count: int
    p50: float
    p99: float
    p999: float
    max: float
    mean: float

    @classmethod
    def of(cls, times_ns: Sequence[float]) -> Spread:
        """Of at least one time.  A percentile is a time that was measured, the next one up."""
        ordered = sorted(times_ns)
        count = len(ordered)

        def at(share: float) -> float:
            return ordered[min(count - 1, int(count * share))]

        return cls(count, at(0.5), at(0.99), at(0.999), ordered[-1], statistics.fmean(ordered))


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table.

    ``value`` and ``other_value`` are in ``unit``: ns, bytes or things that are counted.  At most one of the limits is
    given: the ratio to the other value, or the value itself, may be at most that.  Without a limit there is no verdict.
    A value of None was not measured; the note says why.
    """

    measurement: str
    name: str
    unit: str
    value: float | None
    spread: Spread | None = None
    other: str = ""
    other_value: float | None = None
    other_spread: Spread | None = None
    ratio_limit: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to the other's: below 1 we are faster or smaller."""
        return self.value / self.other_value if self.value is not None and self.other_value else None

    @property
    def target(self) -> str:
        """The target in words, or nothing."""
        if self.ratio_limit is not None:
            return f"≤ {self.ratio_limit:g}x"
        if self.limit == 0:
            return f"no {self.unit}"
        return f"≤ {format_value(self.limit, self.unit)}" if self.limit is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, nothing was measured or there is nothing beside it."""
        if self.value is None:
            return None
        if self.limit is not None:
            return self.value <= self.limit
        if self.ratio_limit is None or self.ratio is None:
            return None
        return self.ratio <= self.ratio_limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "target": self.target, "met": self.met}


def format_value(value: float, unit: str) -> str:
    """A value with its unit, three digits."""
    if unit == "ns":
        return format_ns(value)
    if unit == "bytes":
        return format_size(value)
    return f"{value:g} {unit}"


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
