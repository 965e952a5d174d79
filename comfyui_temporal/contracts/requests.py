"""What a task has requested of ComfyUI and of the credits service, and the outcome of each request.

A request is recorded before it is sent, and updated with each answer. A run keeps these records while it works
(`workflows/attempts.py`, `workflows/task_holds.py`). The give-back of a run that ended without its own clean-up
rebuilds them from the run's history (`activities/orphans.py`). Both pass the answers to the same methods here, and both
undo the requests with `needs_undo`:

    unknown ── reply ────> made ── cancel answered ──> ended
       └────── refusal ──> refused

The fields are in histories: docs/versioning.md says how they may change.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import model_validator

from comfyui_temporal.contracts.comfyui import JobRequest, TrainingDraft
from comfyui_temporal.contracts.credits import HoldReply, PreDeductRequest
from comfyui_temporal.contracts.errors import Answer, RefusalKind, UnreadableReply
from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.tasks import SettlementState

JobBody = JobRequest | TrainingDraft
"""Body of a submit, as history holds it."""


class RequestOutcome(StrEnum):
    """The outcome of a request."""

    UNKNOWN = "unknown"
    """It may have taken effect. Repeating it with the same key and body shows the outcome."""
    REFUSED = "refused"
    """Nothing was made."""
    MADE = "made"
    ENDED = "ended"
    """It was made, and has been undone or has ended otherwise."""


def leaves_unknown(answer: Answer[Any]) -> bool:
    """Whether an answer without a reply leaves open if the request took effect.

    An unreadable answer does. So does an attempt that was stopped before it was sent (`task_ended`), if an earlier
    attempt had been sent and got no answer.
    """
    if answer.refusal is None:
        return False
    is_unsent = answer.refusal.kind is RefusalKind.TASK_ENDED
    return isinstance(answer.refusal, UnreadableReply) or (is_unsent and answer.tries > 1)


def is_key_conflict(answer: Answer[Any]) -> bool:
    """Whether the key was used with another body: this says nothing of what was made under it."""
    return answer.refusal is not None and answer.refusal.kind is RefusalKind.KEY_CONFLICT


def is_unsent(answer: Answer[Any]) -> bool:
    """Whether a call that settles was stopped before any attempt of it was sent."""
    if answer.refusal is None:
        return False
    return answer.refusal.kind in (RefusalKind.TASK_ENDED, RefusalKind.READ_THE_LEDGER) and answer.tries == 1


def refuses_charge(answer: Answer[Any]) -> bool:
    """Whether the answer to a charge says that nothing was or will be charged: the rest is a shortfall.

    Any other refusal sends the workflow to the ledger: an unreadable answer, a conflict of keys, a call that was
    stopped before it was sent.
    """
    if answer.refusal is None or isinstance(answer.refusal, UnreadableReply):
        return False
    return answer.refusal.kind not in (RefusalKind.KEY_CONFLICT, RefusalKind.TASK_ENDED, RefusalKind.READ_THE_LEDGER)


class Requested(OwnModel):
    """What both kinds of requests have in common."""

    @property
    @abstractmethod
    def outcome(self) -> RequestOutcome: ...

    @property
    def needs_undo(self) -> bool:
        """Whether an undo has work to do: find out the request's outcome, or cancel what it made."""
        return self.outcome in (RequestOutcome.UNKNOWN, RequestOutcome.MADE)


class RequestedJob(Requested):
    """A job or training that was requested of ComfyUI."""

    attempt: int
    key: str
    request: JobBody | None = None
    """The body. Only a repeat of an unanswered request needs it; after that it is dropped."""
    asked_at: Instant
    job_id: str | None = None
    refused: bool = False
    is_key_taken: bool = False
    """An earlier life of the task had used the key with another body: this was not an attempt."""
    cancelled: bool = False

    @property
    def outcome(self) -> RequestOutcome:
        if self.cancelled:
            return RequestOutcome.ENDED
        if self.refused:
            return RequestOutcome.REFUSED
        return RequestOutcome.UNKNOWN if self.job_id is None else RequestOutcome.MADE

    def answered(self, answer: Answer[Any]) -> None:
        """Take the answer to the submit or create, first or repeated."""
        if answer.reply is not None:
            self.job_id = answer.reply.job_id
        elif not leaves_unknown(answer):
            self.refused = True
        self.drop_body()

    def give_up(self) -> None:
        """Its id cannot be found out: nothing more is done about it."""
        self.refused = True
        self.drop_body()

    def cancel_answered(self, answer: Answer[Any]) -> None:
        """Take the answer to a cancel. A conflict of keys says nothing about the job; any other answer ends it."""
        if not is_key_conflict(answer):
            self.cancelled = True

    def drop_body(self) -> None:
        """Drop the body if no repeat needs it. Runs of release 0.1.0 kept the body of every job."""
        if self.outcome is not RequestOutcome.UNKNOWN:
            self.request = None


def not_known(found: Iterable[RequestedJob], known: Collection[RequestedJob]) -> list[RequestedJob]:
    """Of the jobs that were found, those that the known ones say nothing of.

    Runs of a task with other settings may have sent one key with several bodies, and any of them may have made the job:
    a key is settled only where the job that was made under it is known.
    """
    made, requests = {job.key for job in known if job.job_id}, [(job.key, job.request) for job in known]
    return [job for job in found if job.key not in made and (job.key, job.request) not in requests]


