"""What was played of a scenario, one line for each fault: a run of hours that was interrupted goes on after it.

Only what ended legally is not played again.  It says nothing of another build: who changes the code takes a new
directory.
"""

from __future__ import annotations

from pathlib import Path

from tests.faults.layer import Fault


class Record:
    def __init__(self, directory: str, scenario: str) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = Path(directory) / scenario
        self._wrong = Path(directory) / f"{scenario}.wrong"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._fired = {fault: word == "fired" for word, _, fault in (line.partition(" ") for line in lines)}

    def __contains__(self, fault: Fault) -> bool:
        return str(fault) in self._fired

    def fired(self, fault: Fault) -> bool:
        """Whether a fault that is in here came to be."""
        return self._fired[str(fault)]

    def legal(self, fault: Fault, *, fired: bool) -> None:
        with self._file.open("a") as file:
            print("fired" if fired else "missed", fault, file=file)

    def wrong(self, fault: Fault, why: str) -> None:
        with self._wrong.open("a") as file:
            print(f"{fault}: {why}\n", file=file)
