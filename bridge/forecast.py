"""Forecasts waits and run times from what Temporal knows: past run times, waiting jobs and servers.

Run times are in the memos of ended jobs, the backlog is in the task queue's statistics, and servers are the pollers of
a queue that every GPU worker polls. Each is read at most once every few seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest, DescribeTaskQueueResponse
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.absent_servers import AbsentServers
from bridge.calls import (
    BRIDGE_QUEUE,
    JOB_WORKFLOW,
    LEAST_MINUTES,
    MANIFEST_MEMO,
    SECONDS_MEMO,
    SERVER_MEMO,
    TRAINING_WORKFLOW,
    pool_queue,
    presence_queue,
    template_queue,
)
from bridge.orders import Missing
from bridge.seen_server import SeenServer, server_of
from bridge.server_reports import ServerReports
from comfyui_temporal.contracts.comfyui import Resolution, TaskPriority
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tasks import PRIORITY_KEYS
from runtime.pollers import pollers_of

CACHE_SECONDS: Final = 3.0
MEASURED_CACHE_SECONDS: Final = 20.0
MEASURED_RUNS: Final = 20
SLOW_SHARE: Final = 0.8
ALIVE_SECONDS: Final = 100.0
"""A worker polls at least every minute. One that has not polled for this long is gone."""
REQUEST_SECONDS: Final = 3.0
T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Backlog:
    """Number of jobs that wait for a server, by priority."""

    accelerated: int = 0
    standard: int = 0

    def ahead_of(self, priority: TaskPriority) -> int:
        """About how many jobs run before a new one of this priority."""
        return self.accelerated + (self.standard if priority is TaskPriority.STANDARD else 0)


@dataclass(frozen=True)
class CanRun:
    """`by_all`: every server of the pool can run it. `missing`: what the first one lacks, if all of them do."""

    by_all: bool
    missing: Missing | None


@dataclass(frozen=True)
class PoolFigures:
    """`servers`: GPU workers of the pool that poll. `busy`: those that run a job. `waiting`: jobs, by priority.

    `free`: well servers that run nothing. `fit`: template → well servers that can run it, of templates that some server
    of the pool cannot run.
    """

    pool: str
    servers: int
    busy: int
    waiting: dict[TaskPriority, int]
    sick: int = 0
    free: int = 0
    fit: dict[str, int] = field(default_factory=dict)

    @property
    def demand(self) -> int:
        """Jobs that wait or run: the servers that the pool can use."""
        return self.busy + sum(self.waiting.values())


@dataclass(frozen=True)
class Expected:
    """`minutes` from now to the end, `ahead` jobs in front, `run_seconds` on the server."""

    minutes: float
    ahead: int
    run_seconds: float


class Forecast:
    """Caches values for a short time. Uses defaults if Temporal does not answer, but where a method raises."""

    def __init__(self, client: Client, *, task_queue: str = BRIDGE_QUEUE) -> None:
        self._client = client
        self._task_queue = task_queue
        self._reports = ServerReports(client, task_queue)
        self._handed_over: dict[str, set[str]] = {}
        """Pool → templates that some server of it could not run, at any time."""
        self._absent = AbsentServers()
        self._cache: dict[Hashable, tuple[float, Any]] = {}
        self._locks: dict[Hashable, asyncio.Lock] = {}

    def forget(self) -> None:
        """Clear the cache."""
        self._cache.clear()

    async def of_image(
        self, *, template_id: str, resolution: Resolution, priority: TaskPriority, pool: str, by_manifest: float
    ) -> Expected:
        """The forecast for a new image job. At least contract §1's default until runs of its template were measured.

        `by_manifest`: the run time that the manifest expects of this job. Measured runs may only raise it: a job of
        another size or with other extras, or one that found everything cached, says nothing against it.
        """
        slowness, backlog, servers, busy = await asyncio.gather(
            self.slowness(template_id), self.backlog(pool), self.servers(), self.busy_servers()
        )
        in_pool = [server for server in servers if server.pool == pool and server.can_run(template_id)]
        in_pool = [server for server in in_pool if not server.is_sick] or in_pool
        seconds = by_manifest * (1.0 if slowness is None else slowness)
        ahead = backlog.ahead_of(priority)
        running = sum(server.name in busy for server in in_pool)
        must_wait = ahead > 0 or running >= len(in_pool)
        wait = (ahead + running / 2) * seconds / max(1, len(in_pool)) if must_wait else 0.0
        minutes = (wait + seconds) / 60
        if slowness is None:
            minutes = max(minutes, SCENES[Scene.IMAGE_GENERATE].eta_minutes[priority])
        return Expected(minutes=round(max(minutes, LEAST_MINUTES), 4), ahead=ahead, run_seconds=round(seconds, 3))

    async def slowness(self, template_id: str) -> float | None:
        """How many times longer than by its manifest a template's run takes here, at least 1; None if never measured.

        Four of five of the last runs took no longer, whatever their size and extras, and on whatever server. Runs that
        were cut because they took too long are among them.
        """

        async def read() -> float | None:
            ended = f"WorkflowType = '{JOB_WORKFLOW}' AND ExecutionStatus = 'Completed'"
            query = f"TaskQueue = '{self._task_queue}' AND {ended} AND TemplateId = '{template_id}'"
            measured: list[float] = []
            seen = 0
            async for execution in self._client.list_workflows(query, page_size=100):
                ratio = _slowness_of(await execution.memo())
                seen += 1
                if ratio is not None:
                    measured.append(ratio)
                if len(measured) >= MEASURED_RUNS or seen >= 200:
                    break
            return max(1.0, sorted(measured)[int(SLOW_SHARE * (len(measured) - 1))]) if measured else None

        return await self._cached(("slowness", template_id), read, None, MEASURED_CACHE_SECONDS)

    async def backlog(self, pool: str) -> Backlog:
        return await self._cached(("backlog", pool), partial(self._read_backlog, pool), Backlog(), CACHE_SECONDS / 3)

    async def _read_backlog(self, pool: str) -> Backlog:
        queues = [pool_queue(self._task_queue, pool)]
        queues += [template_queue(self._task_queue, pool, name) for name in sorted(self._handed_over.get(pool, ()))]
        by_key = await self._waiting_in(queues)
        accelerated = by_key[PRIORITY_KEYS[TaskPriority.ACCELERATED]]
        return Backlog(accelerated=accelerated, standard=by_key.total() - accelerated)

    async def waiting_for(self, pool: str, template_ids: Collection[str]) -> int:
        """How many jobs wait for a server of this pool that can run these templates."""

        async def read() -> int:
            handed_over = sorted(self._handed_over.get(pool, set()) & set(template_ids))
            queues = [pool_queue(self._task_queue, pool)]
            queues += [template_queue(self._task_queue, pool, name) for name in handed_over]
            return (await self._waiting_in(queues)).total()

        await self.servers()
        return await self._cached(("waiting", pool), read, 0, CACHE_SECONDS / 3)

    async def _waiting_in(self, queues: Iterable[str]) -> Counter[int]:
        """Priority key → jobs that wait in these queues."""
        by_key: Counter[int] = Counter()
        for seen in await asyncio.gather(*(self._describe(queue) for queue in queues)):
            by_key.update({key: stats.approximate_backlog_count for key, stats in seen.stats_by_priority_key.items()})
        return by_key

    async def servers(self) -> list[SeenServer]:
        """The running GPU workers, sorted by name; empty if Temporal does not answer."""
        return await self._cached(("servers",), self._read_servers, [], CACHE_SECONDS)

    async def gpu_types(self, pool: str) -> list[str]:
        """Types of GPU of the pool's servers, sorted; also of those that were there a short time ago: they come back.

        Raises RPCError, TimeoutError: "no server" would refuse for good what a second try takes.
        """
        present, absent = await self._known_servers()
        return sorted({server.gpu_type for server in [*present, *absent] if server.pool == pool})

    async def _known_servers(self) -> tuple[list[SeenServer], list[SeenServer]]:
        """The running servers, and those that may come back. Raises RPCError, TimeoutError."""
        present = await self._fresh(("servers",), self._read_servers, CACHE_SECONDS)
        names = {server.name for server in present}
        return present, [server for server in self._absent.servers if server.name not in names]

    async def _read_servers(self) -> list[SeenServer]:
        pollers = await self._read_pollers()
        reports = await self._reports.of({server.name for _, server, _ in pollers})
        oldest = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
        found: dict[str, SeenServer] = {}
        absent: list[tuple[SeenServer, datetime]] = []
        for identity, server, polled_at in pollers:
            report = reports.get(server.name)
            is_its = report is not None and report.identity == identity
            reported = replace(server, report=report) if is_its else server
            if polled_at <= oldest or (is_its and report is not None and report.has_left):
                absent.append((reported, polled_at))
            elif report is None or not is_its:
                found.setdefault(server.name, server)
            else:
                found[server.name] = reported
                self._handed_over.setdefault(server.pool, set()).update([*report.unfit, *report.unknown])
        self._absent.look(found.values(), absent)
        return [found[name] for name in sorted(found)]

    async def _read_pollers(self) -> list[tuple[str, SeenServer, datetime]]:
        """(identity, server, last poll) of each GPU worker of the last minutes, those that have left among them."""
        pollers = await pollers_of(
            self._client,
            presence_queue(self._task_queue),
            TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            within=timedelta(seconds=REQUEST_SECONDS),
        )
        return [
            (poller.identity, server, poller.last_access_time.ToDatetime(UTC))
            for poller in pollers
            if (server := server_of(poller.identity)) is not None
        ]

    async def has_other_owner(self, name: str, owner: str) -> bool:
        """Whether a worker of another server uses this name now. Raises RPCError, TimeoutError."""
        oldest = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
        others = [
            identity
            for identity, server, polled_at in await self._read_pollers()
            if server.name == name and server.owner not in ("", owner) and polled_at > oldest
        ]
        report = (await self._reports.of([name])).get(name)
        return any(report is None or report.identity != identity or not report.has_left for identity in others)

    async def can_run(self, pool: str, template_id: str) -> CanRun:
        """Whether the pool's servers can run a template. Sick ones count, and those that were there a short time ago:
        they come back."""
        servers = [server for server in await self.servers() if server.pool == pool]
        lacking = [server for server in servers if not server.can_run(template_id)]
        lacks = [server.report.unfit.get(template_id) for server in lacking if server.report]
        missing = [found for found in lacks if found is not None]
        is_nowhere = len(missing) == len(servers) and not self._absent.can_run(pool, template_id)
        return CanRun(by_all=not lacking, missing=missing[0] if missing and is_nowhere else None)

    async def is_gone(self, pool: str, template_id: str) -> bool:
        """Whether every server of the pool says that it does not have the template; False if that cannot be known.

        Servers count that were there a short time ago: they may come back with it.
        """
        try:
            present, absent = await self._known_servers()
        except (RPCError, TimeoutError):
            return False
        reports = [server.report for server in [*present, *absent] if server.pool == pool]
        return bool(reports) and not any(report is None or report.has(template_id) for report in reports)

    async def busy_servers(self) -> set[str]:
        """Names of servers that run a job or training."""
        return await self._cached(("busy",), self._read_busy, set(), CACHE_SECONDS / 3)

    async def _read_busy(self) -> set[str]:
        query = (
            f"TaskQueue = '{self._task_queue}' AND WorkflowType IN ('{JOB_WORKFLOW}', '{TRAINING_WORKFLOW}') "
            "AND ExecutionStatus = 'Running' AND TaskStatus = 'running'"
        )
        return {
            str((await execution.memo()).get(SERVER_MEMO))
            async for execution in self._client.list_workflows(query, page_size=200, limit=1_000)
        }

    async def pools(self, known: Collection[str]) -> list[PoolFigures]:
        """The figures of these pools and of all that have a server, read now. Raises RPCError, TimeoutError."""
        async with asyncio.timeout(REQUEST_SECONDS):
            servers, busy = await asyncio.gather(self._read_servers(), self._read_busy())
            names = sorted({*known, *(server.pool for server in servers)})
            backlogs = await asyncio.gather(*(self._read_backlog(pool) for pool in names))
        return [
            self._figures(pool, [server for server in servers if server.pool == pool], busy, backlog)
            for pool, backlog in zip(names, backlogs, strict=True)
        ]

    def _figures(self, pool: str, servers: list[SeenServer], busy: set[str], backlog: Backlog) -> PoolFigures:
        well = [server for server in servers if not server.is_sick]
        return PoolFigures(
            pool=pool,
            servers=len(servers),
            busy=sum(server.name in busy for server in servers),
            waiting={TaskPriority.ACCELERATED: backlog.accelerated, TaskPriority.STANDARD: backlog.standard},
            sick=len(servers) - len(well),
            free=sum(server.name not in busy for server in well),
            fit={name: sum(server.can_run(name) for server in well) for name in self._handed_over.get(pool, ())},
        )

    async def gpus(self, accelerated_run_seconds: float) -> list[dict[str, Any]]:
        """The list of contract §3: one row for each type of GPU. A server that is sick, or away, is not available.

        Raises RPCError, TimeoutError: a list without servers ends a training for good.
        """
        (present, absent), busy = await asyncio.gather(self._known_servers(), self.busy_servers())
        rows: list[dict[str, Any]] = []
        for gpu_type in sorted({server.gpu_type for server in [*present, *absent]}):
            there = [server for server in present if server.gpu_type == gpu_type]
            away = [server for server in absent if server.gpu_type == gpu_type]
            well = [server for server in there if not server.is_sick]
            available = sum(server.name not in busy for server in well)
            ahead = max([(await self.backlog(pool)).accelerated for pool in {server.pool for server in there + away}])
            wait = 0.0 if available and not ahead else (ahead + 1) * accelerated_run_seconds / max(1, len(well)) / 60
            rows.append(
                {
                    "gpu_type": gpu_type,
                    "total": len(there) + len(away),
                    "available": available,
                    "accelerated_wait": round(wait, 4),
                }
            )
        return rows

    async def _describe(self, queue: str) -> DescribeTaskQueueResponse:
        """With the backlog of all partitions; its pollers are those of one."""
        return await self._client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=self._client.namespace,
                task_queue=TaskQueue(name=queue),
                task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
                report_stats=True,
            ),
            timeout=timedelta(seconds=REQUEST_SECONDS),
        )

    async def _cached(self, key: Hashable, read: Callable[[], Awaitable[T]], default: T, cache_seconds: float) -> T:
        """As `_fresh`; `default` if Temporal fails."""
        try:
            return await self._fresh(key, read, cache_seconds)
        except (RPCError, TimeoutError) as error:
            log.warning("forecast_unknown", about=str(key), reason=type(error).__name__)
            return default

    async def _fresh(self, key: Hashable, read: Callable[[], Awaitable[T]], cache_seconds: float) -> T:
        """The cached value while it is fresh, otherwise a new one. Raises RPCError, TimeoutError."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            at, value = self._cache.get(key, (float("-inf"), None))
            if time.monotonic() - at < cache_seconds:
                cached: T = value
                return cached
            async with asyncio.timeout(REQUEST_SECONDS):
                fresh = await read()
            self._cache[key] = (time.monotonic(), fresh)
            return fresh


def _slowness_of(memo: Mapping[str, Any]) -> float | None:
    seconds, by_manifest = memo.get(SECONDS_MEMO), memo.get(MANIFEST_MEMO)
    if not isinstance(seconds, int | float) or not isinstance(by_manifest, int | float) or by_manifest <= 0:
        return None
    return float(seconds / by_manifest)
