"""What a GPU worker's metrics page says of its server: whether it can be used, and whether it runs one of our jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from temporalio.common import MetricMeter

from bridge.server import Server, ServerError
from bridge.slot import Slot
from runtime.background import running_in_background

EVERY_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 3.0
USABLE: Final = "gpu_worker_server_usable"
BUSY: Final = "gpu_worker_busy"
COLD: Final = "gpu_worker_cold_templates"
GAUGES: Final = (USABLE, BUSY, COLD)


class ServerGauges:
    """Of one server. It is unusable until it has answered for the first time."""

    def __init__(self, meter: MetricMeter, server: Server, *, name: str, pool: str) -> None:
        labels: dict[str, str | int | float | bool] = {"server": name, "pool": pool}
        self._server = server
        self._usable = meter.create_gauge(USABLE, "Whether the server answers and runs what it is given.")
        self._usable = self._usable.with_additional_attributes(labels)
        self._busy = meter.create_gauge(BUSY, "Whether the server runs a job of ours or warms up, or is about to.")
        self._busy = self._busy.with_additional_attributes(labels)
        self._cold = meter.create_gauge(COLD, "Templates to warm up whose run is still to come or failed.")
        self._cold = self._cold.with_additional_attributes(labels)
        self._usable.set(0)
        self._busy.set(0)
        self._cold.set(0)

    @asynccontextmanager
    async def shown(self, slot: Slot, cold: Callable[[], int]) -> AsyncIterator[None]:
        """Look at the server every 5 s while the body runs. `cold`: how many templates are not warmed up."""
        async with running_in_background(self._look_always(slot, cold)):
            yield

    async def look(self, slot: Slot, cold: int = 0) -> None:
        """Look once. A server that is silent, sick or without storage is unusable; one that is busy is not."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._server.queue()
        except (ServerError, TimeoutError):
            self._usable.set(0)
        else:
            self._usable.set(0 if slot.sickness else 1)
        self._busy.set(1 if slot.is_held else 0)
        self._cold.set(cold)

    async def _look_always(self, slot: Slot, cold: Callable[[], int]) -> None:
        while True:
            await self.look(slot, cold())
            await asyncio.sleep(EVERY_SECONDS)
