"""The states of a job, the steps between them, and the verbs that each accepts: QEMU's, as two tables.

``python -m shmcbw.workers.job_states`` prints them as DESIGN.md shows them.  Nothing here knows what a backup is.
"""

from __future__ import annotations

from shmcbw.errors import JobStateError

UNDEFINED, CREATED, RUNNING, PAUSED, READY, STANDBY = "undefined", "created", "running", "paused", "ready", "standby"
WAITING, PENDING, ABORTING, CONCLUDED, NULL = "waiting", "pending", "aborting", "concluded", "null"

#: (from, to): what leads there.  The rows with READY and STANDBY are of jobs with two phases; a backup has one.
STEPS = {
    (UNDEFINED, CREATED): "it is made",
    (CREATED, RUNNING): "its cut is taken",
    (CREATED, ABORTING): "cancel",
    (CREATED, NULL): "its transaction came to nothing",
    (RUNNING, PAUSED): "pause, or an error whose action is stop",
    (RUNNING, READY): "no backup",
    (RUNNING, WAITING): "every cluster is copied and the target is synced",
    (RUNNING, ABORTING): "cancel, the snapshot is broken, a copy or the sync failed, or another job of its transaction",
    (PAUSED, RUNNING): "resume; also on the way from paused to aborting",
    (READY, STANDBY): "no backup",
    (READY, WAITING): "no backup",
    (READY, ABORTING): "no backup",
    (STANDBY, READY): "no backup",
    (WAITING, PENDING): "all jobs of its transaction wait",
    (WAITING, ABORTING): "cancel, of any job of its transaction",
    (PENDING, ABORTING): "cancel, or the target can't get its name",
    (PENDING, CONCLUDED): "finalize, at once with auto-finalize: the target has its name",
    (ABORTING, CONCLUDED): "the unfinished target is removed",
    (CONCLUDED, NULL): "dismiss, at once with auto-dismiss: nobody knows of it any more",
}

_BEFORE_THE_END = frozenset({CREATED, RUNNING, PAUSED, READY, STANDBY})
VERBS = {
    "cancel": _BEFORE_THE_END | {WAITING, PENDING},
    "pause": _BEFORE_THE_END,
    "resume": _BEFORE_THE_END,
    "set-speed": _BEFORE_THE_END,
    "change": _BEFORE_THE_END,
    "complete": frozenset({READY}),
    "finalize": frozenset({PENDING}),
    "dismiss": frozenset({CONCLUDED}),
}

STATES = tuple(dict.fromkeys(state for step in STEPS for state in step))


def check_step(job_id: str, state: str, to: str) -> None:
    """AssertionError: a step that no table has is a fault of ours."""
    if (state, to) not in STEPS:
        raise AssertionError(f"job {job_id}: {state} -> {to}")


def check_verb(job_id: str, state: str, verb: str) -> None:
    """JobStateError, with QEMU's text, unless the state accepts the verb."""
    if state not in VERBS[verb]:
        raise JobStateError(f"Job '{job_id}' in state '{state}' cannot accept command verb '{verb}'")


def tables() -> str:
    """Both tables as Markdown."""
    lines = ["| from | to | when |", "| --- | --- | --- |"]
    lines += [f"| {state} | {to} | {when} |" for (state, to), when in STEPS.items()]
    lines += ["", "| verb | accepted in |", "| --- | --- |"]
    lines += [f"| {verb} | {', '.join(s for s in STATES if s in accepted)} |" for verb, accepted in VERBS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables())
