"""Whether any server of a pool can run a template, for jobs before they are queued and for those that wait."""

from __future__ import annotations

from temporalio import activity

from bridge.calls import CHECK_SERVERS
from bridge.forecast import CanRun, Forecast
from bridge.orders import TemplatePlace
from bridge.task_files import for_tenant
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.fields import shortened


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

    @activity.defn(name=CHECK_SERVERS)
    async def check_servers(self, place: TemplatePlace) -> list[ErrorDetails]:
        """Why a waiting job cannot run anywhere; empty where some server can run it, or none has said yet."""
        problem = no_server(await self._forecast.can_run(place.pool, place.template_id), place.template_id)
        return [] if problem is None else [problem]
