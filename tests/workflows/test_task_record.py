"""A task's state and facts: what is recorded, published immediately, held back and left out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.common import SearchAttributeUpdate

from comfyui_temporal.contracts.continuation import HeldProgress, JobUpdate, RecordState
from comfyui_temporal.contracts.errors import ErrorDetails, ExceptionCode, FailureCode
from comfyui_temporal.contracts.size_budget import MAX_UNWRITTEN
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus
from store.fact_rules import WrittenSoFar
from workflows.failures import TaskFailed
from workflows.outside_call import OutsideCall
from workflows.task_record import TaskRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
TASK = ImageTask(task_id="t1", tenant_id="tenant", user_id="user", template_id="upscale", prompt="a cat")


class Recorded:
    """A task record, its time moved by the test, and what it shows in Temporal."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.details = NOON, list[str]()
        self.attributes = list[dict[str, Any]]()
        """Each upsert."""
        patch.setattr(workflow, "now", lambda: self.now)
        patch.setattr(workflow, "set_current_details", self.details.append)
        patch.setattr(workflow, "upsert_search_attributes", self._upserted)
        self.carried = RecordState()
        self.record = TaskRecord(TASK, cast(OutsideCall, None), self.carried)

    def _upserted(self, updates: list[SearchAttributeUpdate[Any]]) -> None:
        self.attributes.append({update.key.name: update.value for update in updates})

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def receive(self, sequence: int, *, is_new_stage: bool = False, **fields: Any) -> None:
        """An update of the job, as the watch passes it on."""
        said = {"status": TaskStatus.RUNNING, "stage": "processing", **fields}
        update = JobUpdate(job_id="j1", sequence=sequence, **said)
        self.record.apply(update)
        self.record.publish_progress(update, is_new_stage=is_new_stage or update.is_final)

    @property
    def is_holding_back(self) -> bool:
        return self.carried.held_back is not None

    @property
    def keys(self) -> list[str]:
        return [fact.key for fact in self.carried.unwritten]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


# What is applied


def test_progress_never_goes_back_within_a_stage_and_restarts_in_the_next(recorded: Recorded) -> None:
    reached = list[float]()
    for fields in ({"progress": 40.0}, {"progress": 30.0}, {}, {"progress": 60.0}, {"stage": "delivery"}):
        recorded.receive(len(reached), **fields)
        reached.append(recorded.record.state.progress)

    assert reached == [40.0, 40.0, 40.0, 60.0, 0.0]
    recorded.receive(9, stage="processing", progress=10.0)
    assert recorded.record.state.progress == 10.0


def test_another_attempt_restarts_progress_in_the_same_stage(recorded: Recorded) -> None:
    recorded.receive(1, progress=40.0)
    update = JobUpdate(job_id="j2", sequence=1, status=TaskStatus.RUNNING, stage="processing", progress=5.0)
    recorded.record.apply(update, attempt_changed=True)

    assert recorded.record.state.progress == 5.0


def test_fields_that_an_update_leaves_out_stay_except_those_of_the_moment(recorded: Recorded) -> None:
    eta = NOON + timedelta(minutes=3)
    recorded.receive(1, next_eta=eta, queue_position=4, estimated_time=8.0, gpu_slots=2)
    state = recorded.record.state
    assert (state.next_eta, state.queue_position, state.estimated_time, state.gpu_slots) == (eta, 4, 8.0, 2)

    recorded.receive(2, gpu_slots=0)
    assert (state.next_eta, state.queue_position, state.estimated_time, state.gpu_slots) == (None, None, 8.0, 0)

    recorded.receive(3, estimated_time=5.0)
    assert (state.estimated_time, state.gpu_slots) == (5.0, 0)


def test_a_requested_job_keeps_nothing_of_the_one_before(recorded: Recorded) -> None:
    recorded.receive(1, progress=40.0, next_eta=NOON, queue_position=4)
    recorded.receive(2, progress=50.0)
    assert recorded.carried.held_back is not None
    recorded.record.attempted(2)
    state = recorded.record.state
    assert (state.attempts, state.stage, state.progress) == (2, None, 0.0)
    assert not recorded.is_holding_back

    state.progress = 7.0
    recorded.record.submitted("queued")

    assert (state.status, state.stage, state.progress) == (TaskStatus.QUEUED, "queued", 0.0)
    assert (state.next_eta, state.queue_position) == (None, None)


