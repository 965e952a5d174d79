"""What activities count, on the worker's metrics page. Every label has few values; none names a task or a tenant.

A process without a metrics page counts nothing. Temporal's SDK adds the labels `namespace`, `task_queue` and
`activity_type`, and `_total` to the name of a counter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from temporalio import activity

from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.task_store import Fact, TaskState
from comfyui_temporal.contracts.tasks import SettlementState

TASKS_ENDED: Final = "tasks_ended"
TASK_POINTS: Final = "task_points"
WRITE_LAG: Final = "task_store_write_lag_seconds"
OUTSIDE_CALLS: Final = "outside_calls"
OUTSIDE_RETRIES: Final = "outside_retries"
ROWS_NOT_LOOKED_AT: Final = "reconciler_rows_not_looked_at"
LAST_LOOK: Final = "reconciler_last_look_timestamp_seconds"
COUNTERS: Final = (TASKS_ENDED, TASK_POINTS, OUTSIDE_CALLS, OUTSIDE_RETRIES, ROWS_NOT_LOOKED_AT)
GAUGES: Final = (LAST_LOOK,)
BUCKETS_SECONDS: Final = {WRITE_LAG: (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3600.0)}
"""The histograms."""

STORE: Final = "task_store"
_PARTIES: Final = {
    "credits": ("estimate", "pre_deduct", "commit", "cancel_hold", "charge", "ledger"),
    "storage": ("snapshot", "delete_snapshot"),
}
_PARTY_OF: Final = {call: party for party, calls in _PARTIES.items() for call in calls}
_REFUSED: Final = "refused"
_KNOWN_CODES: Final = frozenset(code.value for code in FailureCode)
OTHER: Final = "other"
"""A code that is not the contract's: ComfyUI's own codes are kept, and they may be any text."""
NO_CODE: Final = "none"


def party_of(call: str) -> str:
    """The outside party that an activity calls: `comfyui`, `credits` or `storage`."""
    return _PARTY_OF.get(call, "comfyui")


def count_call(party: str, outcome: str) -> None:
    """Count one try of a call, and as a retry if it is not its activity's first."""
    meter = activity.metric_meter()
    outcome = _REFUSED if outcome.startswith(_REFUSED) else outcome
    meter.create_counter(OUTSIDE_CALLS, "Tries of calls to an outside party, by what became of them.").add(
        1, {"party": party, "outcome": outcome}
    )
    if activity.info().attempt > 1:
        meter.create_counter(OUTSIDE_RETRIES, "Tries after an activity's first.").add(1, {"party": party})


def count_end(scene: str, state: TaskState) -> None:
    """Count a task's end, which was just stored, and its points."""
    meter, credits = activity.metric_meter(), state.credits
    code = NO_CODE if state.error is None else state.error.code
    labels = {
        "scene": scene,
        "status": state.status.value,
        "code": code if code in _KNOWN_CODES or code == NO_CODE else OTHER,
    }
    meter.create_counter(TASKS_ENDED, "Tasks that ended, by their end and its code.").add(1, labels)
    is_unknown = credits.settlement is SettlementState.UNKNOWN
    points = {
        "charged": credits.charged or 0,
        "returned": credits.returned or 0,
        "shortfall": credits.shortfall,
        "unknown": credits.held if is_unknown else 0,
    }
    counter = meter.create_counter(TASK_POINTS, "Points of tasks that ended, by what became of them.")
    for what, amount in points.items():
        if amount > 0:
            counter.add(amount, {"scene": scene, "what": what})


def observe_write_lag(facts: Iterable[Fact]) -> None:
    """Note how long the oldest of these facts has waited to be stored, at every try to store it."""
    oldest = min((fact.ts for fact in facts), default=None)
    if oldest is not None:
        seconds = max((datetime.now(UTC) - oldest).total_seconds(), 0.0)
        activity.metric_meter().create_histogram_float(
            WRITE_LAG, "From what happened to the try to write it to the task store."
        ).record(seconds)


def count_rows_not_looked_at(rows: int) -> None:
    activity.metric_meter().create_counter(
        ROWS_NOT_LOOKED_AT, "Open rows whose run the reconciler could not read."
    ).add(rows)


def note_look() -> None:
    """Note that the reconciler has just read the last page of open rows."""
    activity.metric_meter().create_gauge_float(
        LAST_LOOK, "When the reconciler last read all open rows, in Unix time."
    ).set(time.time())
