"""What the bridge's metrics page says of each pool: servers and how they are, backlog, and jobs in all.

`bridge_pool_demand` is backlog plus running. A pool that is scaled by it keeps the servers that work: by the backlog
alone it would lose them as soon as the last job is taken. While Temporal does not answer, the last figures stay: zeros
would take servers away in an outage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from temporalio.common import MetricMeter

from bridge.forecast import Forecast
from runtime.background import running_in_background

EVERY_SECONDS: Final = 5.0
SERVERS: Final = "bridge_pool_servers"
BUSY: Final = "bridge_pool_busy"
BACKLOG: Final = "bridge_pool_backlog"
DEMAND: Final = "bridge_pool_demand"
SICK: Final = "bridge_pool_sick"
FREE: Final = "bridge_pool_free"
FIT: Final = "bridge_pool_fit"
GAUGES: Final = (SERVERS, BUSY, BACKLOG, DEMAND, SICK, FREE)
"""Always shown. `FIT` is shown of templates that some server of their pool cannot run."""

log = structlog.get_logger(__name__)


class PoolGauges:
    """Shows the pools of the templates, and every other pool from the moment that it has a server."""

    def __init__(self, meter: MetricMeter, forecast: Forecast, pools: Iterable[str]) -> None:
        self._forecast = forecast
        self._pools = set(pools)
        self._servers = meter.create_gauge(SERVERS, "GPU workers of a pool that poll for jobs or run one.")
        self._busy = meter.create_gauge(BUSY, "GPU workers of a pool that run a job.")
        self._backlog = meter.create_gauge(BACKLOG, "Jobs of a pool that wait for a server.")
        self._demand = meter.create_gauge(DEMAND, "Jobs of a pool that wait or run: the servers that it can use.")

        self._sick = meter.create_gauge(SICK, "GPU workers of a pool whose server is sick: they take no job.")
        self._free = meter.create_gauge(FREE, "GPU workers of a pool whose server is well and runs no job.")
        self._fit = meter.create_gauge(FIT, "GPU workers of a pool whose server is well and can run this template.")

    @asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Read the pools every 5 s while the body runs."""
        async with running_in_background(self._read_always()):
            yield

    async def read(self) -> None:
        """Read the pools once. Raises RPCError (temporalio), TimeoutError: then nothing is changed."""
        figures = await self._forecast.pools(self._pools)
        self._pools |= {of_pool.pool for of_pool in figures}
        for of_pool in figures:
            labels = {"pool": of_pool.pool}
            self._servers.set(of_pool.servers, labels)
            self._busy.set(of_pool.busy, labels)
            self._demand.set(of_pool.demand, labels)
            self._sick.set(of_pool.sick, labels)
            self._free.set(of_pool.free, labels)
            for template_id, servers in of_pool.fit.items():
                self._fit.set(servers, {**labels, "template": template_id})
            for priority, jobs in of_pool.waiting.items():
                self._backlog.set(jobs, {**labels, "priority": priority.value})

    async def _read_always(self) -> None:
        while True:
            try:
                await self.read()
            except Exception as error:  # the figures go on, whatever one reading meets
                log.warning("pools_not_read", reason=type(error).__name__)
            await asyncio.sleep(EVERY_SECONDS)
