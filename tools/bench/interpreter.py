"""Interpreters as a user starts them: with cached bytecode.

A checkout's environment may forbid to write it (PYTHONDONTWRITEBYTECODE), and then each start compiles everything.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(cache: Path) -> dict[str, str]:
    """The environment with the bytecode in a directory of ours; the first start fills it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(cache)}
