"""Accounts of one scenario: a payer's balance is exact, independent of what other scenarios spend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from comfyui_temporal.contracts.task_store import TaskRow
from proof.simulators.admin_wire import EntrySeen, HoldSeen, RunSeen
from tests.conftest import unique
from tests.workflows.platform import Handle, Platform, task_id_of


@dataclass(frozen=True)
class Payer:
    """A tenant's user with every template granted."""

    platform: Platform
    tenant_id: str
    user_id: str = "user"

    @property
    def fields(self) -> dict[str, str]:
        """The two fields of an input that name the payer."""
        return {"tenant_id": self.tenant_id, "user_id": self.user_id}

    async def has(self, balance: int) -> None:
        """Set the balance, in points; what is frozen stays frozen."""
        await self.platform.simulators.admin.credits.set_balance(balance, self.tenant_id, self.user_id)

    async def has_plain_service(self) -> None:
        """The payer's service keeps no keys: each call acts again. Its ledger shows reasons alone."""
        for fault in ("plain_ledger", "ignore_keys"):
            await self.platform.simulators.admin.credits.fault(fault, tenant_id=self.tenant_id)

    async def balance(self) -> int:
        return (await self.platform.simulators.admin.credits.account(self.tenant_id, self.user_id)).balance

    async def may_use(self, template_id: str, **order: Any) -> None:
        """Grant, revoke or limit a template; see `AuthorizationOrder`."""
        await self.platform.simulators.admin.credits.set_authorization(template_id, self.tenant_id, **order)

    def image(self, **fields: Any) -> dict[str, Any]:
        return self.platform.image(**self.fields, **fields)

    def training(self, **fields: Any) -> dict[str, Any]:
        """A good training input whose dataset lies under the payer's own prefix."""
        dataset = self.platform.folder / "datasets" / self.tenant_id / "faces"
        dataset.mkdir(parents=True, exist_ok=True)
        (dataset / "0.txt").write_text("a picture")
        named = {"dataset_id": "faces", "source_uri": dataset.as_uri()}
        return self.platform.training(**self.fields, dataset=named, **fields)

    async def post(self, route: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """A call to the credits service past the task, e.g. by an operator."""
        self.platform.told_by_hand.add(self.tenant_id)
        token = self.platform.simulators.tokens.made_for(self.tenant_id, self.user_id)
        async with httpx.AsyncClient(base_url=self.platform.simulators.credits_url) as http:
            answer = await http.post(
                f"/api/v1/credits/{route}",
                json=self.fields | body,
                headers={"Authorization": f"Bearer {token}", "X-Idempotency-Key": key},
            )
        assert answer.status_code == 200, answer.text
        reply: dict[str, Any] = answer.json()
        return reply


async def new_payer(platform: Platform, balance: int = 100_000) -> Payer:
    """A payer with this balance in points."""
    payer = Payer(platform, unique("tenant"))
    await payer.has(balance)
    return payer


async def holds_of(platform: Platform, handle: Handle) -> list[HoldSeen]:
    """The task's holds, oldest first."""
    return await platform.simulators.admin.credits.holds(task_id_of(handle))


async def end_open_holds(platform: Platform, handle: Handle) -> str:
    """End the task's open holds from outside: by expiry, or by cancel where holds do not expire.

    The kind of the entries that show it.
    """
    credits = platform.simulators.admin.credits
    expires = platform.simulators.credits_profile.ends_holds
    for hold in await holds_of(platform, handle):
        if hold.phase == "open":
            await (credits.expire_hold if expires else credits.cancel_hold)(hold.pre_deduct_id)
    return "expire" if expires else "cancel"


async def refuse_cancels(platform: Platform, handle: Handle, *, times: int | None = 1) -> None:
    """Refuse the next cancels of holds (None: all) for no reason that the contract gives: a hold ends by expiry."""
    body = {"detail": {"code": "42200", "message": "amount_invalid"}}
    await platform.simulators.admin.credits.fault(
        "answer", route="cancel_hold", task_id=task_id_of(handle), times=times, status=422, body=body
    )


def lost(platform: Platform) -> list[str]:
    """The state of a hold whose answer was lost: by contract the repeat is the same hold, else it is a second one."""
    return [] if platform.simulators.credits_profile.keeps_keys else ["open"]


async def entries_of(platform: Platform, handle: Handle) -> list[EntrySeen]:
    """The task's ledger entries, oldest first."""
    return await platform.simulators.admin.credits.ledger(task_id_of(handle))


async def kinds_of(platform: Platform, handle: Handle) -> list[str]:
    """The kinds of the task's ledger entries, oldest first."""
    return [entry.kind for entry in await entries_of(platform, handle)]


async def has_kinds(platform: Platform, handle: Handle, *kinds: str) -> bool:
    """Whether the task's ledger entries are of these kinds, oldest first."""
    return await kinds_of(platform, handle) == list(kinds)


async def until_kinds(platform: Platform, handle: Handle, kinds: list[str]) -> None:
    await platform.until(lambda: has_kinds(platform, handle, *kinds))


async def until_price_shown(platform: Platform, handle: Handle, cost: int | None = None) -> dict[str, Any]:
    """Wait until the task shows this price, or any, for confirmation; the confirmation."""

    async def shown() -> dict[str, Any] | None:
        wanted: dict[str, Any] | None = (await platform.progress(handle))["confirmation"]
        return wanted if wanted is not None and cost in (None, wanted["estimated_cost"]) else None

    wanted = await platform.until(shown)
    assert wanted is not None
    return wanted


async def row_of(platform: Platform, handle: Handle) -> TaskRow:
    row = await platform.store.task(task_id_of(handle))
    assert row is not None
    return row


async def start_long_training(platform: Platform, task: dict[str, Any]) -> Handle:
    """Start a training of five hours; returns when it has begun: its hold of an hour is due after half of it."""
    await platform.simulators.admin.comfyui.fault(
        "job_duration", route="create_training", task_id=task["task_id"], seconds=5 * 3600
    )
    handle = await platform.start(task)
    await until_started(platform, handle)
    return handle


async def until_started(platform: Platform, handle: Handle) -> RunSeen:
    """Wait until the task's newest job or training has started, which is once credits are held; its state."""

    async def begun() -> RunSeen | None:
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        is_held = any(hold.phase == "open" for hold in await holds_of(platform, handle))
        return runs[-1] if runs and is_held and runs[-1].phase in ("waiting", "working") else None

    run = await platform.until(begun)
    assert run is not None
    return run
