"""Whether any server of a pool can run a template, for jobs before they are queued and for those that wait."""

from __future__ import annotations

import time
from typing import Final

from temporalio import activity

from bridge.calls import CHECK_SERVERS
from bridge.forecast import CanRun, Forecast
from bridge.orders import TemplatePlace
from bridge.task_files import for_tenant
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import shortened

GONE_SECONDS: Final = 60.0
"""A template that no server has for so long was removed, renamed or moved to another pool: its queue is not polled."""
FORGOTTEN_SECONDS: Final = 1200.0
"""Twice the longest pause between two looks of a job: what was seen before says nothing."""


def no_server(can_run: CanRun, template_id: str) -> ErrorDetails | None:
    """The error of a job that no server of its pool can run, with the names of what is missing; else None."""
    if can_run.missing is None:
        return None
    message = shortened(f"No server can run {template_id!r}: {for_tenant('; '.join(can_run.missing.reasons))}")
    return ErrorDetails(code=can_run.missing.code, message=message, retryable=False)


class ServerCheck:
    """The activity of the bridge's own queue. A job may be queued before the first server has reported."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._gone: dict[tuple[str, str], tuple[float, float]] = {}
        """(pool, template) → when it was first and last seen to be gone."""

    @activity.defn(name=CHECK_SERVERS)
    async def check_servers(self, place: TemplatePlace) -> list[ErrorDetails]:
        """Why a waiting job cannot run anywhere; empty where some server can run it, or none has said yet."""
        problem = no_server(await self._forecast.can_run(place.pool, place.template_id), place.template_id)
        if problem is None and await self._is_gone(place):
            message = f"Template {place.template_id!r} was removed while this waited for a server."
            problem = ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message, retryable=False)
        return [] if problem is None else [problem]

    async def _is_gone(self, place: TemplatePlace) -> bool:
        """Whether no server of the pool has the template any more, also not after a moment: files may be replaced."""
        key = (place.pool, place.template_id)
        if not await self._forecast.is_gone(*key):
            self._gone.pop(key, None)
            return False
        now = time.monotonic()
        first, last = self._gone.get(key, (now, now))
        first = first if now - last < FORGOTTEN_SECONDS else now
        self._gone[key] = first, now
        return now - first >= GONE_SECONDS
