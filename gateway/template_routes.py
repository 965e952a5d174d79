"""`GET /api/v1/templates`: what ComfyUI offers, with prices, as a worker reads it.

Annotations are evaluated when this module runs: `template_routes` makes the dependency that they name.
"""

from typing import Annotated, Final

from fastapi import APIRouter, Depends
from temporalio.client import Client

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
from gateway.tenant_lists import FRESH_SECONDS, ListedBy, TenantLists
from runtime.caller_tokens import Caller

NOT_OFFERED: Final = "ComfyUI does not list its templates here: a template's id and what it takes have to be known."
READ_BY: Final = ListedBy(
    workflow=TEMPLATE_LIST_WORKFLOW,
    id_prefix=TEMPLATE_LIST_PREFIX,
    result=TemplateList,
    summary="the gateway lists ComfyUI's templates",
    what="the templates",
    unavailable=ProblemCode.COMFYUI_UNAVAILABLE,
    no_answer="ComfyUI does not list its templates now. Try again.",
)


class TemplatesView(OwnModel):
    """Every template that the tenant may use, by id."""

    templates: list[TemplateView]


class Templates:
    """What ComfyUI offers each tenant."""

    def __init__(self, temporal: Client, *, task_queue: str, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._lists = TenantLists(temporal, READ_BY, task_queue=task_queue, fresh_seconds=fresh_seconds)

    async def of(self, caller: Caller) -> list[TemplateView]:
        """Raises Problem."""
        question = TemplateQuestion(tenant_id=caller.tenant_id, user_id=caller.user_id)
        listed = await self._lists.of(caller.tenant_id, question)
        if listed.templates is None:
            raise Problem(ProblemCode.ROUTE_NOT_OFFERED, NOT_OFFERED, headers={"Retry-After": str(int(FRESH_SECONDS))})
        return listed.templates


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
