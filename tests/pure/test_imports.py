"""What imports what: layers, and what a writer process pays."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Each module imports only modules above it; cli and __main__ are the top layer and may import what runs.
ORDER = [
    "errors", "clusters", "layout", "states", "sizes", "_core", "failpoints", "image", "seals", "segment",
    "bitmap", "slots", "epochs", "points", "dirty", "groups",
    "snapshots", "reader", "filter", "status", "invariants", "doctor", "__init__",
    "chain_commands", "export_command", "cli", "__main__",
]  # fmt: skip
TOP = {"chain_commands", "export_command", "cli", "__main__"}


def imported(path: Path) -> set[str]:
    """The shmcbw modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shmcbw."):
            found.add((node.module or "").split(".")[1])
    return found - {"__version__"}


def test_every_module_of_the_library_has_its_place() -> None:
    assert {path.stem for path in (ROOT / "shmcbw").glob("*.py")} == set(ORDER) - {"_core"}


@pytest.mark.parametrize("name", [name for name in ORDER if name != "_core"])
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)]) | ({"workers"} if name in TOP else set())
    assert imported(ROOT / "shmcbw" / f"{name}.py") <= above


def test_importing_the_library_is_light() -> None:
    code = "import sys, shmcbw; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for heavy in (
        "numpy",
        "asyncio",
        "multiprocessing",
        "psutil",
        "rich",
        "argparse",
        "logging",
        "subprocess",
        "ctypes",
    ):
        assert heavy not in loaded, heavy
