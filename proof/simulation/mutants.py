"""Known mistakes, put back one at a time. The simulation must fail on each within a few hundred seeds.

A mutant patches the real classes of `workflows`. `pitfall` names the pitfall, decision or section that it breaks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from temporalio import workflow
from temporalio.exceptions import FailureError

from comfyui_temporal.contracts import ticks
from comfyui_temporal.contracts.tasks import CancelTaskOutcome
from workflows.attempts import Attempts
from workflows.credit_hold import CreditHold
from workflows.ending import Outcome, TaskEnding
from workflows.failures import TaskEnd, TaskFailed
from workflows.following import Following
from workflows.image_price import ImagePrice
from workflows.job_watch import JobWatch
from workflows.ledger_search import LedgerSearch
from workflows.outside_call import OutsideCall, _NoLocalAnswer
from workflows.settlement import Settlement
from workflows.stop import Stop
from workflows.task_flow import TaskFlow
from workflows.task_ledger import Found, HoldFate, TaskLedger
from workflows.task_record import TaskRecord

Patches = list[tuple[Any, str, Any]]


@dataclass(frozen=True)
class Mutant:
    """A mistake: what it patches, and the kind of task on which it shows first."""

    pitfall: str
    kind: str
    patches: Callable[[], Patches]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Apply the mistake while the context is open."""
        with ExitStack() as patched:
            for owner, name, replacement in self.patches():
                patched.enter_context(patch.object(owner, name, replacement))
            yield


def submit_by_local_activity() -> Patches:
    setup = OutsideCall.setup

    async def locally_first(self: OutsideCall, method: Any, argument: Any, *, summary: str, **options: Any) -> Any:
        if not summary.startswith("1 "):
            return await setup(self, method, argument, summary=summary, **options)
        self._stop.raise_if_requested()
        try:
            return await self._local_try(method, argument, summary=summary)
        except _NoLocalAnswer:
            return await setup(self, method, argument, summary=summary, **options)

    return [(OutsideCall, "setup", locally_first)]


def undo_by_local_activity() -> Patches:
    until_answered = OutsideCall.until_answered

    async def locally_first(self: OutsideCall, method: Any, argument: Any, *, summary: str, **rest: Any) -> Any:
        if summary.startswith(("5 cancel", "6 cancel")):
            try:
                return await self._local_try(method, argument, summary=summary)
            except _NoLocalAnswer:
                pass
        return await until_answered(self, method, argument, summary=summary, **rest)

    return [(OutsideCall, "until_answered", locally_first)]


def events_numbered_by_the_workflow() -> Patches:
    add = TaskRecord._add

    def numbered(self: TaskRecord, fact: Any) -> None:
        number = getattr(self, "_number", 0) + 1
        self._number = number  # type: ignore[attr-defined]
        add(self, fact.model_copy(update={"key": str(number), "job_id": None, "sequence": None}))

    return [(TaskRecord, "_add", numbered)]


def commit_inside_the_try() -> Patches:
    async def settle(self: TaskEnding, delivery: Any, cost: int) -> Any:
        try:
            await self._settlement.charge(cost)
            self._stop.raise_if_requested()
        except TaskEnd as end:
            return await self.give_back(end)
        self._stop.close()
        return Outcome(delivery=delivery)

    return [(TaskEnding, "settle", settle)]


