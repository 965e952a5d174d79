"""What an ended run's history says of its requests: the same answers come to the same outcome as in the run itself."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType as Happened
from temporalio.api.enums.v1 import WorkflowTaskFailedCause as Cause
from temporalio.api.history.v1 import HistoryEvent
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError

from activities.orphans import HistoryReader, NotReadHere, add_from_row, orphans_by_row
from comfyui_temporal.contracts.give_back import Orphans, OwnEnd
from comfyui_temporal.contracts.requests import HoldState, RequestedHold, RequestedJob, RequestOutcome
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW, TaskStatus, TrainingResult
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import DATA_CONVERTER, data_converter_of
from tests.versions.fullest import DOCUMENTS, fullest

AT = datetime(2031, 1, 1, 12, tzinfo=UTC)
HELD = {"pre_deduct_id": "hold-1", "frozen_amount": 24, "balance_after": 76}


def refusal(message: str) -> dict[str, Any]:
    return {"code": "input_invalid", "message": message, "http_status": 422, "sentence": "Refused."}


def accepted(job_id: str) -> dict[str, Any]:
    return {"job_id": job_id, "estimated_cost": 24}


def payload(document: Any) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(document).encode())


class History:
    """A run's history as it is read, one call after the other."""

    def __init__(self, converter: DataConverter = DATA_CONVERTER, *, lives: int = 0, has_earlier_runs: bool = False):
        row = TaskRow.model_validate(fullest(Orphans)["row"] | {"lives": lives})
        orphans = Orphans(row=row, how="terminated")
        self.reader = HistoryReader(orphans, converter, has_earlier_runs=has_earlier_runs)
        self._events = 0

    async def call(self, name: str, argument: Any, answer: dict[str, Any] | None = None) -> None:
        """A call that the run made; `answer` is None where it got none."""
        scheduled = await self.scheduled(name, argument)
        if answer is not None:
            await self.answered(scheduled, answer)

    async def scheduled(self, name: str, argument: Any) -> int:
        """A call that has no answer yet; its number."""
        scheduled = self._event(Happened.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
        attributes = scheduled.activity_task_scheduled_event_attributes
        attributes.activity_type.name = name
        attributes.input.payloads.append(payload(argument))
        await self.reader.take(scheduled)
        return scheduled.event_id

    async def answered(self, scheduled: int, answer: Any) -> None:
        completed = self._event(Happened.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
        completed.activity_task_completed_event_attributes.scheduled_event_id = scheduled
        completed.activity_task_completed_event_attributes.result.payloads.append(payload(answer))
        await self.reader.take(completed)

    async def continued_with(self, holds: HoldState, jobs: Sequence[RequestedJob] = ()) -> None:
        run = fullest(DOCUMENTS["image-run"])
        run["carried"] |= {"hold": holds.model_dump(mode="json"), "jobs": [job.model_dump(mode="json") for job in jobs]}
        await self.started(IMAGE_WORKFLOW, run)

    async def started(self, workflow: str, run: dict[str, Any]) -> None:
        started = self._event(Happened.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED)
        started.workflow_execution_started_event_attributes.workflow_type.name = workflow
        started.workflow_execution_started_event_attributes.input.payloads.append(payload(run))
        await self.reader.take(started)

    async def was_reset(self) -> None:
        failed = self._event(Happened.EVENT_TYPE_WORKFLOW_TASK_FAILED)
        failed.workflow_task_failed_event_attributes.cause = Cause.WORKFLOW_TASK_FAILED_CAUSE_RESET_WORKFLOW
        await self.reader.take(failed)

    async def had_a_bug(self) -> None:
        await self.reader.take(self._event(Happened.EVENT_TYPE_WORKFLOW_TASK_FAILED))

    async def was_cancelled(self) -> None:
        await self.reader.take(self._event(Happened.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED))

    async def completed(self, result: dict[str, Any]) -> None:
        event = self._event(Happened.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED)
        event.workflow_execution_completed_event_attributes.result.payloads.append(payload(result))
        await self.reader.take(event)

    async def failed(self, error: ApplicationError) -> None:
        event = self._event(Happened.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED)
        await DATA_CONVERTER.encode_failure(error, event.workflow_execution_failed_event_attributes.failure)
        await self.reader.take(event)

    def _event(self, kind: Happened.ValueType) -> HistoryEvent:
        self._events += 1
        event = HistoryEvent(event_id=self._events, event_type=kind)
        event.event_time.FromDatetime(AT)
        return event


SUBMIT = {**fullest(DOCUMENTS["submit-job"]), "key": "task-1:submit:1"}
HOLD = {**fullest(DOCUMENTS["pre-deduct"]), "key": "task-1:pre_deduct:1"}
CHARGE = fullest(DOCUMENTS["charge"])
CANCEL_HOLD = fullest(DOCUMENTS["cancel-hold"])
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


async def test_a_hold_that_the_run_before_had_requested_without_an_answer_was_sent_more_than_once() -> None:
    """The repeat is this run's first try, and the answer names one sending only."""
    history = History()
    await history.continued_with(HoldState(asked=[RequestedHold(n=1, request=HOLD["body"], asked_at=AT)]))
    await history.call("pre_deduct", HOLD, {"reply": HELD})
    orphans = history.reader.orphans
    assert [(hold.pre_deduct_id, hold.amount) for hold in orphans.holds] == [("hold-1", 24)]
    assert orphans.asked_again


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (None, RequestOutcome.MADE),
        ({"reply": {"pre_deduct_id": "hold-2"}}, RequestOutcome.ENDED),
        ({"refusal": refusal("already_processed")}, RequestOutcome.MADE),
    ],
    ids=str,
)
async def test_a_hold_has_ended_once_its_cancel_is_answered(
    answer: dict[str, Any] | None, outcome: RequestOutcome
) -> None:
    """A refusal leaves to the ledger how it ended. The other hold stays as it was."""
    history = History()
    for n in (1, 2):
        await history.call(
            "pre_deduct", {**HOLD, "key": f"task-1:pre_deduct:{n}"}, {"reply": HELD | {"pre_deduct_id": f"hold-{n}"}}
        )
    body = {**CANCEL_HOLD["body"], "pre_deduct_id": "hold-2"}
    await history.call("cancel_hold", {**CANCEL_HOLD, "body": body}, answer)
    assert [hold.outcome for hold in history.reader.orphans.holds] == [RequestOutcome.MADE, outcome]


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


