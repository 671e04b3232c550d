"""What a round is made of, and who is killed or stopped when: functions of the seed alone.

The same seed gives the same images, the same random choices of each incarnation of a role, and the same schedule of
decisions.  What these hit is a matter of timing.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from shmcbw.workers.stamps import BLOCK_SIZE, DATA, ZERO, Layout

WRITER, READER, WORKER, COORDINATOR = "writer", "reader", "worker", "coordinator"
POOL, CREW, ALL = "pool", "crew", "all"
KILL, STOP, RESTART = "kill", "stop", "restart"
NOW, BUSY, ORPHAN, CUT, ODD = "now", "busy", "orphan", "cut", "odd"
DROP, START, CLOSE, GROUP, RESIZE = "drop", "start", "close", "group", "resize"

#: What happens, to whom, at which moment, and how often in proportion.
#: POOL: all workers of an image.  CREW: these and the coordinator.  ALL: writers and readers too.
#: BUSY: in a write, in a copy.  ORPHAN: in a copy, when another coordinator has come.  CUT, DROP, CLOSE: in such a call
#: of the coordinator.  GROUP, RESIZE: the same, and it is asked for one.  ODD: in a drained section that a stopped
#: writer makes long.  START: it, and then the next one while that starts.
ACTS: tuple[tuple[str, str, str, float], ...] = (
    (KILL, WRITER, NOW, 3),
    (KILL, WRITER, BUSY, 4),
    (KILL, READER, NOW, 1.5),
    (KILL, WORKER, NOW, 3),
    (KILL, WORKER, BUSY, 4),
    (KILL, WORKER, ORPHAN, 0.4),
    (KILL, POOL, NOW, 0.5),
    (KILL, COORDINATOR, NOW, 0.7),
    (KILL, COORDINATOR, CUT, 1),
    (KILL, COORDINATOR, ODD, 0.4),
    (KILL, COORDINATOR, DROP, 0.5),
    (KILL, COORDINATOR, START, 0.4),
    (KILL, COORDINATOR, CLOSE, 0.3),
    (KILL, COORDINATOR, GROUP, 0.9),
    (KILL, COORDINATOR, RESIZE, 0.6),
    (KILL, CREW, NOW, 0.3),
    (KILL, ALL, NOW, 0.2),
    (STOP, WRITER, NOW, 1),
    (STOP, WRITER, BUSY, 1.5),
    (STOP, READER, NOW, 1),
    (STOP, WORKER, NOW, 1),
    (STOP, WORKER, BUSY, 1.5),
    (STOP, POOL, NOW, 0.8),
    (STOP, COORDINATOR, NOW, 0.7),
    (STOP, COORDINATOR, CUT, 0.7),
    (STOP, COORDINATOR, ODD, 0.5),
    (STOP, COORDINATOR, GROUP, 0.5),
    (STOP, COORDINATOR, RESIZE, 0.3),
    (RESTART, COORDINATOR, NOW, 0.8),
)


@dataclass(frozen=True, slots=True)
class Decision:
    """``pause_s`` after the one before.  ``number``: which writer, reader or worker.
    ``delay_s``: after the moment aimed at.  ``hold_s``: of a stop.
    """

    pause_s: float
    act: str
    role: str
    aim: str
    image: int
    number: int
    delay_s: float
    hold_s: float


def decisions(seed: str, images: int, rate: float) -> Iterator[Decision]:
    """The endless schedule: ``rate`` decisions a second on average."""
    chance = random.Random(f"{seed} decisions")
    weights = [weight for *_, weight in ACTS]
    while True:
        act, role, aim, _ = chance.choices(ACTS, weights)[0]
        yield Decision(
            pause_s=min(chance.expovariate(rate), 5 / rate),
            act=act,
            role=role,
            aim=aim,
            image=chance.randrange(images),
            number=chance.randrange(1 << 16),
            delay_s=chance.random() ** 2 * (0.4 if aim == START else 0.01),
            hold_s=chance.uniform(0.010, 0.300),
        )


def first_decisions(seed: str, images: int, rate: float, count: int) -> list[Decision]:
    return list(itertools.islice(decisions(seed, images, rate), count))


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """One image of a round; sizes in bytes.

    ``sizes``: what it has at first and what it grows to; the last is ``size_bytes``.  ``together``: the directories of
    the images that one coordinator process serves, or nothing if each has its own.  ``daemon``: its coordinator is a
    `shmcbw serve`, driven over QMP.  ``share``: of a CPU, for each writer.  ``sabotage``: see `SABOTAGES`.
    """

    seed: str
    image_id: int
    size_bytes: int
    sizes: tuple[int, ...]
    together: tuple[str, ...]
    initial: int
    cluster_size: int
    writers: int
    readers: int
    workers: int
    slots: int
    cbw_timeout_s: float
    daemon: bool
    share: float
    sabotage: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        return Layout(self.size_bytes, self.writers, self.image_id, self.initial)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> ImagePlan:
        plan = json.loads(path.read_text())
        return cls(**{**plan, **{name: tuple(plan[name]) for name in ("sizes", "together", "sabotage")}})


#: How the tool is shown to be able to fail.  bypass: a writer stores past the filter.  sleep: a writer stands still.
#: litter: a file and a name in /dev/shm are left.  blind: a reader returns the source instead.  apart: the members of a
#: group are cut one after the other.
SABOTAGES = ("bypass", "sleep", "litter", "blind", "apart")

WRITERS_CPU_SHARE = 0.35
DAEMON_CHANCE = 0.35
#: Of one image: shorter than a stop may be, so that snapshots break.
SHORT_TIMEOUT_S = 0.15
RESIZES_MAX = 12


def image_plans(
    seed: str,
    *,
    together: bool,
    images: int,
    writers: int,
    readers: int,
    workers: int,
    size_bytes: int,
    cbw_timeout_s: float,
    sabotage: tuple[str, ...],
) -> list[ImagePlan]:
    """The images of one round: one of them has a short deadline, one grows; ``together``: one process serves all."""
    chance = random.Random(f"{seed} images")
    cpus = len(os.sched_getaffinity(0))
    plans = []
    names = tuple(f"image{image}" for image in range(images)) if together and images > 1 else ()
    short, growing = (chance.randrange(max(2, images)) for _ in range(2))
    for image in range(images):
        blocks = max(size_bytes // BLOCK_SIZE, 48 * writers) + chance.randrange(16)
        image_id = chance.randrange(1, 1 << 62)
        # What an image gets by a resize is zeroes.
        initial = chance.choice((DATA, DATA, ZERO)) if image != growing else ZERO
        layout = Layout(blocks * BLOCK_SIZE, writers, image_id, initial)
        plans.append(
            ImagePlan(
                seed=f"{seed} {image}",
                image_id=image_id,
                size_bytes=layout.size_bytes,
                sizes=_sizes(chance, layout) if image == growing else (layout.size_bytes,),
                together=names,
                initial=initial,
                cluster_size=chance.choice((4, 16, 64, 64, 256)) << 10,
                writers=writers,
                readers=readers,
                workers=workers,
                slots=2 * writers + 2,
                cbw_timeout_s=min(cbw_timeout_s, SHORT_TIMEOUT_S) if image == short else cbw_timeout_s,
                daemon=chance.random() < DAEMON_CHANCE and not names,
                share=min(1.0, WRITERS_CPU_SHARE * cpus / (images * writers)),
                sabotage=sabotage,
            )
        )
    return plans


def _sizes(chance: random.Random, layout: Layout) -> tuple[int, ...]:
    """Where units end, so each is in the image as a whole or not at all; at first some are there of each writer."""
    ends = [unit.offset + unit.length for unit in layout.units]
    later = ends[max(4 * layout.writers, 2 * len(ends) // 5) : -1]
    return (*sorted(chance.sample(later, min(RESIZES_MAX, len(later)))), layout.size_bytes)
