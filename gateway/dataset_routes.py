"""`GET /api/v1/datasets`: what the caller's tenant may train on, as a worker reads it.

A worker looks below the tenant's own part of `DATASET_ROOTS` alone. A dataset belongs to a tenant and to no user of it:
where users are kept apart, none is listed.

Annotations are evaluated when this module runs: `dataset_routes` makes the dependency that they name.
"""

from typing import Annotated, Final

from fastapi import APIRouter, Depends
from temporalio.client import Client

from comfyui_temporal.contracts.datasets import (
    DATASET_LIST_PREFIX,
    DATASET_LIST_WORKFLOW,
    DatasetList,
    DatasetQuestion,
    DatasetView,
)
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.permissions import Operation
from gateway.access import Access
from gateway.problems import Problem, ProblemCode, problems
from gateway.tenant_lists import FRESH_SECONDS, ListedBy, TenantLists
from runtime.caller_tokens import Caller

NO_ROOTS: Final = "No datasets are configured here (DATASET_ROOTS): trainings are refused."
USERS_APART: Final = (
    "Users are kept apart here, so a tenant's datasets are not listed: their addresses have to be known."
)
READ_BY: Final = ListedBy(
    workflow=DATASET_LIST_WORKFLOW,
    id_prefix=DATASET_LIST_PREFIX,
    result=DatasetList,
    summary="the gateway lists a tenant's datasets",
    what="the datasets",
    unavailable=ProblemCode.STORAGE_UNAVAILABLE,
    no_answer="The datasets' storage cannot be read now. Try again.",
)


class DatasetsView(OwnModel):
    """The datasets of the caller's tenant, by name."""

    datasets: list[DatasetView]
    is_whole: bool
    """False: there are more than are listed."""


class Datasets:
    """What each tenant may train on."""

    def __init__(self, temporal: Client, *, task_queue: str, fresh_seconds: float = FRESH_SECONDS) -> None:
        self._lists = TenantLists(temporal, READ_BY, task_queue=task_queue, fresh_seconds=fresh_seconds)

    async def of(self, caller: Caller) -> DatasetsView:
        """Raises Problem."""
        if caller.own_tasks_only:
            raise _not_offered(USERS_APART)
        listed = await self._lists.of(caller.tenant_id, DatasetQuestion(tenant_id=caller.tenant_id))
        if listed.datasets is None:
            raise _not_offered(NO_ROOTS)
        return DatasetsView(datasets=listed.datasets, is_whole=listed.is_whole)


def _not_offered(sentence: str) -> Problem:
    return Problem(ProblemCode.ROUTE_NOT_OFFERED, sentence, headers={"Retry-After": str(int(FRESH_SECONDS))})


def dataset_routes(datasets: Datasets, access: Access) -> APIRouter:
    router = APIRouter(prefix="/api/v1/datasets", tags=["tasks"])
    unavailable = problems(
        ProblemCode.UNAUTHENTICATED,
        ProblemCode.NOT_AUTHORIZED,
        ProblemCode.ROUTE_NOT_OFFERED,
        ProblemCode.STORAGE_UNAVAILABLE,
        ProblemCode.WORKER_UNAVAILABLE,
        ProblemCode.TEMPORAL_UNAVAILABLE,
        ProblemCode.TOKENS_UNVERIFIABLE,
    )

    @router.get("", responses=unavailable)
    async def list_datasets(caller: Annotated[Caller, Depends(access.requires(Operation.READ_TASK))]) -> DatasetsView:
        """What the tenant may train on: the folders below its own dataset roots, with how many files each has."""
        return await datasets.of(caller)

    return router
