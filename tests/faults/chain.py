"""A round of increments: a persistent bitmap, a full backup, an increment, the end, and another increment after it.

Whatever fails, no increment is ever a wrong one: the backups that are finished make a chain which restores to the
instant of the last cut, also across a coordinator that could not save its bitmaps.
"""

from __future__ import annotations

from shmcbw.errors import ShmcbwError
from shmcbw.workers.restore import restore
from tests.faults.round import WRITES, Round, good

BITMAP = "b"


class Chain(Round):
    """Also judged: what the finished backups restore to."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._chain: list[str] = []

    def play(self) -> None:
        self.layer.watch(self.image, self.targets, self.state)
        if self.fault is not None:
            self.layer.arm(self.fault)
        coordinator, writer = self.stage.coordinator, self.stage.writer
        self._do(coordinator, "start", image=str(self.image), state=str(self.state))
        self._do(writer, "open", **self._opening())
        self._do(writer, "write", count=WRITES)
        self._do(writer, "go")
        self._do(coordinator, "add_bitmap", name=BITMAP)
        for name, sync in (("base", "full"), ("increment", "incremental")):
            if not self._back_up(name, sync):
                # Without a fault now.
                assert self._back_up(f"{name}2", sync), f"{name} fails without a fault"
            self._do(writer, "write", count=WRITES)
        self._do(writer, "halt")
        self._do(writer, "flush")
        violations = self._value(coordinator, "violations")
        assert violations == [], violations
        self._do(writer, "leave")
        self._do(coordinator, "close")
        self.counts = self.layer.counts()
        self._lift()
        self._judge_chain()
        self._go_on()
        self._look_for_leftovers()

    def _back_up(self, name: str, sync: str) -> bool:
        """Whether it is finished; if not, the fault is lifted."""
        coordinator, writer = self.stage.coordinator, self.stage.writer
        parameters = {"speed": 1, "sync": sync, "bitmap": BITMAP, "mode": "on-success"}
        self._cut(name, "backup", target=str(self.targets / name), **parameters)
        self._do(writer, "write", count=WRITES)
        self._do(coordinator, "speed", speed=0)
        self._do(writer, "write", count=WRITES)
        answer = self._do(coordinator, "wait", broken=True, timeout=40)
        self._kept |= {name, f"{name}.shmcbw"}
        if answer.good:
            self._chain.append(name)
        else:
            there = (self.targets / name).exists()
            assert "it is complete" in answer.message or not self._may_tidy() or not there, f"{answer}, but it is there"
        return answer.good

    def _judge_chain(self) -> None:
        out = self.directory / "restored"
        try:
            restore([str(self.targets / name) for name in self._chain], str(out), overwrite=True)
        except (ShmcbwError, OSError) as error:
            raise AssertionError(f"a finished chain can't be restored: {error}") from error
        self._judge_copy(out, self._cuts[self._chain[-1]])

    def _go_on(self) -> None:
        """The next coordinator has the bitmap, or it says that no increment can be made of it."""
        coordinator, writer = self.stage.coordinator, self.stage.writer
        good(coordinator.play("close"))
        good(coordinator.play("start", image=str(self.image), state=str(self.state)))
        bitmaps: dict[str, bool] = good(coordinator.play("bitmaps"))
        assert bitmaps in ({BITMAP: True}, {BITMAP: False}) or self.disturbed, bitmaps
        if bitmaps.get(BITMAP):
            good(writer.play("open", **self._opening()))
            good(writer.play("write", count=WRITES))
            assert self._back_up("last", "incremental"), "an increment of a bitmap that was taken over fails"
            good(writer.play("leave"))
            self._judge_chain()
        else:
            assert self.disturbed or self.fired, "no bitmap, and no fault"
        if bitmaps:
            good(coordinator.play("remove_bitmap", name=BITMAP))
        good(coordinator.play("close"))
        assert list(self.state.iterdir()) == [], "saved bitmaps that nobody has any more"
