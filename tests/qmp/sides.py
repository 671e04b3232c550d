"""The two sides of the differential test: the same script for `shmcbw serve` and for QEMU's storage daemon.

A script sees a `Side`: it adds an image and a target, runs commands, writes as a guest does, has copies fail, and looks
at what came of it.  What it does is recorded: replies, and events.  `Record` is what both sides must agree on.
"""

from __future__ import annotations

import base64
import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shmcbw
from tests.monitor import Connection, Monitored, StorageDaemon

CLUSTER = 65536
CLUSTERS = 16
SIZE = CLUSTER * CLUSTERS

Reply = tuple[str, Any]


class Record:
    """What happened: replies in order, and events in order."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, Reply]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def of_jobs(self, *, but_never_started: bool = False) -> dict[str, list[str]]:
        """The events of each job, without pairs of paused and running that nobody asked for (D1).

        but_never_started: nor jobs of a transaction that was refused (D2).
        """
        found: dict[str, list[str]] = {}
        for name, data in self.events:
            job = data.get("id") or data.get("device")
            if job is None:
                continue
            text = {"JOB_STATUS_CHANGE": data.get("status"), "BLOCK_JOB_ERROR": f"{name} {data.get('action')}"}.get(
                name, f"{name}{' with error' if 'error' in data else ''}"
            )
            found.setdefault(job, []).append(str(text))
        if but_never_started:
            found = {job: texts for job, texts in found.items() if texts[:2] != ["created", "aborting"]}
        return {job: without_drains(texts) for job, texts in found.items()}


def without_drains(texts: list[str]) -> list[str]:
    """QEMU pauses jobs while it changes its graph, now and then, and says so."""
    found: list[str] = []
    for text in texts:
        if text == "running" and found[-2:] == ["running", "paused"]:
            found.pop()
        else:
            found.append(text)
    return found


class Side:
    """One daemon, and the pair of files that the present script works on."""

    name: str

    def __init__(self, monitor: Monitored, directory: Path) -> None:
        self.monitor = monitor
        self.directory = directory
        self.client: Connection = monitor.connect()
        self.record = Record()
        self.count = 0

    # -- a script's surroundings -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def script(self) -> Iterator[Record]:
        """A fresh record; afterwards no job and no node is left, whatever the script did."""
        self.record = Record()
        self.client.events.clear()
        try:
            yield self.record
            self.collect()
        finally:
            self.clean()

    def collect(self) -> None:
        """Take in the events that have come: the reply to a command is behind all that came before it."""
        self.client.execute("query-version")
        self.record.events = [(event["event"], event["data"]) for event in self.client.events]

    def image(self, node: str = "n", *, seed: int = 1, size: int = SIZE) -> Path:
        """A source of random bytes under a node."""
        path = self.file(node, random.Random(seed).randbytes(size))
        self.client.execute("blockdev-add", driver="file", node_name=node, filename=str(path))
        self.serve(node)
        return path

    def target(self, node: str = "t", *, size: int = SIZE, fail_at: int | None = None, image: str = "n") -> Path:
        """An empty target; ``fail_at``: writing this cluster, in a backup of ``image``, fails with EIO; -1: any."""
        path = self.file(node, b"")
        os.truncate(path, size)
        self.add_target(node, path, fail_at, image)
        return path

    def file(self, node: str, content: bytes) -> Path:
        self.count += 1
        path = self.directory / f"{node}{self.count}.img"
        path.write_bytes(content)
        return path

    def ask(self, command: str, /, **arguments: Any) -> Reply:
        """Run a command and record what comes: ("return", value) or ("error", class: text)."""
        reply = self.client.ask(command, **arguments)
        error = reply.get("error")
        found: Reply = ("error", f"{error['class']}: {error['desc']}") if error else ("return", reply["return"])
        self.record.replies.append((command, found))
        return found

    def wait(self, job: str, status: str) -> None:
        self.client.wait_status(job, status)

    def bitmaps(self, node: str = "n") -> dict[str, dict[str, Any]]:
        """The named bitmaps of a node, with their hashes."""
        nodes = {each["node-name"]: each for each in self.client.execute("query-named-block-nodes")}
        found = {}
        for each in nodes[node].get("dirty-bitmaps", []):
            if "name" in each:
                name = each.pop("name")
                each["sha256"] = self.client.ask("x-debug-block-dirty-bitmap-sha256", node=node, name=name).get(
                    "return"
                )
                found[name] = each
        return found

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {each["device"]: each for each in self.client.execute("query-block-jobs")}

    def clean(self) -> None:
        for job in self.client.execute("query-jobs"):
            if job["status"] != "concluded":
                self.client.ask("job-cancel", id=job["id"])
                self.wait(job["id"], "concluded")
            self.client.ask("job-dismiss", id=job["id"])
        self.unserve()
        left = [""]
        while left:
            left = [each["node-name"] for each in self.client.execute("query-named-block-nodes")]
            removed = [name for name in left if "return" in self.client.ask("blockdev-del", node_name=name)]
            if not removed:
                assert not left, f"{self.name}: these nodes can't be removed: {left}"

    # -- what is different -------------------------------------------------------------------------------------------

    def serve(self, node: str) -> None:
        """Make it writable for `write`."""
        raise NotImplementedError

    def unserve(self) -> None:
        raise NotImplementedError

    def add_target(self, node: str, path: Path, fail_at: int | None, image: str = "n") -> None:
        raise NotImplementedError

    def write(self, cluster: int, byte: int = 0x11, node: str = "n") -> bool:
        """Write a cluster as a guest: whether that succeeded."""
        raise NotImplementedError

    def add_snapshot(self, policy: str, *, timeout: int, fault: str) -> None:
        """An image ``n`` with a snapshot whose copies fail ("error"), or take 3 s ("hang"), or neither ("")."""
        raise NotImplementedError

    def read_snapshot(self, cluster: int) -> bytes | None:
        """A cluster of the snapshot, None if it can't be read."""
        raise NotImplementedError


