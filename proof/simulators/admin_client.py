"""Clients of the admin routes: one for each simulator, and `Admin` for both together."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from proof.simulators.admin_wire import (
    AccountOrder,
    AccountSeen,
    AuthorizationOrder,
    BalanceCheck,
    CallbackSeen,
    ClockOrder,
    ClockSeen,
    EntrySeen,
    Fault,
    FaultKind,
    FaultOrder,
    GpuOrder,
    HoldSeen,
    Match,
    Parameters,
    RequestSeen,
    RunAction,
    RunOrder,
    RunSeen,
    Schedule,
)

T = TypeVar("T")
_LIMIT_SECONDS = 10.0
_MATCH_FIELDS = frozenset(Match.model_fields)


class AdminRefused(Exception):
    """The admin route refused the order; the message says why."""


class ServiceAdmin:
    """What both simulators offer. `url` is the service's own; `token` its admin token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=f"{url}/admin",
            headers={"Authorization": f"Bearer {token}"},
            timeout=_LIMIT_SECONDS,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def fault(self, kind: FaultKind | str, **given: Any) -> Fault:
        """Set one fault, e.g. `fault("drop", route="commit", when="after", nth=2)`.

        Names of `Match` select occasions, the rest are `Parameters`. It hits once unless `times` says otherwise.
        """
        match = Match(**{name: given.pop(name) for name in _MATCH_FIELDS & set(given)})
        order = FaultOrder(kind=FaultKind(kind), match=match, parameters=Parameters(**given))
        return await self._call(Fault, "POST", "/faults", order)

    async def schedule(self, seed: int, rate: float, kinds: list[FaultKind], route: str | None = None) -> list[Fault]:
        """Random faults that the seed repeats."""
        return await self._call(
            list[Fault], "POST", "/schedule", Schedule(seed=seed, rate=rate, kinds=kinds, route=route)
        )

    async def faults(self) -> list[Fault]:
        return await self._call(list[Fault], "GET", "/faults")

    async def remove_fault(self, fault: Fault) -> None:
        await self._send("DELETE", f"/faults/{fault.fault_id}")

    async def remove_faults(self) -> None:
        await self._send("DELETE", "/faults")

    async def clock(self) -> ClockSeen:
        return await self._call(ClockSeen, "GET", "/clock")

    async def advance(self, seconds: float) -> ClockSeen:
        """Move the clock on; what comes due meanwhile has happened when this returns."""
        return await self._call(ClockSeen, "POST", "/clock", ClockOrder(advance_seconds=seconds))

    async def set_speed(self, speed: float) -> ClockSeen:
        return await self._call(ClockSeen, "POST", "/clock", ClockOrder(speed=speed))

    async def requests_seen(self, route: str | None = None, task_id: str | None = None) -> list[RequestSeen]:
        """Oldest first."""
        return await self._call(list[RequestSeen], "GET", "/requests", route=route, task_id=task_id)

    async def reset(self) -> None:
        """Back to the first state, except for the clock: no faults, no jobs; accounts as they were at first."""
        await self._send("POST", "/reset")

    async def _call(
        self, kind: type[T], method: str, path: str, body: BaseModel | None = None, **query: str | None
    ) -> T:
        return TypeAdapter(kind).validate_json((await self._send(method, path, body, **query)).content)

    async def _send(self, method: str, path: str, body: BaseModel | None = None, **query: str | None) -> httpx.Response:
        response = await self._http.request(
            method,
            path,
            content=body.model_dump_json(exclude_unset=True) if body else None,
            headers={"Content-Type": "application/json"} if body else None,
            params={name: value for name, value in query.items() if value is not None},
        )
        if response.is_error:
            raise AdminRefused(f"{method} {self.url}/admin{path}: {response.status_code} {response.text[:2000]}")
        return response


