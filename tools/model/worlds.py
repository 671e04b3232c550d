"""What is searched: worlds of one image, of two, and of a resize, and what a search needs to know of each kind."""

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
from tools.model.resize.mutations import RESIZE_MUTATIONS
from tools.model.resize.properties import RESIZE_PROPERTIES
from tools.model.resize.protocol import RESIZE_STEPS, ResizeProtocol
from tools.model.resize.scenarios import RESIZE_LARGER, RESIZE_SCENARIOS
from tools.model.resize.state import ResizeScenario
from tools.model.resize.trace import resize_words
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


class AllApart:
    """No two states of a resize behave alike."""

    def __init__(self, protocol: ResizeProtocol) -> None:
        pass

    def normal(self, state: bytes) -> bytes:
        return state

    def representative(self, state: bytes) -> bytes:
        return state


RESIZE: Final = Kind(ResizeProtocol, AllApart, RESIZE_PROPERTIES, {}, RESIZE_STEPS, {}, resize_words)
KINDS: Final = {"one image": ONE_IMAGE, "two images, one cut": TWO_IMAGES, "a resize": RESIZE}

Anyone = Scenario | GroupScenario | ResizeScenario

WORLDS: Final[tuple[Anyone, ...]] = (*scenarios.SCENARIOS, *GROUP_SCENARIOS, *RESIZE_SCENARIOS)
"""Searched by `make test`."""

LARGER: Final[tuple[Anyone, ...]] = (*scenarios.LARGER, *GROUP_LARGER, *RESIZE_LARGER)
"""Searched by `make model` only."""

MUTATIONS: Final[tuple[Mutation, ...]] = (*mutations.MUTATIONS, *GROUP_MUTATIONS, *RESIZE_MUTATIONS)


def kind_of(scenario: Anyone) -> Kind:
    if isinstance(scenario, ResizeScenario):
        return RESIZE
    return TWO_IMAGES if isinstance(scenario, GroupScenario) else ONE_IMAGE
