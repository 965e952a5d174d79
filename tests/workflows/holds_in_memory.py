"""A task's holds on their own: a credits service and the task's row in memory answer their calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.exceptions import ApplicationError

from activities.credits import CreditsActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.credits import (
    CancelHoldReply,
    CancelHoldRequest,
    ChargeReply,
    ChargeRequest,
    CommitRequest,
    HoldReply,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import Answer, FailureCode, Refusal, RefusalKind
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE
from comfyui_temporal.contracts.requests import HoldState
from comfyui_temporal.contracts.task_store import RowSeen, TaskRow
from comfyui_temporal.contracts.tasks import CreditsSummary, ImageTask
from tests.workflows.test_ledger_search import NOON, Looks
from tests.workflows.test_task_ledger import OneHold, charge_entry, entries_of
from workflows.credit_hold import CreditHold
from workflows.outside_call import OutsideCall
from workflows.task_record import TaskRecord

TASK = ImageTask(task_id="t", tenant_id="a", user_id="b", template_id="upscale", prompt="a cat")
DEADLINE = NOON + timedelta(minutes=5)


def refusal(message: str) -> Refusal:
    return Refusal(code=FailureCode.INTERNAL, message=message, http_status=409, sentence=f"It was refused: {message}.")


class Records:
    """Replaces the record of a task: what is recorded for operators, by key."""

    def __init__(self) -> None:
        self.exceptions: dict[str, SimpleNamespace] = {}
        self.points = 0
        """The sum of points in the events."""
        self.answers = SimpleNamespace(held=lambda: None)

    @property
    def codes(self) -> list[str]:
        return [record.code for record in self.exceptions.values()]

    def record_exception(self, key: str, code: str, message: str, **details: Any) -> None:
        self.exceptions.setdefault(key, SimpleNamespace(code=str(code), message=message, details=details))

    def publish(self, *_: Any, credits_delta: int = 0, **__: Any) -> None:
        self.points += credits_delta

    def credits_changed(self, credits: CreditsSummary) -> CreditsSummary:
        return credits


class Parties(Looks):
    """Both parties of one task. `shape`: how the ledger shows an entry. `unpatched`: what older code began without."""

    limits = SimpleNamespace(policy=SimpleNamespace(hold_margin_seconds=300))

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        *holds: OneHold,
        shape: str = "kind",
        paused_at: int | None = None,
        unpatched: Collection[str] = (),
    ) -> None:
        super().__init__(patch, paused_at=paused_at)
        patch.setattr(workflow, "patched", lambda name: name not in unpatched)
        patch.setattr(workflow, "info", lambda: SimpleNamespace(first_execution_run_id="r"))
        patch.setattr(workflow, "wait_condition", once)
        self.holds = {hold.pre_deduct_id: hold for hold in holds}
        self.shown = [entry for hold in holds for entry in entries_of(hold, shape)]
        self.hold_ids: list[str] = []
        """What the row names, oldest first."""
        self.is_store_away = self.is_ledger_refused = self.is_suspended = False
        self.refuses_cancels: str | None = None
        """For which reason."""
        self.used_keys: list[str] = []
        """Keys that an earlier life has used with other bodies."""
        self.charges: list[int] = []
        """Points that were charged without a hold."""
        self.first_answer: Answer[HoldReply] | None = None
        """Instead of the reply to the first request for a hold, which acts all the same."""
        self.answers_after = timedelta(0)
        """How long that answer takes."""
        self.records = Records()
        self.waits = SimpleNamespace(in_time=self._in_time, keeps_hold=lambda: True)
        self._by_key: dict[str, OneHold] = {}
        self._shape = shape

    @property
    def open_holds(self) -> list[str]:
        return [hold.pre_deduct_id for hold in self.holds.values() if hold.end is None]

    def may_begin(self) -> None:
        pass

    async def setup(self, method: Any, argument: Any, **_: Any) -> Answer[Any]:
        return await self.until_answered(method, argument)

    async def in_background(self, method: Any, argument: Any, **_: Any) -> Answer[Any] | None:
        return None if self.is_suspended else await self.until_answered(method, argument)

    async def until_answered(self, *arguments: Any, **_: Any) -> Answer[Any]:
        method, argument = arguments
        if method is CreditsActivities.pre_deduct:
            return self._take(argument)
        if method is CreditsActivities.cancel_hold:
            return self._cancel(argument.body)
        if method is CreditsActivities.commit:
            return self._commit(argument)
        if method is CreditsActivities.charge:
            return self._charge(argument)
        assert method is CreditsActivities.ledger
        if self.is_ledger_refused:
            return Answer[Any](refusal=refusal("account_not_found"))
        return await super().until_answered()

    async def read_store(self, *_: Any, **__: Any) -> RowSeen:
        if self.is_store_away:
            raise ApplicationError("The task store does not answer.", type=STORE_UNAVAILABLE)
        row = cast(TaskRow, SimpleNamespace(hold_ids=self.hold_ids, job_ids=[]))
        return RowSeen.model_construct(life=self.earlier.life, row=row, told_points=0, life_seconds=None)

    def visible(self, method: Any, argument: Any, **_: Any) -> Awaitable[Any]:
        if method is TaskStoreActivities.look:
            self.is_store_away = False  # such a call is repeated until it is back
            return self.read_store()
        return self.until_answered(method, argument)

    def credit_hold(self, state: HoldState) -> CreditHold:
        outside, record = cast(OutsideCall, self), cast(TaskRecord, self.records)
        return CreditHold(TASK, outside, record, lambda: DEADLINE, state)

    def _take(self, post: Post[PreDeductRequest]) -> Answer[HoldReply]:
        hold = self._by_key.get(post.key)
        if hold is None:
            hold = self._by_key[post.key] = OneHold(len(self.holds) + 1, post.body.estimated_cost)
            self.holds[hold.pre_deduct_id] = hold
            self.shown += entries_of(hold, self._shape)
        self.now += self.answers_after
        answer, self.first_answer, self.answers_after = self.first_answer, None, timedelta(0)
        reply = HoldReply(pre_deduct_id=hold.pre_deduct_id, frozen_amount=hold.amount)
        return answer or Answer[HoldReply](reply=reply)

    def _cancel(self, body: CancelHoldRequest) -> Answer[CancelHoldReply]:
        hold = self.holds[body.pre_deduct_id]
        if self.refuses_cancels is not None:
            return Answer[CancelHoldReply](refusal=refusal(self.refuses_cancels))
        if hold.end is not None:
            return Answer[CancelHoldReply](refusal=refusal(RefusalKind.HOLD_ALREADY_RESOLVED))
        hold.end = "cancel"
        self.shown.append(entries_of(hold, self._shape)[-1])
        return Answer[CancelHoldReply](reply=CancelHoldReply(pre_deduct_id=hold.pre_deduct_id))

    def _commit(self, post: Post[CommitRequest]) -> Answer[HoldReply]:
        hold, cost = self.holds[post.body.pre_deduct_id], post.body.actual_cost
        if post.key in self.used_keys:
            return Answer[HoldReply](refusal=refusal(RefusalKind.KEY_CONFLICT))
        if hold.end is not None:
            return Answer[HoldReply](refusal=refusal(RefusalKind.HOLD_ALREADY_RESOLVED))
        hold.end, hold.cost = "commit", cost
        self.shown += entries_of(hold, self._shape)[1:]
        return Answer[HoldReply](reply=HoldReply(pre_deduct_id=hold.pre_deduct_id, frozen_amount=cost))

    def _charge(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        self.charges.append(post.body.amount)
        self.shown.append(charge_entry(post.body.amount, self._shape))
        return Answer[ChargeReply](reply=ChargeReply(ledger_id="c", change=-post.body.amount))

    @staticmethod
    async def _in_time(happened: Callable[[], bool], **_: Any) -> None:
        await once(happened)


async def once(happened: Callable[[], bool]) -> None:
    """Let background calls go on until it has happened."""
    for _ in range(100):
        await asyncio.sleep(0)
        if happened():
            return
    raise AssertionError("it does not happen")