class Ours(Side):
    name = "shmcbw"

    def __init__(self, directory: Path) -> None:
        super().__init__(Monitored(directory, "--workers", "1"), directory)
        self._fail: dict[str, int] = {}

    def serve(self, node: str) -> None:
        # As the first command that needs it does; a writer can only come when it is served.
        self.client.execute("block-dirty-bitmap-add", node=node, name="serve")
        self.client.execute("block-dirty-bitmap-remove", node=node, name="serve")

    def unserve(self) -> None:
        self._fail.clear()

    def add_target(self, node: str, path: Path, fail_at: int | None, image: str = "n") -> None:
        self.client.execute("blockdev-add", driver="file", node_name=node, filename=str(path))
        if fail_at is not None:
            self.arm(image, "worker.copying", f"errno:EIO@{fail_at}")

    def arm(self, node: str, name: str, action: str) -> None:
        self.client.execute("x-shmcbw-set-failpoint", node_name=node, name=name, action=action)

    def write(self, cluster: int, byte: int = 0x11, node: str = "n") -> bool:
        nodes = {each["node-name"]: each for each in self.client.execute("query-named-block-nodes")}
        with shmcbw.open(nodes[node]["file"]) as disk:
            try:
                disk.pwrite(bytes([byte]) * CLUSTER, cluster * CLUSTER)
            except OSError:
                return False
        return True

    def add_snapshot(self, policy: str, *, timeout: int, fault: str) -> None:
        self.image()
        self.target("scratch")
        if fault:
            self.arm("n", "worker.copying", "errno:EIO" if fault == "error" else "delay:3000*1")
        options = {"on-cbw-error": policy, "cbw-timeout": timeout}
        self.client.execute(
            "blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target="scratch", **options
        )
        self.client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")

    def read_snapshot(self, cluster: int) -> bytes | None:
        place = {"offset": cluster * CLUSTER, "length": CLUSTER}
        reply = self.client.ask("x-shmcbw-snapshot-read", node_name="access", **place)
        return base64.b64decode(reply["return"]["data"]) if "return" in reply else None


