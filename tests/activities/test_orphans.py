"""What an ended run's history says of its requests: the same answers come to the same outcome as in the run itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.history.v1 import HistoryEvent
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from activities.orphans import HistoryReader, NotReadHere, orphans_by_row
from comfyui_temporal.contracts.give_back import Orphans
from comfyui_temporal.contracts.requests import HoldState, RequestedHold, RequestOutcome
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import DATA_CONVERTER, data_converter_of
from tests.versions.fullest import DOCUMENTS, fullest

AT = datetime(2031, 1, 1, 12, tzinfo=UTC)
HELD = {"pre_deduct_id": "hold-1", "frozen_amount": 24, "balance_after": 76}


def refusal(message: str) -> dict[str, Any]:
    return {"code": "input_invalid", "message": message, "http_status": 422, "sentence": "Refused."}


def payload(document: Any) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(document).encode())


class History:
    """A run's history as it is read, one call after the other."""

    def __init__(self, converter: DataConverter = DATA_CONVERTER) -> None:
        row = TaskRow.model_validate(fullest(Orphans)["row"])
        self.reader = HistoryReader(Orphans(row=row, how="terminated"), converter)
        self._events = 0

    async def call(self, name: str, argument: Any, answer: dict[str, Any] | None = None) -> None:
        """A call that the run made; `answer` is None where it got none."""
        scheduled = self._event(Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        attributes = scheduled.activity_task_scheduled_event_attributes
        attributes.activity_type.name = name
        attributes.input.payloads.append(payload(argument))
        await self.reader.take(scheduled)
        if answer is not None:
            completed = self._event(Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
            completed.activity_task_completed_event_attributes.scheduled_event_id = scheduled.event_id
            completed.activity_task_completed_event_attributes.result.payloads.append(payload(answer))
            await self.reader.take(completed)

    async def continued_with(self, holds: HoldState) -> None:
        run = fullest(DOCUMENTS["image-run"])
        run["carried"] |= {"hold": holds.model_dump(mode="json"), "jobs": []}
        started = self._event(Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
        started.workflow_execution_started_event_attributes.workflow_type.name = "ImageGenerationWorkflow"
        started.workflow_execution_started_event_attributes.input.payloads.append(payload(run))
        await self.reader.take(started)

    def _event(self, kind: Happened.ValueType) -> HistoryEvent:
        self._events += 1
        event = HistoryEvent(event_id=self._events, event_type=kind)
        event.event_time.FromDatetime(AT)
        return event


SUBMIT = {**fullest(DOCUMENTS["submit-job"]), "key": "task-1:submit:1"}
HOLD = {**fullest(DOCUMENTS["pre-deduct"]), "key": "task-1:pre_deduct:1"}
CHARGE = fullest(DOCUMENTS["charge"])
CANCEL_JOB = {**fullest(DOCUMENTS["job-call"]), "job_id": "job-1"}


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (None, RequestOutcome.UNKNOWN),
        ({"reply": {"job_id": "job-1", "estimated_cost": 24}}, RequestOutcome.MADE),
        ({"refusal": refusal("job_refused")}, RequestOutcome.REFUSED),
        ({"not_offered": True}, RequestOutcome.REFUSED),
        ({"refusal": refusal("task_ended")}, RequestOutcome.REFUSED),
        ({"refusal": refusal("task_ended"), "tries": 2}, RequestOutcome.UNKNOWN),
    ],
    ids=str,
)
async def test_a_submit_comes_to_what_its_answer_says(answer: dict[str, Any] | None, outcome: RequestOutcome) -> None:
    history = History()
    await history.call("submit_job", SUBMIT, answer)
    [job] = history.reader.orphans.jobs
    assert job.outcome is outcome
    assert (job.request is not None) is (outcome is RequestOutcome.UNKNOWN), "only what may be repeated keeps its body"


@pytest.mark.parametrize(
    ("answer", "outcome", "is_sent_again"),
    [
        (None, RequestOutcome.UNKNOWN, False),
        ({"reply": HELD}, RequestOutcome.MADE, False),
        ({"reply": HELD, "tries": 2}, RequestOutcome.MADE, True),
        ({"refusal": refusal("insufficient_balance")}, RequestOutcome.REFUSED, False),
        ({"refusal": refusal("insufficient_balance"), "tries": 2}, RequestOutcome.REFUSED, True),
        ({"refusal": refusal("task_ended")}, RequestOutcome.REFUSED, False),
        ({"refusal": refusal("task_ended"), "tries": 2}, RequestOutcome.UNKNOWN, True),
    ],
    ids=str,
)
async def test_a_hold_comes_to_what_its_answer_says(
    answer: dict[str, Any] | None, outcome: RequestOutcome, is_sent_again: bool
) -> None:
    """One that was sent more than once may stand twice at a service that keeps no keys: the give-back looks for it."""
    history = History()
    await history.call("pre_deduct", HOLD, answer)
    orphans = history.reader.orphans
    assert [hold.outcome for hold in orphans.holds] == [outcome]
    assert bool(orphans.asked_again) is is_sent_again


async def test_a_hold_that_was_requested_by_two_calls_was_sent_more_than_once() -> None:
    history = History()
    await history.call("pre_deduct", HOLD)
    await history.call("pre_deduct", HOLD, {"reply": HELD})
    assert history.reader.orphans.asked_again


async def test_what_the_runs_before_had_sent_more_than_once_is_remembered() -> None:
    history = History()
    await history.continued_with(HoldState(asked_again=1))
    assert history.reader.orphans.asked_again


@pytest.mark.parametrize("is_published", [True, False])
async def test_a_hold_that_runs_before_did_not_see_given_back_is_cancelled_again(is_published: bool) -> None:
    """Its cancel had been refused, or its end could not be found out."""
    history = History()
    hold = RequestedHold(
        n=1, request=HOLD["body"], asked_at=AT, pre_deduct_id="hold-1", resolved=True, told=24, told_back=is_published
    )
    await history.continued_with(HoldState(asked=[hold]))
    assert [hold.needs_undo for hold in history.reader.orphans.holds] == [not is_published]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (None, RequestOutcome.MADE),
        ({"reply": {"job_id": "job-1"}}, RequestOutcome.ENDED),
        ({"not_offered": True}, RequestOutcome.ENDED),
        ({"refusal": refusal("job_not_found")}, RequestOutcome.ENDED),
        ({"refusal": refusal("idempotency_conflict")}, RequestOutcome.MADE),
    ],
    ids=str,
)
async def test_a_job_has_ended_once_its_cancel_is_answered(
    answer: dict[str, Any] | None, outcome: RequestOutcome
) -> None:
    history = History()
    await history.call("submit_job", SUBMIT, {"reply": {"job_id": "job-1", "estimated_cost": 24}})
    await history.call("cancel_job", CANCEL_JOB, answer)
    assert [job.outcome for job in history.reader.orphans.jobs] == [outcome]


