"""A call in the history: its limits, its retries, its tenant and priority (docs/architecture.md, "Defaults")."""

from __future__ import annotations

from datetime import timedelta

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import ActivityTaskScheduledEventAttributes
from temporalio.common import RetryPolicy
from temporalio.testing import WorkflowEnvironment

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.tasks import ImageTask
from tests.workflows.probe import probed
from workflows.give_back import ManualCall
from workflows.outside_call import RETRY, RETRY_SILENCE_ONLY, OutsideCall
from workflows.stop import Stop


def task_of(priority: TaskPriority) -> ImageTask:
    return ImageTask(
        task_id="t1", tenant_id="tenant", user_id="user", template_id="upscale", prompt="a cat", priority=priority
    )


def calls_of(priority: TaskPriority) -> OutsideCall:
    return OutsideCall(task_of(priority), Stop())


async def scheduled(
    environment: WorkflowEnvironment, priority: TaskPriority, retry: RetryPolicy = RETRY
) -> ActivityTaskScheduledEventAttributes:
    """A poll as history has it, scheduled within 15 minutes."""

    async def lines() -> None:
        outside = calls_of(priority)
        call = JobCall(call_for=outside.call_for, job_id="j1")
        outside.visible(ComfyUIActivities.get_job, call, summary="4 poll", within=timedelta(minutes=15), retry=retry)

    seen = await probed(environment, lines)
    [event] = [each for each in seen.events if each.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED]
    assert event.user_metadata.summary.data == b'"4 poll"'
    return event.activity_task_scheduled_event_attributes


async def test_a_visible_call_goes_on_within_seconds_of_a_kill_and_is_repeated_slower_and_slower(
    temporal_env: WorkflowEnvironment,
) -> None:
    call = await scheduled(temporal_env, TaskPriority.STANDARD)

    assert call.schedule_to_close_timeout.ToTimedelta() == timedelta(minutes=15)
    assert call.start_to_close_timeout.ToTimedelta() == timedelta(seconds=10)
    assert call.heartbeat_timeout.ToTimedelta() == timedelta(seconds=2)
    assert call.retry_policy.initial_interval.ToTimedelta() == timedelta(seconds=1)
    assert call.retry_policy.backoff_coefficient == 2
    assert call.retry_policy.maximum_interval.ToTimedelta() == timedelta(seconds=30)
    assert call.retry_policy.maximum_attempts == 0
    assert list(call.retry_policy.non_retryable_error_types) == []


async def test_a_call_that_is_repeated_for_silence_only_has_the_same_pauses(temporal_env: WorkflowEnvironment) -> None:
    call = await scheduled(temporal_env, TaskPriority.STANDARD, RETRY_SILENCE_ONLY)

    assert list(call.retry_policy.non_retryable_error_types) == [FailureCode.REPLY_INVALID]
    assert call.retry_policy.initial_interval.ToTimedelta() == timedelta(seconds=1)
    assert call.retry_policy.backoff_coefficient == 2
    assert call.retry_policy.maximum_interval.ToTimedelta() == timedelta(seconds=30)


@pytest.mark.parametrize(("priority", "key"), [(TaskPriority.ACCELERATED, 1), (TaskPriority.STANDARD, 3)])
async def test_a_call_is_its_tenants_at_its_tasks_priority(
    temporal_env: WorkflowEnvironment, priority: TaskPriority, key: int
) -> None:
    call = await scheduled(temporal_env, priority)

    assert (call.priority.priority_key, call.priority.fairness_key) == (key, "tenant")


async def test_a_key_names_task_step_and_number(temporal_env: WorkflowEnvironment) -> None:
    async def lines() -> str:
        return calls_of(TaskPriority.STANDARD).key("pre_deduct", 2)

    assert (await probed(temporal_env, lines)).result == "t1:pre_deduct:2"


async def test_a_give_back_repeats_a_requests_key_and_cancels_under_one_that_the_run_never_used(
    temporal_env: WorkflowEnvironment,
) -> None:
    """Under another key a repeated request for a hold takes a second one. The run's cancel had another reason."""

    async def lines() -> list[str]:
        manual = ManualCall(task_of(TaskPriority.STANDARD), Stop())
        return [manual.key(step, 2) for step in ("pre_deduct", "cancel")]

    assert (await probed(temporal_env, lines)).result == ["t1:pre_deduct:2", "t1:give_back:2"]
