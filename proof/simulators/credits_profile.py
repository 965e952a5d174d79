"""Which credits service is simulated (contract §4): one that keeps our contract, or the platform's own (field)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class CreditsProfile:
    """The differences between the two services."""

    name: str
    keeps_keys: bool
    """Idempotency. Without it every repeat acts again: a second hold, a second charge."""
    asks_for_tokens: bool
    """Without it the caller is the user that the body or the query names."""
    ends_holds: bool
    """A hold ends by itself when its `expire_at` has passed. Without it a hold stays open until it is resolved."""
    tells_kinds: bool
    """Ledger entries with `kind`, `pre_deduct_id` and `frozen_change`, in pages and by task; else `reason` alone."""
    counts_gpu_hours: bool
    """In the estimate of a training."""
    tells_quota: bool
    """`template_quota` is a number; else null."""
    charge_refusal: tuple[int, str]
    """HTTP status and code of a charge that the balance does not cover."""


CONTRACT: Final = CreditsProfile(
    "contract",
    keeps_keys=True,
    asks_for_tokens=True,
    ends_holds=True,
    tells_kinds=True,
    counts_gpu_hours=True,
    tells_quota=True,
    charge_refusal=(402, "40201"),
)
FIELD: Final = CreditsProfile(
    "field",
    keeps_keys=False,
    asks_for_tokens=False,
    ends_holds=False,
    tells_kinds=False,
    counts_gpu_hours=False,
    tells_quota=False,
    charge_refusal=(403, "40302"),
)
PROFILES: Final = {profile.name: profile for profile in (CONTRACT, FIELD)}
