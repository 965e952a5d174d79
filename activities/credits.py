"""The credits service's routes (contract §4): the client that calls them and the activities that workflows see.

Each activity returns an `Answer`: the reply or a definite refusal. Everything else is raised as a retryable error
(`credits_unavailable`, `reply_invalid`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import ClassVar, Final

from temporalio import activity

from activities.lives import Lives
from activities.outside_client import OutsideClient, same
from activities.outside_http import OutsideFailure, Party, Route, current_time_limit_seconds, time_limit
from activities.running_call import answered
from comfyui_temporal.contracts.calls import CallFor, LedgerQuery, Post
from comfyui_temporal.contracts.credits import (
    Balance,
    CancelHoldReply,
    CancelHoldRequest,
    ChargeReply,
    ChargeRequest,
    CommitRequest,
    Estimate,
    EstimateRequest,
    HoldReply,
    Ledger,
    LedgerEntry,
    LedgerKind,
    PreDeductRequest,
)
from comfyui_temporal.contracts.errors import CREDITS_CODES_BY_NUMBER, CREDITS_ERRORS, Answer, FailureCode
from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.size_budget import MAX_LEDGER_BYTES, json_bytes

CREDITS: Final = Party(
    name="The credits service",
    setting="COMFYUI_TEMPORAL_CREDITS_URL",
    unavailable=FailureCode.CREDITS_UNAVAILABLE,
    errors={row.message: row for row in CREDITS_ERRORS},
    messages_by_number=CREDITS_CODES_BY_NUMBER,
)
_ABOUT_HOLD: Final = {"40401": "pre_deduct_not_found", "40901": "pre_deduct_already_processed"}
_ABOUT_ACCOUNT: Final = {"40401": "account_not_found"}

ESTIMATE: Final = Route("POST", "/api/v1/credits/estimate", messages_by_number={"40401": "template_not_found"})
PRE_DEDUCT: Final = Route("POST", "/api/v1/credits/pre-deduct", messages_by_number={"40401": "authorization_not_found"})
COMMIT: Final = Route("POST", "/api/v1/credits/commit", messages_by_number=_ABOUT_HOLD)
CANCEL_HOLD: Final = Route("POST", "/api/v1/credits/cancel", messages_by_number=_ABOUT_HOLD)
CHARGE: Final = Route(
    "POST",
    "/api/v1/credits/charge",
    messages_by_number={
        "40302": "insufficient_balance",
        "42201": "amount_limit_exceeded",
        "42901": "charge_rate_limited",
    },
)
BALANCE: Final = Route("GET", "/api/v1/credits/balance", messages_by_number=_ABOUT_ACCOUNT)
LEDGER: Final = Route("GET", "/api/v1/credits/ledger", messages_by_number=_ABOUT_ACCOUNT)

MAX_LEDGER_PAGES: Final = 200
LONGEST_PAGE: Final = 1000
"""Entries. `limit` may be this much at most (contract §4)."""
CUT: Final = "cut"
"""Cursor of a ledger that was read completely but is too large to be returned completely."""
CUT_OFF: Final = "cut-off"
"""Cursor of a ledger that may have more entries, without a way to read them."""
LEDGER_SECONDS: Final = 3.0
"""Further pages are requested for this long. After that the last page still has time for a slow answer."""


class CreditsClient(OutsideClient):
    """The credits service: one method for each route."""

    party: ClassVar[Party] = CREDITS

    async def estimate(self, post: Post[EstimateRequest]) -> Answer[Estimate]:
        return await self._call(ESTIMATE, _scope(post.call_for), post.call_for, Estimate, key=post.key, body=post.body)

    async def pre_deduct(self, post: Post[PreDeductRequest]) -> Answer[HoldReply]:
        return await self._call(
            PRE_DEDUCT, _scope(post.call_for), post.call_for, HoldReply, key=post.key, body=post.body
        )

    async def commit(self, post: Post[CommitRequest]) -> Answer[HoldReply]:
        def check(reply: HoldReply) -> str | None:
            return same("pre_deduct_id", post.body.pre_deduct_id, reply.pre_deduct_id)

        return await self._call(
            COMMIT, _scope(post.call_for), post.call_for, HoldReply, key=post.key, body=post.body, check=check
        )

    async def cancel_hold(self, post: Post[CancelHoldRequest]) -> Answer[CancelHoldReply]:
        def check(reply: CancelHoldReply) -> str | None:
            return same("pre_deduct_id", post.body.pre_deduct_id, reply.pre_deduct_id)

        return await self._call(
            CANCEL_HOLD,
            _scope(post.call_for),
            post.call_for,
            CancelHoldReply,
            key=post.key,
            body=post.body,
            check=check,
        )

    async def charge(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        return await self._call(CHARGE, _scope(post.call_for), post.call_for, ChargeReply, key=post.key, body=post.body)

    async def balance(self, call_for: CallFor) -> Answer[Balance]:
        """The balance of the tenant's and user's account, in points. Changes nothing."""
        return await self._call(BALANCE, _scope(call_for), call_for, Balance, query=_account(call_for))

    async def ledger_page(
        self, call_for: CallFor, *, limit: int, task_id: str | None = None, cursor: str | None = None
    ) -> Answer[Ledger]:
        """One page of the account's ledger, newest first. A service may ignore `task_id` (ours)."""
        query = _account(call_for) | {"limit": limit}
        if task_id is not None:
            query["task_id"] = task_id
        if cursor is not None:
            query["cursor"] = cursor
        return await self._call(LEDGER, _scope(call_for), call_for, Ledger, query=query)

    async def ledger(self, query: LedgerQuery) -> Answer[Ledger]:
        """The entries of one task, from all pages. `cursor` is null if every page was read.

        It stops after 200 pages or 3 s with the cursor that it reached: entries that were found count, a missing entry
        proves nothing. A full page of a service without pages (field) is requested once more with 1,000 entries; if
        that one is full too, older entries may be missing.
        """
        entries: list[LedgerEntry] = []
        cursor: str | None = None
        seen: set[str] = set()
        began, limit = time.monotonic(), current_time_limit_seconds()
        for _ in range(MAX_LEDGER_PAGES):
            with time_limit(limit - (time.monotonic() - began)):
                answer = await self.ledger_page(query.call_for, limit=query.limit, task_id=query.task_id, cursor=cursor)
            if answer.reply is None:
                return answer
            entries += answer.reply.entries
            cursor = answer.reply.cursor or None
            if cursor in seen:
                raise self._client.reply_invalid(LEDGER, "its cursor leads in a circle")
            if cursor is None and not seen and _may_be_cut(answer.reply, query.limit):
                with time_limit(limit - (time.monotonic() - began)):
                    entries, cursor = await self._longest_page(query, entries)
                break
            if cursor is None or time.monotonic() - began > LEDGER_SECONDS:
                break
            seen.add(cursor)
        return Answer(reply=fitting(Ledger(entries=entries_of_task(entries, query.task_id), cursor=cursor)))

    async def _longest_page(
        self, query: LedgerQuery, entries: list[LedgerEntry]
    ) -> tuple[list[LedgerEntry], str | None]:
        """The most that a ledger without pages shows, and whether that is cut off; `entries` where it refuses."""
        if query.limit >= LONGEST_PAGE:
            return entries, CUT_OFF
        try:
            answer = await self.ledger_page(query.call_for, limit=LONGEST_PAGE, task_id=query.task_id)
        except OutsideFailure:
            return entries, CUT_OFF
        if answer.reply is None:
            return entries, CUT_OFF
        return answer.reply.entries, CUT_OFF if _may_be_cut(answer.reply, LONGEST_PAGE) else None