class ComfyUIAdmin(ServiceAdmin):
    """Jobs, trainings, GPUs and callbacks."""

    async def jobs(self, task_id: str | None = None) -> list[RunSeen]:
        """Jobs and trainings, oldest first."""
        return await self._call(list[RunSeen], "GET", "/jobs", task_id=task_id)

    async def act(self, run_id: str, action: RunAction | str, **parameters: Any) -> RunSeen:
        """Let something happen to a run now: `act(job_id, "preempt")`, `act(job_id, "fail", code="node_error")`."""
        order = RunOrder(action=RunAction(action), parameters=Parameters(**parameters))
        return await self._call(RunSeen, "POST", f"/jobs/{run_id}", order)

    async def gpus(self) -> dict[str, int]:
        return await self._call(dict[str, int], "GET", "/gpus")

    async def set_gpus(self, gpu_type: str, total: int) -> None:
        await self._send("PUT", f"/gpus/{gpu_type}", GpuOrder(total=total))

    async def callbacks(self, task_id: str | None = None) -> list[CallbackSeen]:
        """The outbox, oldest first."""
        return await self._call(list[CallbackSeen], "GET", "/callbacks", task_id=task_id)

    async def release_callbacks(self) -> None:
        """Send what was withheld."""
        await self._send("POST", "/callbacks/release")


class CreditsAdmin(ServiceAdmin):
    """Accounts, authorisations, holds and the ledger."""

    async def accounts(self) -> list[AccountSeen]:
        return await self._call(list[AccountSeen], "GET", "/accounts")

    async def account(self, tenant_id: str = "tenant-demo", user_id: str = "user-demo") -> AccountSeen:
        """One account. Raises LookupError."""
        for account in await self.accounts():
            if (account.tenant_id, account.user_id) == (tenant_id, user_id):
                return account
        raise LookupError(f"there is no account {tenant_id}/{user_id}")

    async def set_balance(self, balance: int, tenant_id: str = "tenant-demo", user_id: str = "user-demo") -> None:
        """In points; makes the account, with every template granted, where it is missing."""
        await self._send("PUT", f"/accounts/{tenant_id}/{user_id}", AccountOrder(balance=balance))

    async def set_authorization(self, template_id: str, tenant_id: str = "tenant-demo", **order: Any) -> None:
        """E.g. `set_authorization("upscale", phase="revoked")`; see `AuthorizationOrder`."""
        await self._send("PUT", f"/authorizations/{tenant_id}/{template_id}", AuthorizationOrder(**order))

    async def holds(self, task_id: str | None = None) -> list[HoldSeen]:
        holds = await self._call(list[HoldSeen], "GET", "/holds")
        return [hold for hold in holds if task_id in (None, hold.task_id)]

    async def expire_hold(self, pre_deduct_id: str) -> None:
        """End an open hold's life now. Raises AdminRefused where holds do not expire (profile `field`)."""
        await self._send("POST", f"/holds/{pre_deduct_id}/expire")

    async def cancel_hold(self, pre_deduct_id: str) -> None:
        """Cancel an open hold by hand, as an operator of the service would."""
        await self._send("POST", f"/holds/{pre_deduct_id}/cancel")

    async def ledger(self, task_id: str | None = None) -> list[EntrySeen]:
        """Every entry, oldest first."""
        entries = await self._call(list[EntrySeen], "GET", "/ledger")
        return [entry for entry in entries if task_id in (None, entry.task_id)]

    async def charged(self, task_id: str) -> int:
        """What a task has cost its payer so far, in points: commits and charges."""
        entries = await self.ledger(task_id)
        return -sum(entry.change + entry.frozen_change for entry in entries)

    async def balance_check(self) -> BalanceCheck:
        return await self._call(BalanceCheck, "GET", "/balance-check")


class Admin:
    """Both simulators: their clocks move together."""

    def __init__(self, comfyui_url: str, credits_url: str, token: str) -> None:
        self.comfyui = ComfyUIAdmin(comfyui_url, token)
        self.credits = CreditsAdmin(credits_url, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.comfyui.close()
        await self.credits.close()

    async def advance(self, seconds: float) -> None:
        await self.credits.advance(seconds)
        await self.comfyui.advance(seconds)

    async def set_speed(self, speed: float) -> None:
        await self.credits.set_speed(speed)
        await self.comfyui.set_speed(speed)

    async def remove_faults(self) -> None:
        await self.comfyui.remove_faults()
        await self.credits.remove_faults()

    async def reset(self) -> None:
        await self.comfyui.reset()
        await self.credits.reset()