async def test_a_cancel_ends_the_job_that_it_names() -> None:
    history = History()
    for n in (1, 2):
        await history.call("submit_job", {**SUBMIT, "key": f"task-1:submit:{n}"}, {"reply": accepted(f"job-{n}")})
    await history.call("cancel_job", {**CANCEL_JOB, "job_id": "job-2"}, {"reply": {"job_id": "job-2"}})
    assert [job.outcome for job in history.reader.orphans.jobs] == [RequestOutcome.MADE, RequestOutcome.ENDED]


async def test_a_request_that_is_repeated_is_one_job_and_another_body_is_another() -> None:
    """A service without idempotency would make a job for each that is left without an answer."""
    history = History()
    await history.call("submit_job", SUBMIT)
    await history.call("submit_job", {**SUBMIT, "body": SUBMIT["body"] | {"callback_url": "https://other.example/"}})
    await history.call("submit_job", SUBMIT, {"reply": accepted("job-1")})
    jobs = history.reader.orphans.jobs
    assert [(job.job_id, job.outcome) for job in jobs] == [
        ("job-1", RequestOutcome.MADE),
        (None, RequestOutcome.UNKNOWN),
    ]
    assert [job.attempt for job in jobs] == [1, 1]


@pytest.mark.parametrize("has_answer", [False, True])
async def test_a_request_of_the_run_before_that_is_repeated_is_one_job(has_answer: bool) -> None:
    history = History()
    asked = {"attempt": 1, "key": SUBMIT["key"], "request": SUBMIT["body"], "asked_at": AT}
    await history.continued_with(HoldState(), [RequestedJob.model_validate(asked)])
    await history.call("submit_job", SUBMIT, {"reply": accepted("job-1")} if has_answer else None)
    assert [job.job_id for job in history.reader.orphans.jobs] == ["job-1" if has_answer else None]


@pytest.mark.parametrize(("message", "is_taken"), [("idempotency_conflict", True), ("job_refused", False)])
async def test_a_key_that_an_earlier_life_had_used_was_no_attempt(message: str, is_taken: bool) -> None:
    history = History()
    await history.call("submit_job", SUBMIT, {"refusal": refusal(message)})
    assert [job.is_key_taken for job in history.reader.orphans.jobs] == [is_taken]


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


@pytest.mark.parametrize("was_reset", [False, True])
async def test_a_charge_that_was_requested_before_a_reset_may_have_been_sent(was_reset: bool) -> None:
    """A call that was out at the reset is made again, and that one is stopped. The call of before it says nothing."""
    history = History()
    out = await history.scheduled("charge", {**CHARGE, "key": "task-1:charge:1", "price": 2_460})
    await (history.was_reset() if was_reset else history.had_a_bug())
    await history.answered(out, {"refusal": refusal("read_the_ledger")})
    orphans = history.reader.orphans
    assert ([post.key for post in orphans.charges], orphans.cost) == (["task-1:charge:1"] if was_reset else [], 2_460)


