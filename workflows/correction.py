"""Looks up settlements that were unknown when their task ended (contract §4): hourly for a day.

A correction changes only the row's `credits` and adds an exception record. It writes no event and does not
change the run's result.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from functools import partial
from typing import Final

from temporalio import workflow
from temporalio.exceptions import FailureError

from activities.credits import CreditsActivities
from activities.unsettled import UnsettledActivities
from comfyui_temporal.contracts.calls import LedgerQuery
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.reconcile import UnsettledLook
from comfyui_temporal.contracts.task_store import Correction, TaskException, UnsettledTask
from comfyui_temporal.contracts.tasks import CreditsSummary
from workflows.outside_call import HEARTBEAT_TIMEOUT, RETRY, STORE_TIMEOUT, OutsideCall
from workflows.stop import Stop
from workflows.task_ledger import TaskLedger

READ_WITHIN: Final = timedelta(seconds=30)
"""A ledger that cannot be read in time is left to the next hour: one outage delays no pass."""
READS_AT_ONCE: Final = 10
LAST_LOOK_AFTER: Final = timedelta(hours=22)
"""After the task's end: a charge that the ledger has not shown by then counts as not made. Rows are looked at for 25
hours, so a look that fails, or comes late where many rows are due, is not the only one.
"""
CHARGES_AWAITED: Final = "settlement-corrected-once-the-charges-that-were-sent-are-shown"
CHARGE_IS_ENOUGH: Final = "settlement-corrected-by-a-charge-without-a-hold"
CUT_IS_ENOUGH: Final = "settlement-corrected-by-a-ledger-that-is-cut-before-the-task"
DOUBLED_MAY_STAY: Final = "settlement-corrected-beside-an-open-doubled-hold"


def corrected(
    recorded: CreditsSummary,
    ledger: TaskLedger,
    *,
    price: int | None = None,
    lives: int | None = None,
    is_last_look: bool = False,
) -> CreditsSummary | None:
    """The credits as the ledger shows them now; None where it still does not show the end.

    `lives`: how often the task's run was reset; None where that is not known. `is_last_look`: a commit would be shown
    by now.
    """
    charged, stands = ledger.charged(), ledger.open_holds()
    was_held = bool(recorded.held or recorded.pre_deduct_count)
    if charged is None or not (ledger.holds or (ledger.charges and not was_held)):
        return None  # an entry that is absent proves nothing
    if not ledger.is_complete and not _is_cut_before(recorded, ledger, lives):
        return None
    may_be_returned = is_last_look and _is_doubled_alone_open(recorded, ledger, lives)
    if charged == 0 and (stands.named or stands.nameless) and not may_be_returned:
        return None  # its points have not been returned
    return recorded.settled(charged=charged, returned=max(0, recorded.held - charged), price=price)


def _is_cut_before(recorded: CreditsSummary, ledger: TaskLedger, lives: int | None) -> bool:
    """Whether what a cut ledger lacks is older than the task: it is newest first, and shows the task's first hold.

    It shows that one where it shows as many holds as were granted. An earlier life may have been granted more, and an
    open hold may be a doubled one that takes the first one's place.
    """
    stands = ledger.open_holds()
    is_first_shown = 0 < recorded.pre_deduct_count <= len(ledger.holds)
    return lives == 0 and is_first_shown and not (stands.named or stands.nameless)


def _is_doubled_alone_open(recorded: CreditsSummary, ledger: TaskLedger, lives: int | None) -> bool:
    """Whether as many holds were given back as the task was granted, and the open ones are more than those.

    Without ids the ledger does not show which of them is the doubled one. An earlier life may have been granted more.
    """
    is_readable = ledger.is_complete and not ledger.tells_ids and not ledger.commits
    granted = recorded.pre_deduct_count
    return is_readable and lives == 0 and 0 < granted < len(ledger.holds) and len(ledger.returns) >= granted


def _is_last_look(task: UnsettledTask) -> bool:
    return task.ended_at is None or workflow.now() - task.ended_at >= LAST_LOOK_AFTER


def _may_show_more(task: UnsettledTask, ledger: TaskLedger) -> bool:
    """Whether a charge that was sent may still be shown: a hold's end proves nothing about that."""
    return len(ledger.charges) < task.charges and not _is_last_look(task)


class Corrections:
    """One pass over the tasks that are due."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(READS_AT_ONCE)

    async def made(self, *, every_seconds: float) -> int:
        """Correct what the ledger shows. Returns how many rows; one that cannot be read delays no other."""
        due = await workflow.execute_activity_method(
            UnsettledActivities.take_unsettled,
            UnsettledLook(every_seconds=every_seconds),
            start_to_close_timeout=STORE_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RETRY,
            summary="3 unknown settlements",
        )
        made = [asyncio.create_task(self._look(task)) for task in due]
        if made:
            await workflow.wait(made)
        return sum(task.result() for task in made)

    async def _look(self, task: UnsettledTask) -> bool:
        async with self._turns:
            try:
                return await self._corrected(task)
            except FailureError as error:
                workflow.logger.warning("The settlement of %s could not be looked up: %s", task.task_id, error)
                return False

    async def _corrected(self, task: UnsettledTask) -> bool:
        outside = OutsideCall(task, Stop())
        query = LedgerQuery(call_for=outside.call_for, task_id=task.task_id)
        answer = await outside.visible(
            CreditsActivities.ledger, query, summary=f"3 ledger of {task.task_id}", within=READ_WITHIN
        )
        if answer.reply is None:
            return False
        ledger = TaskLedger.of(answer.reply)
        known = partial(corrected, task.credits, ledger, price=task.price, lives=task.lives)
        credits = known()
        if credits is None and _is_last_look(task) and (known_now := known(is_last_look=True)) is not None:
            credits = known_now if workflow.patched(DOUBLED_MAY_STAY) else None
        if credits is None or not (ledger.holds or workflow.patched(CHARGE_IS_ENOUGH)):
            return False
        if not (ledger.is_complete or workflow.patched(CUT_IS_ENOUGH)):
            return False
        if _may_show_more(task, ledger) and workflow.patched(CHARGES_AWAITED):
            return False
        record = TaskException(
            key="settlement_corrected",
            code=ExceptionCode.SETTLEMENT_CORRECTED.value,
            message=f"The ledger shows by now that {credits.charged} points were charged and {credits.returned} "
            "returned; the task had ended before this was known.",
            details={"charged": credits.charged, "returned": credits.returned},
            ts=workflow.now(),
        )
        return await workflow.execute_activity_method(
            UnsettledActivities.correct_settlement,
            Correction(task_id=task.task_id, credits=credits, record=record),
            start_to_close_timeout=STORE_TIMEOUT,
            schedule_to_close_timeout=STORE_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=RETRY,
            summary=f"3 correct {task.task_id}",
        )
