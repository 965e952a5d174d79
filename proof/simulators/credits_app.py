"""The credits service over HTTP: contract §4's routes, and the admin's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import APIRouter, FastAPI, HTTPException

from comfyui_temporal.contracts.prices import PriceTable
from proof.simulators.admin_routes import add_shared_routes, guarded_router, health_router
from proof.simulators.admin_wire import (
    AccountOrder,
    AccountSeen,
    AuthorizationOrder,
    BalanceCheck,
    EntrySeen,
    HoldSeen,
)
from proof.simulators.clock import Clock
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.simulators.credits_service import CreditsService
from proof.simulators.edge import Edge
from proof.simulators.faults import Faults
from proof.simulators.ledger import Person
from proof.simulators.state_file import StateFile
from proof.simulators.tokens import Tokens
from runtime.background import running_in_background, woken

_LONGEST_SLEEP_SECONDS = 30.0


def credits_app(
    *,
    folder: Path,
    tokens: Tokens,
    admin_token: str,
    prices: PriceTable,
    speed: float,
    profile: CreditsProfile = CONTRACT,
) -> FastAPI:
    """The application; its state is in `folder`/credits.sqlite3 and is closed when the application ends."""
    state = StateFile(folder / "credits.sqlite3")
    clock = Clock(state, speed=speed)
    faults = Faults(state)
    service = CreditsService(state, clock, faults, prices, profile)
    edge = Edge(
        state,
        clock,
        tokens,
        faults,
        service.task_of,
        keeps_keys=profile.keeps_keys,
        asks_for_tokens=profile.asks_for_tokens,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with running_in_background(_expire_holds(service)):
            yield
        state.close()

    app = FastAPI(title="Simulated credits service", lifespan=lifespan)
    app.include_router(_contract_routes(service, edge))
    app.include_router(health_router())
    app.include_router(_admin_routes(service, edge, admin_token))
    return app


async def _expire_holds(service: CreditsService) -> None:
    """Return each hold at its expiry, also without a request."""
    moved = asyncio.Event()
    service.clock.on_change(moved.set)
    while True:
        service.ledger.expire_due()
        soonest = service.ledger.next_expiry()
        rest = _LONGEST_SLEEP_SECONDS if soonest is None else soonest - service.clock.timestamp()
        # A new hold lives 60 s at least: none can end during a sleep that began before it, unless the clock is moved.
        await woken(moved, within_seconds=min(max(rest, 0.001), _LONGEST_SLEEP_SECONDS))
        moved.clear()


def _contract_routes(service: CreditsService, edge: Edge) -> APIRouter:
    router = APIRouter(prefix="/api/v1/credits")
    add = partial(edge.add_route, router)
    add("POST", "/estimate", "estimate", service.estimate)
    add("POST", "/pre-deduct", "pre_deduct", service.pre_deduct)
    add("POST", "/commit", "commit", service.commit)
    add("POST", "/cancel", "cancel_hold", service.cancel)
    add("POST", "/charge", "charge", service.charge)
    add("GET", "/balance", "balance", service.balance)
    add("GET", "/ledger", "ledger", service.ledger_page)
    return router


def _admin_routes(service: CreditsService, edge: Edge, admin_token: str) -> APIRouter:
    router = guarded_router(admin_token)

    def reset() -> None:
        service.state.clear(keeping=["clock"])
        service.open_first_accounts()

    add_shared_routes(router, edge, service.clock, service.ledger.expire_due, reset)

    @router.get("/accounts")
    async def accounts() -> list[AccountSeen]:
        service.ledger.expire_due()
        return service.ledger.all_accounts()

    @router.put("/accounts/{tenant_id}/{user_id}", status_code=204)
    async def set_account(tenant_id: str, user_id: str, order: AccountOrder) -> None:
        with service.state.transaction():
            service.ledger.set_balance(Person(tenant_id, user_id), order.balance)
            service.authorizations.set_missing(tenant_id)

    @router.put("/authorizations/{tenant_id}/{template_id}", status_code=204)
    async def set_authorization(tenant_id: str, template_id: str, order: AuthorizationOrder) -> None:
        service.authorizations.set(tenant_id, template_id, order)

    @router.get("/holds")
    async def holds() -> list[HoldSeen]:
        service.ledger.expire_due()
        return service.ledger.all_holds()

    @router.post("/holds/{pre_deduct_id}/expire", status_code=204)
    async def expire(pre_deduct_id: str) -> None:
        if not service.profile.ends_holds:
            raise HTTPException(409, "Holds of this service do not expire.")
        service.ledger.expire_now(pre_deduct_id)

    @router.post("/holds/{pre_deduct_id}/cancel", status_code=204)
    async def cancel_by_hand(pre_deduct_id: str) -> None:
        service.ledger.expire_due()
        hold = service.ledger.find_hold(pre_deduct_id)
        if hold is not None and hold.phase == "open":
            with service.state.transaction():
                service.ledger.cancel(hold, "by hand")

    @router.get("/ledger")
    async def entries() -> list[EntrySeen]:
        service.ledger.expire_due()
        return service.ledger.all_entries()

    @router.get("/balance-check")
    async def balance_check() -> BalanceCheck:
        service.ledger.expire_due()
        return service.ledger.check()

    return router