@pytest.mark.parametrize(
    ("answers", "is_refused"),
    [
        ([None], False),
        ([{"reply": {"ledger_id": "charge-1", "change": -2_000}}], False),
        ([{"refusal": refusal("insufficient_balance")}], True),
        ([{"refusal": refusal("idempotency_conflict")}], False),
        ([{"refusal": refusal("read_the_ledger")}], False),
        ([{"refusal": refusal("insufficient_balance")}, None], False),
    ],
    ids=str,
)
async def test_only_a_refusal_of_the_last_charge_ends_charging(
    answers: list[dict[str, Any] | None], is_refused: bool
) -> None:
    history = History()
    for n, answer in enumerate(answers, start=1):
        await history.call("charge", {**CHARGE, "key": f"task-1:charge:{n}"}, answer)
    assert history.reader.orphans.charge_refused is is_refused


@pytest.mark.parametrize(
    ("calls", "sent"),
    [
        ([(1, {"refusal": refusal("read_the_ledger")}), (2, None)], [2]),
        ([(1, {"refusal": refusal("read_the_ledger")}), (1, None)], [1]),
        ([(1, {"refusal": refusal("task_ended")})], []),
        ([(1, {"refusal": refusal("read_the_ledger"), "tries": 2})], [1]),
        ([(1, None), (1, {"refusal": refusal("read_the_ledger")})], [1]),
        ([(1, {"refusal": refusal("insufficient_balance")})], [1]),
    ],
    ids=str,
)
async def test_a_charge_that_was_stopped_before_it_was_sent_is_none_to_finish(
    calls: list[tuple[int, dict[str, Any] | None]], sent: list[int]
) -> None:
    history = History()
    for n, answer in calls:
        await history.call("charge", {**CHARGE, "key": f"task-1:charge:{n}"}, answer)
    assert [post.key for post in history.reader.orphans.charges] == [f"task-1:charge:{n}" for n in sent]


