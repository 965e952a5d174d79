"""What the worker's activities count, read from a metrics page as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from temporalio.testing import ActivityEnvironment, WorkflowEnvironment

import worker
from activities import metrics
from activities.closed_runs import ClosedRunActivities
from activities.outside_http import OutsideFailure
from activities.running_call import answered
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode, Refusal
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.reconcile import OpenTasksLook
from comfyui_temporal.contracts.task_store import TaskState
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from runtime.settings import Settings
from store import TaskStore
from tests.activities.calls import call_for
from tests.conftest import NewDatabase
from tests.metrics_page import MetricsPage, names_in
from tests.store.facts import claim_of, end, fact, new_task_id, write_of
from tests.store.test_activities import policy_of


class Page(MetricsPage):
    """A page, and activities that count on it."""

    async def run(self, work: Any, *arguments: Any, attempt: int = 1, call: str = "submit_job") -> Any:
        environment = ActivityEnvironment()
        environment.metric_meter = self.runtime.metric_meter
        environment.info = replace(environment.info, attempt=attempt, activity_type=call)
        return await environment.run(work, *arguments)


@pytest.fixture
def page() -> Iterator[Page]:
    yield Page()


async def test_calls_are_counted_by_party_and_outcome_and_repeats_as_retries(page: Page) -> None:
    async def reply() -> Answer[str]:
        return Answer(reply="ok")

    async def refusal() -> Answer[str]:
        code, message = FailureCode.INSUFFICIENT_BALANCE, "insufficient_balance"
        return Answer(refusal=Refusal(code=code, message=message, http_status=402, sentence="Top up."))

    async def failure() -> Answer[str]:
        raise OutsideFailure(FailureCode.CREDITS_UNAVAILABLE, "no answer")

    async def called(call: Any) -> None:
        await answered(call_for(), call())

    await page.run(called, reply)
    await page.run(called, refusal, call="pre_deduct")
    for attempt in (1, 2, 3):
        with pytest.raises(Exception, match="no answer"):
            await page.run(called, failure, call="commit", attempt=attempt)

    assert page.value("outside_calls_total", party="comfyui", outcome="reply") == 1
    assert page.value("outside_calls_total", party="credits", outcome="refused") == 1
    assert page.value("outside_calls_total", party="credits", outcome="credits_unavailable") == 3
    assert page.value("outside_retries_total", party="credits") == 2
    assert page.value("outside_retries_total", party="comfyui") == 0
    assert "task-1" not in page.text and "tenant-demo" not in page.text


async def test_every_call_of_a_worker_has_its_party() -> None:
    dsn = SecretStr("postgresql://user:word@127.0.0.1:9/nowhere")
    settings = Settings(_env_file=None, service_secret=SecretStr("s" * 32), database_dsn=dsn)
    async with worker.opened_activities(settings) as activities:
        holders = {
            method.__temporal_activity_definition.name: type(method.__self__).__name__  # type: ignore[attr-defined]
            for method in activities
        }
    parties = {"ComfyUIActivities": "comfyui", "CreditsActivities": "credits", "DatasetActivities": "storage"}
    for call, holder in holders.items():
        if holder in parties:
            assert metrics.party_of(call) == parties[holder], call


async def test_an_end_is_counted_once_with_its_points_and_how_long_it_waited(page: Page, task_store: TaskStore) -> None:
    activities, task_id = TaskStoreActivities(task_store, policy_of), new_task_id()
    await task_store.claim(claim_of(task_id))
    credits = CreditsSummary(held=30, charged=24, returned=6, settlement=SettlementState.SETTLED)
    waited = datetime.now(UTC) - timedelta(seconds=20)
    ending = write_of(task_id, end(ts=waited), status=TaskStatus.COMPLETED, credits=credits)
    await page.run(activities.write, ending)
    await page.run(activities.write, ending)

    assert page.value("tasks_ended_total", scene="image.generate", status="completed", code="none") == 1
    assert page.value("task_points_total", scene="image.generate", what="charged") == 24
    assert page.value("task_points_total", what="returned") == 6
    assert page.value("task_points_total", what="unknown") == 0
    assert page.value("task_store_write_lag_seconds_bucket", le="15") == 0
    assert page.value("task_store_write_lag_seconds_bucket", le="30") == 2


async def test_points_whose_settlement_is_unknown_and_codes_that_are_not_ours(page: Page) -> None:
    credits = CreditsSummary(held=30, charged=None, returned=None, settlement=SettlementState.UNKNOWN)
    error = ErrorDetails(code="anything-that-comfyui-says")
    state = TaskState(version=1, status=TaskStatus.FAILED, credits=credits, error=error)

    async def count() -> None:
        metrics.count_end(Scene.MODEL_TRAIN.value, state)

    await page.run(count)

    assert page.value("tasks_ended_total", scene="model.train", status="failed", code="other") == 1
    assert page.value("task_points_total", what="unknown") == 30
    assert "anything-that-comfyui-says" not in page.text


async def test_a_store_that_is_away_is_counted_as_a_party(page: Page) -> None:
    store = TaskStore("postgresql://user:word@127.0.0.1:1/tasks")
    activities = TaskStoreActivities(store, policy_of)
    with pytest.raises(Exception, match="PostgreSQL"):
        await page.run(activities.write, write_of(new_task_id(), end()), attempt=4, call="write")
    assert page.value("outside_calls_total", party="task_store", outcome="internal") == 1
    assert page.value("outside_retries_total", party="task_store") == 1
    await store.close()


async def test_a_pass_of_the_reconciler_is_noted_when_it_has_read_its_last_page(
    page: Page, temporal_env: WorkflowEnvironment, new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, began = TaskStore(await new_database()), time.time()
    for _ in range(2):
        await store.claim(claim_of(new_task_id()))
    activities = ClosedRunActivities(temporal_env.client, store)
    monkeypatch.setattr("activities.closed_runs.PAGE_SIZE", 1)

    first = await page.run(activities.closed_among_open, OpenTasksLook(quiet_seconds=0))
    assert page.value(metrics.LAST_LOOK) == 0
    await page.run(activities.closed_among_open, OpenTasksLook(quiet_seconds=0, cursor=first.cursor))

    assert began <= page.value(metrics.LAST_LOOK) <= time.time()
    await store.close()


async def test_every_name_is_exported_as_it_is_declared(page: Page) -> None:
    """Rules and dashboards are checked against these names (tests/deploy)."""

    async def count_all() -> None:
        metrics.count_call("comfyui", "reply")
        state = TaskState(version=1, status=TaskStatus.COMPLETED, credits=CreditsSummary(charged=1))
        metrics.count_end("image.generate", state)
        metrics.observe_write_lag([fact("a")])
        metrics.count_rows_not_looked_at(1)
        metrics.note_look()

    await page.run(count_all, attempt=2)

    assert names_in(page.text) == {
        *(f"{name}_total" for name in metrics.COUNTERS),
        *metrics.GAUGES,
        *metrics.BUCKETS_SECONDS,
    }
