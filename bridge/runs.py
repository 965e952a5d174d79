"""Jobs and trainings in Temporal: started once per idempotency key, read, and updated.

The workflow id is derived from the idempotency key. The first request under a key starts the workflow. Its memo keeps
the request's hash and the answer for the namespace's retention (30 days or more), and a repeat reads the answer there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowQueryRejectedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import (
    Priority,
    SearchAttributeKey,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from bridge.calls import (
    ANSWER_MEMO,
    BODY_MEMO,
    BRIDGE_QUEUE,
    KEY_WORKFLOW,
    MOVE_UPDATE,
    RUN_GRAPH,
    STATUS_MEMO,
    VIEW_QUERY,
    workflow_id,
    workflow_of,
)
from bridge.orders import JobView
from bridge.replies import Action, Call, Refused, Reply, Unanswered
from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS, SEARCH_ATTRIBUTES, TaskStatus
from comfyui_temporal.runs import NoQueryNow, RunSeen, RunStatus, describe_run, query_run

ACCEPTED: Final = 202
CLAIMED: Final = Reply(0, None)
NOT_KEPT: Final = frozenset({"idempotency_conflict", "authorization_missing"})
"""Refusals that leave their key free: nothing is stored for a request that its token does not allow."""
JOBS_PATH: Final = "/comfyui/v1/jobs/"
RPC_TIMEOUT: Final = timedelta(seconds=5)
KIND_MEMO: Final = "kind"
TENANT_MEMO: Final = "tenant_id"
ENDED_IN_TEMPORAL_SEQUENCE: Final = 2**40
"""Higher than any run counts: the state of a run that was terminated in Temporal is final."""


Moved = Callable[[JobView], Awaitable[int | None]]


@dataclass(frozen=True)
class NewRun:
    """Everything needed to start a run."""

    workflow: str
    workflow_id: str
    kind: str
    argument: BaseModel
    answer: dict[str, Any]
    fingerprint: str
    task_id: str
    tenant_id: str
    user_id: str
    scene: Scene
    template_id: str
    priority: TaskPriority


def fingerprint(path: str, body: Any) -> str:
    """A hash that is equal for equal JSON bodies; the order of their fields does not matter."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"POST {path}\n{canonical}".encode()).hexdigest()


class Keys:
    """Idempotency keys of POSTs: the same request gets its first answer again, another request a conflict."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def once(self, call: Call, action: Action) -> Reply:
        """Run an action that starts a workflow under the key. A refusal is stored under the key as well."""
        name, request_hash = workflow_id(call.claims.tenant_id, call.key), fingerprint(call.path, call.body)
        kept = await self._runs.kept(name, request_hash)
        if kept is not None:
            return kept
        try:
            return await action(call)
        except Refused as refused:
            if refused.message in NOT_KEPT or await self._runs.keep(name, request_hash, refused.reply()):
                raise
            # Another request under the key was faster, and may have been accepted.
            first = await self._runs.kept(name, request_hash)
            if first is None:
                raise
            return first

    async def claimed(self, call: Call, action: Action) -> Reply:
        """Run an action on a run of the caller's tenant that may be repeated without harm. Its key is stored first."""
        name, request_hash = workflow_id(call.claims.tenant_id, call.key), fingerprint(call.path, call.body)
        if await self._runs.kept(name, request_hash) is None:
            kind = "job" if call.path.startswith(JOBS_PATH) else "training"
            await self._runs.demand_own(call.run_id, kind=kind, tenant_id=call.claims.tenant_id)
            await self._runs.keep(name, request_hash, CLAIMED)
            await self._runs.kept(name, request_hash)
        return await action(call)