def test_a_requested_job_has_no_news_yet(recorded: Recorded) -> None:
    recorded.receive(1, progress=40.0)
    assert recorded.record.as_of == NOON
    recorded.record.job_failed(ErrorDetails(code=FailureCode.LOST))
    assert recorded.record.as_of == NOON, "the figures are still those of the job that failed"
    recorded.record.attempted(2)
    assert recorded.record.as_of is None

    recorded.pass_seconds(5)
    recorded.receive(1)
    assert recorded.record.as_of == NOON + timedelta(seconds=5)


def test_an_update_that_repeats_the_submitted_state_is_not_published(recorded: Recorded) -> None:
    recorded.record.submitted("queued")
    recorded.receive(1, is_new_stage=True, status=TaskStatus.QUEUED, stage="queued")

    assert recorded.keys == []


# What is published


def test_a_fact_has_the_state_of_the_task(recorded: Recorded) -> None:
    recorded.receive(1, progress=40.0, next_eta=NOON, queue_position=4)
    recorded.record.publish("held:1", EventType.CREDITS, credits_delta=-24)

    fact = recorded.carried.unwritten[-1]
    assert (fact.key, fact.event, fact.ts, fact.credits_delta) == ("held:1", EventType.CREDITS, NOON, -24)
    assert (fact.attempt, fact.status, fact.stage, fact.progress) == (1, TaskStatus.RUNNING, "processing", 40.0)
    assert (fact.next_eta, fact.queue_position, fact.is_end) == (NOON, 4, False)

    recorded.record.attempted(3)
    recorded.record.publish("retry:3", EventType.RUNNING)
    assert recorded.carried.unwritten[-1].attempt == 3


def test_progress_is_published_once_a_second_and_what_comes_sooner_is_held_back(recorded: Recorded) -> None:
    recorded.receive(1, progress=10.0)
    recorded.pass_seconds(0.999)
    recorded.receive(2, progress=20.0)
    assert recorded.keys == ["j1:1"]
    assert recorded.carried.held_back == HeldProgress(job_id="j1", sequence=2)

    recorded.receive(3, progress=30.0)
    assert recorded.carried.held_back == HeldProgress(job_id="j1", sequence=3)

    recorded.carried.unwritten.clear()
    recorded.pass_seconds(0.001)
    recorded.receive(4, progress=40.0)
    assert recorded.keys == ["j1:4"]
    assert not recorded.is_holding_back


def test_a_change_of_stage_and_an_error_are_published_immediately(recorded: Recorded) -> None:
    recorded.receive(1, progress=10.0)
    recorded.receive(2, is_new_stage=True, stage="delivery")
    recorded.receive(3, stage="delivery", error=ErrorDetails(code="node_error", message="x"))

    assert recorded.keys == ["j1:1", "j1:3"]
    assert recorded.carried.held_back is None


def test_an_update_with_nothing_new_is_not_published(recorded: Recorded) -> None:
    recorded.receive(1, progress=10.2)
    recorded.pass_seconds(5)
    recorded.receive(2, progress=10.9)
    assert recorded.keys == ["j1:1"]

    changes: list[dict[str, Any]] = [{"progress": 11.0}, {"queue_position": 3}, {"next_eta": NOON}]
    for changed in changes:
        recorded.record._backlog.take()
        recorded.record._backlog.written()
        recorded.pass_seconds(5)
        recorded.receive(9, **{"progress": 10.9, **changed})
        assert recorded.keys == ["j1:9"], changed


# What waits to be written


def test_while_the_store_is_away_only_the_newest_progress_of_a_stage_waits(recorded: Recorded) -> None:
    for sequence in range(1, 5):
        recorded.pass_seconds(2)
        recorded.receive(sequence, progress=10.0 * sequence)
    assert recorded.keys == ["j1:4"]

    recorded.record.publish("held:2", EventType.CREDITS)
    recorded.pass_seconds(2)
    recorded.receive(5, progress=50.0)
    recorded.receive(6, is_new_stage=True, stage="delivery")
    assert recorded.keys == ["j1:4", "held:2", "j1:5", "j1:6"]