def _may_be_cut(page: Ledger, limit: int) -> bool:
    """Whether a last page is full although its service names no kinds: such a service may have no cursor either."""
    return len(page.entries) >= limit and all(entry.kind is None for entry in page.entries)


def entries_of_task(entries: list[LedgerEntry], task_id: str) -> list[LedgerEntry]:
    """The task's entries, and entries of its holds without a task id: a cancel or an expiry need not repeat the id."""
    holds = {entry.pre_deduct_id for entry in entries if entry.task_id == task_id and entry.pre_deduct_id}
    return [
        entry for entry in entries if entry.task_id == task_id or (not entry.task_id and entry.pre_deduct_id in holds)
    ]


def fitting(ledger: Ledger) -> Ledger:
    """The ledger small enough to be returned: the oldest holds that were taken and given back are left out first.

    Such a pair charged nothing. If that is not enough, the oldest entries are left out too, and `cursor` says that the
    ledger is incomplete.
    """
    sizes = [json_bytes(entry) + 1 for entry in ledger.entries]
    too_much = sum(sizes) - MAX_LEDGER_BYTES
    if too_much <= 0:
        return ledger
    left_out: set[int] = set()
    for pair in _given_back(ledger.entries):
        if too_much > 0:
            left_out |= set(pair)
            too_much -= sum(sizes[i] for i in pair)
    cursor = ledger.cursor
    for i in reversed(range(len(ledger.entries))):
        if too_much > 0 and i not in left_out:
            left_out.add(i)
            too_much -= sizes[i]
            cursor = cursor or CUT
    return Ledger(entries=[entry for i, entry in enumerate(ledger.entries) if i not in left_out], cursor=cursor)


