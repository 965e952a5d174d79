"""ComfyUI's routes (contract §2, §3): the client that calls them and the activities that workflows see.

Each activity returns an `Answer`: the reply, a definite refusal, or *not offered*. Everything else is raised as a
retryable error (`comfyui_unavailable`, `reply_invalid`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar, Final, Protocol

from pydantic import TypeAdapter
from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.lives import Lives
from activities.outside_client import OutsideClient, same
from activities.outside_http import Party, Route, current_time_limit_seconds, time_limit
from activities.running_call import answered
from comfyui_temporal.contracts.calls import CallFor, GpuQuestion, JobCall, Post
from comfyui_temporal.contracts.comfyui import (
    DatasetSnapshot,
    GpuPool,
    JobAccepted,
    JobCancelled,
    JobRequest,
    JobState,
    SnapshotReference,
    TrainingAccepted,
    TrainingDraft,
    TrainingRequest,
    TrainingState,
)
from comfyui_temporal.contracts.errors import COMFYUI_CODES_BY_NUMBER, COMFYUI_ERRORS, Answer, FailureCode
from comfyui_temporal.contracts.permissions import REQUIRED_SCOPES, Operation, Scene
from comfyui_temporal.contracts.size_budget import MAX_POOLS
from comfyui_temporal.contracts.templates import (
    MAX_TEMPLATES,
    TEMPLATE_LIST_PREFIX,
    ListedTemplate,
    TemplateList,
    TemplateQuestion,
)

COMFYUI: Final = Party(
    name="ComfyUI",
    setting="COMFYUI_TEMPORAL_COMFYUI_URL",
    unavailable=FailureCode.COMFYUI_UNAVAILABLE,
    errors={row.message: row for row in COMFYUI_ERRORS},
    messages_by_number=COMFYUI_CODES_BY_NUMBER,
)
_TRAINING: Final = {"40401": "training_not_found"}
_TEMPLATE: Final = {"40401": "template_not_found"}

SUBMIT_JOB: Final = Route("POST", "/comfyui/v1/jobs", messages_by_number=_TEMPLATE)
GET_JOB: Final = Route("GET", "/comfyui/v1/jobs/{job_id}")
CANCEL_JOB: Final = Route("POST", "/comfyui/v1/jobs/{job_id}/cancel", is_ours=True)
CREATE_TRAINING: Final = Route("POST", "/comfyui/v1/training", messages_by_number=_TEMPLATE)
GET_TRAINING: Final = Route("GET", "/comfyui/v1/training/{job_id}", messages_by_number=_TRAINING)
START_TRAINING: Final = Route("POST", "/comfyui/v1/training/{job_id}/start", True, _TRAINING)
CANCEL_TRAINING: Final = Route("POST", "/comfyui/v1/training/{job_id}/cancel", True, _TRAINING)
LIST_GPUS: Final = Route("GET", "/comfyui/v1/gpus", is_ours=True)
LIST_TEMPLATES: Final = Route("GET", "/comfyui/v1/templates", is_ours=True)


class ComfyUIClient(OutsideClient):
    """ComfyUI's service: one method for each route."""

    party: ClassVar[Party] = COMFYUI

    async def submit_job(self, post: Post[JobRequest]) -> Answer[JobAccepted]:
        scope = REQUIRED_SCOPES[Operation.CREATE_JOB]
        return await self._call(SUBMIT_JOB, scope, post.call_for, JobAccepted, key=post.key, body=post.body)

    async def get_job(self, call: JobCall) -> Answer[JobState]:
        return await self._about_job(GET_JOB, Operation.READ_COMFYUI, call)

    async def cancel_job(self, call: JobCall) -> Answer[JobCancelled]:
        return await self._cancel(CANCEL_JOB, call, lambda reply: reply.job_id)

    async def create_training(self, post: Post[TrainingRequest]) -> Answer[TrainingAccepted]:
        scope = REQUIRED_SCOPES[Operation.CREATE_TRAINING]
        return await self._call(CREATE_TRAINING, scope, post.call_for, TrainingAccepted, key=post.key, body=post.body)

    async def start_training(self, call: JobCall) -> Answer[TrainingState]:
        return await self._about_training(START_TRAINING, Operation.START_TRAINING, call)

    async def get_training(self, call: JobCall) -> Answer[TrainingState]:
        return await self._about_training(GET_TRAINING, Operation.READ_COMFYUI, call)

    async def cancel_training(self, call: JobCall) -> Answer[JobCancelled]:
        return await self._cancel(CANCEL_TRAINING, call, lambda reply: reply.training_id)

    async def list_gpus(self, call_for: CallFor) -> Answer[list[GpuPool]]:
        scope = REQUIRED_SCOPES[Operation.READ_COMFYUI]
        return await self._call(LIST_GPUS, scope, call_for, TypeAdapter(list[GpuPool]))

    async def list_templates(self, call_for: CallFor) -> Answer[list[ListedTemplate]]:
        scope = REQUIRED_SCOPES[Operation.READ_COMFYUI]
        return await self._call(LIST_TEMPLATES, scope, call_for, TypeAdapter(list[ListedTemplate]))

    async def _cancel(
        self, route: Route, call: JobCall, id_in: Callable[[JobCancelled], str | None]
    ) -> Answer[JobCancelled]:
        def check(reply: JobCancelled) -> str | None:
            return same("its id", call.job_id, id_in(reply) or "")

        scope = REQUIRED_SCOPES[Operation.CANCEL_JOB]
        return await self._call(
            route, scope, call.call_for, JobCancelled, ids={"job_id": call.job_id}, key=call.key, check=check
        )

    async def _about_job(self, route: Route, operation: Operation, call: JobCall) -> Answer[JobState]:
        check: Callable[[JobState], str | None] = lambda state: same("job_id", call.job_id, state.job_id)  # noqa: E731
        scope = REQUIRED_SCOPES[operation]
        return await self._call(
            route, scope, call.call_for, JobState, ids={"job_id": call.job_id}, key=call.key, check=check
        )

    async def _about_training(self, route: Route, operation: Operation, call: JobCall) -> Answer[TrainingState]:
        def check(state: TrainingState) -> str | None:
            return same("training_id", call.job_id, state.training_id)

        scope = REQUIRED_SCOPES[operation]
        return await self._call(
            route, scope, call.call_for, TrainingState, ids={"job_id": call.job_id}, key=call.key, check=check
        )