def test_what_is_being_written_is_not_changed(recorded: Recorded) -> None:
    recorded.receive(1, progress=10.0)
    recorded.record._backlog.take()
    for sequence in (2, 3):
        recorded.pass_seconds(2)
        recorded.receive(sequence, progress=10.0 * sequence)

    assert recorded.keys == ["j1:1", "j1:3"]


def test_a_new_stage_and_an_error_are_changes_that_newer_figures_do_not_replace(recorded: Recorded) -> None:
    """The gateway may have published newer ticks before: such progress is left out, a change is not."""
    recorded.receive(1, is_new_stage=True, stage="sampling")
    recorded.record.publish("held:2", EventType.CREDITS)
    recorded.pass_seconds(2)
    recorded.receive(2, progress=10.0, stage="sampling")
    recorded.record.publish("held:3", EventType.CREDITS)
    recorded.receive(3, is_new_stage=True, stage="sampling", error=ErrorDetails(code=FailureCode.LOST))

    changes = [(fact.key, fact.is_change) for fact in recorded.carried.unwritten]
    assert changes == [("j1:1", True), ("held:2", False), ("j1:2", False), ("held:3", False), ("j1:3", True)]


def test_a_change_of_stage_stays_one_where_newer_progress_of_that_stage_replaces_it(recorded: Recorded) -> None:
    """Seen: a job went back to the queue while a write hung, and ticked again: no event of the queue was written."""
    recorded.receive(7, is_new_stage=True, status=TaskStatus.QUEUED, stage="queued")
    recorded.pass_seconds(2)
    recorded.receive(8, status=TaskStatus.QUEUED, stage="queued", queue_position=3)
    [fact] = recorded.carried.unwritten
    [(_, written)] = WrittenSoFar(last_seq=5, has_ended=False, job_sequences={"j1": 9}).take([fact], set())
    assert (written.key, written.stage, written.queue_position) == ("j1:8", "queued", 3)


def test_a_change_of_stage_stays_one_where_a_full_list_leaves_its_first_progress_out(recorded: Recorded) -> None:
    recorded.receive(1, is_new_stage=True, stage="sampling")
    recorded.record.publish("held:2", EventType.CREDITS)
    recorded.pass_seconds(2)
    recorded.receive(2, stage="sampling", progress=40.0)
    for n in range(MAX_UNWRITTEN):
        recorded.record.publish(f"more:{n}", EventType.CREDITS)
    changes = {fact.key: fact.is_change for fact in recorded.carried.unwritten}
    assert ("j1:1" in changes, changes["j1:2"]) == (False, True)


def test_a_message_is_no_progress_and_is_never_coalesced(recorded: Recorded) -> None:
    recorded.receive(1, progress=10.0)
    recorded.record.publish("queue_sla", EventType.RUNNING, message="Still queued.")
    recorded.record.publish("retry:2", EventType.RUNNING)
    recorded.record.publish("again", EventType.RUNNING)

    assert recorded.keys == ["j1:1", "queue_sla", "retry:2", "again"]


def test_a_full_list_drops_the_oldest_progress_that_is_not_being_written_and_nothing_else(recorded: Recorded) -> None:
    recorded.receive(1, progress=1.0)
    recorded.record._backlog.take()
    for n in range(2, MAX_UNWRITTEN, 2):
        recorded.pass_seconds(2)
        recorded.receive(n, queue_position=n)
        recorded.record.publish(f"held:{n + 1}", EventType.CREDITS)
    recorded.record.publish("full", EventType.CREDITS)
    assert len(recorded.keys) == MAX_UNWRITTEN == 256
    assert recorded.keys[:3] == ["j1:1", "j1:2", "held:3"]

    recorded.record.publish("one more", EventType.CREDITS)

    assert len(recorded.keys) == MAX_UNWRITTEN
    assert recorded.keys[:2] == ["j1:1", "held:3"]
    assert recorded.keys[-1] == "one more"


def test_a_backlog_full_of_required_facts_grows(recorded: Recorded) -> None:
    for n in range(MAX_UNWRITTEN + 1):
        recorded.record.publish(f"held:{n}", EventType.CREDITS)

    assert len(recorded.keys) == MAX_UNWRITTEN + 1


