"""The group cut, one atomic step after the other: a state goes in, the states that may follow come out.

Read it together with the group cut of ``shmcbw/DESIGN.md``. What is one step here and what is not follows the rules
(a) to (d) of ``tools.model.protocol``, and these:

(g) *The entries are prepared in one step*: nobody but the coordinator and an adopter looks at one while its image is
    open, and an adopter drops it, with or without the other.
(h) *An adopter's last look at its own word and what follows from it are one step*: once the coordinator is dead a word
    only ever becomes committed, and only the leader's adopter or this one commit it.
"""

from __future__ import annotations

from typing import Final

from tools.model.group.state import (
    ADOPTER,
    AT,
    COORDINATOR,
    ENTRY,
    EPOCH,
    FATE,
    FAULT,
    FIRST_EPOCH,
    IMAGES,
    KILLS,
    LEADER,
    TOLD,
    WORD,
    WRITER_DONE,
    WRITER_EPOCH,
    WRITER_MARK,
    WRITER_SEEN,
    Adopter,
    Coordinator,
    Entry,
    Fate,
    Fault,
    GroupLayout,
    GroupScenario,
    Told,
    Word,
    Writer,
)
from tools.model.world import Step

FIRST_ODD: Final = FIRST_EPOCH + 1
"""The odd epoch of the one cut, in both images."""

GROUP_STEPS: Final[dict[str, str]] = {
    "writer.mark": "step 1: mark the slot in flight, in the image it stores to next",
    "writer.read_epoch": "step 2: read the epoch; odd: clear the mark and wait at the gate",
    "writer.give_up": "gated, deadline passed or coordinator dead: entry PREPARED -> ABANDONED (CAS)",
    "writer.open": "then: epoch from that odd value to the next even one (CAS); start over",
    "writer.store": "steps 3 to 6: store, clear the mark",
    "group.prepare": "entries FREE -> PREPARED for the next odd epochs, in a new group, not committed",
    "group.close": "epoch of an image := odd",
    "group.see_slot": "a slot's mark is clear: that slot is drained",
    "group.publish": "entry of an image PREPARED -> ACTIVE (CAS), once all slots of both are drained",
    "group.commit": "the leader's word := committed, once both are published",
    "group.tell": "the other member's word := committed",
    "group.open": "epoch of an image := next even (CAS)",
    "group.finish": "a backup has ended: its entry is freed, its group word is gone",
    "group.late": "deadline passed: the cut fails",
    "group.break": "failed: entry of an image ACTIVE -> BROKEN",
    "group.abandon": "failed: entry of an image PREPARED -> ABANDONED (CAS)",
    "group.free": "failed: entry of an image is freed",
    "adopt.abandon": "the coordinator is dead, its lock taken: entry PREPARED -> ABANDONED (CAS)",
    "adopt.open": "then: epoch to the next even value, if it is odd",
    "adopt.ask": "of a member: what the leader's word says",
    "adopt.repeat": "... committed: this one's word := committed",
    "adopt.tell": "of the leader: committed: the other member's word := committed",
    "adopt.keep": "ACTIVE and committed: the backup goes on",
    "adopt.drop": "anything else: the entry is freed",
    "adopt.finish": "the backup has ended: its entry is freed, its group word is gone",
    "kill.group": "SIGKILL of the coordinator of both images",
    "kill.adopter": "SIGKILL of an image's adopter",
}


