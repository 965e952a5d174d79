"""The stack as the soak sees it: its clients, its parts, and the open tasks."""

from __future__ import annotations

from functools import partial
from typing import Any

from local_stack.description import caller_token
from proof.site.parts import SupervisedParts
from proof.site.site import Site
from proof.site.waiting import insist
from proof.soak.plan import users_of


class SoakSite(Site):
    """A site whose parts the local stack supervises."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.parts = SupervisedParts(self)
        self.open_tasks: dict[str, int] = {}
        """Task id → its number, while it is open."""

    def bearer_of(self, tenant_id: str, user_id: str) -> dict[str, str]:
        """The header of one user of a tenant."""
        return {"Authorization": f"Bearer {caller_token(tenant_id, user_id, self.folder.secrets())}"}

    async def set_balances(self, balance: int, tenant_id: str) -> None:
        """Set the balance of every user of a tenant."""
        set_balance = self.admin.credits.set_balance
        for user_id in users_of(tenant_id):
            await insist(partial(set_balance, balance, tenant_id, user_id), "accounts")
