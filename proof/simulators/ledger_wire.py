"""How the ledger's entries look on the wire (contract §4 *Reading a ledger*): by kind, or by reason alone (field)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from comfyui_temporal.contracts.credits import LedgerKind
from proof.simulators.admin_wire import EntrySeen

_BARE_FIELDS: Final = frozenset({"ledger_id", "task_id", "change", "balance_after", "reason", "created_at"})
_FIELDS: Final = _BARE_FIELDS | {"kind", "pre_deduct_id", "frozen_change"}


def by_kind(entries: list[EntrySeen]) -> list[dict[str, Any]]:
    """One object an entry, in the order given."""
    return [_shown(entry, _FIELDS) for entry in entries]


def by_reason(entries: list[EntrySeen]) -> list[dict[str, Any]]:
    """The platform's own ledger, newest first as the entries are given.

    A commit shows as the return of the hold's rest (left out where there is none) and the cost, although the
    hold had lowered the balance already: sums of `change` mean nothing. A hold's end by expiry does not show.
    """
    return [row for entry in entries for row in reversed(list(_reasons(entry)))]


def _reasons(entry: EntrySeen) -> Iterator[dict[str, Any]]:
    """Oldest first."""
    shown = _shown(entry, _BARE_FIELDS)
    match entry.kind:
        case LedgerKind.PRE_DEDUCT | LedgerKind.CANCEL:
            yield shown | {"reason": entry.kind}
        case LedgerKind.COMMIT:
            if entry.change:
                yield shown | {"ledger_id": f"{entry.ledger_id}-rest", "reason": "refund_pre_deduct"}
            yield shown | {"reason": "commit", "change": entry.change + entry.frozen_change}
        case LedgerKind.EXPIRE:
            return
        case _:  # a charge has its request's own reason
            yield shown


def _shown(entry: EntrySeen, fields: frozenset[str]) -> dict[str, Any]:
    return entry.model_dump(mode="json", include=set(fields))
