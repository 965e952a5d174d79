"""Signals a task's run, and finds out what became of a run that takes no signals."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

import structlog
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.contracts.scenes import Callback
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, workflow_id_of
from comfyui_temporal.runs import describe_run
from gateway.callback_relay import Relayed
from gateway.metrics import Metrics
from store import StoreUnavailable, TaskStore

log = structlog.get_logger(__name__)

SIGNAL_SECONDS: Final = 1.5
_NAMESPACE_MISSING: Final = "NamespaceNotFound"


class TaskRuns:
    """The runs of this namespace, as far as callbacks concern them."""

    def __init__(self, client: Client, store: TaskStore, metrics: Metrics) -> None:
        self._metrics = metrics
        self._client = client
        self._store = store

    async def signal(self, task_id: str, callback: Callback) -> Relayed:
        """Signal the callback, without its log lines, to the task's run."""
        handle = self._client.get_workflow_handle(workflow_id_of(task_id))
        payload = callback.model_dump(mode="json", exclude={"log"}, exclude_unset=True)
        try:
            async with asyncio.timeout(SIGNAL_SECONDS):
                with self._metrics.signal_seconds.time():
                    await handle.signal(CALLBACK_SIGNAL, payload, rpc_timeout=timedelta(seconds=SIGNAL_SECONDS))
        except RPCError as error:
            if _is_run_missing(error):
                return await self._without_open_run(task_id)
            return self._unavailable(task_id, error)
        except (TimeoutError, RuntimeError) as error:
            return self._unavailable(task_id, error)
        return Relayed.SIGNALLED

    async def _without_open_run(self, task_id: str) -> Relayed:
        """`over` if a closed run or a claim is known; `unknown` only if both Temporal and the store say so."""
        limit = timedelta(seconds=SIGNAL_SECONDS)
        try:
            async with asyncio.timeout(SIGNAL_SECONDS):
                await describe_run(self._client, workflow_id_of(task_id), rpc_timeout=limit)
            return Relayed.TASK_OVER
        except RPCError as error:
            if not _is_run_missing(error):
                return self._unavailable(task_id, error)
        except (TimeoutError, RuntimeError) as error:
            return self._unavailable(task_id, error)
        try:
            return Relayed.TASK_OVER if await self._store.is_claimed(task_id) else Relayed.TASK_UNKNOWN
        except StoreUnavailable as error:
            return self._unavailable(task_id, error)

    def _unavailable(self, task_id: str, error: Exception) -> Relayed:
        log.warning("callback_not_signalled", task_id=task_id, reason=type(error).__name__, detail=str(error)[:200])
        return Relayed.UNAVAILABLE


def _is_run_missing(error: RPCError) -> bool:
    """NOT_FOUND of the run. If the namespace is missing our configuration is wrong, and the sender must repeat."""
    if error.status is not RPCStatusCode.NOT_FOUND:
        return False
    return not any(_NAMESPACE_MISSING in detail.type_url for detail in error.grpc_status.details)
