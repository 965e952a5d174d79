"""The limits of each tenant at the gateway's doors (contract §7): 429 before anything is started or sent.

What is set and what is left stands in the headers of each start and stream, in the words of the IETF's draft
(https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers):

    RateLimit-Policy: "starts";q=600;w=60, "open-tasks";q=2000
    RateLimit: "starts";r=599;t=60, "open-tasks";r=1990;t=5

The task store counts for all processes. While it is away nothing is refused here: a run's claim counts too.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from comfyui_temporal.contracts.tenant_limits import WINDOW_SECONDS, Admission, Limit, TenantLimits
from gateway.problems import Problem, ProblemCode
from store import StoreFailure, TaskStore

log = structlog.get_logger(__name__)

POLICY_HEADER: Final = "RateLimit-Policy"
LEFT_HEADER: Final = "RateLimit"
REPORT_SECONDS: Final = 5.0
_PER_MINUTE: Final = frozenset({Limit.STARTS, Limit.BYTES})


class TenantDoor:
    """Admits starts and streams of all tenants, for one gateway process."""

    def __init__(self, store: TaskStore, limits_of: Callable[[str], TenantLimits]) -> None:
        self._store = store
        self._limits_of = limits_of
        self._process_id = uuid.uuid4().hex
        self._streams: Counter[str] = Counter()
        """This process' open streams of each tenant."""

    async def admit_start(self, tenant_id: str, task_id: str, size: int) -> dict[str, str]:
        """Count a start whose order has `size` bytes. Returns the answer's headers. Raises Problem 429."""
        limits = self._limits_of(tenant_id)
        if not limits.bounds_starts:
            return {}
        try:
            admission = await self._store.admit_start(tenant_id=tenant_id, task_id=task_id, size=size, limits=limits)
        except StoreFailure:
            return {}
        return checked(admission, tenant_id)

    async def open_stream(self, tenant_id: str) -> dict[str, str]:
        """Count a stream; `close_stream` must follow. Returns the answer's headers. Raises Problem 429."""
        limits = self._limits_of(tenant_id)
        own_open = self._streams[tenant_id]
        self._streams[tenant_id] += 1
        try:
            if not limits.open_streams:
                return {}
            admission = await self._store.admit_stream(
                tenant_id=tenant_id, process_id=self._process_id, own_open=own_open, limits=limits
            )
            return checked(admission, tenant_id)
        except StoreFailure:
            return {}
        except BaseException:
            self.close_stream(tenant_id)
            raise

    def close_stream(self, tenant_id: str) -> None:
        self._streams[tenant_id] -= 1
        if self._streams[tenant_id] <= 0:
            del self._streams[tenant_id]

    @asynccontextmanager
    async def reporting(self) -> AsyncIterator[None]:
        """Within this context other processes learn how many streams are open here."""
        task = asyncio.create_task(self._report_forever())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            with suppress(StoreFailure):
                await self._store.report_streams(process_id=self._process_id, open_of={})

    async def _report_forever(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            bounded = {tenant: count for tenant, count in self._streams.items() if self._limits_of(tenant).open_streams}
            try:
                await self._store.report_streams(process_id=self._process_id, open_of=bounded)
            except StoreFailure as failure:
                log.warning("open_streams_not_reported", reason=str(failure))


def checked(admission: Admission, tenant_id: str) -> dict[str, str]:
    headers = _headers(admission)
    if admission.refused is not None:
        headers["Retry-After"] = str(admission.retry_after_seconds)
        raise Problem(ProblemCode.RATE_LIMITED, admission.sentence(tenant_id), headers=headers)
    return headers


def _headers(admission: Admission) -> dict[str, str]:
    if not admission.allowances:
        return {}
    policies, left = [], []
    for each in admission.allowances:
        window = f";w={WINDOW_SECONDS}" if each.limit in _PER_MINUTE else ""
        policies.append(f'"{each.limit.value}";q={each.most}{window}')
        left.append(f'"{each.limit.value}";r={each.left};t={each.resets_in_seconds}')
    return {POLICY_HEADER: ", ".join(policies), LEFT_HEADER: ", ".join(left)}
