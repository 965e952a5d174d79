"""What each credits route does (contract §4). Every act runs inside one transaction and answers or refuses."""

from __future__ import annotations

import base64
import uuid
from typing import Any, Final

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.credits import (
    CURRENCY,
    MAX_CHARGE_POINTS,
    CancelHoldRequest,
    ChargeRequest,
    CommitRequest,
    EstimateRequest,
    PreDeductRequest,
)
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import IMAGES, LORAS, PriceTable
from comfyui_temporal.contracts.scenes import SCENES
from proof.simulators.admin_wire import EntrySeen, FaultKind
from proof.simulators.authorizations import Authorizations
from proof.simulators.clock import Clock
from proof.simulators.credits_profile import CreditsProfile
from proof.simulators.edge import Call
from proof.simulators.faults import Faults, Occasion
from proof.simulators.ledger import Hold, Ledger, Person, utc_of
from proof.simulators.ledger_wire import by_kind, by_reason
from proof.simulators.replies import Refused, Reply, checked
from proof.simulators.state_file import StateFile
from proof.simulators.tokens import demand_person, demand_scene

FIRST_ACCOUNTS: Final = (Person("tenant-demo", "user-demo"), Person("tenant-other", "user-other"))
FIRST_BALANCE: Final = 100_000
DEFAULT_HOLD_SECONDS: Final = 600
MAX_PAGE: Final = 1_000
DEFAULT_PAGE: Final = 50


