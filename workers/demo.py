"""The demo: writers hammer an image, a backup and a plain ``cp`` run at the same time, and both copies are judged.

    run_demo ── Coordinator ── copy workers
        ├────── writer processes: python -m shmcbw.workers.demo DIRECTORY NUMBER
        └────── cp

A writer rewrites its units (`stamps.py`) in random order through `shmcbw.open`, one write call each, and logs when each
began and had returned.  From these logs alone follows whether a copy shows the image at one instant.  The backup must;
``cp`` does not, and that is what backups are for.

Writers get names, never handles: the directory has the plan, and a file of one byte that says stop.  They leave by
themselves when their parent is gone.  Owned here: those processes, the directory, and the signals SIGINT and SIGTERM
while processes run; both only set a flag, so that no clean-up is cut short.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import shmcbw
from shmcbw.errors import CutAbandonedError, ShmcbwError
from shmcbw.sizes import format_ns, format_size

from .coordinator import Coordinator
from .job_states import CONCLUDED, RUNNING
from .jobs import Job
from .stamps import BLOCK_SIZE, UNIT_BLOCKS_MAX, Layout, Log, LogWriter, Verdict, check, make_image, make_unit

IMAGE, BACKUP, CP, PLAN, STOP, RESULT = "disk.img", "backup.img", "cp.img", "plan.json", "stop", "demo.json"

CUT_TRIES = 10
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
COPY_TIMEOUT_S = 60.0
LOOK_S = 0.01
FOLLOW_S = 0.002
#: The cut's time is wall clock.  Of the conversion to the logs' clock we trust this much.
CLOCK_SLACK_NS = 100_000


# -- the writer --------------------------------------------------------------------------------------------------------


def _write_on(directory: Path, number: int) -> None:
    """A writer process: write until told to stop, until the parent is gone, or until the plan's time is over."""
    plan = json.loads((directory / PLAN).read_text())
    layout = Layout(**plan["layout"])
    units = layout.units_of(number)
    chance = random.Random(f"{layout.seed} {number}")
    parent, share, until = plan["parent"], plan["share"], plan["until"]
    log = LogWriter(directory / f"writer-{number}.log")
    with (
        (directory / STOP).open("rb") as file,
        mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ) as stop,
        shmcbw.open(directory / IMAGE) as disk,
    ):
        while not stop[0] and os.getppid() == parent and time.monotonic() < until:
            started = time.monotonic()
            unit = chance.choice(units)
            data = make_unit(layout, unit, log.sequence)
            log.begin(unit)
            disk.pwrite(data, unit.offset)
            log.end()
            if share < 1:
                time.sleep((time.monotonic() - started) * (1 / share - 1))
        statistics = disk.statistics()
    log.close()
    (directory / f"writer-{number}.json").write_text(json.dumps(statistics))


def _cpu_share(writers: int) -> float:
    """How much of a CPU each writer takes: together half of what there is, so that others can show what they do."""
    return min(1.0, len(os.sched_getaffinity(0)) / 2 / writers)


# -- the processes -----------------------------------------------------------------------------------------------------


class _Interrupts:
    """SIGINT and SIGTERM as a flag, in the main thread; elsewhere the process's owner has them."""

    def __init__(self) -> None:
        self._received = 0

    def check(self) -> None:
        if self._received:
            raise KeyboardInterrupt

    def __enter__(self) -> _Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number


