"""Exhaustive breadth-first search with shortest counter-examples.

Knows states and steps as opaque values; what they mean is said elsewhere. Every
state reached is kept with the state it was first reached from. The first state
with a broken property ends the search, and since all states at fewer steps have
been judged before, no counter-example is shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tools.model.world import Step
from tools.model.worlds import Anyone, kind_of


@dataclass(frozen=True)
class Verdict:
    """What a search found.

    ``states`` is how many different states were reached, ``depth`` the length in steps of
    the longest shortest way to one. ``broken`` names the property that does not hold, or is
    empty; ``what`` then says what is wrong and ``trace`` is the way to it: the first state
    as a step called "start", and every step with the state after it.
    """

    states: int
    depth: int
    broken: str
    what: str
    trace: tuple[Step, ...]

    @property
    def steps(self) -> int:
        """Length of the counter-example."""
        return max(0, len(self.trace) - 1)


class TooManyStates(RuntimeError):
    """The search was given up at its limit of states: no verdict."""


class Search:
    """One search: a protocol in a scenario, judged by some properties (None: by all of its kind of world).

    ``reduced=False`` keeps all states apart and does kills that can make no difference.
    """

    def __init__(
        self,
        protocol: Callable[..., Any],
        scenario: Anyone,
        *,
        judged: Iterable[str] | None = None,
        reduced: bool = True,
    ) -> None:
        kind = kind_of(scenario)
        self._judged = {name: kind.properties[name] for name in judged or kind.properties}
        self.protocol = protocol(
            scenario,
            judge_means=any(name in kind.means for name in self._judged),
            every_kill=not reduced,
        )
        self.reductions = kind.reductions(self.protocol)
        self._reduced = reduced

    def run(self, limit_states: int = 20_000_000) -> Verdict:
        """Visit everything. Raises TooManyStates at the limit."""
        first = self.protocol.layout.first_state()
        came_from: dict[bytes, bytes] = {first: b""}
        frontier = [first]
        depth = 0
        while frontier:
            found: list[bytes] = []
            for state in frontier:
                for step in self.protocol.steps(state):
                    if step[2] in came_from or (new := self.key(step[2])) in came_from:
                        continue
                    came_from[new] = state
                    found.append(new)
                    for name, broken_in in self._judged.items():
                        if broken := broken_in(self.protocol, new):
                            trace = self._replay(came_from, new)
                            return Verdict(len(came_from), depth + 1, name, broken, trace)
            if len(came_from) > limit_states:
                raise TooManyStates(f"more than {limit_states} states at {depth} steps")
            frontier = found
            depth += 1
        return Verdict(len(came_from), depth - 1, "", "", ())

    def reachable(self) -> set[bytes]:
        """All states, judged by nothing."""
        found = {self.protocol.layout.first_state()}
        waiting = list(found)
        while waiting:
            for step in self.protocol.steps(waiting.pop()):
                if (new := self.key(step[2])) not in found:
                    found.add(new)
                    waiting.append(new)
        return found

    def _normal(self, state: bytes) -> bytes:
        return self.reductions.normal(state) if self._reduced else state

    def key(self, state: bytes) -> bytes:
        """The state that stands for all that behave like this one."""
        if not self._reduced:
            return state
        return self.reductions.representative(self.reductions.normal(state))

    def _replay(self, came_from: dict[bytes, bytes], last: bytes) -> tuple[Step, ...]:
        """Do the steps again, with every process keeping its name.

        ``came_from`` is about representatives, in which writers may have changed places.
        """
        way = [last]
        while came_from[way[-1]]:
            way.append(came_from[way[-1]])
        state = self.protocol.layout.first_state()
        trace: list[Step] = [("start", 0, state)]
        for wanted in reversed(way[:-1]):
            steps = self.protocol.steps(state)
            name, number, state = next(step for step in steps if self.key(step[2]) == wanted)
            state = self._normal(state)
            trace.append((name, number, state))
        return tuple(trace)


def longest_run(search: Search) -> int | None:
    """Steps of the longest run, or None if a run can go on without end.

    With this, "nobody has a step left only at the end" says that every run gets there,
    whoever is scheduled when. For scenarios without a reader, which reads for ever.
    """
    protocol = search.protocol
    first = protocol.layout.first_state()
    follow: dict[bytes, set[bytes]] = {}
    waiting = [first]
    arrivals = {first: 0}
    while waiting:
        state = waiting.pop()
        follow[state] = {search.key(step[2]) for step in protocol.steps(state)}
        for new in follow[state]:
            if new not in arrivals:
                arrivals[new] = 0
                waiting.append(new)
            arrivals[new] += 1
    length = {first: 0}
    ready = [first]
    while ready:
        state = ready.pop()
        for new in follow.pop(state):
            length[new] = max(length.get(new, 0), length[state] + 1)
            arrivals[new] -= 1
            if not arrivals[new]:
                ready.append(new)
    return None if follow else max(length.values())
