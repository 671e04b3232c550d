"""The words of a state of a resize, for people."""

from __future__ import annotations

from tools.model.resize.state import (
    ANNOUNCED,
    CLUSTER,
    FILE,
    GENERATION,
    HANDLE_SIZE,
    HEADER,
    SEGMENT,
    WORKER_LOCKED,
    WORKER_SIZE,
    WORKER_TOLD,
    Cluster,
    ResizeLayout,
)
from tools.model.state import name_of

SIZES = ("old", "new")


def resize_words(at: ResizeLayout, state: bytes) -> dict[str, str]:
    """The words of a state by name, as text."""
    found = {
        "size of the image": SIZES[state[FILE]],
        "size of the segment": SIZES[state[SEGMENT]],
        "image_size": SIZES[state[HEADER]],
        "resize_to": ("0", "new")[state[ANNOUNCED]],
        "generation": str(state[GENERATION]),
        "the cluster": name_of(Cluster, state[CLUSTER]),
        "size of the handle": SIZES[state[HANDLE_SIZE]],
    }
    for number, w in enumerate(at.worker, 1):
        found[f"worker {number}"] = (
            f"{SIZES[state[w + WORKER_SIZE]]} size, of generation {state[w + WORKER_TOLD]}, "
            f"lock {'held' if state[w + WORKER_LOCKED] else 'free'}"
        )
    return found