class Snapshots(Protocol):
    """Where a snapshot's list of files is read: `activities.datasets.DatasetSnapshots`."""

    async def whole(self, reference: SnapshotReference) -> DatasetSnapshot: ...


class ComfyUIActivities:
    """ComfyUI as workflows see it. The caller opens and closes the client.

    Calls that start something go through `lives` first.
    """

    def __init__(self, client: ComfyUIClient, lives: Lives, snapshots: Snapshots) -> None:
        self._client = client
        self._lives = lives
        self._snapshots = snapshots

    @activity.defn
    async def submit_job(self, post: Post[JobRequest]) -> Answer[JobAccepted]:
        return await answered(post.call_for, self._lives.begin(post, self._client.submit_job))

    @activity.defn
    async def get_job(self, call: JobCall) -> Answer[JobState]:
        return await answered(call.call_for, self._client.get_job(call))

    @activity.defn
    async def cancel_job(self, call: JobCall) -> Answer[JobCancelled]:
        return await answered(call.call_for, self._client.cancel_job(call))

    @activity.defn
    async def create_training(self, post: Post[TrainingDraft]) -> Answer[TrainingAccepted]:
        """Adds the list of files to the body. A list that does not match the draft's checksum is `dataset_invalid`."""
        return await answered(post.call_for, self._lives.begin(post, self._create_training))

    async def _create_training(self, post: Post[TrainingDraft]) -> Answer[TrainingAccepted]:
        began, limit = time.monotonic(), current_time_limit_seconds()
        request = post.body.request(await self._snapshots.whole(post.body.dataset))
        with time_limit(limit - (time.monotonic() - began)):
            return await self._client.create_training(
                Post[TrainingRequest](call_for=post.call_for, key=post.key, body=request)
            )

    @activity.defn
    async def start_training(self, call: JobCall) -> Answer[TrainingState]:
        return await answered(call.call_for, self._lives.begin(call, self._client.start_training))

    @activity.defn
    async def get_training(self, call: JobCall) -> Answer[TrainingState]:
        return await answered(call.call_for, self._client.get_training(call))

    @activity.defn
    async def cancel_training(self, call: JobCall) -> Answer[JobCancelled]:
        return await answered(call.call_for, self._client.cancel_training(call))

    @activity.defn
    async def list_gpus(self, question: GpuQuestion) -> Answer[list[GpuPool]]:
        """The few pools that decide, from a list that may be long."""
        answer = await answered(question, self._client.list_gpus(question))
        return answer if answer.reply is None else Answer(reply=deciding_pools(answer.reply, question.gpu_type))

    @activity.defn
    async def list_templates(self, question: TemplateQuestion) -> TemplateList:
        """What a tenant may see of each template. A refusal is raised: there is nothing to decide by it."""
        call_for = CallFor(
            task_id=f"{TEMPLATE_LIST_PREFIX}{question.tenant_id}",
            tenant_id=question.tenant_id,
            user_id=question.user_id,
            scene=Scene.IMAGE_GENERATE,
        )
        answer = await answered(call_for, self._client.list_templates(call_for))
        if answer.refusal is not None:
            raise ApplicationError(answer.refusal.sentence, type=answer.refusal.code.value, non_retryable=True)
        if answer.reply is None:
            return TemplateList()
        return TemplateList(templates=[template.for_tenants() for template in answer.reply[:MAX_TEMPLATES]])


def deciding_pools(pools: list[GpuPool], gpu_type: str | None) -> list[GpuPool]:
    """One pool for each type, one that has GPUs if possible: of the requested type, else of the first types."""
    deciding: dict[str, GpuPool] = {}
    for pool in pools:
        known = deciding.get(pool.gpu_type)
        if gpu_type in (None, pool.gpu_type) and (known is None or (pool.total > 0 and not known.total)):
            deciding[pool.gpu_type] = pool
    return sorted(deciding.values(), key=lambda pool: pool.total == 0)[:MAX_POOLS]
