"""QEMU's copy-before-write filter, driven in three ways; the filter itself is the same in all of them.

``qemu-io``   one process, the writes on its command line; it says how long each took.  So: the time inside QEMU, from
              the request to its completion, without anything in front.  This is what we are judged by.
``qemu-img bench``   the same without a look at each write: a mean, back to back, in order.
``fio``       through NBD over a unix socket from qemu-storage-daemon: what another process pays for such a write.

The filter (driver=copy-before-write) has a raw image as its file and an empty sparse file as its target, and copies
clusters of 64 KiB as we do.  It has no queue to hand work to: each copy is a read and a write of its own.

Two ways to do input and output.  ``usual``: cache=writeback, aio=threads, what QEMU does unless it is told otherwise,
and the page cache, as in our mapping.  ``best``: cache=none, aio=native, which on tmpfs does not leave the thread at
all; on a disk it would measure the disk, so there it is not used.

After each run the target must have a copy of each cluster: QEMU must have done what it is measured for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BLOCK = 4096
CLUSTER = 65536
PROMPT = b"qemu-io> "
TIMEOUT_S = 120.0
START_TIMEOUT_S = 10.0

Io = tuple[str, str]
USUAL: Io = ("writeback", "threads")
BEST: Io = ("none", "native")


def missing() -> str:
    """Why there is nothing to compare with; empty if there is."""
    absent = [name for name in ("qemu-io", "qemu-img") if shutil.which(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else ""


def have_fio() -> bool:
    """Whether fio with NBD, and a daemon for it, are installed."""
    if shutil.which("fio") is None or shutil.which("qemu-storage-daemon") is None:
        return False
    said = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    return "nbd" in said.split()


def options(source: Path, target: Path, io: Io = USUAL) -> str:
    """The filter as one --image-opts string."""
    return ",".join(
        ["driver=copy-before-write"]
        + [
            f"{child}.driver=raw,{child}.file.driver=file,{child}.file.filename={path},{child}.file.aio={io[1]}"
            for child, path in (("file", source), ("target", target))
        ]
    )


def empty_target(source: Path, target: Path) -> None:
    """A target as long as the source, one hole."""
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        file.truncate(source.stat().st_size)


def check_copied(target: Path, clusters: int) -> None:
    """RuntimeError unless the target has that many clusters: then nothing was measured that is worth it."""
    copied = target.stat().st_blocks * 512
    if copied < clusters * CLUSTER:
        raise RuntimeError(f"{target}: {copied} bytes of {clusters * CLUSTER} were copied before the writes")


# -- qemu-io -----------------------------------------------------------------------------------------------------------


def write_timed(source: Path, target: Path, offsets: Sequence[int], pause_ns: int, io: Io = USUAL) -> list[float]:
    """Nanoseconds of each write in qemu-io; ``pause_ns`` after its answer before it is given the next."""
    empty_target(source, target)
    command = ["qemu-io", "-t", io[0], "--image-opts", options(source, target, io)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        said = _converse(process, offsets, pause_ns) if pause_ns else _dictate(process, offsets)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    # 4 KiB, 1 ops; 00.00 sec (12.5 MiB/sec and 3200.0000 ops/sec)
    times = [1e9 / float(rate) for rate in re.findall(rb"and ([\d.]+(?:e[+]?\d+)?) ops/sec", said)]
    if len(times) != len(offsets):
        raise RuntimeError(f"qemu-io: {len(times)} of {len(offsets)} writes: {said[-500:].decode(errors='replace')}")
    check_copied(target, len({offset // CLUSTER for offset in offsets}))
    return times


def _command(offset: int) -> bytes:
    return b"write -P 85 %d %d\n" % (offset, BLOCK)


def _dictate(process: subprocess.Popen[bytes], offsets: Sequence[int]) -> bytes:
    """All writes at once; qemu-io does one after the other."""
    return process.communicate(b"".join(map(_command, offsets)), TIMEOUT_S)[0]


def _converse(process: subprocess.Popen[bytes], offsets: Sequence[int], pause_ns: int) -> bytes:
    """One write, its answer, a pause, the next."""
    assert process.stdin is not None and process.stdout is not None
    said = _answer(process, b"")
    for offset in offsets:
        time.sleep(pause_ns / 1e9)
        os.write(process.stdin.fileno(), _command(offset))
        said += _answer(process, b"")
    return said


def _answer(process: subprocess.Popen[bytes], said: bytes) -> bytes:
    """What it says up to its next prompt."""
    assert process.stdout is not None
    while not said.endswith(PROMPT):
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            raise RuntimeError(f"qemu-io ended: {said.decode(errors='replace')}")
        said += more
    return said


# -- qemu-img bench ----------------------------------------------------------------------------------------------------


def bench(source: Path, target: Path, clusters: int, io: Io = USUAL) -> float:
    """Mean nanoseconds of a write to each of the first clusters, in order, back to back."""
    empty_target(source, target)
    command = ["qemu-img", "bench", "-w", "-t", io[0], "-d", "1", "-s", str(BLOCK), "-S", str(CLUSTER)]
    command += ["-c", str(clusters), "--image-opts", options(source, target, io)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    found = re.search(r"completed in ([\d.]+) seconds", said)
    if found is None:
        raise RuntimeError(f"qemu-img bench: {said}")
    check_copied(target, clusters)
    return float(found[1]) * 1e9 / clusters


# -- fio through NBD ---------------------------------------------------------------------------------------------------


def fio_timed(source: Path, target: Path, offsets: Sequence[int], pause_ns: int) -> dict[str, float]:
    """Nanoseconds of writes through NBD, by percentile: "50.000000", "99.000000", "99.900000"."""
    empty_target(source, target)
    script = target.with_suffix(".iolog")
    lines = ["fio version 2 iolog", "nbd add", "nbd open", *(f"nbd write {offset} {BLOCK}" for offset in offsets)]
    script.write_text("\n".join([*lines, "nbd close", ""]))
    with daemon(source, target) as socket:
        command = ["fio", "--name=writes", "--ioengine=nbd", f"--uri=nbd+unix:///e?socket={socket}", "--iodepth=1"]
        command += [f"--read_iolog={script}", f"--thinktime={pause_ns // 1000}", f"--size={source.stat().st_size}"]
        command += ["--clat_percentiles=0", "--lat_percentiles=1", "--percentile_list=50:99:99.9"]
        command += ["--output-format=json"]
        done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    # Lines about the connection come before the object.
    writes = json.loads(done.stdout[done.stdout.index("{\n") :])["jobs"][0]["write"]
    if writes["total_ios"] != len(offsets):
        raise RuntimeError(f"fio: {writes['total_ios']} of {len(offsets)} writes")
    check_copied(target, len({offset // CLUSTER for offset in offsets}))
    found: dict[str, float] = writes["lat_ns"]["percentile"]
    return {**found, "max": writes["lat_ns"]["max"], "mean": writes["lat_ns"]["mean"]}


@contextmanager
def daemon(source: Path, target: Path, *, snapshot: bool = False) -> Iterator[Path]:
    """qemu-storage-daemon with the filter as NBD export "e", or with its snapshot as that, and its socket."""
    socket = target.with_suffix(".nbd")
    command = ["qemu-storage-daemon"]
    for name, path in (("source", source), ("target", target)):
        command += ["--blockdev", f"driver=file,node-name={name},filename={path}"]
    command += ["--blockdev", "driver=copy-before-write,node-name=filter,file=source,target=target"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    if snapshot:
        command += ["--blockdev", "driver=snapshot-access,node-name=access,file=filter"]
        command += ["--export", "type=nbd,id=e,node-name=access,name=e"]
    else:
        command += ["--export", "type=nbd,id=e,node-name=filter,name=e,writable=on"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"qemu-storage-daemon does not serve (exit status {process.returncode})")
            time.sleep(0.01)
        yield socket
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)