class _Writers:
    """The writer processes."""

    def __init__(self, directory: Path, layout: Layout, seconds: float) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        plan = {
            "layout": {"size_bytes": layout.size_bytes, "writers": layout.writers, "seed": layout.seed},
            "parent": os.getpid(),
            "share": _cpu_share(layout.writers),
            # Where nobody tells them to stop and the parent lives on.
            "until": time.monotonic() + seconds + START_TIMEOUT_S + COPY_TIMEOUT_S,
        }
        (directory / PLAN).write_text(json.dumps(plan))
        (directory / STOP).write_bytes(b"\0")
        self._count = layout.writers

    def start(self, interrupts: _Interrupts) -> None:
        """Start them; returns when each has written."""
        for number in range(self._count):
            command = [sys.executable, "-P", "-m", "shmcbw.workers.demo", str(self._directory), str(number)]
            with self._file(number, "err").open("wb") as errors:
                self._processes.append(
                    # A group of their own: a terminal's Ctrl-C is the parent's to judge.
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors, process_group=0)
                )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(self._logged(number) for number in range(self._count)):
            interrupts.check()
            self.check()
            if time.monotonic() > deadline:
                raise ShmcbwError(f"the writers did not begin to write within {START_TIMEOUT_S:.0f} s")
            time.sleep(LOOK_S)

    def check(self) -> None:
        """ShmcbwError with a writer's own words if one has ended that should not."""
        for number, process in enumerate(self._processes):
            if process.poll() is not None:
                raise self._failure(number, process)

    def stop(self) -> None:
        """Have them stop and wait for it; ShmcbwError if one did not end well."""
        self._tell()
        for number, process in enumerate(self._processes):
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise ShmcbwError(f"writer {number} did not stop within {STOP_TIMEOUT_S:.0f} s") from None
            if process.returncode:
                raise self._failure(number, process)

    def kill(self) -> None:
        """The end of whoever is left."""
        self._tell()
        deadline = time.monotonic() + 1
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def logs(self, layout: Layout) -> list[Log]:
        return [Log.read(self._file(number, "log"), layout) for number in range(self._count)]

    def statistics(self) -> list[dict[str, Any]]:
        return [json.loads(self._file(number, "json").read_text()) for number in range(self._count)]

    def _file(self, number: int, kind: str) -> Path:
        return self._directory / f"writer-{number}.{kind}"

    def _logged(self, number: int) -> bool:
        try:
            return self._file(number, "log").stat().st_size > 0
        except FileNotFoundError:
            return False

    def _tell(self) -> None:
        # In place: the writers have the file mapped.
        with contextlib.suppress(FileNotFoundError), (self._directory / STOP).open("r+b") as file:
            file.write(b"\1")

    def _failure(self, number: int, process: subprocess.Popen[bytes]) -> ShmcbwError:
        words = self._file(number, "err").read_text(errors="replace").strip()
        return ShmcbwError(f"writer {number} ended, status {process.returncode}: {words or 'it said nothing'}")


class _PlainCopy:
    """``cp`` of the live image, as a user without a backup tool would do it."""

    def __init__(self, directory: Path) -> None:
        self.started_ns = time.monotonic_ns()
        self.took_ns = 0
        self.error: str | None = None
        command = ["cp", "--reflink=never", "--sparse=never", str(directory / IMAGE), str(directory / CP)]
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
            )
        except OSError as error:
            self.error = f"cp can't be run: {error.strerror}"

    def ended(self) -> bool:
        """Whether it has ended, well or with an `error`."""
        if self._process is not None and self._process.poll() is not None:
            self.took_ns = time.monotonic_ns() - self.started_ns
            words = self._process.communicate()[1].strip()
            if self._process.returncode:
                self.error = words or f"cp ended with status {self._process.returncode}"
            self._process = None
        return self._process is None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# -- what happened -----------------------------------------------------------------------------------------------------


@dataclass
class _Backup:
    """Times of the backup job, and its cut on the logs' clock."""

    job: Job
    abandoned_cuts: int
    cut_ns: int | None
    started_ns: int
    copied_ns: int = 0
    done_ns: int = 0


@dataclass
class _Waits:
    """Waits of writers for a copy, all writers together."""

    count: int = 0
    longest_ns: int = 0
    histogram: dict[int, int] = field(default_factory=dict)

    def add(self, statistics: dict[str, Any]) -> None:
        self.count += statistics["wait_count"]
        self.longest_ns = max(self.longest_ns, statistics["wait_max_ns"])
        for bound, count in statistics["wait_histogram_ns"].items():
            self.histogram[int(bound)] = self.histogram.get(int(bound), 0) + count

    def quantile(self, share: float) -> int:
        """The upper bound (a power of two ns, or the longest) that this share of the waits did not exceed."""
        seen = 0
        for bound, count in sorted(self.histogram.items()):
            seen += count
            if seen >= share * self.count:
                return min(bound, self.longest_ns)
        return self.longest_ns


