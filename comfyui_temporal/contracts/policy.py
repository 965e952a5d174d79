"""A task's limits and prices from the worker's settings (contract §5). A run's first step reads them into history."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote

from pydantic import Field

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.prices import PriceTable

CONFIRM_WITHIN_SECONDS: Final = 3_600.0
RETRY_AFTER_SECONDS: Final = (30.0, 60.0, 120.0)
CONTINUE_AS_NEW_EVENTS: Final = 2_000
CONTINUE_AS_NEW_SIGNALS: Final = 5_000
"""Defaults of the settings that make a policy, and of a policy in the history of an earlier release."""


class Policy(OwnModel):
    """Limits and prices of one task. Durations name their unit."""

    prices: PriceTable = PriceTable()
    callback_url: str
    """Where ComfyUI posts this task's callbacks: `…/callbacks/comfyui/{task_id}`."""
    poll_after_seconds: float = Field(gt=0)
    poll_at_most_seconds: float = Field(gt=0)
    deadline_factor: float = Field(gt=0)
    cap_minutes: float = Field(gt=0)
    """A task's whole time is capped at twice the longest span (factor × announced time), and at most this."""
    ceiling_factor: float = Field(default=2.0, ge=1)
    """Default `max_credits` of an image: this factor times the table's price."""
    confirm_within_seconds: float = Field(default=CONFIRM_WITHIN_SECONDS, gt=0)
    retry_after_seconds: list[float] = list(RETRY_AFTER_SECONDS)
    """One more attempt after each of these pauses."""
    charge_shortfall: bool = False
    queue_sla_minutes: float = Field(gt=0)
    hold_margin_seconds: float = 300.0
    opening_call_minutes: float = 15.0
    """How long submit, create, estimate, pre-deduct and start are retried (contract §4)."""
    continue_as_new_events: int = CONTINUE_AS_NEW_EVENTS
    continue_as_new_signals: int = CONTINUE_AS_NEW_SIGNALS
    short_way: bool = False
    """Whether the store is looked into for ticks (decision 4). False in runs that an earlier release began."""
    counts_from_processing: bool = False
    """Whether deadline and cap leave out the time in the queue (contract §1). False in runs of an earlier release."""
    checks_balance_first: bool = False
    """Whether the balance is compared with the estimate before anything is submitted or copied. False in runs of an
    earlier release."""
    dataset_roots: list[str] = []
    """`dataset.source_uri` and `resume_from` must be below one of this tenant's prefixes."""

    def is_own_address(self, uri: str) -> bool:
        """Whether the address is below one of this tenant's prefixes, without `..` out of it."""
        climbs = any(part in ("..", ".") for part in unquote(uri).replace("\\", "/").split("/"))
        return not climbs and any(uri.startswith(root) and len(uri) > len(root) for root in self.dataset_roots)
