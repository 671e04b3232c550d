"""A coordinator in a process of its own, driven by lines of JSON: ``python -m tests.owner IMAGE [IMAGE...]``.

Commands: {"do": "backup", "target"}, {"do": "snapshot", "scratch"}, {"do": "read"}, {"do": "resize", "size"},
{"do": "wait"}, {"do": "drop"}, {"do": "close"}, and with several images {"do": "group", "targets"}: the others then are
about all of them.  Each is answered by {"ok": …} or {"error": type, "message": …}.  It may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from shmcbw.workers import Backup, Coordinator, backup_group

ROOT = Path(__file__).resolve().parents[1]


class Owner:
    """The parent's end."""

    def __init__(self, *images: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.owner", *map(str, images)],
            cwd=ROOT,
            env={**os.environ, "SHMCBW_FAILPOINTS": "segment", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def ask(self, **command: Any) -> dict[str, Any] | None:
        """Send a command and return its answer; None if the process died over it."""
        self.send(**command)
        return self.answer()

    def send(self, **command: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def end(self) -> None:
        """Kill it if it still runs, and free the pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def main(images: list[str]) -> None:
    with ExitStack() as stack:
        coordinators = [stack.enter_context(Coordinator(image, workers=2, drain_limit=2.0)) for image in images]
        targets = [job.target for coordinator in coordinators for job in coordinator.jobs]
        print(json.dumps({"ok": targets}), flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = {"ok": _do(coordinators, command)}
            except Exception as error:  # whatever it is, the test wants to see it
                answer = {"error": type(error).__name__, "message": str(error)}
            print(json.dumps(answer), flush=True)
            if command["do"] == "close":
                return


def _do(coordinators: list[Coordinator], command: dict[str, Any]) -> Any:
    action = command["do"]
    snapshots = [snapshot for coordinator in coordinators for snapshot in coordinator.snapshots]
    if action == "backup":
        return coordinators[0].backup(command["target"], cbw_timeout=20).id
    if action == "group":
        members = zip(coordinators, command["targets"], strict=True)
        return [job.id for job in backup_group([Backup(*member, cbw_timeout=20) for member in members])]
    if action == "snapshot":
        coordinators[0].snapshot(command["scratch"], cbw_timeout=20)
    elif action == "read":
        return [hashlib.sha256(s.pread(s.size_bytes, 0)).hexdigest() for s in snapshots]
    elif action == "drop":
        for snapshot in snapshots:
            snapshot.close()
    elif action == "resize":
        coordinators[0].resize(command["size"])
    elif action == "wait":
        for coordinator in coordinators:
            for job in coordinator.jobs:
                job.wait(30)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