@pytest.mark.parametrize(("noted", "lives"), [(0, 1), (3, 3)])
async def test_a_reset_that_the_row_does_not_know_of_counts(noted: int, lives: int) -> None:
    """With an earlier life the ledger is searched before anything is charged."""
    history = History(lives=noted)
    await history.had_a_bug()
    assert history.reader.orphans.row.lives == noted
    await history.was_reset()
    assert history.reader.orphans.row.lives == lives


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
    for n, commit in enumerate(commits, start=1):
        body = {**COMMIT["body"], "actual_cost": commit["actual_cost"], "pre_deduct_id": f"hold-{n}"}
        await history.call("commit", {**COMMIT, "body": body, "price": commit["price"]})
    orphans = history.reader.orphans
    assert (orphans.cost, orphans.commit_of) == (cost, f"hold-{len(commits)}")


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


# The dataset's copy


SNAPSHOT = {**fullest(DOCUMENTS["snapshot-order"]), "dataset_id": "dataset-1"}


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_copy_is_left_until_its_deletion_is_answered(is_deleted: bool) -> None:
    history = History()
    await history.call("snapshot", SNAPSHOT)
    await history.call("delete_snapshot", SNAPSHOT, {} if is_deleted else None)
    left = history.reader.orphans.snapshot
    assert (left is None) is is_deleted
    if left is not None:
        assert (left.dataset_id, left.files, left.manifest) == ("dataset-1", None, None)


@pytest.mark.parametrize(
    ("copied", "has_earlier_runs", "has_list", "is_left"),
    [
        ({"is_asked": True, "is_deleted": False}, False, False, True),
        ({"is_asked": True, "is_deleted": True}, False, False, False),
        ({"is_asked": False, "is_deleted": False}, False, False, False),
        (None, False, False, False),
        (None, True, False, True),
        (None, False, True, True),
    ],
)
async def test_a_copy_that_another_run_or_the_gateway_made_is_left(
    copied: dict[str, Any] | None, has_earlier_runs: bool, has_list: bool, is_left: bool
) -> None:
    """No call in this history made it."""
    run = fullest(DOCUMENTS["training-run"])
    run["dataset"] = {"dataset_id": "dataset-1", "source_uri": "file:///datasets/1/"}
    run["dataset"] |= {"files_sha256": "0" * 64} if has_list else {}
    run["carried"] = run["carried"] | {"dataset": copied} if copied else None
    history = History(has_earlier_runs=has_earlier_runs)
    await history.started(TRAINING_WORKFLOW, run)
    left = history.reader.orphans.snapshot
    assert (left.dataset_id if left else None) == ("dataset-1" if is_left else None)


# How the run ended by itself


async def test_a_run_that_was_completed_ended_with_what_it_delivered() -> None:
    """Its row may be open again: the store was restored."""
    history, result = History(), fullest(TrainingResult)
    await history.completed(result)
    end = history.reader.orphans.own_end
    assert end is not None and end.output is not None
    assert (end.status.value, end.output.model_path) == (result["status"], result["output"]["model_path"])


async def test_a_run_that_was_cancelled_ended_so() -> None:
    history = History()
    await history.was_cancelled()
    assert history.reader.orphans.own_end == OwnEnd(status=TaskStatus.CANCELLED)


@pytest.mark.parametrize(
    ("details", "kind", "code"),
    [
        ([{}], "node_error", "node_error"),
        ([], "task_exists", None),
        ([{}], "a kind of another program", None),
    ],
)
async def test_a_failure_without_a_result_is_no_end_of_the_task(
    details: list[Any], kind: str, code: str | None
) -> None:
    """A run that was refused at its start has begun nothing, and fails without details."""
    history = History()
    await history.failed(ApplicationError("It cannot be.", *details, type=kind))
    end = history.reader.orphans.own_end
    assert (end.code if end else None) == code
    assert end is None or (end.status, end.message) == (TaskStatus.FAILED, "It cannot be.")


# What the row adds


def orphans_of_row(holds: Sequence[RequestedHold] = (), jobs: Sequence[RequestedJob] = (), **row: Any) -> Orphans:
    """What a history left, beside a row that knows nothing but `row`."""
    credits = {"held": 24, "pre_deduct_ids": row.pop("pre_deduct_ids", [])}
    fields = {"task_id": "task-1", "hold_ids": [], "job_ids": [], "job_id": None, "credits": credits, **row}
    known = TaskRow.model_validate(fullest(Orphans)["row"] | fields)
    return Orphans(row=known, how="terminated", holds=list(holds), jobs=list(jobs))