@pytest.mark.parametrize(
    ("answers", "sent"),
    [
        ([], 0),
        ([None], 1),
        ([{"reply": {"ledger_id": "charge-1", "change": -2_000}}, None], 2),
        ([{"reply": {"ledger_id": "charge-1", "change": -2_000}}, {"refusal": refusal("insufficient_balance")}], 1),
        ([{"refusal": refusal("read_the_ledger")}], 0),
    ],
    ids=str,
)
async def test_the_charges_that_a_run_sent_are_counted_without_one_that_was_refused(
    answers: list[dict[str, Any] | None], sent: int
) -> None:
    """A later life looks for as many in the ledger."""
    history = History()
    for n, answer in enumerate(answers, start=1):
        await history.call("charge", {**CHARGE, "key": f"task-1:charge:{n}"}, answer)
    assert history.reader.orphans.charges_sent == sent


COMMIT = fullest(DOCUMENTS["commit"])


@pytest.mark.parametrize(
    ("commits", "cost"),
    [
        ([{"price": 240, "actual_cost": 120}], 240),
        ([{"price": 240, "actual_cost": 240}, {"price": 240, "actual_cost": 120}], 240),
        ([{"price": None, "actual_cost": 240}, {"price": None, "actual_cost": 120}], 240),
        ([{"price": 240, "actual_cost": 120}, {"price": None, "actual_cost": 120}], 240),
        ([{"price": 100, "actual_cost": 77}], 100),
    ],
    ids=str,
)
async def test_the_price_is_known_beyond_what_was_committed(commits: list[dict[str, Any]], cost: int) -> None:
    """A worker that does not know the field sends none: then the largest commit counts."""
    history = History()
    for commit in commits:
        body = {**COMMIT["body"], "actual_cost": commit["actual_cost"]}
        await history.call("commit", {**COMMIT, "body": body, "price": commit["price"]})
    assert history.reader.orphans.cost == cost


async def test_the_price_is_known_where_only_charges_were_requested() -> None:
    history = History()
    await history.call("charge", {**CHARGE, "key": "task-1:charge:1", "price": 2_460})
    assert history.reader.orphans.cost == 2_460


def test_a_vanished_run_leaves_the_copy_that_its_row_names() -> None:
    row = TaskRow.model_validate(fullest(Orphans)["row"])
    assert row.dataset is not None
    left = orphans_by_row(row, "vanished").snapshot
    assert left is not None
    assert (left.call_for.task_id, left.dataset_id) == (row.task_id, row.dataset.dataset_id)
    assert orphans_by_row(row.model_copy(update={"dataset": None}), "vanished").snapshot is None


ENCRYPTED = data_converter_of(PayloadEncryption([EncryptionKey("2030", b"o" * 32)]))


async def test_what_is_encrypted_with_another_key_is_not_passed_over() -> None:
    scheduled = HistoryEvent(event_id=7, event_type=Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    scheduled.activity_task_scheduled_event_attributes.activity_type.name = "pre_deduct"
    scheduled.activity_task_scheduled_event_attributes.input.payloads.extend(await ENCRYPTED.encode([{}]))
    with pytest.raises(NotReadHere, match=r"Event 7 .*'2030', which this process does not have"):
        await History().reader.take(scheduled)


async def test_the_sentence_of_an_encrypted_failure_is_read() -> None:
    failed = HistoryEvent(event_id=9, event_type=Happened.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED)
    failure = failed.workflow_execution_failed_event_attributes.failure
    await ENCRYPTED.encode_failure(ApplicationError("It cannot be drawn.", {}, type="node_error"), failure)
    assert "drawn" not in str(failure)
    with pytest.raises(NotReadHere, match=r"Event 9 .*'2030'"):
        await History().reader.take(failed)
    history = History(ENCRYPTED)
    await history.reader.take(failed)
    end = history.reader.orphans.own_end
    assert end is not None and (end.code, end.message) == ("node_error", "It cannot be drawn.")


def calls_of(flow: str) -> set[str]:
    """The activities that the modules of this flow, and those that they import, can schedule."""
    modules, calls = [flow], {name for spec in SCENES.values() for name in (spec.submit, spec.get, spec.cancel)}
    for name in modules:  # it grows meanwhile
        module = importlib.import_module(name)
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("workflows."):
                modules += [str(node.module)] if node.module not in modules else []
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("Activities"):
                method = getattr(getattr(module, ast.unparse(node.value)), node.attr)
                calls.add(method.__temporal_activity_definition.name)
    return calls


@pytest.mark.parametrize("flow", ["workflows.image_generation", "workflows.training"])
async def test_every_call_that_a_tasks_run_can_schedule_is_known(flow: str) -> None:
    """A history with a call that is not known is never given back."""
    calls = calls_of(flow)
    assert {"claim", "look", "heard", "commit", "charge", "ledger", "unanswered_jobs"} < calls
    for name in sorted(calls):
        try:
            await History().call(name, {})
        except NotReadHere as problem:
            assert "is not known here" not in str(problem), name
