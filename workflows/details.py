"""A run explains itself in the Temporal UI: its current details, as Markdown (README, "In the Temporal UI")."""

from __future__ import annotations

import re
from datetime import datetime

from comfyui_temporal.contracts.task_store import TaskState

_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|<>&~])")


def escaped(text: str) -> str:
    """Text from outside without its markup."""
    return _MARKUP.sub(lambda match: f"&#{ord(match.group(1))};", " ".join(text.split()))


def current_details(state: TaskState, *, waits_for: str, until: datetime | None, last_news_at: datetime | None) -> str:
    """What an operator looks for first: the task's state, what is held, what it waits for and until when."""
    credits = state.credits
    rows = {
        "status": state.status.value,
        "stage": f"{state.stage or '-'} {state.progress:.0f} %",
        "job": f"{state.job_id or '-'} (attempt {state.attempts})",
        "credits": f"estimated {credits.estimated}, held {credits.held}, charged {_points(credits.charged)}, "
        f"returned {_points(credits.returned)}",
        "waits for": _waiting(state, waits_for, until),
        "last update from ComfyUI": _time(last_news_at),
    }
    if state.confirmation is not None:
        rows["to be confirmed"] = f"{state.confirmation.estimated_cost} points, see confirm_price"
    if state.error is not None:
        rows["last error"] = f"{state.error.code}: {state.error.message}"
    # A list: the UI shows no tables, and would run the words of one together.
    return "\n".join(f"- **{name}:** {escaped(value)}" for name, value in rows.items())


def _waiting(state: TaskState, what: str, until: datetime | None) -> str:
    if state.status.is_end() or not what:
        return "-"
    return f"{what}, until {_time(until)}" if until else what


def _points(points: int | None) -> str:
    return "unknown" if points is None else str(points)


def _time(at: datetime | None) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S UTC") if at else "-"
