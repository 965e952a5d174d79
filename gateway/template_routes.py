"""`GET /api/v1/templates`: what ComfyUI offers, with prices, as a worker reads it.

The gateway has no token for ComfyUI (docs/security.md), so a worker is asked by a short run. One answer serves a tenant
for `FRESH_SECONDS`, and all requests that arrive while it is read.

Annotations are evaluated when this module runs: `template_routes` makes the dependency that they name.
"""

import asyncio
import time
from collections import OrderedDict
from datetime import timedelta
from typing import Annotated, Final

import structlog
from fastapi import APIRouter, Depends
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import TimeoutError as RunTimedOut

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.permissions import Operation
from comfyui_temporal.contracts.templates import (
    TEMPLATE_LIST_PREFIX,
    TEMPLATE_LIST_WORKFLOW,
    TemplateList,
    TemplateQuestion,
    TemplateView,
)
from gateway.access import Access
from gateway.problems import Problem, ProblemCode, problems
from gateway.temporal_calls import CALL_SECONDS, temporal_problems
from runtime.caller_tokens import Caller

FRESH_SECONDS: Final = 30.0
RUN_SECONDS: Final = 5.0
MAX_TENANTS: Final = 1_000
NOT_OFFERED: Final = "ComfyUI does not list its templates here: a template's id and what it takes have to be known."
NO_WORKER: Final = "No worker read the templates in time: none runs, or it is busy. Try again."
NO_COMFYUI: Final = "ComfyUI does not list its templates now. Try again."

log = structlog.get_logger(__name__)


class TemplatesView(OwnModel):
    """Every template that the tenant may use, by id."""

    templates: list[TemplateView]


class Templates:
    """The lists of the tenants that asked last, each as old as `FRESH_SECONDS` at most."""

    def __init__(self, temporal: Client, *, task_queue: str, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._temporal = temporal
        self._task_queue = task_queue
        self._fresh_seconds = fresh_seconds
        self._read: OrderedDict[str, tuple[float, asyncio.Task[TemplateList]]] = OrderedDict()

    async def of(self, caller: Caller) -> list[TemplateView]:
        """Raises Problem."""
        tenant_id, now = caller.tenant_id, time.monotonic()
        until, reading = self._read.get(tenant_id, (0.0, None))
        if reading is None or now >= until or _has_failed(reading):
            question = TemplateQuestion(tenant_id=tenant_id, user_id=caller.user_id)
            reading = asyncio.create_task(self._list(question))
            reading.add_done_callback(_has_failed)
            self._read[tenant_id] = now + self._fresh_seconds, reading
            self._read.move_to_end(tenant_id)
            while len(self._read) > MAX_TENANTS:
                self._read.popitem(last=False)
        # Somebody who leaves does not end what others wait for.
        listed = await asyncio.shield(reading)
        if listed.templates is None:
            raise Problem(ProblemCode.ROUTE_NOT_OFFERED, NOT_OFFERED, headers={"Retry-After": str(int(FRESH_SECONDS))})
        return listed.templates

    async def _list(self, question: TemplateQuestion) -> TemplateList:
        try:
            with temporal_problems():
                # One run for a tenant, whichever of the gateways begins it.
                running = self._temporal.execute_workflow(
                    TEMPLATE_LIST_WORKFLOW,
                    question,
                    id=f"{TEMPLATE_LIST_PREFIX}{question.tenant_id}",
                    task_queue=self._task_queue,
                    result_type=TemplateList,
                    id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                    execution_timeout=timedelta(seconds=RUN_SECONDS),
                    static_summary="the gateway lists ComfyUI's templates",
                )
                listed: TemplateList = await asyncio.wait_for(running, RUN_SECONDS + CALL_SECONDS)
                return listed
        except WorkflowFailureError as failure:
            raise _problem_of(failure) from None


def _has_failed(reading: asyncio.Task[TemplateList]) -> bool:
    return reading.done() and (reading.cancelled() or reading.exception() is not None)


def _problem_of(failure: WorkflowFailureError) -> Problem:
    # The failure's own sentence names ComfyUI's address: it is for operators.
    log.warning("templates_not_listed", detail=str(failure.cause.__cause__ or failure.cause)[:200])
    if isinstance(failure.cause, RunTimedOut):
        return Problem(ProblemCode.WORKER_UNAVAILABLE, NO_WORKER)
    return Problem(ProblemCode.COMFYUI_UNAVAILABLE, NO_COMFYUI)


def template_routes(templates: Templates, access: Access) -> APIRouter:
    router = APIRouter(prefix="/api/v1/templates", tags=["tasks"])
    unavailable = problems(
        ProblemCode.UNAUTHENTICATED,
        ProblemCode.NOT_AUTHORIZED,
        ProblemCode.ROUTE_NOT_OFFERED,
        ProblemCode.COMFYUI_UNAVAILABLE,
        ProblemCode.WORKER_UNAVAILABLE,
        ProblemCode.TEMPORAL_UNAVAILABLE,
        ProblemCode.TOKENS_UNVERIFIABLE,
    )

    @router.get("", responses=unavailable)
    async def list_templates(caller: Annotated[Caller, Depends(access.requires(Operation.READ_TASK))]) -> TemplatesView:
        """What ComfyUI offers: templates with inputs, extras, control images, resolutions and prices in points."""
        return TemplatesView(templates=await templates.of(caller))

    return router