class RequestedHold(Requested):
    """A hold that was requested of the credits service. Its life counts from the first sending (contract §4)."""

    n: int
    request: PreDeductRequest
    asked_at: Instant
    pre_deduct_id: str | None = None
    amount: int = 0
    refused: bool = False
    resolved: bool = False
    told: int = 0
    """Points that an event published as held."""
    told_back: bool = False
    """Whether an event published that it was given back."""
    leaving: str | None = None
    """Why it is being given back in the background. A repeat of that call, or the undo, sends the same reason."""

    @property
    def outcome(self) -> RequestOutcome:
        if self.resolved:
            return RequestOutcome.ENDED
        if self.refused:
            return RequestOutcome.REFUSED
        return RequestOutcome.UNKNOWN if self.pre_deduct_id is None else RequestOutcome.MADE

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be done or published about it."""
        return self.resolved and (self.told_back or not self.told)

    @property
    def is_doubtful(self) -> bool:
        """Whether it counts as ended and was not seen to be given back: committed, left to its expiry or unknown."""
        return self.resolved and not self.is_over

    @property
    def usable(self) -> int:
        """Points that may be charged to it: points beyond the requested amount are never used (contract §5)."""
        return min(self.amount, self.request.estimated_cost)

    def cancel_answered(self, answer: Answer[Any]) -> None:
        """Take the answer to a cancel. After a refusal the ledger decides how the hold ended."""
        if answer.refusal is None:
            self.resolved = True


class HoldState(OwnModel):
    """A task's holds. At most one is open, except during a renewal.

    Of the holds that are over, the newest are kept and the rest are counted.
    """

    asked: list[RequestedHold] = []
    asked_count: int = 0
    """How many were requested in all: the newest one's `n`."""
    granted_before: int = 0
    """How many were granted of those that are not kept."""
    estimated: int = 0
    charged: int = 0
    """Points charged by commit or charge, including a commit of the hold that another party made."""
    shortfall: int = 0
    settlement: SettlementState = SettlementState.OPEN
    is_unknown: bool = False
    """The outcome of a hold or a charge is unknown: the task ends with `settlement` unknown."""
    is_left: bool = False
    """A hold is left to its expiry: `settlement` is unknown unless points of the task are charged."""
    granted: int | None = None
    """How many holds were granted in all; None, as in `given_back`, if an earlier release did not count."""
    given_back: int | None = None
    """How many of these are known to have been given back."""
    committed: int = 0
    """How many of these are known to have been committed."""
    asked_again: int = 0
    """How many were sent more than once: a service without idempotency may have taken more of them."""
    lives: int = 0
    """The most earlier lives of the task that an answer has reported (contract §4)."""
    next_renewal_at: Instant | None = None
    uncovered_since: Instant | None = None
    asking: int | None = None
    """`n` of the hold that a renewal requested and that has no answer yet: a repeat uses the same key and body."""
    checkpoint_passed: bool = False
    """Whether a training has reached a checkpoint since it had no hold."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        self.asked_count = max(self.asked_count, *(hold.n for hold in self.asked), 0)
        return self

    def add(self, n: int, request: PreDeductRequest, at: datetime) -> RequestedHold:
        """Record the next hold, before it is requested."""
        self.leave_out_old()
        self.asked_count = max(self.asked_count, n)
        hold = RequestedHold(n=n, request=request, asked_at=at)
        self.asked.append(hold)
        return hold

    def learn_lives(self, answer: Answer[Any]) -> None:
        """Keep how many earlier lives an answer reports: a run that continues as new must know it too."""
        if answer.earlier_life is not None:
            self.lives = max(self.lives, answer.earlier_life.lives)

    def answered(self, hold: RequestedHold, answer: Answer[HoldReply], *, earlier_tries: int = 0) -> None:
        """Take the answer to a pre-deduct, first or repeated. `earlier_tries`: sendings that `tries` does not count."""
        self.asked_again += answer.tries + earlier_tries > 1
        if answer.reply is not None:
            hold.pre_deduct_id, hold.amount = answer.reply.pre_deduct_id, answer.reply.frozen_amount
            if self.granted is not None:
                self.granted += 1
        elif not leaves_unknown(answer):
            hold.refused = True

    def open_doubtful(self) -> None:
        """Count the holds that were not seen to be given back as open: an undo cancels them once more."""
        for hold in self.asked:
            if hold.is_doubtful:
                hold.resolved = False

    def granted_holds(self) -> list[RequestedHold]:
        """The kept holds that were granted, oldest first."""
        return [hold for hold in self.asked if hold.pre_deduct_id]

    def leave_out_old(self) -> None:
        """Only count holds that need no further call: thirty days of renewals request thousands of holds."""
        over = [hold for hold in self.granted_holds() if hold.is_over]
        too_old = {hold.n for hold in over[: max(0, len(over) - MAX_KEPT_HOLDS)]}
        self.granted_before += len(too_old)
        refused = {hold.n for hold in self.asked[:-1] if hold.refused and hold.n != self.asking}
        self.asked = [hold for hold in self.asked if hold.n not in too_old | refused]


def not_left_out(in_order: list[str], kept: Collection[str], left_out: int) -> list[str]:
    """Of a task's holds, in the order in which they were granted, those that are not older than what was kept.

    `left_out`: how many are over and only counted. Holds older than the 64 that are kept have long expired.
    """
    if not left_out:
        return in_order
    return in_order[next((n for n, pre_deduct_id in enumerate(in_order) if pre_deduct_id in kept), 0) :]


def older_than_kept(in_order: list[str], kept: Collection[str], left_out: int) -> list[str]:
    """Those that `not_left_out` leaves away and that a run cannot have counted: they are more than it left out.

    These are an earlier life's where the run was reset to before its first hold.
    """
    if not left_out:
        return []
    first = next((n for n, pre_deduct_id in enumerate(in_order) if pre_deduct_id in kept), 0)
    return in_order[: max(0, first - left_out)]
