"""Start a task's workflow: the same input started twice with one id is one task (contract §8).

Used by `TemporalTasks` and by the gateway.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowHandle
from temporalio.common import (
    Priority,
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from comfyui_temporal.client.errors import TaskExists
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tasks import (
    INPUT_MEMO,
    PRIORITY_KEYS,
    TASK_QUEUE,
    TaskInput,
    TaskStatus,
    input_sha256_of,
    workflow_id_of,
)
from comfyui_temporal.encryption import encryption_of
from comfyui_temporal.encryption_keys import EncryptionError
from comfyui_temporal.runs import RunSeen, describe_run

RPC_TIMEOUT: Final = timedelta(seconds=5)
WORKFLOW_TASK_TIMEOUT: Final = timedelta(seconds=3)


@dataclass(frozen=True)
class Started:
    """A task's run. `is_new` is false if the same input had been started before."""

    handle: WorkflowHandle[Any, Any]
    task_id: str
    run_id: str
    is_new: bool


async def start_task(client: Client, task: TaskInput, *, task_queue: str = TASK_QUEUE) -> Started:
    """Start a task of any scene, or find the run of the same input. Raises TaskExists, RPCError, EncryptionError."""
    spec = SCENES[task.scene]
    options = start_options(client, task, task_queue)
    try:
        handle: WorkflowHandle[Any, Any] = await client.start_workflow(
            spec.workflow, task, rpc_timeout=RPC_TIMEOUT, **options
        )
    except WorkflowAlreadyStartedError:
        return await _same_task(client, _handle_of(client, task), task)
    return Started(handle, task.task_id, handle.first_execution_run_id or "", is_new=True)


def start_options(client: Client, task: TaskInput, task_queue: str) -> dict[str, Any]:
    """Every start of a task has these, whether or not it waits."""
    spec = SCENES[task.scene]
    return {
        "id": workflow_id_of(task.task_id),
        "task_queue": task_queue,
        "result_type": spec.result,
        # A closed run counts too: a finished task is never run, or paid, again.
        "id_reuse_policy": WorkflowIDReusePolicy.REJECT_DUPLICATE,
        # Not USE_EXISTING: that would return a run of another input or type with the same id.
        "id_conflict_policy": WorkflowIDConflictPolicy.FAIL,
        "memo": {INPUT_MEMO: encryption_of(client).input_hash(task)},
        "search_attributes": _search_attributes(task),
        "static_summary": spec.summary(task),
        "priority": Priority(priority_key=PRIORITY_KEYS[task.priority], fairness_key=task.tenant_id),
        # Another worker takes over from a killed one after 3 s instead of 10.
        "task_timeout": WORKFLOW_TASK_TIMEOUT,
    }


def _handle_of(client: Client, task: TaskInput) -> WorkflowHandle[Any, Any]:
    return client.get_workflow_handle(workflow_id_of(task.task_id), result_type=SCENES[task.scene].result)


def _search_attributes(task: TaskInput) -> TypedSearchAttributes:
    values = {
        "TaskId": task.task_id,
        "TenantId": task.tenant_id,
        "UserId": task.user_id,
        "Scene": task.scene.value,
        "TemplateId": task.template_id,
        "TaskPriority": task.priority.value,
        "TaskStatus": TaskStatus.QUEUED.value,
    }
    first_stage = SCENES[task.scene].first_stage
    if first_stage is not None:
        values["TaskStage"] = first_stage
    return TypedSearchAttributes(
        [SearchAttributePair(SearchAttributeKey.for_keyword(name), value) for name, value in values.items()]
    )


async def _same_task(client: Client, handle: WorkflowHandle[Any, Any], task: TaskInput) -> Started:
    run = await describe_run(client, handle.id, rpc_timeout=RPC_TIMEOUT)
    if not encryption_of(client).is_hash_of(await _input_hash(client, handle, run, type(task)), task):
        raise TaskExists(task.task_id)
    return Started(handle, task.task_id, run.run_id, is_new=False)


async def _input_hash(
    client: Client,
    handle: WorkflowHandle[Any, Any],
    run: RunSeen,
    input_type: type[TaskInput],
) -> str | None:
    in_memo = (await run.memo()).get(INPUT_MEMO)
    if isinstance(in_memo, str):
        return in_memo
    # Another client has just started it: its run has no memo yet, but its input is in the history.
    async for event in handle.fetch_history_events(page_size=1):
        if event.event_type != EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
            return None
        payloads = event.workflow_execution_started_event_attributes.input.payloads
        try:
            [task] = await client.data_converter.decode(payloads, [input_type])
        except EncryptionError:
            raise
        except Exception:  # the run may have any input; an unreadable one is another input
            return None
        return input_sha256_of(task)
    return None