class GroupProtocol:
    """All processes of one scenario. Without one of its rules: ``mutations.py``."""

    def __init__(self, scenario: GroupScenario, *, judge_means: bool = True, every_kill: bool = False) -> None:
        self.scenario = scenario
        self.layout = GroupLayout(scenario)
        self.image = self.layout.image
        # All that is judged here are promises, and every kill is done: these are there because a search says them.
        self.judge_means = judge_means
        self.every_kill = every_kill

    def steps(self, state: bytes) -> list[Step]:
        """Every step that some process may do next."""
        steps: list[Step] = []
        for slot, w in enumerate(self.layout.writer):
            own = self.writer(state, slot)
            if not own and state[w] != Writer.DONE:
                own = [("writer.blocked", slot, self.with_fault(state, Fault.BLOCKED))]
            steps += own
        if state[COORDINATOR] == Coordinator.DEAD:
            for image in IMAGES:
                steps += self.adopter(state, image)
        else:
            steps += self.coordinator(state)
        if not steps and not self.finished(state):
            steps.append(("nobody", 0, self.with_fault(state, Fault.UNFINISHED)))
        if state[KILLS]:
            steps += self.kills(state)
        return steps

    def with_fault(self, state: bytes, fault: int) -> bytes:
        new = bytearray(state)
        new[FAULT] = fault
        return bytes(new)

    def finished(self, state: bytes) -> bool:
        """Writers through, gates open, entries free, and somebody has answered for both snapshots."""
        return all(state[w] == Writer.DONE for w in self.layout.writer) and all(
            not state[at + EPOCH] & 1 and state[at + ENTRY] == Entry.FREE and state[at + FATE] for at in self.image
        )

    def kills(self, state: bytes) -> list[Step]:
        steps: list[Step] = []
        if state[COORDINATOR] not in (Coordinator.DEAD, Coordinator.PREPARE, Coordinator.DONE):
            new = self.one_kill(state)
            new[COORDINATOR] = Coordinator.DEAD
            new[AT] = 0
            self.forget_seen(new)
            steps.append(("kill.group", 0, bytes(new)))
        for image, at in enumerate(self.image):
            if state[at + ADOPTER] not in (Adopter.LOCK, Adopter.DONE):
                new = self.one_kill(state)
                new[at + ADOPTER] = Adopter.LOCK
                steps.append(("kill.adopter", image, bytes(new)))
        return steps

    def one_kill(self, state: bytes) -> bytearray:
        new = bytearray(state)
        new[KILLS] -= 1
        return new

    # -- the gate, as in the world of one image ------------------------------------------------

    def abandon(self, state: bytes, image: int, odd: int, new: bytearray) -> None:
        """Compare-and-swap: PREPARED for this odd epoch -> ABANDONED."""
        at = self.image[image]
        if state[at + ENTRY] == Entry.PREPARED and odd & 1:
            new[at + ENTRY] = Entry.ABANDONED

    def open_gate(self, state: bytes, image: int, odd: int, new: bytearray) -> None:
        """Compare-and-swap: this odd epoch -> the next even one."""
        at = self.image[image]
        if odd & 1 and state[at + EPOCH] == odd:
            new[at + EPOCH] = odd + 1

    # -- writers -------------------------------------------------------------------------------

    def image_of(self, state: bytes, slot: int) -> int:
        """The image that the writer stores to next."""
        return self.scenario.writers[slot][state[self.layout.writer[slot] + WRITER_DONE]]

    def writer(self, state: bytes, slot: int) -> list[Step]:
        w = self.layout.writer[slot]
        if state[w] == Writer.DONE:
            return []
        image = self.image_of(state, slot)
        epoch = state[self.image[image] + EPOCH]
        new = bytearray(state)
        if state[w] == Writer.MARK:
            return self.writer_mark(state, slot, image)
        if state[w] == Writer.READ_EPOCH:
            new[w] = Writer.STORE
            if epoch & 1:
                new[w], new[w + WRITER_EPOCH], new[w + WRITER_MARK + image] = Writer.GATE, epoch, 0
            return [("writer.read_epoch", slot, bytes(new))]
        if state[w] == Writer.GATE:
            steps = self.writer_mark(state, slot, image) if epoch != state[w + WRITER_EPOCH] else []
            new[w] = Writer.OPEN
            self.give_up(state, image, state[w + WRITER_EPOCH], new)
            return [*steps, ("writer.give_up", slot, bytes(new))]
        if state[w] == Writer.OPEN:
            self.open_gate(state, image, state[w + WRITER_EPOCH], new)
            new[w], new[w + WRITER_EPOCH] = Writer.MARK, 0
            return [("writer.open", slot, bytes(new))]
        new[self.layout.stores[image][slot]] += 1
        new[w + WRITER_DONE] += 1
        new[w + WRITER_MARK + image] = 0
        last = new[w + WRITER_DONE] == len(self.scenario.writers[slot])
        new[w] = Writer.DONE if last else Writer.MARK
        return [("writer.store", slot, bytes(new))]

    def writer_mark(self, state: bytes, slot: int, image: int) -> list[Step]:
        w = self.layout.writer[slot]
        new = bytearray(state)
        new[w], new[w + WRITER_EPOCH], new[w + WRITER_MARK + image] = Writer.READ_EPOCH, 0, 1
        return [("writer.mark", slot, bytes(new))]

    def give_up(self, state: bytes, image: int, odd: int, new: bytearray) -> None:
        self.abandon(state, image, odd, new)

    # -- the coordinator of both images --------------------------------------------------------

    def coordinator(self, state: bytes) -> list[Step]:
        return {
            Coordinator.PREPARE: self.prepare,
            Coordinator.CLOSE: self.close,
            Coordinator.DRAIN: self.drain,
            Coordinator.PUBLISH: self.publish,
            Coordinator.COMMIT: self.commit,
            Coordinator.TELL: self.tell,
            Coordinator.OPEN: self.open,
            Coordinator.FINISH: self.finish,
            Coordinator.BREAK: self.break_published,
            Coordinator.ABANDON: self.abandon_cut,
            Coordinator.FAIL_OPEN: self.open,
            Coordinator.FREE: self.free,
            Coordinator.DONE: self.nothing,
            Coordinator.LATE: self.late,
        }[state[COORDINATOR]](state)

    def nothing(self, _state: bytes) -> list[Step]:
        return []

    def late(self, state: bytes) -> list[Step]:
        raise NotImplementedError("only a mutation is ever late")

    def go(self, new: bytearray, following: int) -> None:
        """The same step for the other image, then the following one for the first."""
        if new[AT] == IMAGES[-1]:
            new[COORDINATOR], new[AT] = following, 0
        else:
            new[AT] += 1

    def prepare(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        for at in self.image:
            new[at + ENTRY], new[at + WORD] = Entry.PREPARED, Word.OPEN
        new[COORDINATOR] = Coordinator.CLOSE
        return [("group.prepare", 0, bytes(new))]

    def close(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[self.image[state[AT]] + EPOCH] |= 1
        self.go(new, Coordinator.DRAIN)
        return [("group.close", state[AT], bytes(new))]

    def drain(self, state: bytes) -> list[Step]:
        """See each slot of both images clear once, in any order; then publish. Or the deadline passes."""
        steps: list[Step] = []
        drained = True
        for image in IMAGES:
            drained &= self.is_drained(state, image)
            for slot, w in enumerate(self.layout.writer):
                if not state[w + WRITER_SEEN + image] and not state[w + WRITER_MARK + image]:
                    new = bytearray(state)
                    new[w + WRITER_SEEN + image] = 1
                    steps.append(("group.see_slot", slot, bytes(new)))
        new = bytearray(state)
        self.forget_seen(new)
        if drained:
            new[COORDINATOR] = Coordinator.PUBLISH
            steps += self.coordinator(bytes(new))
        new[COORDINATOR] = Coordinator.BREAK
        return [*steps, ("group.late", 0, bytes(new))]

    def is_drained(self, state: bytes, image: int) -> bool:
        return all(state[w + WRITER_SEEN + image] for w in self.layout.writer)

    def forget_seen(self, new: bytearray) -> None:
        for w in self.layout.writer:
            for image in IMAGES:
                new[w + WRITER_SEEN + image] = 0

    def publish(self, state: bytes) -> list[Step]:
        image = state[AT]
        new = bytearray(state)
        if state[self.image[image] + ENTRY] == Entry.PREPARED:
            self.set_active(state, image, new)
            self.go(new, Coordinator.COMMIT)
        else:
            new[COORDINATOR], new[AT] = Coordinator.BREAK, 0
        return [("group.publish", image, bytes(new))]

    def set_active(self, state: bytes, image: int, new: bytearray) -> None:
        """This is the instant that the snapshot of this image shows."""
        new[self.image[image] + ENTRY] = Entry.ACTIVE
        for cut, stores in zip(self.layout.cut[image], self.layout.stores[image], strict=True):
            new[cut] = state[stores]

    def commit(self, state: bytes) -> list[Step]:
        """The caller hears of it at once: the earlier it hears, the more can prove wrong what it heard."""
        new = bytearray(state)
        new[self.image[LEADER] + WORD] = Word.COMMITTED
        self.tell_caller(new)
        new[COORDINATOR] = Coordinator.TELL
        return [("group.commit", 0, bytes(new))]

    def tell_caller(self, new: bytearray) -> None:
        new[TOLD] = Told.SUCCESS
        for at in self.image:
            new[at + FATE] |= Fate.TAKEN

    def tell(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        new[self.image[1] + WORD] = Word.COMMITTED
        new[COORDINATOR] = Coordinator.OPEN
        return [("group.tell", 0, bytes(new))]

    def open(self, state: bytes) -> list[Step]:
        image = state[AT]
        new = bytearray(state)
        self.open_gate(state, image, FIRST_ODD, new)
        if state[COORDINATOR] == Coordinator.OPEN:
            self.go(new, Coordinator.FINISH)
        elif image != IMAGES[-1]:
            new[COORDINATOR], new[AT] = Coordinator.ABANDON, image + 1
        else:
            new[COORDINATOR], new[AT], new[TOLD] = Coordinator.FREE, 0, Told.FAILURE
        return [("group.open", image, bytes(new))]

    def finish(self, state: bytes) -> list[Step]:
        steps: list[Step] = []
        for image, at in enumerate(self.image):
            if state[at + ENTRY] != Entry.FREE:
                new = bytearray(state)
                self.free_entry(image, new)
                if all(new[each + ENTRY] == Entry.FREE for each in self.image):
                    new[COORDINATOR] = Coordinator.DONE
                steps.append(("group.finish", image, bytes(new)))
        return steps

    def free_entry(self, image: int, new: bytearray) -> None:
        new[self.image[image] + ENTRY] = Entry.FREE
        new[self.image[image] + WORD] = Word.NONE

    def break_published(self, state: bytes) -> list[Step]:
        at = self.image[state[AT]]
        new = bytearray(state)
        if state[at + ENTRY] == Entry.ACTIVE:
            new[at + ENTRY] = Entry.BROKEN
        self.go(new, Coordinator.ABANDON)
        return [("group.break", state[AT], bytes(new))]

    def abandon_cut(self, state: bytes) -> list[Step]:
        new = bytearray(state)
        self.abandon(state, state[AT], FIRST_ODD, new)
        new[COORDINATOR] = Coordinator.FAIL_OPEN
        return [("group.abandon", state[AT], bytes(new))]

    def free(self, state: bytes) -> list[Step]:
        image = state[AT]
        new = bytearray(state)
        self.free_entry(image, new)
        new[self.image[image] + FATE] |= Fate.GONE
        self.go(new, Coordinator.DONE)
        return [("group.free", image, bytes(new))]

    # -- adopters ------------------------------------------------------------------------------

    def adopter(self, state: bytes, image: int) -> list[Step]:
        """The coordinator is dead, so its locks are free, and each image may be adopted by another process."""
        at = self.image[image]
        new = bytearray(state)
        doing = state[at + ADOPTER]
        if doing == Adopter.DONE:
            return []
        if doing == Adopter.LOCK:
            if state[at + ENTRY] == Entry.FREE and not state[at + EPOCH] & 1:
                return []
            self.abandon(state, image, FIRST_ODD, new)
            new[at + ADOPTER] = Adopter.OPEN
            return [("adopt.abandon", image, bytes(new))]
        if doing == Adopter.OPEN:
            self.open_gate(state, image, state[at + EPOCH], new)
            new[at + ADOPTER] = Adopter.ASK
            return [("adopt.open", image, bytes(new))]
        if doing == Adopter.ASK:
            return self.ask(state, image)
        if doing in (Adopter.HEARD_NO, Adopter.HEARD_YES):
            return self.repeat(state, image)
        if doing == Adopter.JUDGE:
            return self.judge(state, image)
        if doing == Adopter.LATE:
            return self.adopter_late(state, image)
        self.free_entry(image, new)
        new[at + ADOPTER] = Adopter.DONE
        return [("adopt.finish", image, bytes(new))]

    def adopter_late(self, state: bytes, image: int) -> list[Step]:
        raise NotImplementedError("only a mutation is ever late")

    def ask(self, state: bytes, image: int) -> list[Step]:
        """A leader that is committed tells the other member; another member asks the leader."""
        new = bytearray(state)
        at, leader = self.image[image], self.image[LEADER]
        if image == LEADER:
            self.tell_member(state, new)
            new[at + ADOPTER] = Adopter.JUDGE
            return [("adopt.tell", image, bytes(new))]
        yes = state[leader + WORD] == Word.COMMITTED
        new[at + ADOPTER] = Adopter.HEARD_YES if yes else Adopter.HEARD_NO
        return [("adopt.ask", image, bytes(new))]

    def tell_member(self, state: bytes, new: bytearray) -> None:
        member = self.image[1]
        if state[self.image[LEADER] + WORD] == Word.COMMITTED and state[member + WORD] == Word.OPEN:
            new[member + WORD] = Word.COMMITTED

    def repeat(self, state: bytes, image: int) -> list[Step]:
        at = self.image[image]
        new = bytearray(state)
        if state[at + ADOPTER] == Adopter.HEARD_YES and state[at + WORD] == Word.OPEN:
            new[at + WORD] = Word.COMMITTED
        new[at + ADOPTER] = Adopter.JUDGE
        return [("adopt.repeat", image, bytes(new))]

    def judge(self, state: bytes, image: int) -> list[Step]:
        at = self.image[image]
        new = bytearray(state)
        if state[at + ENTRY] == Entry.ACTIVE and self.counts(state, image):
            new[at + ADOPTER] = Adopter.FINISH
            new[at + FATE] |= Fate.TAKEN
            return [("adopt.keep", image, bytes(new))]
        self.free_entry(image, new)
        new[at + ADOPTER] = Adopter.DONE
        new[at + FATE] |= Fate.GONE
        return [("adopt.drop", image, bytes(new))]

    def counts(self, state: bytes, image: int) -> bool:
        """Whether an ACTIVE entry of this image may be taken as right."""
        return state[self.image[image] + WORD] == Word.COMMITTED
