"""Sizes as people write them: 512, 64K, 100M, 1.5G, 2T (binary multiples)."""

from __future__ import annotations

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size like ``64K``; ValueError says what is wrong.  ``KiB`` and ``KB`` mean the same as ``K``."""
    cleaned = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = cleaned[-1:] if cleaned[-1:] in _UNITS and cleaned[-1:] else ""
    digits = cleaned.removesuffix(unit)
    if not digits or not all(part.isascii() and part.isdigit() for part in digits.split(".", 1)):
        raise ValueError(f"{text!r} is not a size (examples: 4096, 64K, 100M, 1.5G)")
    size = int(float(digits) * _UNITS[unit]) if "." in digits else int(digits) * _UNITS[unit]
    if size >= 1 << 62 or (size == 0 and digits.strip("0.")):
        raise ValueError(f"{text!r} is not a size between 1 byte and 4 EiB")
    return size


def format_size(size_bytes: float) -> str:
    """``64 KiB``, ``1.5 GiB``: three digits are enough for a person."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size_bytes >= 1024 and len(units) > 1:
        size_bytes /= 1024
        del units[0]
    unit = units[0]
    number = f"{size_bytes:.0f}" if unit == "bytes" or size_bytes >= 100 else f"{size_bytes:.3g}"
    return f"{number} {unit}"


def format_ns(ns: float) -> str:
    """``35 µs``, ``1.2 ms``, ``3 s``."""
    for unit, limit in (("ns", 1e3), ("µs", 1e6), ("ms", 1e9)):
        if ns < limit:
            return f"{ns / (limit / 1e3):.3g} {unit}"
    return f"{ns / 1e9:.3g} s"