class Runs:
    """Raises Refused, and Unanswered if Temporal or the bridge's workers do not answer."""

    def __init__(self, client: Client, *, task_queue: str = BRIDGE_QUEUE) -> None:
        self._client = client
        self._task_queue = task_queue

    async def kept(self, workflow_id: str, fingerprint: str) -> Reply | None:
        """The answer stored under this key, or None for a new key. Raises Refused `idempotency_conflict`.

        A key that was only claimed (by a cancel or a start) has status 0: its request may be repeated.
        """
        described = await self._described(workflow_id)
        if described is None:
            return None
        memo = await described.memo()
        if memo.get(BODY_MEMO) != fingerprint:
            raise Refused("idempotency_conflict")
        return Reply(int(memo.get(STATUS_MEMO, ACCEPTED)), memo.get(ANSWER_MEMO))

    async def keep(self, workflow_id: str, fingerprint: str, reply: Reply) -> bool:
        """Store a key and its answer. Returns False, and does nothing, if the key is taken."""
        memo = {BODY_MEMO: fingerprint, STATUS_MEMO: reply.status, ANSWER_MEMO: reply.body, KIND_MEMO: "key"}
        try:
            await self._client.start_workflow(
                KEY_WORKFLOW,
                id=workflow_id,
                task_queue=self._task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=memo,
                static_summary="an idempotency key",
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError:
            return False
        except RPCError as error:
            raise _unanswered(error) from None
        return True

    async def begin(self, new: NewRun) -> Reply:
        """Start the run. Returns its answer, or the stored one if another request with the key was faster."""
        try:
            await self._client.start_workflow(
                new.workflow,
                new.argument,
                id=new.workflow_id,
                task_queue=self._task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo={
                    BODY_MEMO: new.fingerprint,
                    ANSWER_MEMO: new.answer,
                    KIND_MEMO: new.kind,
                    TENANT_MEMO: new.tenant_id,
                },
                search_attributes=_attributes(new),
                priority=Priority(priority_key=PRIORITY_KEYS[new.priority], fairness_key=new.tenant_id),
                task_timeout=timedelta(seconds=5),
                static_summary=f"{new.kind} of {new.task_id}",
                rpc_timeout=RPC_TIMEOUT,
            )
        except WorkflowAlreadyStartedError:
            kept = await self.kept(new.workflow_id, new.fingerprint)
            if kept is None:
                raise Unanswered(503, "the first request under this key is still being handled") from None
            return kept
        except RPCError as error:
            raise _unanswered(error) from None
        return Reply(ACCEPTED, new.answer)

    async def view(self, run_id: str, *, kind: str, tenant_id: str, moved: Moved | None = None) -> dict[str, Any]:
        """The wire's fields of a run. Raises Refused (404), also for another tenant's run.

        `moved` returns about how many jobs are ahead of a queued one now; the run records it.
        """
        described = await self._own(run_id, kind, tenant_id)
        handle = self._client.get_workflow_handle(described.workflow_id, run_id=described.run_id)
        if not described.status.is_over:
            view = await self._query(handle)
            if moved is not None:
                view = await self._moved(handle, view, await moved(view))
            return _with_beat(view, await _last_percent(self._client, described))
        return _fields(await _ended_view(handle, described, run_id, kind))

    async def update(self, run_id: str, name: str, key: str, *, kind: str, tenant_id: str) -> dict[str, Any]:
        """Send an update to a run, once per key. A run that is over does not change."""
        described = await self._own(run_id, kind, tenant_id)
        if not described.status.is_over:
            handle = self._client.get_workflow_handle(described.workflow_id, run_id=described.run_id)
            try:
                view = await handle.execute_update(
                    name, id=hashlib.sha256(key.encode()).hexdigest(), result_type=JobView, rpc_timeout=RPC_TIMEOUT
                )
                return _fields(view)
            except (WorkflowUpdateRPCTimeoutOrCancelledError, WorkflowUpdateFailedError):
                raise Unanswered(503, "the bridge's workers did not answer in time") from None
            except RPCError as error:
                if error.status is not RPCStatusCode.NOT_FOUND:
                    raise _unanswered(error) from None
        return await self.view(run_id, kind=kind, tenant_id=tenant_id)

    async def _moved(self, handle: WorkflowHandle[Any, Any], view: JobView, position: int | None) -> JobView:
        shown = view.fields.get("queue_position")
        if position is None or not isinstance(shown, int) or position >= shown:
            return view
        try:
            moved: JobView = await handle.execute_update(
                MOVE_UPDATE, position, result_type=JobView, rpc_timeout=RPC_TIMEOUT
            )
            return moved
        except (WorkflowUpdateRPCTimeoutOrCancelledError, WorkflowUpdateFailedError, RPCError):
            # The position is only informative: a failure must not cost the answer.
            return view

    async def demand_own(self, run_id: str, *, kind: str, tenant_id: str) -> None:
        """Raises Refused (404) unless there is such a run of the tenant."""
        await self._own(run_id, kind, tenant_id)

    async def _own(self, run_id: str, kind: str, tenant_id: str) -> RunSeen:
        is_id = re.fullmatch(rf"{kind}-[0-9a-f]{{40}}", run_id) is not None
        described = await self._described(workflow_of(run_id)) if is_id else None
        memo = await described.memo() if described is not None else {}
        if described is None or memo.get(TENANT_MEMO) != tenant_id or memo.get(KIND_MEMO) != kind:
            raise Refused(f"{kind}_not_found")
        return described

    async def _described(self, workflow_id: str) -> RunSeen | None:
        try:
            return await describe_run(self._client, workflow_id, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise _unanswered(error) from None

    async def _query(self, handle: WorkflowHandle[Any, Any]) -> JobView:
        try:
            return await query_run(handle, VIEW_QUERY, result_type=JobView, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            raise _unanswered(error) from None
        except (WorkflowQueryFailedError, WorkflowQueryRejectedError):
            raise Unanswered(503, "the bridge's workers did not answer in time") from None
        except NoQueryNow as paused:
            raise Unanswered(503, str(paused)) from None


def _attributes(new: NewRun) -> TypedSearchAttributes:
    values = {
        "TaskId": new.task_id,
        "TenantId": new.tenant_id,
        "UserId": new.user_id,
        "Scene": new.scene.value,
        "TemplateId": new.template_id,
        "TaskPriority": new.priority.value,
        "TaskStatus": TaskStatus.QUEUED.value,
        "TaskStage": "queued",
    }
    return TypedSearchAttributes(
        [SearchAttributePair(SearchAttributeKey.for_keyword(name), values[name]) for name in SEARCH_ATTRIBUTES]
    )


async def _last_percent(client: Client, described: RunSeen) -> int:
    """The percent in the last heartbeat of the run on a server; 0 without one."""
    for pending in described.pending_activities:
        is_running = pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
        if pending.activity_type.name == RUN_GRAPH and (is_running or pending.heartbeat_details.payloads):
            beats = await client.data_converter.decode(pending.heartbeat_details.payloads)
            percent = beats[0].get("percent") if beats and isinstance(beats[0], dict) else None
            return percent if isinstance(percent, int) else 0
    return 0


def _with_beat(view: JobView, percent: int) -> dict[str, Any]:
    """The view with the progress of the GPU worker's last heartbeat, numbered as a tick."""
    fields = _fields(view)
    if view.tick_base is not None and percent > 0 and fields.get("error_details") is None:
        progress = view.progress_from + (view.progress_to - view.progress_from) * percent / 100
        fields |= {"stage_progress": round(progress, 2), "sequence": view.tick_base + percent}
    return fields


def _fields(view: JobView) -> dict[str, Any]:
    return {**view.fields, "sequence": view.sequence}


async def _ended_view(handle: WorkflowHandle[Any, Any], described: RunSeen, run_id: str, kind: str) -> JobView:
    if described.status is RunStatus.COMPLETED:
        typed: WorkflowHandle[Any, JobView] = handle
        try:
            return JobView.model_validate(await typed.result(rpc_timeout=RPC_TIMEOUT))
        except (RPCError, WorkflowFailureError) as error:
            raise Unanswered(503, f"the run's result cannot be read: {type(error).__name__}") from None
    details = ErrorDetails(
        code=FailureCode.INTERNAL.value,
        message="The run's workflow was terminated or failed; see it in the Temporal UI.",
        retryable=True,
    )
    names = {"job": "job_status", "training": "training_status"}
    statuses = {"job": "processing", "training": "failed"}
    return JobView(
        tenant_id="",
        task_id="",
        fields={
            f"{kind}_id": run_id,
            names[kind]: statuses[kind],
            "error_details": details.model_dump(mode="json", exclude_none=True),
        },
        sequence=ENDED_IN_TEMPORAL_SEQUENCE,
    )


def _unanswered(error: RPCError) -> Unanswered:
    return Unanswered(503, f"Temporal does not answer now: {error.status.name.lower()}")
