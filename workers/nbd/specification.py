"""What an NBD server is told to serve: plain data, the same in the parent and in its serving processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BitmapSpec:
    """A dirty bitmap of an export: its name, and the file that every serving process maps (`dirty.py`)."""

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """What to serve: an image (``snapshot`` None) or a snapshot of it (serial number, or path of scratch or target).

    ``writable``: an image takes writes; a snapshot takes discards, which let go of what was read.  ``writethrough``:
    each write is on the disk before it is answered.
    """

    name: str
    image: str
    snapshot: int | str | None = None
    writable: bool = False
    bitmaps: tuple[BitmapSpec, ...] = ()
    description: str = ""
    writethrough: bool = False

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ExportSpec:
        """From what `dataclasses.asdict` has made of one."""
        bitmaps = tuple(BitmapSpec(**each) for each in found["bitmaps"])
        return cls(**{**found, "bitmaps": bitmaps})


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files; with ``authority`` clients must show a certificate that it has signed."""

    certificate: str
    key: str
    authority: str | None = None