class CreditsService:
    """Accounts, authorisations and prices behind `/api/v1/credits`."""

    def __init__(
        self, state: StateFile, clock: Clock, faults: Faults, prices: PriceTable, profile: CreditsProfile
    ) -> None:
        self.state = state
        self.clock = clock
        self.prices = prices
        self.profile = profile
        self._faults = faults
        self.ledger = Ledger(state, clock, ends_holds=profile.ends_holds)
        self.authorizations = Authorizations(state, clock, self.ledger)
        self.open_first_accounts()

    def open_first_accounts(self) -> None:
        """The two accounts that every stack knows (contract §8), where they are missing."""
        with self.state.transaction():
            for person in FIRST_ACCOUNTS:
                if self.ledger.balances(person) is None:
                    self.ledger.set_balance(person, FIRST_BALANCE)
                    self.authorizations.set_missing(person.tenant_id)

    def task_of(self, pre_deduct_id: str) -> str | None:
        hold = self.ledger.find_hold(pre_deduct_id)
        return hold.task_id if hold else None

    def estimate(self, call: Call) -> Reply:
        order = checked(EstimateRequest, call.body)
        demand_scene(call.claims, order.scene)
        demand_person(call.claims, order.tenant_id, order.user_id)
        standing = self.ledger.balances(Person(order.tenant_id, order.user_id))
        if standing is None:
            raise Refused("authorization_missing")
        costs = {priority: self._price(order, priority) for priority in TaskPriority}
        selected = costs[order.priority]
        minutes = SCENES[order.scene].eta_minutes
        return Reply(
            200,
            {
                "currency": CURRENCY,
                "template_id": order.template_id,
                "scene": order.scene,
                "resolution": order.resolution,
                "priority": order.priority,
                "extras": order.extras,
                "estimated_cost": selected,
                "selected_cost": selected,
                "min_cost": min(costs.values()),
                "max_cost": max(costs.values()),
                "current_balance": standing[0],
                "suggest_topup": max(0, selected - standing[0]),
                "calculation_basis": "base + resolution or model weight + priority + extras + GPU hours",
                "policy_tag": "list-price",
                "audit_id": f"audit-{uuid.uuid4().hex}",
                "options": [
                    {
                        "priority": priority,
                        "total_cost": cost,
                        "eta_minutes": round(minutes[priority] / self.clock.speed, 6),
                    }
                    for priority, cost in costs.items()
                ],
            },
        )

    def _price(self, order: EstimateRequest, priority: TaskPriority) -> int:
        is_accelerated = priority is TaskPriority.ACCELERATED
        unknown = sorted(set(order.extras) - {*self.prices.extras, LORAS, IMAGES})
        if unknown or any(points < 0 for points in order.extras.values()):
            raise Refused("payload_invalid", fields=[f"extras.{name}: not offered" for name in unknown] or ["extras"])
        if order.scene is Scene.IMAGE_GENERATE:
            if order.resolution not in self.prices.resolutions:
                raise Refused("payload_invalid", fields=["resolution: not offered"])
            base = self.prices.image(resolution=order.resolution, accelerated=is_accelerated, extras={})
            return base + sum(order.extras.values())
        if order.resolution not in self.prices.base_models:
            raise Refused("payload_invalid", fields=["resolution: no such base model"])
        gpu_hours = order.gpu_hours if self.profile.counts_gpu_hours else 0.0
        if gpu_hours is None or gpu_hours < 0:
            raise Refused("payload_invalid", fields=["gpu_hours: Field required for model.train, at least 0"])
        return self.prices.training(base_model=order.resolution, accelerated=is_accelerated, gpu_hours=gpu_hours) + sum(
            order.extras.values()
        )

    def pre_deduct(self, call: Call) -> Reply:
        order = checked(PreDeductRequest, {"expire_in": DEFAULT_HOLD_SECONDS} | _object(call.body))
        demand_scene(call.claims, order.scene)
        demand_person(call.claims, order.tenant_id, order.user_id)
        if order.estimated_cost < 1:
            raise Refused("payload_invalid", fields=["estimated_cost: Input should be greater than 0"])
        if order.currency != CURRENCY:
            raise Refused("payload_invalid", fields=[f"currency: Input should be '{CURRENCY}'"])
        self.ledger.expire_due()
        self.authorizations.demand(order.tenant_id, order.template_id)
        hold = self.ledger.hold(
            Person(order.tenant_id, order.user_id),
            task_id=order.task_id,
            template_id=order.template_id,
            scene=order.scene,
            amount=order.estimated_cost,
            expire_in=order.expire_in,
        )
        return self._hold_reply(hold, hold.amount)

    def commit(self, call: Call) -> Reply:
        order = checked(CommitRequest, call.body)
        hold = self._own_hold(call, order.pre_deduct_id, order.tenant_id, order.user_id)
        if hold.task_id != order.task_id:
            raise Refused("pre_deduct_not_found")
        self.ledger.commit(hold, order.actual_cost)
        return self._hold_reply(hold, order.actual_cost)

    def cancel(self, call: Call) -> Reply:
        order = checked(CancelHoldRequest, call.body)
        hold = self._own_hold(call, order.pre_deduct_id, order.tenant_id, order.user_id)
        self.ledger.cancel(hold, order.reason)
        balance, _ = self.ledger.balances(hold.person) or (0, 0)
        return Reply(
            200,
            {
                "pre_deduct_id": hold.pre_deduct_id,
                "status": "cancelled",
                "reason": order.reason,
                "balance_after": str(balance),
            },
        )

    def charge(self, call: Call) -> Reply:
        body = _object(call.body)
        amount = body.get("amount")
        if isinstance(amount, int) and amount > MAX_CHARGE_POINTS:
            raise Refused("amount_limit_exceeded")
        order = checked(ChargeRequest, body)
        demand_scene(call.claims, *Scene)
        demand_person(call.claims, order.tenant_id, order.user_id)
        self.ledger.expire_due()
        person = Person(order.tenant_id, order.user_id)
        entry = self.ledger.charge(
            person,
            task_id=order.task_id,
            amount=order.amount,
            reason=order.reason,
            refusal=self.profile.charge_refusal,
        )
        return Reply(200, _entry_fields(entry, "ledger_id", "change", "balance_after", "reason", "created_at"))

    def balance(self, call: Call) -> Reply:
        person = self._asking_person(call)
        self.ledger.expire_due()
        balance, frozen = self._standing(person)
        return Reply(200, {"balance": balance, "frozen": frozen, "currency": CURRENCY})

    def ledger_page(self, call: Call) -> Reply:
        person = self._asking_person(call)
        self.ledger.expire_due()
        self._standing(person)
        asked = call.request.query_params
        occasion = Occasion("ledger", "GET", asked.get("task_id"), person.tenant_id)
        lag = sum(fault.parameters.seconds or 0 for fault in self._faults.hit(occasion, {FaultKind.LEDGER_LAG}))
        until = self.clock.timestamp() - lag
        limit = _limit(asked.get("limit"))
        if not self.profile.tells_kinds:
            entries, _ = self.ledger.page(person, limit=limit, before=None, task_id=None, until=until)
            return Reply(200, {"entries": by_reason(entries)[:limit]})
        is_plain = bool(self._faults.hit(occasion, {FaultKind.PLAIN_LEDGER}))
        entries, following = self.ledger.page(
            person,
            limit=limit,
            before=_number_of(asked.get("cursor")),
            task_id=None if is_plain else asked.get("task_id"),
            until=until,
        )
        return Reply(
            200,
            {
                "entries": by_reason(entries) if is_plain else by_kind(entries),
                "cursor": _cursor_of(following) if following is not None else None,
            },
        )

    def _own_hold(self, call: Call, pre_deduct_id: str, tenant_id: str, user_id: str) -> Hold:
        """The hold, when it is this person's and the token's scene covers it. Raises Refused."""
        demand_person(call.claims, tenant_id, user_id)
        self.ledger.expire_due()
        hold = self.ledger.find_hold(pre_deduct_id)
        demand_scene(call.claims, *([Scene(hold.scene)] if hold else Scene))
        if hold is None or hold.person != Person(tenant_id, user_id):
            raise Refused("pre_deduct_not_found")
        return hold

    def _hold_reply(self, hold: Hold, amount: int) -> Reply:
        balance, _ = self.ledger.balances(hold.person) or (0, 0)
        quota = self.authorizations.quota(hold.person.tenant_id, hold.template_id) if self.profile.tells_quota else None
        usage = self.ledger.uses(hold.person.tenant_id, hold.template_id, hold.person.user_id)
        return Reply(
            200,
            {
                "pre_deduct_id": hold.pre_deduct_id,
                "frozen_amount": amount,
                "balance_after": balance,
                "quota_snapshot": {"template_quota": quota, "user_usage": usage},
                "expire_at": utc_of(hold.expire_at).isoformat(),
            },
        )

    def _asking_person(self, call: Call) -> Person:
        asked = call.request.query_params
        person = Person(asked.get("tenant_id", ""), asked.get("user_id", ""))
        demand_scene(call.claims, *Scene)
        demand_person(call.claims, person.tenant_id, person.user_id)
        return person

    def _standing(self, person: Person) -> tuple[int, int]:
        standing = self.ledger.balances(person)
        if standing is None:
            raise Refused("account_not_found")
        return standing


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise Refused("payload_invalid", fields=["body: Input should be an object"])
    return body


def _entry_fields(entry: EntrySeen, *names: str) -> dict[str, Any]:
    return entry.model_dump(mode="json", include=set(names))


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_PAGE):
        raise Refused("payload_invalid", fields=[f"limit: Input should be 1 to {MAX_PAGE}"])
    return int(text)


def _cursor_of(number: int) -> str:
    return base64.urlsafe_b64encode(f"entry:{number}".encode()).decode()


def _number_of(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    try:
        kind, _, number = base64.urlsafe_b64decode(cursor.encode()).decode().partition(":")
        if kind == "entry" and number.isascii() and number.isdigit() and len(number) < 19:
            return int(number)
    except (ValueError, UnicodeError):
        pass
    raise Refused("payload_invalid", fields=["cursor: not one of this ledger's"])
