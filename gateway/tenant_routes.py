"""`GET /api/v1/tenant`: the caller, what its token allows, its open tasks and its balance as last seen.

Annotations are evaluated when this module runs: `tenant_routes` makes the dependency that they name.
"""

from typing import Annotated

from fastapi import APIRouter, Depends

from comfyui_temporal.contracts.fields import Instant, OwnModel
from comfyui_temporal.contracts.permissions import Operation
from gateway.access import Access
from gateway.problems import Problem, ProblemCode, problems
from runtime.caller_tokens import Caller
from store import StoreUnavailable, TaskStore


class TenantView(OwnModel):
    """Who the token speaks for. `queued` and `running`: open tasks that the caller sees."""

    tenant_id: str
    user_id: str
    operations: list[str]
    """What the token allows (contract §7)."""
    queued: int = 0
    running: int = 0
    balance: int | None = None
    """Points, as the credits service last stated them with one of the user's tasks; null before the first."""
    balance_at: Instant | None = None


def tenant_routes(store: TaskStore, access: Access) -> APIRouter:
    router = APIRouter(prefix="/api/v1/tenant", tags=["tasks"])
    unavailable = problems(
        ProblemCode.UNAUTHENTICATED,
        ProblemCode.NOT_AUTHORIZED,
        ProblemCode.STORE_UNAVAILABLE,
        ProblemCode.TOKENS_UNVERIFIABLE,
    )

    @router.get("", responses=unavailable)
    async def read_tenant(caller: Annotated[Caller, Depends(access.requires(Operation.READ_TASK))]) -> TenantView:
        """The caller's tenant: open tasks, balance, and what the token allows."""
        only_user = caller.user_id if caller.own_tasks_only else None
        try:
            seen = await store.tenant_seen(caller.tenant_id, caller.user_id, only_user=only_user)
        except StoreUnavailable:
            raise Problem(ProblemCode.STORE_UNAVAILABLE, "The task store cannot be read now. Try again.") from None
        allowed = sorted(operation.value for operation in Operation if caller.allows(operation))
        return TenantView(tenant_id=caller.tenant_id, user_id=caller.user_id, operations=allowed, **seen.model_dump())

    return router
