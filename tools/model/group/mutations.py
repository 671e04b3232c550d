"""The group cut with one rule removed, once per rule: each must give a counter-example (``tools.model.mutations``)."""

from __future__ import annotations

from typing import Final

from tools.model.group.protocol import GroupProtocol
from tools.model.group.scenarios import group_scenario
from tools.model.group.state import (
    ADOPTER,
    AT,
    COORDINATOR,
    ENTRY,
    EPOCH,
    IMAGES,
    LEADER,
    WORD,
    Adopter,
    Coordinator,
    Entry,
    Word,
)
from tools.model.mutations import Mutation
from tools.model.world import Step

# -- one instant -------------------------------------------------------------------------------


class CutOneByOne(GroupProtocol):
    """Each image is closed, drained and published before the next one is closed."""

    def close(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[self.image[state[AT]] + EPOCH] |= 1
        new[COORDINATOR] = Coordinator.DRAIN
        return [("group.close", state[AT], bytes(new))]

    def is_drained(self, state: bytes, image: int) -> bool:
        return image != state[AT] or super().is_drained(state, image)

    def publish(self, state: bytes) -> list[Step]:
        image = state[AT]
        name, number, after = super().publish(state)[0]
        new = bytearray(after)
        if image == 0 and new[COORDINATOR] == Coordinator.PUBLISH:
            new[COORDINATOR] = Coordinator.CLOSE
        return [(name, number, bytes(new))]


class GroupPublishedByStore(GroupProtocol):
    """The coordinator stores ACTIVE: no compare-and-swap."""

    def publish(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.set_active(state, state[AT], new)
        self.go(new, Coordinator.COMMIT)
        return [("group.publish", state[AT], bytes(new))]


class GroupNotAbandoned(GroupProtocol):
    """A gated writer advances the epoch of its image and leaves the entry PREPARED."""

    def give_up(self, state: bytes, image: int, odd: int, new: bytearray) -> None:
        pass


# -- all or none -------------------------------------------------------------------------------


class NoGroupWord(GroupProtocol):
    """There is no group word: an entry that is ACTIVE counts."""

    def counts(self, state: bytes, image: int) -> bool:
        return True


class CommitBeforePublish(GroupProtocol):
    """The coordinator commits the group first and publishes then."""

    def publish(self, state: bytes) -> list[Step]:
        if state[self.image[LEADER] + WORD] == Word.COMMITTED:
            return super().publish(state)
        new = bytearray(state)
        new[self.image[LEADER] + WORD] = Word.COMMITTED
        return [("group.commit", 0, bytes(new))]


class CommitWithoutAll(GroupProtocol):
    """The coordinator commits the group with what could be published."""

    def publish(self, state: bytes) -> list[Step]:
        if state[self.image[state[AT]] + ENTRY] == Entry.PREPARED:
            return super().publish(state)
        new = bytearray(state)
        self.go(new, Coordinator.COMMIT)
        return [("group.publish", state[AT], bytes(new))]


class OwnWordOnly(GroupProtocol):
    """An adopter looks at its own word alone."""

    def ask(self, state: bytes, image: int) -> list[Step]:
        if image == LEADER:
            return super().ask(state, image)
        new = bytearray(state)
        new[self.image[image] + ADOPTER] = Adopter.HEARD_NO
        return [("adopt.ask", image, bytes(new))]


class MembersNotTold(GroupProtocol):
    """The leader's adopter leaves the other member to ask."""

    def tell_member(self, state: bytes, new: bytearray) -> None:
        pass


class ToldAfterFree(GroupProtocol):
    """The leader's adopter tells the member when its own backup has ended and its entry is free."""

    def tell_member(self, state: bytes, new: bytearray) -> None:
        pass

    def adopter(self, state: bytes, image: int) -> list[Step]:
        if image != LEADER or state[self.image[image] + ADOPTER] != Adopter.FINISH:
            return super().adopter(state, image)
        new = bytearray(state)
        self.free_entry(image, new)
        new[self.image[image] + ADOPTER] = Adopter.LATE
        return [("adopt.finish", image, bytes(new))]

    def adopter_late(self, state: bytes, image: int) -> list[Step]:
        new = bytearray(state)
        member = self.image[1]
        if state[member + WORD] == Word.OPEN:
            new[member + WORD] = Word.COMMITTED
        new[self.image[image] + ADOPTER] = Adopter.DONE
        return [("adopt.tell", image, bytes(new))]


class OwnWordFirst(GroupProtocol):
    """A member's adopter looks at its own word first, then asks the leader, and believes what it saw."""

    def ask(self, state: bytes, image: int) -> list[Step]:
        at = self.image[image]
        if image == LEADER:
            return super().ask(state, image)
        new = bytearray(state)
        new[at + ADOPTER] = Adopter.HEARD_YES if state[at + WORD] == Word.COMMITTED else Adopter.HEARD_NO
        return [("adopt.look", image, bytes(new))]

    def repeat(self, state: bytes, image: int) -> list[Step]:
        at = self.image[image]
        new = bytearray(state)
        if state[at + ADOPTER] == Adopter.HEARD_YES or state[self.image[LEADER] + WORD] == Word.COMMITTED:
            new[at + WORD] = Word.COMMITTED
            new[at + ADOPTER] = Adopter.JUDGE
        else:
            new[at + ADOPTER] = Adopter.LATE
        return [("adopt.ask", image, bytes(new))]

    def adopter_late(self, state: bytes, image: int) -> list[Step]:
        new = bytearray(state)
        new[self.image[image] + WORD] = Word.OPEN
        return self.judge(bytes(new), image)


class NoLeaderCounts(GroupProtocol):
    """A member that finds no leader any more takes the group for committed."""

    def ask(self, state: bytes, image: int) -> list[Step]:
        if image == LEADER or state[self.image[LEADER] + WORD] != Word.NONE:
            return super().ask(state, image)
        new = bytearray(state)
        new[self.image[image] + ADOPTER] = Adopter.HEARD_YES
        return [("adopt.ask", image, bytes(new))]


class AdoptedWhileAlive(GroupProtocol):
    """An image is adopted though its coordinator lives: it was slow, and there was no lock."""

    def steps(self, state: bytes) -> list[Step]:
        steps = super().steps(state)
        if state[COORDINATOR] not in (Coordinator.DEAD, Coordinator.PREPARE, Coordinator.DONE):
            for image in IMAGES:
                steps += self.adopter(state, image)
        return [step for step in steps if step[0] != "nobody" or len(steps) == 1]


GROUP_MUTATION_STEPS: Final[dict[str, str]] = {"adopt.look": "of a member: what its own word says"}
"""Steps that only mutations do."""

GROUP_MUTATIONS: Final = tuple(
    Mutation(name, protocol, promise, group_scenario(where))
    for name, protocol, promise, where in (
        ("cut-one-by-one", CutOneByOne, "INSTANT", "pairs"),
        ("group-published-by-store", GroupPublishedByStore, "INSTANT", "pairs"),
        ("group-not-abandoned", GroupNotAbandoned, "INSTANT", "pairs"),
        ("no-group-word", NoGroupWord, "ALL", "adopters"),
        ("commit-before-publish", CommitBeforePublish, "ALL", "adopters"),
        ("commit-without-all", CommitWithoutAll, "ALL", "adopters"),
        ("own-word-only", OwnWordOnly, "ALL", "adopters"),
        ("members-not-told", MembersNotTold, "ALL", "adopters"),
        ("told-after-free", ToldAfterFree, "ALL", "adopters"),
        ("own-word-first", OwnWordFirst, "ALL", "adopters"),
        ("no-leader-counts", NoLeaderCounts, "ALL", "adopters"),
        ("adopted-while-alive", AdoptedWhileAlive, "ALL", "adopters"),
    )
)
