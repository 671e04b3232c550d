"""What is searched: the worlds of one image and those of two, and for each kind what a search needs to know of it."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tools.model import mutations, protocol, reductions, scenarios, trace
from tools.model.group.mutations import GROUP_MUTATION_STEPS, GROUP_MUTATIONS
from tools.model.group.properties import GROUP_PROPERTIES
from tools.model.group.protocol import GROUP_STEPS, GroupProtocol
from tools.model.group.reductions import GroupReductions
from tools.model.group.scenarios import GROUP_LARGER, GROUP_SCENARIOS
from tools.model.group.state import GroupScenario
from tools.model.group.trace import group_words
from tools.model.mutations import Mutation
from tools.model.properties import MEANS, PROPERTIES
from tools.model.state import Scenario


class Reducing(typing.Protocol):
    """Maps a state to the one that stands for it: `normal` keeps every process what it is."""

    def normal(self, state: bytes) -> bytes: ...

    def representative(self, state: bytes) -> bytes: ...


@dataclass(frozen=True)
class Kind:
    """A kind of world.

    ``protocol`` is the unmutated one; ``properties`` judge its states, ``means`` are the names of those that are no
    promises; ``steps`` say what each step is, ``mutated_steps`` those of mutations; ``words`` are a state's, as text.
    """

    protocol: Callable[..., Any]
    reductions: Callable[[Any], Reducing]
    properties: Mapping[str, Callable[[Any, bytes], str]]
    means: Mapping[str, object]
    steps: Mapping[str, str]
    mutated_steps: Mapping[str, str]
    words: Callable[[Any, bytes], dict[str, str]]


ONE_IMAGE: Final = Kind(
    protocol.Protocol, reductions.Reductions, PROPERTIES, MEANS, protocol.STEPS, mutations.STEPS, trace.words
)
TWO_IMAGES: Final = Kind(
    GroupProtocol, GroupReductions, GROUP_PROPERTIES, {}, GROUP_STEPS, GROUP_MUTATION_STEPS, group_words
)

Anyone = Scenario | GroupScenario

WORLDS: Final[tuple[Anyone, ...]] = (*scenarios.SCENARIOS, *GROUP_SCENARIOS)
"""Searched by `make test`."""

LARGER: Final[tuple[Anyone, ...]] = (*scenarios.LARGER, *GROUP_LARGER)
"""Searched by `make model` only."""

MUTATIONS: Final[tuple[Mutation, ...]] = (*mutations.MUTATIONS, *GROUP_MUTATIONS)


def kind_of(scenario: Anyone) -> Kind:
    return TWO_IMAGES if isinstance(scenario, GroupScenario) else ONE_IMAGE
