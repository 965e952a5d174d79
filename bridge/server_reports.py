"""What every server says of itself: which templates it cannot run, and whether it is sick.

A report is the memo of a workflow that ends at once, as idempotency keys are: readable at once, by any bridge process,
and in the Temporal UI. It is written when something changes. Whether its server is still there is seen at the pollers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import structlog
from pydantic import ValidationError
from temporalio.client import Client
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.service import RPCError, RPCStatusCode

from bridge.calls import REPORT_MEMO, SERVER_WORKFLOW, report_id
from bridge.orders import ServerReport
from comfyui_temporal.runs import describe_run
from runtime.background import running_in_background

RPC_TIMEOUT: Final = timedelta(seconds=5)
RETRY_SECONDS: Final = 2.0
CHANGES_SECONDS: Final = 1.0
"""At most one report in this time."""

log = structlog.get_logger(__name__)


class ServerReports:
    """Reads and writes reports. Raises RPCError."""

    def __init__(self, client: Client, task_queue: str) -> None:
        self._client = client
        self._task_queue = task_queue

    async def write(self, report: ServerReport) -> None:
        """Replace the server's report."""
        await self._client.start_workflow(
            SERVER_WORKFLOW,
            id=report_id(self._task_queue, report.name),
            task_queue=self._task_queue,
            id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
            id_conflict_policy=WorkflowIDConflictPolicy.TERMINATE_EXISTING,
            memo={REPORT_MEMO: report.model_dump(mode="json")},
            static_summary=report.summary(),
            rpc_timeout=RPC_TIMEOUT,
        )

    async def of(self, names: Iterable[str]) -> dict[str, ServerReport]:
        """Name → report. Servers without a readable report are left out."""
        wanted = sorted(set(names))
        reports = await asyncio.gather(*(self._read(name) for name in wanted))
        return {name: report for name, report in zip(wanted, reports, strict=True) if report is not None}

    async def _read(self, name: str) -> ServerReport | None:
        try:
            seen = await describe_run(self._client, report_id(self._task_queue, name), rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        try:
            return ServerReport.model_validate((await seen.memo()).get(REPORT_MEMO))
        except ValidationError:
            return None


class Reporting:
    """Writes one server's report whenever `changed` was called, until the end."""

    def __init__(self, reports: ServerReports, report: Callable[[], ServerReport]) -> None:
        self._reports = reports
        self._report = report
        self._changed = asyncio.Event()
        self._written: ServerReport | None = None

    def changed(self) -> None:
        self._changed.set()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Report while the body runs, and at its end that the server has left."""
        self._changed.set()
        try:
            async with running_in_background(self._write_always()):
                yield
        finally:
            await self._write(self._report().model_copy(update={"has_left": True}))

    async def _write_always(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            report = self._report()
            if report != self._written and not await self._write(report):
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
            await asyncio.sleep(CHANGES_SECONDS)

    async def _write(self, report: ServerReport) -> bool:
        try:
            await self._reports.write(report)
        except RPCError as error:
            log.warning("server_report_unwritten", server=report.name, reason=error.status.name.lower())
            return False
        self._written = report
        return True