def _cut_short(step: str) -> Patches:
    """Let Temporal's cancellation reach the flow during `step`."""
    original = getattr(TaskEnding, step)

    async def marked(self: TaskEnding, *arguments: Any) -> Any:
        self._stop.is_bare = True  # type: ignore[attr-defined]
        return await original(self, *arguments)

    async def uninterrupted(self: Stop, flow: Any, writer: Any) -> Any:
        running, writing = asyncio.create_task(flow), asyncio.create_task(writer)
        while not running.done():
            try:
                await workflow.wait([running, writing], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.ask("", by_temporal=True)
                if getattr(self, "is_bare", False):
                    running.cancel()
        result = running.result()
        writing.cancel()
        if self.by_temporal and self.outcome == "accepted":
            raise asyncio.CancelledError(self.reason)
        return result

    return [(TaskEnding, step, marked), (Stop, "uninterrupted", uninterrupted)]


def cancel_before_the_inbox() -> Patches:
    job_end = Following.job_end

    async def stop_first(self: Following) -> Any:
        read = self._watch.read

        def stop_then_read() -> None:
            self._stop.raise_if_requested()
            read()

        self._watch.read = stop_then_read  # type: ignore[method-assign]
        return await job_end(self)

    return [(Following, "job_end", stop_first)]


def retry_loop_eats_the_cancel() -> Patches:
    async def setup(self: OutsideCall, method: Any, argument: Any, *, summary: str, **options: Any) -> Any:
        while True:
            handle = self.visible(method, argument, summary=summary)
            await workflow.wait_condition(lambda handle=handle: handle.done() or self._stop.requested)  # type: ignore[misc]
            if not handle.done():
                handle.cancel()
            try:
                return await handle
            except FailureError:
                self._stop.requested = False

    return [(OutsideCall, "setup", setup)]


def hold_counted_from_its_answer() -> Patches:
    granted = CreditHold._granted

    def counted(self: CreditHold, hold: Any, answer: Any) -> Any:
        hold.asked_at = workflow.now()
        return granted(self, hold, answer)

    return [(CreditHold, "_granted", counted)]


def undo_without_an_id() -> Patches:
    async def nothing_to_undo(_self: Any, _request: Any) -> None:
        return None

    return [(Attempts, "_learn", nothing_to_undo), (CreditHold, "_learn", nothing_to_undo)]


def body_rebuilt() -> Patches:
    post = CreditHold._post

    def rebuilt(self: CreditHold, hold: Any) -> Any:
        seconds = int((self._deadline() - workflow.now()).total_seconds() + self._margin_seconds)
        hold.request = hold.request.model_copy(update={"expire_in": min(3_600, max(60, seconds))})
        return post(self, hold)

    return [(CreditHold, "_post", rebuilt)]


def signal_handler_raises() -> Patches:
    def read(self: JobWatch, payload: bytes | None) -> Any:
        return self._routes.update_from(json.loads(payload or b"null"))

    return [(JobWatch, "_read", read)]


def earlier_jobs_count() -> Patches:
    def read(self: JobWatch) -> None:
        for update in self._inbox.take_all():
            self._apply(update)
        if self._poll is not None and self._poll.done():
            self._take_poll()

    return [(JobWatch, "read", read)]


def any_sequence_counts() -> Patches:
    apply = JobWatch._apply

    def applied(self: JobWatch, update: Any) -> None:
        newest = self.state.newest
        apply(self, update if newest is None else update.model_copy(update={"sequence": newest.sequence + 1}))

    return [(JobWatch, "_apply", applied)]


def refusal_raised_in_an_undo() -> Patches:
    async def raised(_self: CreditHold, _hold: Any, refusal: Any) -> int:
        raise TaskFailed.by_refusal(refusal)

    return [(CreditHold, "_cancel_refused", raised)]


def unwritten_facts_not_carried() -> Patches:
    carry = TaskRecord.carry

    def without(self: TaskRecord) -> Any:
        return carry(self).model_copy(update={"unwritten": [], "exceptions": []})

    return [(TaskRecord, "carry", without)]


def end_not_waited_for() -> Patches:
    async def at_once(_self: TaskRecord) -> None:
        return None

    return [(TaskRecord, "all_written", at_once)]


def end_reported_before_it_is_decided() -> Patches:
    return [(TaskRecord, "_is_recorded", lambda _self, _facts: True)]


def absence_is_proof() -> Patches:
    async def at_first_sight(self: LedgerSearch, hold: Any) -> Found:
        found = TaskLedger(await self._entries()).fate(hold)
        return Found(HoldFate.GIVEN_BACK) if found.fate is HoldFate.UNKNOWN else found

    return [(LedgerSearch, "fate_of", at_first_sight)]


def cancel_answered_at_once() -> Patches:
    async def cancel_task(self: Stop, reason: str) -> Any:
        self.ask(reason)
        return CancelTaskOutcome(outcome="accepted")

    return [(Stop, "cancel_task", cancel_task)]


def hold_never_renewed() -> Patches:
    return [(CreditHold, "due", lambda _self: None)]


def continues_on_signals() -> Patches:
    async def at_once(self: TaskFlow[Any, Any]) -> bool:
        if not self.is_long() or not self._may_continue():
            return False
        self.watch.stop_polling()
        return workflow.continue_as_new(self._continuation())

    return [(TaskFlow, "continue_as_new_if_long", at_once)]


def recorded_before_the_stop_is_checked() -> Patches:
    return [(OutsideCall, "may_begin", lambda _self: None)]


def commit_a_point_short() -> Patches:
    commit = Settlement._commit

    async def short(self: Settlement, hold: Any, cost: int) -> Any:
        return await commit(self, hold, max(cost - 1, 0))

    return [(Settlement, "_commit", short)]


def stale_job_cancelled() -> Patches:
    wait_to_retry, cancel = Attempts.wait_to_retry, Attempts._cancel

    async def marked(self: Attempts, end: Any) -> None:
        self.is_retrying = True  # type: ignore[attr-defined]
        try:
            await wait_to_retry(self, end)
        finally:
            self.is_retrying = False  # type: ignore[attr-defined]

    async def the_first(self: Attempts, job: Any) -> None:
        await cancel(self, self.asked[0] if getattr(self, "is_retrying", False) else job)

    return [(Attempts, "wait_to_retry", marked), (Attempts, "_cancel", the_first)]


def hold_without_margin() -> Patches:
    return [(CreditHold, "_margin_seconds", 0.0)]


def estimate_ignored() -> Patches:
    agree = ImagePrice.agree

    async def jobs_price(self: ImagePrice, job: Any, table: int, *, n: int) -> int:
        await agree(self, job, table, n=n)
        return int(job.estimated_cost)

    return [(ImagePrice, "agree", jobs_price)]


def balance_ignored() -> Patches:
    async def unchecked(_self: CreditHold, _estimate: Any) -> None:
        """Any balance is enough."""

    return [(CreditHold, "check_balance", unchecked)]


def price_not_checked() -> Patches:
    async def unchecked(_self: ImagePrice, *, n: int) -> None:
        """The estimate is read after the submit, as it was once."""

    return [(ImagePrice, "check_balance", unchecked)]


def ceiling_ignored() -> Patches:
    agree = ImagePrice.agree

    async def without_limit(self: ImagePrice, job: Any, table: int, *, n: int) -> int:
        task, self._task = self._task, self._task.model_copy(update={"max_credits": 1_000_000})
        try:
            return await agree(self, job, table, n=n)
        finally:
            self._task = task

    return [(ImagePrice, "agree", without_limit)]


def a_stage_is_a_tick() -> Patches:
    return [(ticks, "FIGURES", ticks.FIGURES | {"stage", "status"})]


MUTANTS: Final = {
    "submit_by_local_activity": Mutant("pitfall 21", "image", submit_by_local_activity),
    "undo_by_local_activity": Mutant("pitfalls 21, 34", "image", undo_by_local_activity),
    "events_numbered_by_the_workflow": Mutant("decision 2", "image", events_numbered_by_the_workflow),
    "commit_inside_the_try": Mutant("pitfall 16", "image", commit_inside_the_try),
    "bare_commit": Mutant("pitfall 12", "image", lambda: _cut_short("settle")),
    "bare_undo": Mutant("pitfalls 9, 12", "image", lambda: _cut_short("give_back")),
    "cancel_before_the_inbox": Mutant("decision 8", "image", cancel_before_the_inbox),
    "retry_loop_eats_the_cancel": Mutant("pitfall 10", "image", retry_loop_eats_the_cancel),
    "hold_counted_from_its_answer": Mutant("contract §4 Lost answer", "image", hold_counted_from_its_answer),
    "undo_without_an_id": Mutant("pitfall 13", "image", undo_without_an_id),
    "body_rebuilt": Mutant("decision 1, pitfall 21", "image", body_rebuilt),
    "signal_handler_raises": Mutant("pitfall 2", "image", signal_handler_raises),
    "earlier_jobs_count": Mutant("contract §1", "image", earlier_jobs_count),
    "any_sequence_counts": Mutant("contract §2", "image", any_sequence_counts),
    "refusal_raised_in_an_undo": Mutant("pitfall 38", "image", refusal_raised_in_an_undo),
    "unwritten_facts_not_carried": Mutant("pitfall 22", "image", unwritten_facts_not_carried),
    "end_not_waited_for": Mutant("decision 3", "image", end_not_waited_for),
    "end_reported_before_it_is_decided": Mutant("pitfall 34", "training", end_reported_before_it_is_decided),
    "absence_is_proof": Mutant("contract §4 commit refused", "image", absence_is_proof),
    "cancel_answered_at_once": Mutant("contract §8", "image", cancel_answered_at_once),
    "hold_never_renewed": Mutant("contract §4 Renewal", "training", hold_never_renewed),
    "continues_on_signals": Mutant("pitfall 22", "image", continues_on_signals),
    "commit_a_point_short": Mutant("pitfall 60, contract §5 Charged", "image", commit_a_point_short),
    "stale_job_cancelled": Mutant("pitfall 60, contract §1", "image", stale_job_cancelled),
    "hold_without_margin": Mutant("pitfall 60, contract §4 Renewal", "image", hold_without_margin),
    "estimate_ignored": Mutant("pitfall 60, contract §5", "image", estimate_ignored),
    "balance_ignored": Mutant("step tables, price check", "image", balance_ignored),
    "price_not_checked": Mutant("step tables, price check", "image", price_not_checked),
    "ceiling_ignored": Mutant("pitfall 60, contract §5", "image", ceiling_ignored),
    "a_stage_is_a_tick": Mutant("contract §2, decision 4", "image", a_stage_is_a_tick),
    "training_hold_never_refreshed": Mutant(
        "pitfall 60, contract §5", "training", lambda: [(CreditHold, "require", lambda _self, _amount: None)]
    ),
    "recorded_before_the_stop_is_checked": Mutant(
        "contract §4 Lost answer", "image", recorded_before_the_stop_is_checked
    ),
}


def caught(name: str, seeds: range, play: Callable[[int, str], Any]) -> Any:
    """The first outcome that detects the mutant, or None. `play(seed, kind)` runs one schedule."""
    mutant = MUTANTS[name]
    with mutant.put_back():
        for seed in seeds:
            outcome = play(seed, mutant.kind)
            if outcome.problem is not None:
                return outcome
    return None
