"""Which tenant may use which template, until when and how often (contract §4's authorization_* refusals)."""

from __future__ import annotations

from typing import Final

from proof.simulators.admin_wire import AuthorizationOrder
from proof.simulators.clock import Clock
from proof.simulators.jobs import IMAGE_TEMPLATES
from proof.simulators.ledger import Ledger
from proof.simulators.replies import Refused
from proof.simulators.state_file import StateFile

TEMPLATES: Final = (*IMAGE_TEMPLATES, "lora-train")
NO_QUOTA: Final = -1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS authorizations (
    tenant_id TEXT NOT NULL,
    template_id TEXT NOT NULL,
    phase TEXT NOT NULL,
    expires_at REAL,
    quota INTEGER NOT NULL,
    PRIMARY KEY (tenant_id, template_id)
);
"""


class Authorizations:
    """A quota counts the tenant's holds on a template that are open or committed; −1 is none."""

    def __init__(self, state: StateFile, clock: Clock, ledger: Ledger) -> None:
        self._state = state
        self._clock = clock
        self._ledger = ledger
        state.lay_out(_SCHEMA)

    def set(self, tenant_id: str, template_id: str, order: AuthorizationOrder) -> None:
        self._state.run(
            "INSERT OR REPLACE INTO authorizations VALUES (?, ?, ?, ?, ?)",
            tenant_id,
            template_id,
            order.phase,
            order.expires_at.timestamp() if order.expires_at else None,
            order.quota,
        )

    def set_missing(self, tenant_id: str) -> None:
        """Grant every known template that the tenant has no row for."""
        for template_id in TEMPLATES:
            self._state.run(
                "INSERT OR IGNORE INTO authorizations VALUES (?, ?, 'granted', NULL, ?)",
                tenant_id,
                template_id,
                NO_QUOTA,
            )

    def quota(self, tenant_id: str, template_id: str) -> int:
        """−1: none."""
        row = self._state.row(
            "SELECT quota FROM authorizations WHERE tenant_id = ? AND template_id = ?", tenant_id, template_id
        )
        return row["quota"] if row else NO_QUOTA

    def demand(self, tenant_id: str, template_id: str) -> None:
        """Raises Refused by what is wrong with the tenant's right to the template."""
        row = self._state.row(
            "SELECT * FROM authorizations WHERE tenant_id = ? AND template_id = ?", tenant_id, template_id
        )
        if row is None or row["phase"] == "missing":
            raise Refused("authorization_not_found")
        if row["phase"] == "revoked":
            raise Refused("authorization_revoked")
        if row["expires_at"] is not None and row["expires_at"] <= self._clock.timestamp():
            raise Refused("authorization_expired")
        if row["quota"] != NO_QUOTA and self._ledger.uses(tenant_id, template_id) >= row["quota"]:
            raise Refused("authorization_quota_exceeded")
