"""A coordinator in a process of its own, driven by lines of JSON: ``python -m tests.owner IMAGE [IMAGE...]``.

Commands: {"do": "backup", "target", "speed"?, "cbw_timeout"?, "of_snapshot"?, "how"?},
{"do": "snapshot", "scratch", "cbw_timeout"?}, {"do": "bitmap", "call", "with", "how"}; of all jobs
{"do": "speed", "speed"}, {"do": "pause"}, {"do": "resume"}, {"do": "cancel"}, {"do": "wait"}, {"do": "results"} and
{"do": "statuses"}; {"do": "read"}, {"do": "resize", "size"}, {"do": "drop"}, {"do": "close"}, {"do": "jobs"},
{"do": "verb", "target", "verb", "with"?} (of one job), and with several images {"do": "group", "targets", "speeds"?,
"together"?, "how"?}: the others then are about all of them.
Each is answered by {"ok": …} or {"error": type, "message": …}.  It may be killed at any moment.  Its drained sections
last for OWNER_DRAIN_LIMIT_S (environment) at most, 2 s if that is not set; OWNER_STATE_DIR: for bitmaps;
OWNER_ADDRESS_SPACE_BYTES: what it and its workers may map; OWNER_LOG: a file for what they have to say.
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

from shmcbw.errors import ShmcbwError
from shmcbw.workers import Backup, Coordinator, Job, JobTransaction, backup_group
from tests.processes import limit_address_space

ROOT = Path(__file__).resolve().parents[1]


class Owner:
    """The parent's end."""

    module = "tests.owner"

    def __init__(self, *arguments: Path, **environment: str) -> None:
        log = environment.get("OWNER_LOG")
        with ExitStack() as stack:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *map(str, arguments)],
                cwd=ROOT,
                env={**os.environ, "SHMCBW_FAILPOINTS": "segment", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stack.enter_context(open(log, "ab")) if log is not None else None,
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
    if limit_bytes := int(os.environ.get("OWNER_ADDRESS_SPACE_BYTES", "0")):
        limit_address_space(limit_bytes)
    with ExitStack() as stack:
        limit = float(os.environ.get("OWNER_DRAIN_LIMIT_S", "2"))
        how: dict[str, Any] = {"workers": 2, "drain_limit": limit, "state_dir": os.environ.get("OWNER_STATE_DIR")}
        coordinators = [stack.enter_context(Coordinator(image, **how)) for image in images]
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
    jobs = [job for coordinator in coordinators for job in coordinator.jobs]
    timeout = command.get("cbw_timeout", 20)
    if action == "backup":
        how = {"speed": command.get("speed", 0), **command.get("how", {})}
        how |= {"source": snapshots[-1]} if command.get("of_snapshot") else {}
        return coordinators[0].backup(command["target"], cbw_timeout=timeout, **how).id
    if action == "bitmap":
        found = getattr(coordinators[0].bitmaps, command["call"])(*command.get("with", []), **command.get("how", {}))
        return list(found) if command["call"] == "extents" else found
    if action == "group":
        members = zip(coordinators, command["targets"], command.get("speeds", [0] * len(coordinators)), strict=True)
        how = {"transaction": JobTransaction() if command.get("together") else None, **command.get("how", {})}
        backups = [Backup(owner, target, cbw_timeout=20, speed=speed, **how) for owner, target, speed in members]
        return [job.id for job in backup_group(backups)]
    if action == "snapshot":
        coordinators[0].snapshot(command["scratch"], cbw_timeout=timeout)
    elif action == "speed":
        for job in jobs:
            job.set_speed(command["speed"])
    elif action in ("pause", "resume"):
        for job in jobs:
            if job.status in ("running", "paused"):
                getattr(job, action)()
    elif action == "statuses":
        return {job.target: job.status for job in jobs}
    elif action == "verb":
        job = next(job for job in jobs if job.target == command["target"])
        getattr(job, command["verb"])(*command.get("with", []))
    elif action == "jobs":
        return [job.describe() for job in jobs]
    elif action == "cancel":
        for job in jobs:
            job.cancel()
    elif action == "results":
        return {job.target: _result(job) for job in jobs}
    elif action == "read":
        contents = [snapshot.pread(snapshot.size_bytes, 0) for snapshot in snapshots]
        if "to" in command and contents:
            Path(command["to"]).write_bytes(contents[-1])
        return [hashlib.sha256(content).hexdigest() for content in contents]
    elif action == "drop":
        for snapshot in snapshots:
            snapshot.close()
    elif action == "resize":
        coordinators[0].resize(command["size"])
    elif action == "wait":
        with ExitStack() as waits:
            # All of them, also when one has failed.
            for job in jobs:
                waits.callback(job.wait, 30)
    return None


def _result(job: Job) -> str | None:
    """Wait for its end: None, or the kind of its error."""
    try:
        job.wait(30)
    except ShmcbwError as error:
        return type(error).__name__
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