# Exceptions and ends


def test_an_exception_record_ends_nothing(recorded: Recorded) -> None:
    recorded.record.record_exception("queue_sla", ExceptionCode.QUEUE_SLA_MISSED, "Still queued.", minutes=8)

    [record] = recorded.carried.exceptions
    assert (record.key, record.code, record.message) == ("queue_sla", "queue_sla_missed", "Still queued.")
    assert (record.details, record.ts, recorded.keys) == ({"minutes": 8}, NOON, [])


def test_a_failure_is_reported_to_caller_and_operators(recorded: Recorded) -> None:
    recorded.receive(1, progress=40.0, next_eta=NOON, queue_position=4)
    recorded.record.failed(TaskFailed(FailureCode.TIMEOUT, "It did not end."))

    state, end = recorded.record.state, recorded.carried.unwritten[-1]
    assert (state.status, state.next_eta, state.queue_position) == (TaskStatus.FAILED, None, None)
    assert state.error is not None and state.error.code == "timeout"
    assert (end.key, end.event, end.is_end, end.error, end.message) == (
        "end",
        EventType.FAILED,
        True,
        state.error,
        "It did not end.",
    )
    assert [(record.key, record.code) for record in recorded.carried.exceptions] == [("end", "timeout")]


def test_a_completed_task_is_at_100_percent_and_shows_no_error_of_an_earlier_job(recorded: Recorded) -> None:
    recorded.record.job_failed(ErrorDetails(code=FailureCode.LOST))
    recorded.receive(1, progress=40.0)
    recorded.record.delivered(["https://results/1.png"], None)
    recorded.record.completed()

    state, end = recorded.record.state, recorded.carried.unwritten[-1]
    assert (state.status, state.progress, state.error) == (TaskStatus.COMPLETED, 100.0, None)
    assert (end.key, end.event, end.is_end, end.progress) == ("end", EventType.COMPLETED, True, 100.0)
    assert end.result_urls == state.result_urls == ["https://results/1.png"]


# What Temporal shows


def test_search_attributes_are_set_only_where_they_changed(recorded: Recorded) -> None:
    recorded.carried.written_status = TaskStatus.QUEUED
    recorded.record.submitted("queued")
    recorded.record.submitted("queued")
    recorded.receive(1)
    recorded.receive(2)
    recorded.record.attempted(2)
    recorded.record.update_search_attributes()
    recorded.record.end(TaskStatus.CANCELLED, EventType.CANCELLED)

    assert recorded.attributes == [
        {"TaskStage": "queued"},
        {"TaskStatus": "running", "TaskStage": "processing"},
        {"TaskStage": None},
        {"TaskStatus": "cancelled"},
    ]


def test_every_change_of_the_row_has_a_higher_version(recorded: Recorded) -> None:
    versions = [recorded.record.state.version]
    changes: list[Callable[[], None]] = [
        recorded.record.update_search_attributes,
        lambda: recorded.record.publish("held:1", EventType.CREDITS),
        lambda: recorded.record.record_exception("x", ExceptionCode.QUEUE_SLA_MISSED, "x"),
        lambda: recorded.receive(1, progress=1.0),
    ]
    for change in changes:
        change()
        versions.append(recorded.record.state.version)

    assert sorted(set(versions)) == versions


def test_an_operator_sees_what_is_waited_for_and_the_last_update(recorded: Recorded) -> None:
    recorded.record.waiting_for("ComfyUI: callback or poll", NOON)
    shown = len(recorded.details)
    recorded.record.waiting_for("ComfyUI: callback or poll", NOON)
    assert len(recorded.details) == shown == 1, "each is a write to the server"
    assert "ComfyUI: callback or poll, until" in recorded.details[-1]

    recorded.record.waiting_for("ComfyUI: callback or poll", NOON + timedelta(minutes=1))
    recorded.record.waiting_for("the next attempt", NOON + timedelta(minutes=1))
    assert len(recorded.details) == 3

    recorded.receive(1)
    assert "- **last update from ComfyUI:** 2026&#45;03&#45;01 12:00:00 UTC" in recorded.details[-1]