def _given_back(entries: list[LedgerEntry]) -> Iterator[tuple[int, int]]:
    """Positions of a pre-deduct and of its cancel or expiry, oldest first. Entries are newest first."""
    taken: dict[tuple[str | None, int], list[int]] = {}
    for i in reversed(range(len(entries))):
        entry = entries[i]
        kind = entry.kind.value if entry.kind is not None else entry.reason
        if kind == LedgerKind.PRE_DEDUCT:
            taken.setdefault((entry.pre_deduct_id, -entry.change), []).append(i)
        elif kind in (LedgerKind.CANCEL, LedgerKind.EXPIRE) and (
            held := taken.get((entry.pre_deduct_id, entry.change))
        ):
            yield held.pop(0), i


def _scope(call_for: CallFor) -> Scope:
    return Scope.CREDITS_ROLLBACK if call_for.is_rollback else SCENES[call_for.scene].scope


def _account(call_for: CallFor) -> dict[str, str | int]:
    return {"tenant_id": call_for.tenant_id, "user_id": call_for.user_id}


class CreditsActivities:
    """The credits service as workflows see it. The caller opens and closes the client.

    Commits and calls that start something go through `lives` first.
    """

    def __init__(self, client: CreditsClient, lives: Lives) -> None:
        self._client = client
        self._lives = lives

    @activity.defn
    async def estimate(self, post: Post[EstimateRequest]) -> Answer[Estimate]:
        return await answered(post.call_for, self._client.estimate(post))

    @activity.defn
    async def pre_deduct(self, post: Post[PreDeductRequest]) -> Answer[HoldReply]:
        return await answered(post.call_for, self._lives.begin(post, self._client.pre_deduct))

    @activity.defn
    async def commit(self, post: Post[CommitRequest]) -> Answer[HoldReply]:
        return await answered(post.call_for, self._lives.settle(post, self._client.commit))

    @activity.defn
    async def cancel_hold(self, post: Post[CancelHoldRequest]) -> Answer[CancelHoldReply]:
        return await answered(post.call_for, self._client.cancel_hold(post))

    @activity.defn
    async def charge(self, post: Post[ChargeRequest]) -> Answer[ChargeReply]:
        return await answered(post.call_for, self._lives.charge(post, self._client.charge))

    @activity.defn
    async def ledger(self, query: LedgerQuery) -> Answer[Ledger]:
        return await answered(query.call_for, self._client.ledger(query))