def _wall_offset_ns() -> int:
    """Wall clock minus CLOCK_MONOTONIC, from the closest of a few pairs of looks."""
    looks = []
    for _ in range(10):
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        looks.append((after - before, wall - (before + after) // 2))
    return min(looks)[1]


def _back_up(coordinator: Coordinator, target: Path) -> _Backup:
    """Take the cut.  On a machine that is short of CPUs a writer may be stopped in mid-write: then again."""
    for abandoned in range(CUT_TRIES):
        offset_before = _wall_offset_ns()
        try:
            job = coordinator.backup(target)
        except CutAbandonedError:
            if abandoned == CUT_TRIES - 1:
                raise
            continue
        offset = _wall_offset_ns()
        # Somebody has set the clock: there is no telling when the cut was.
        known = abs(offset - offset_before) < CLOCK_SLACK_NS
        return _Backup(job, abandoned, job.cut_time_ns - offset if known else None, time.monotonic_ns())
    raise AssertionError("unreachable")


def _load_rich() -> None:
    """Before time counts: it takes a fifth of a second."""
    with contextlib.suppress(ImportError):
        import rich.console
        import rich.progress  # noqa: F401


@contextlib.contextmanager
def _progress(total_bytes: int, stream: TextIO | None) -> Iterator[Callable[[int], None]]:
    """A progress bar, or a line now and then, or nothing: a function to call with the bytes done."""
    if stream is None:
        yield lambda _: None
        return
    try:
        import rich.console
        import rich.progress
    except ImportError:
        shown_s = time.monotonic()

        def show(done_bytes: int) -> None:
            nonlocal shown_s
            if time.monotonic() - shown_s >= 1:
                shown_s = time.monotonic()
                print(f"     {format_size(done_bytes)} of {format_size(total_bytes)}", file=stream, flush=True)

        yield show
        return
    columns = (
        rich.progress.TextColumn("     backup"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TransferSpeedColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(file=stream)) as bar:
        task = bar.add_task("backup", total=total_bytes)
        yield lambda done_bytes: bar.update(task, completed=done_bytes)


def _follow(
    backup: _Backup, cp: _PlainCopy, writers: _Writers, interrupts: _Interrupts, until: float, stream: TextIO | None
) -> None:
    """Wait until both copies are done and the writers have had their time; raise what went wrong."""
    job = backup.job
    deadline = max(until, time.monotonic() + COPY_TIMEOUT_S)
    with _progress(job.progress().total_bytes, stream) as show:
        while not backup.done_ns:
            interrupts.check()
            writers.check()
            cp.ended()
            status = job.status
            if status != RUNNING and not backup.copied_ns:
                backup.copied_ns = time.monotonic_ns()
            if status == CONCLUDED:
                backup.done_ns = time.monotonic_ns()
            elif time.monotonic() > deadline:
                raise ShmcbwError(f"the backup is not complete after {COPY_TIMEOUT_S:.0f} s")
            show(job.progress().current_bytes)
            time.sleep(FOLLOW_S)
    job.wait(0)
    while not cp.ended() or time.monotonic() < until:
        interrupts.check()
        writers.check()
        if time.monotonic() > deadline:
            raise ShmcbwError(f"cp is not complete after {COPY_TIMEOUT_S:.0f} s")
        time.sleep(FOLLOW_S)


# -- the demo ----------------------------------------------------------------------------------------------------------


def run_demo(
    size_bytes: int, writers: int, workers: int, seconds: float, keep: str | None, json_output: bool, stream: TextIO
) -> int:
    """Run the demo and tell on ``stream``, in words or as one JSON object: 0 if the backup is exactly one instant.

    Works in ``keep``, an empty or new directory that stays, or in a temporary one.  Blocks for ``seconds`` and what
    the copies and the check take, a few seconds more.  ValueError: size, number of writers or directory can't be
    used.  ShmcbwError: a process failed, in its own words.  KeyboardInterrupt: SIGINT or SIGTERM came.  Whatever is
    raised, all processes have ended and what is temporary is gone.
    """
    layout = Layout(size_bytes, writers, int.from_bytes(os.urandom(4), "little"))
    directory = _make_directory(keep)
    try:
        with _Interrupts() as interrupts:
            result, lines = _run(directory, layout, workers, seconds, interrupts, None if json_output else stream)
        if keep is not None:
            (directory / RESULT).write_text(json.dumps(result, indent=2) + "\n")
            lines.append(f"Kept in {directory}: {IMAGE}, {BACKUP}, {CP}, the writers' logs and {RESULT}.")
    finally:
        if keep is None:
            shutil.rmtree(directory, ignore_errors=True)
    if json_output:
        print(json.dumps(result), file=stream, flush=True)
    else:
        print("\n".join(lines), file=stream, flush=True)
    return 0 if result["right"] else 1


def _make_directory(keep: str | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="shmcbw-demo-"))
    directory = Path(keep).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ValueError(f"{keep} is not empty: the demo needs a directory of its own")
    return directory


def _check_space(directory: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the demo needs {format_size(needed_bytes)} in {directory} for an image and two copies, "
            f"{format_size(free_bytes)} are free",
        )


def _run(
    directory: Path, layout: Layout, workers: int, seconds: float, interrupts: _Interrupts, stream: TextIO | None
) -> tuple[dict[str, Any], list[str]]:
    """The demo itself: its result as plain data, and as the lines that come last."""

    def tell(text: str) -> None:
        if stream is not None:
            print(text, file=stream, flush=True)

    if stream is not None:
        _load_rich()
    tell(f"A backup of a disk image while {_some(layout.writers, 'process', 'es')} write to it, and a cp to compare.\n")
    _check_space(directory, 3 * layout.size_bytes)
    make_image(directory / IMAGE, layout)
    tell(
        f"  1  Made an image of {format_size(layout.size_bytes)}: {layout.size_bytes // BLOCK_SIZE} blocks of 4 KiB in "
        f"{len(layout.units)} units.\n"
        f"     A unit (1 to {UNIT_BLOCKS_MAX} blocks) is always written as a whole; each block says by which write."
    )
    interrupts.check()
    team = _Writers(directory, layout, seconds)
    cp: _PlainCopy | None = None
    with Coordinator(directory / IMAGE, workers=workers, slots=max(64, layout.writers)) as coordinator:
        try:
            tell(f"  2  Started a coordinator with {_some(workers, 'copy worker')}.")
            team.start(interrupts)
            until = time.monotonic() + seconds
            tell(f"  3  Started {_some(layout.writers, 'writer process', 'es')}: random units, every write logged.")
            while time.monotonic() < until - 0.6 * seconds:
                interrupts.check()
                team.check()
                time.sleep(LOOK_S)
            tell("  4  In the middle of that: a backup, and a plain cp of the same image beside it.")
            backup = _back_up(coordinator, directory / BACKUP)
            cp = _PlainCopy(directory)
            tell(
                f"     The cut is taken; for it, writes were held for {format_ns(backup.job.drained_ns)}"
                + (f" (after {_some(backup.abandoned_cuts, 'cut')} given up)." if backup.abandoned_cuts else ".")
            )
            _follow(backup, cp, team, interrupts, until, stream)
            team.stop()
        finally:
            team.kill()
            if cp is not None:
                cp.kill()
    tell("  5  Stopped the writers.  Judging both copies by the writers' logs ...")
    logs = team.logs(layout)
    interrupts.check()
    verdict = check(directory / BACKUP, logs, layout)
    interrupts.check()
    cp_verdict = check(directory / CP, logs, layout) if cp.error is None else None
    waits = _Waits()
    for statistics in team.statistics():
        waits.add(statistics)
    result = _result(layout, workers, backup, logs, waits, verdict, cp, cp_verdict)
    return result, _lines(result)


def _result(
    layout: Layout,
    workers: int,
    backup: _Backup,
    logs: list[Log],
    waits: _Waits,
    verdict: Verdict,
    cp: _PlainCopy,
    cp_verdict: Verdict | None,
) -> dict[str, Any]:
    writes = sum(log.writes for log in logs)
    written = sum(layout.units[unit].length for log in logs for unit in log.units[1:])
    wrote_ns = max(log.ends_ns[-1] for log in logs) - min(log.begins_ns[1] for log in logs)
    progress = backup.job.progress()
    copying_ns = backup.copied_ns - backup.started_ns
    cut_in_window = None if backup.cut_ns is None else verdict.holds(backup.cut_ns, CLOCK_SLACK_NS)
    return {
        "right": verdict.right and cut_in_window is not False,
        "layout": {"size_bytes": layout.size_bytes, "writers": layout.writers, "seed": layout.seed},
        "copy_workers": workers,
        "writes": {
            "count": writes,
            "bytes": written,
            "per_second": writes * 1e9 / wrote_ns,
            "bytes_per_second": written * 1e9 / wrote_ns,
            "longest_ns": max(max(map(int.__sub__, log.ends_ns, log.begins_ns)) for log in logs),
        },
        "waits": {
            "count": waits.count,
            "p50_ns": waits.quantile(0.5),
            "p99_ns": waits.quantile(0.99),
            "max_ns": waits.longest_ns,
        },
        "backup": {
            "drained_ns": backup.job.drained_ns,
            "cuts_abandoned": backup.abandoned_cuts,
            "cut_ns": backup.cut_ns,
            "cut_in_window": cut_in_window,
            "copying_ns": copying_ns,
            "took_ns": backup.done_ns - backup.started_ns,
            "bytes_per_second": layout.size_bytes * 1e9 / copying_ns,
            "copied_for_writers_bytes": progress.copied_for_writers_bytes,
            "verdict": verdict.as_dict(),
        },
        "cp": {
            "error": cp.error,
            "took_ns": cp.took_ns,
            "verdict": cp_verdict.as_dict() if cp_verdict else None,
        },
    }


def _lines(result: dict[str, Any]) -> list[str]:
    """The end of the story."""
    writes, waits, backup, cp = result["writes"], result["waits"], result["backup"], result["cp"]
    size = result["layout"]["size_bytes"]
    share = backup["copied_for_writers_bytes"] / size
    lines = [
        "",
        f"Writers   {writes['count']} writes, {writes['per_second']:.0f} a second "
        f"({format_size(writes['bytes_per_second'])}/s); the longest took {format_ns(writes['longest_ns'])}.",
        f"          {waits['count']} were the first to touch old data and waited until it was copied"
        + (":" if waits["count"] else "."),
    ]
    if waits["count"]:
        lines.append(
            f"          half of them at most {format_ns(waits['p50_ns'])}, 99 % at most {format_ns(waits['p99_ns'])}, "
            f"the longest {format_ns(waits['max_ns'])}."
        )
    lines += [
        f"Backup    {format_size(size)} copied in {format_ns(backup['copying_ns'])} "
        f"({format_size(backup['bytes_per_second'])}/s; {share:.0%} of it because a writer waited),",
        f"          synced and in place after {format_ns(backup['took_ns'])}.",
        *_judgement(backup["verdict"]),
    ]
    if backup["cut_in_window"] is None:
        lines.append("          Somebody has set the clock meanwhile: whether that is the cut's time is not known.")
    elif backup["verdict"]["right"] and not backup["cut_in_window"]:
        lines.append("          WRONG all the same: it is not the instant of the cut.")
    elif backup["verdict"]["right"]:
        low, high = backup["verdict"]["windows"][0][0], backup["verdict"]["windows"][-1][1]
        lines.append(f"          The logs leave {format_ns(high - low)} for that instant, and the cut's time is in it.")
    if cp["verdict"] is None:
        lines.append(f"cp        {cp['error']}")
    else:
        lines += [f"cp        took {format_ns(cp['took_ns'])}.", *_judgement(cp["verdict"])]
    lines += ["", "The backup is right." if result["right"] else "The backup is WRONG."]
    return lines


def _judgement(verdict: dict[str, Any]) -> list[str]:
    """A verdict for a newcomer."""
    if verdict["right"]:
        return [f"          RIGHT: all {verdict['blocks']} blocks show one and the same instant."]
    lines = ["          WRONG: it shows no instant."]
    if verdict["stray_units"]:
        lines.append(
            f"          {verdict['stray_units']} of {verdict['units']} units are from another time than the others, "
            f"up to {format_ns(verdict['worst_miss_ns'])} off."
        )
    if verdict["torn_units"]:
        lines.append(f"          Torn, part of one write and part of another: {_some(verdict['torn_units'], 'unit')}.")
    if verdict["corrupt_blocks"]:
        lines.append(f"          Not as any write has made them: {_some(verdict['corrupt_blocks'], 'block')}.")
    return lines


def _some(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


if __name__ == "__main__":
    try:
        _write_on(Path(sys.argv[1]), int(sys.argv[2]))
    except (OSError, ShmcbwError) as problem:
        sys.exit(f"{type(problem).__name__}: {problem}")