class Theirs(Side):
    name = "qemu"

    def __init__(self, directory: Path) -> None:
        super().__init__(StorageDaemon(directory), directory)
        self.nbd = directory / "nbd.sock"
        address = {"type": "unix", "path": str(self.nbd)}
        self.client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": address["path"]}})
        self._exports: list[str] = []

    def serve(self, node: str) -> None:
        self.client.execute("block-export-add", id=f"e-{node}", type="nbd", node_name=node, name=node, writable=True)
        self._exports.append(f"e-{node}")

    def unserve(self) -> None:
        for export in self._exports:
            self.client.execute("block-export-del", id=export, mode="hard")
            self.client.wait_event("BLOCK_EXPORT_DELETED", lambda data, export=export: data["id"] == export)  # type: ignore[misc]
        self.client.events.clear()
        self._exports.clear()

    def add_target(self, node: str, path: Path, fail_at: int | None, image: str = "n") -> None:
        if fail_at is None:
            self.client.execute("blockdev-add", driver="file", node_name=node, filename=str(path))
            return
        rule: dict[str, Any] = {"event": "none", "iotype": "write", "errno": 5, "once": False}
        if fail_at >= 0:
            rule["sector"] = fail_at * CLUSTER // 512
        self.client.execute(
            "blockdev-add",
            driver="blkdebug",
            node_name=node,
            image={"driver": "file", "filename": str(path)},
            inject_error=[rule],
        )

    def add_snapshot(self, policy: str, *, timeout: int, fault: str) -> None:
        path = self.file("n", random.Random(1).randbytes(SIZE))
        self.client.execute("blockdev-add", driver="file", node_name="n", filename=str(path))
        scratch = self.file("scratch", b"")
        os.truncate(scratch, SIZE)
        self.add_target("scratch", scratch, -1 if fault == "error" else None)
        target = "scratch"
        if fault == "hang":
            limits = {"bps-write": CLUSTER // 4}
            self.client.ask("object-del", id="slow")
            self.client.execute("object-add", qom_type="throttle-group", id="slow", limits=limits)
            target = "slowed"
            self.client.execute(
                "blockdev-add", driver="throttle", node_name=target, file="scratch", throttle_group="slow"
            )
        options = {"on-cbw-error": policy, "cbw-timeout": timeout}
        self.client.execute(
            "blockdev-add", driver="copy-before-write", node_name="cbw", file="n", target=target, **options
        )
        self.client.execute("blockdev-add", driver="snapshot-access", node_name="access", file="cbw")
        for node, name in (("cbw", "n"), ("access", "access")):
            self.client.execute(
                "block-export-add", id=f"e-{name}", type="nbd", node_name=node, name=name, writable=node == "cbw"
            )
            self._exports.append(f"e-{name}")
        if fault == "hang":
            # The first one goes through, the next one waits until its time is paid.
            assert self.write(15)

    def read_snapshot(self, cluster: int) -> bytes | None:
        out = self.file("read", b"")
        server = f"file.driver=nbd,file.server.type=unix,file.server.path={self.nbd},file.export=access"
        place = f"driver=raw,offset={cluster * CLUSTER},size={CLUSTER},{server}"
        command = ["qemu-img", "convert", "-O", "raw", "--image-opts", place, str(out)]
        done = subprocess.run(command, capture_output=True, timeout=60)
        return out.read_bytes() if done.returncode == 0 else None

    def write(self, cluster: int, byte: int = 0x11, node: str = "n") -> bool:
        command = f"write -P {byte} {cluster * CLUSTER} {CLUSTER}"
        url = f"nbd+unix:///{node}?socket={self.nbd}"
        done = subprocess.run(["qemu-io", "-f", "raw", "-c", command, url], capture_output=True, text=True, timeout=60)
        return done.returncode == 0 and "wrote" in done.stdout
