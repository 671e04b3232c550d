"""Torture: random writes, zeroes, discards, cuts, snapshot reads, cancels, while everybody is killed and stopped.

    python tools/torture.py --seconds 60                   a minute of it
    python tools/torture.py --seconds 60 --seed 7          the same schedule of decisions again
    python tools/torture.py --keep DIR ...                 keep the directory of a round that failed
    python tools/torture.py --judge DIR/round-3            judge a kept round again, from its files

Every write is stamped and logged by its writer.  From these logs alone an independent judge decides whether each
finished backup and each snapshot read was exactly one instant; see tools/torturing.  Prints what was done and what
failed; exit status 1 on any mismatch, hang, leak or error, 2 if it could not be done at all, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.torturing import plan
from tools.torturing.evidence import Evidence
from tools.torturing.figures import Figures, lines, never_happened
from tools.torturing.place import Place
from tools.torturing.storm import Interrupted, Storm
from tools.torturing.together import judge_groups
from tools.torturing.watch import SHM

PROGRESS_S = 5.0
#: A run that is as long must have played everything.
PLAYED_S = 120.0
#: What rounds in memory may need at most.
MEMORY_BYTES = 4 << 30


class _Interrupt:
    """SIGINT and SIGTERM as a flag, so that no clean-up is cut short."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = True

    def __call__(self) -> bool:
        return self.received


class _Progress:
    """A line every few seconds, where somebody looks."""

    def __init__(self, total: Figures) -> None:
        self._total = total
        self._started_s = time.monotonic()
        self._shown_s = self._started_s
        self._shown = sys.stderr.isatty()

    def __call__(self, now: Figures) -> None:
        if not self._shown or time.monotonic() - self._shown_s < PROGRESS_S:
            return
        self._shown_s = time.monotonic()
        both = Figures()
        both.add(self._total)
        both.add(now)
        found = both.as_dict()
        kills = ", ".join(f"{count} {role}" for role, count in found.get("kills", {}).items())
        print(
            f"{self._shown_s - self._started_s:6.0f} s  round {both.rounds}: {found['cycles']} cycles ({kills}); "
            f"{found['mismatches']} mismatches, {found['hangs']} hangs, {found['leaks']} leaks",
            file=sys.stderr,
            flush=True,
        )


def torture(options: argparse.Namespace, interrupt: _Interrupt) -> Figures:
    """Rounds until the time is over; judged one by one, each in a directory of its own that is removed."""
    total = Figures()
    with contextlib.ExitStack() as stack:
        places = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-", dir=base)))
            for base in _bases(options.directory)
        ]
        _play(options, interrupt, places, total)
    return total


def _bases(directory: Path | None) -> list[Path]:
    """Where the rounds are, in turn: on the temporary directory's disk, and in memory where there is room."""
    if directory is not None:
        return [directory]
    bases = [Path(tempfile.gettempdir())]
    if SHM.is_dir() and shutil.disk_usage(SHM).free >= MEMORY_BYTES:
        bases.append(SHM)
    return bases


def _play(options: argparse.Namespace, interrupt: _Interrupt, places: Sequence[Path], total: Figures) -> None:
    progress = _Progress(total)
    until = time.monotonic() + options.seconds
    try:
        while not total.rounds or (time.monotonic() < until and not interrupt()):
            seed = f"{options.seed} {total.rounds}"
            plans = plan.image_plans(
                seed,
                # On disk and in memory.
                together=total.rounds % 4 in (0, 3),
                images=options.images,
                writers=options.writers,
                readers=options.readers,
                workers=options.workers,
                size_bytes=options.size << 20,
                cbw_timeout_s=options.cbw_timeout,
                sabotage=tuple(options.sabotage),
            )
            place = places[total.rounds % len(places)] / f"round-{total.rounds}"
            place.mkdir()
            storm = Storm(place, seed, plans, options.rate, places[0] / "cache", interrupt, progress)
            left = until - time.monotonic()
            # A round that would be too short for anything is made part of the one before.
            seconds = left if left < 1.5 * options.round else options.round
            try:
                storm.run(max(1.0, seconds))
            finally:
                total.add(storm.figures)
            if storm.figures.failed and options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                shutil.move(place, options.keep / place.name)
            else:
                shutil.rmtree(place)
    except Interrupted:
        pass


def judge_again(directory: Path) -> Figures:
    """The judgement of a round that was kept."""
    figures = Figures(rounds=1)
    evidences = [Evidence(Place(image)) for image in sorted(directory.glob("image*"))]
    for evidence in evidences:
        figures.add(evidence.judge())
    figures.add(judge_groups(evidences))
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/torture.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of torture; what judges them comes on top")
    parser.add_argument("--seed", type=int, help="of all random decisions (default: random, and printed)")
    parser.add_argument("--images", type=int, default=2, help="images at once, each with a coordinator")
    parser.add_argument("--writers", type=int, default=2, help="writer processes of each image")
    parser.add_argument("--readers", type=int, default=1, help="processes that read snapshots of each image")
    parser.add_argument("--workers", type=int, default=2, help="copy workers of each image")
    parser.add_argument("--size", type=int, default=6, metavar="MIB", help="of each image")
    parser.add_argument("--rate", type=float, default=8, help="kills, stops and restarts a second")
    parser.add_argument("--round", type=float, default=20, metavar="SECONDS", help="how long one set of images lasts")
    parser.add_argument(
        "--cbw-timeout",
        type=float,
        default=5,
        metavar="SECONDS",
        help="what a write may wait; on one of the images less",
    )
    parser.add_argument(
        "--directory", type=Path, help="where the images are (default: the temporary directory and memory, in turn)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep rounds that failed here")
    parser.add_argument("--judge", type=Path, metavar="DIR", help="judge a round that was kept, and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--sabotage", action="append", choices=plan.SABOTAGES, default=[], help="something that must be found"
    )
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1, 1 << 31)
    for name in ("seconds", "images", "writers", "readers", "workers", "size", "rate", "round", "cbw_timeout"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    interrupt = _Interrupt()
    started = time.monotonic()
    figures = judge_again(options.judge) if options.judge is not None else torture(options, interrupt)
    if options.judge is None and options.seconds >= PLAYED_S and not interrupt():
        for name in never_happened(figures):
            figures.fail("error", "the whole run", f"{name}: not once in {options.seconds:.0f} s")
    if options.json:
        print(json.dumps({"seed": options.seed, "took_s": round(time.monotonic() - started, 3), **figures.as_dict()}))
    else:
        print("\n".join([f"seed        {options.seed}", *lines(figures)]))
    if figures.failed:
        return 1
    return 130 if interrupt() else 0


if __name__ == "__main__":
    sys.exit(main())
