"""How jobs end: alone, or several together.

Every job has a transaction; most are the only one in theirs.  A job that has done its work waits until all of its
transaction have; then all are pending; then, at one `finalize` or at once, all targets get their names.  If one fails
or is cancelled, all of them end without.

    decided to end well   each journal says so, before the first target gets its name
    decided to fail       each journal has the result, before the first target is removed

So coordinators that were killed in between find the decision in any of their journals and carry it out.  An adopted job
waits for the others of its transaction until their coordinators are there, in the same process; cancel ends it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from . import job_states as states
from .job_states import check_verb

if TYPE_CHECKING:
    from .jobs import Job


class JobTransaction:
    """Jobs of one `take_group` that end together ("grouped").  Make one, and hand it to each of the requests.

    Its lock is the locks of all coordinators that it touches, taken in one order for everybody; so nobody calls it who
    holds one of several.
    """

    def __init__(self) -> None:
        self.id = os.urandom(8).hex()
        #: How many jobs will join; 0 before it is used.
        self.size = 0
        #: The decision to end well was made, and is to be carried out.
        self.decided = False
        #: It has failed: so will those that are adopted later.
        self.failed = False
        self._members: list[Job] = []
        _transactions[self.id] = self

    @classmethod
    def of_one(cls) -> JobTransaction:
        """For a job that ends alone."""
        transaction = cls()
        transaction.size = 1
        return transaction

    @classmethod
    def adopted(cls, transaction_id: str, size: int) -> JobTransaction:
        """The transaction that a dead coordinator's journal names, one object for all that come back."""
        found = _transactions.get(transaction_id)
        if found is None or found.size != size:
            found = cls()
            found.id, found.size = transaction_id, size
            _transactions[transaction_id] = found
        return found

    def expect(self, size: int) -> None:
        """Called once, before the first of its jobs is made."""
        if self.size:
            raise ValueError("a job transaction can be used once")
        self.size = size

    def expect_none(self) -> None:
        """There was no cut: it may be used for another one."""
        self.size = 0

    def join(self, job: Job, *, decided: bool = False) -> None:
        """``decided``: the journal of an adopted job says that its transaction ends well."""
        self._members.append(job)
        self.decided |= decided

    def settle(self) -> None:
        """Take the next steps that the members' states call for."""
        with self._locked() as members:
            live = [job for job in members if not job.ended]
            failed = [job for job in live if job.failure is not None]
            if (failed or self.failed) and not self.decided:
                self._fail(failed + [job for job in live if job not in failed])
            elif live and (self.decided or len(members) == self.size):
                # Decided: those that are not here have ended well already, or will.
                # Pending among them: a coordinator died after some of them had been told.
                if all(job.status in (states.WAITING, states.PENDING) for job in live):
                    for job in live:
                        if job.status == states.WAITING:
                            job.become_pending(kept=self.size > 1 or not self.finalizes_itself)
                pending = all(job.status == states.PENDING for job in live)
                if pending and self.finalizes_itself:
                    self._conclude(live)

    def finalize(self, job: Job) -> None:
        """The verb, for all of the members; JobStateError."""
        with self._locked() as members:
            check_verb(job.id, job.status, "finalize")
            self._conclude([member for member in members if member.status == states.PENDING])

    def cancel(self, job: Job, error: BaseException) -> None:
        """The verb, for all of the members; JobStateError.  What is decided to end well does."""
        with self._locked() as members:
            check_verb(job.id, job.status, "cancel")
            if not self.decided:
                job.failure = job.failure or error
                self._fail([job, *(member for member in members if member is not job and not member.ended)])

    @property
    def finalizes_itself(self) -> bool:
        """Whether its pending jobs go on without `finalize`: by what they were asked for, or it was called before."""
        return self.decided or all(job.auto_finalize for job in self._members)

    def _conclude(self, members: list[Job]) -> None:
        if self.size > 1 and not self.decided:
            try:
                for job in members:
                    job.record(decided=True)
            except OSError as error:
                members[0].failure = error
                self._fail(members)
                return
        self.decided = True
        for number, job in enumerate(members):
            if not job.conclude():
                # Not named and will not be: those that are named stay so, the others end with it.
                self._fail(members[number:])
                return

    def _fail(self, members: list[Job]) -> None:
        self.failed = not self.decided
        for job in members:
            job.record_failure()
        for job in members:
            job.abort()

    def __repr__(self) -> str:
        return f"<JobTransaction of {', '.join(job.id for job in self._members)}>"

    @contextmanager
    def _locked(self) -> Iterator[list[Job]]:
        while True:
            members = list(self._members)
            with ExitStack() as locks:
                owners = {job.coordinator.segment.name: job.coordinator for job in members}
                for _, owner in sorted(owners.items()):
                    locks.enter_context(owner.held())
                # One that has joined meanwhile has to be locked too.
                if members == self._members:
                    yield members
                    return


#: For adoption: by id, as long as a job holds them.
_transactions: weakref.WeakValueDictionary[str, JobTransaction] = weakref.WeakValueDictionary()