def hold(n: int, pre_deduct_id: str | None) -> RequestedHold:
    return RequestedHold(n=n, request=HOLD["body"], asked_at=AT, pre_deduct_id=pre_deduct_id, amount=24)


def job(attempt: int, job_id: str | None) -> RequestedJob:
    return RequestedJob(attempt=attempt, key=f"task-1:submit:{attempt}", asked_at=AT, job_id=job_id)


def test_a_vanished_run_leaves_the_holds_and_jobs_that_its_row_names() -> None:
    row = orphans_of_row(hold_ids=["h1"], pre_deduct_ids=["h1", "h2"], job_ids=["j1"], job_id="j2").row
    left = orphans_by_row(row, "vanished")
    assert [(each.n, each.pre_deduct_id, each.usable) for each in left.holds] == [(1, "h1", 24), (2, "h2", 24)]
    assert [(each.attempt, each.key, each.job_id) for each in left.jobs] == [
        (1, "task-1:submit:1", "j1"),
        (2, "task-1:submit:2", "j2"),
    ]
    assert all(each.needs_undo for each in [*left.holds, *left.jobs])


def test_holds_of_earlier_lives_get_numbers_that_the_last_run_did_not_use() -> None:
    """By its number a hold's cancel has its key: of two with one number one would stay open."""
    left = orphans_of_row([hold(2, "h2"), hold(5, None), hold(4, "h4")], hold_ids=["h1", "h2", "h3"])
    add_from_row(left)
    assert [(each.n, each.pre_deduct_id) for each in left.holds] == [
        (2, "h2"),
        (5, None),
        (4, "h4"),
        (6, "h1"),
        (7, "h3"),
    ]
    assert left.holds_before == 0


def test_holds_that_the_last_run_only_counted_are_not_added_again() -> None:
    left = orphans_of_row([hold(3, "h3")], hold_ids=["h1", "h2", "h3", "h4"])
    left.holds_before = 2
    add_from_row(left)
    assert ([each.pre_deduct_id for each in left.holds], left.holds_before) == (["h3", "h4"], 2)


@pytest.mark.parametrize(("named", "added", "counted"), [(2, 2, 0), (3, 2, 1), (5, 2, 3)])
def test_the_oldest_of_many_holds_are_only_counted(
    monkeypatch: pytest.MonkeyPatch, named: int, added: int, counted: int
) -> None:
    monkeypatch.setattr("activities.orphans.MAX_KEPT_HOLDS", 2)
    ids = [f"h{n}" for n in range(named)]
    left = orphans_of_row(hold_ids=ids)
    add_from_row(left)
    assert ([each.pre_deduct_id for each in left.holds], left.holds_before) == (ids[-added:], counted)


def test_jobs_of_earlier_lives_get_attempts_that_the_last_run_did_not_use() -> None:
    left = orphans_of_row(jobs=[job(3, "j3"), job(1, "j1")], job_ids=["j1", "j2"], job_id="j4")
    add_from_row(left)
    assert [(each.attempt, each.job_id) for each in left.jobs] == [(3, "j3"), (1, "j1"), (4, "j2"), (5, "j4")]


# What this worker cannot read


async def test_a_run_of_another_flow_is_not_passed_over() -> None:
    with pytest.raises(NotReadHere, match="a workflow AnotherWorkflow is not known here"):
        await History().started("AnotherWorkflow", {})


async def test_a_call_of_a_newer_worker_is_not_passed_over() -> None:
    with pytest.raises(NotReadHere, match="a call refund is not known here"):
        await History().call("refund", {})


@pytest.mark.parametrize("change", [{"priority": "of a newer worker"}, {"carried": {"jobs": "of a newer worker"}}])
async def test_a_run_whose_input_cannot_be_read_is_not_passed_over(change: dict[str, Any]) -> None:
    with pytest.raises(NotReadHere, match=r"Event 1 .*priority|Event 1 .*carried"):
        await History().started(IMAGE_WORKFLOW, fullest(DOCUMENTS["image-run"]) | change)


async def test_fields_of_a_newer_worker_hide_nothing_that_was_requested() -> None:
    history = History()
    run = fullest(DOCUMENTS["image-run"])
    run |= {"newer": 1, "carried": run["carried"] | {"newer": {"a": 1}, "jobs": [], "hold": {"asked_again": 1}}}
    await history.started(IMAGE_WORKFLOW, run)
    await history.call("pre_deduct", HOLD | {"newer": 1}, {"reply": HELD | {"newer": 1}, "newer": 1})
    orphans = history.reader.orphans
    assert ([each.pre_deduct_id for each in orphans.holds], orphans.asked_again) == (["hold-1"], 1)


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
