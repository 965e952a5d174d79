"""`python -m proof.kill_points.gated_worker`: `worker.py` as it is, with calls that can be kept at a point.

What differs from production, and only here:
1. An interceptor stops a call at its gate (gates.py), heartbeating, for as long as the gate is closed.
2. Calls may take two minutes, not ten seconds: a call at its point must not time out before the fault.
   Heartbeats, by which the calls of a killed worker are found, are unchanged.
3. The ledger is read for 20 seconds, not ten minutes, before what it does not show counts as absent.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import ExitStack
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import temporalio.client
import temporalio.worker
from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    StartActivityInput,
    StartLocalActivityInput,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)
from temporalio.workflow import ActivityHandle

import worker
from activities import outside_http, running_call
from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.outside_http import OutsideHttp, RawReply
from comfyui_temporal.contracts.tasks import WORKFLOW_ID_PREFIX
from proof.kill_points.gates import AFTER_REPLY, BEFORE_REPORT, BEFORE_SEND, Gate, Gates
from proof.kill_points.shorter_waits import shorter_waits
from runtime.settings import Settings

FOLDER_VARIABLE: Final = "KILL_POINTS_FOLDER"
PATIENCE: Final = timedelta(minutes=2)
LOOK_SECONDS: Final = 0.02
HEARTBEAT_SECONDS: Final = 0.5

_gate: ContextVar[Gate | None] = ContextVar("gate", default=None)


class Gatekeeper(temporalio.client.Interceptor, temporalio.worker.Interceptor):
    """Stops activities at their task's gate; gives them the patience to wait there."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _GatedActivity(next, self)

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:
        return _PatientWorkflow

    async def wait(self, task_id: str) -> None:
        """Until the gate is opened; a cancellation is swallowed, as a call in flight is never cut short."""
        self.gates.reach(task_id)
        looks = 0
        while self.gates.is_closed(task_id):
            try:
                await asyncio.sleep(LOOK_SECONDS)
            except asyncio.CancelledError:
                continue
            looks += 1
            if looks * LOOK_SECONDS >= HEARTBEAT_SECONDS and not activity.info().is_local:
                looks = 0
                activity.heartbeat()


class _GatedActivity(ActivityInboundInterceptor):
    def __init__(self, next: ActivityInboundInterceptor, keeper: Gatekeeper) -> None:
        super().__init__(next)
        self._keeper = keeper

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        info = activity.info()
        task_id = (info.workflow_id or "").removeprefix(WORKFLOW_ID_PREFIX)
        gate = self._keeper.gates.standing(task_id)
        if gate is None or not gate.takes(info.activity_type, input.args):
            return await super().execute_activity(input)
        if gate.only_visible and info.is_local:
            raise ApplicationError("kept for the visible try")
        if gate.phase == BEFORE_SEND:
            await self._keeper.wait(task_id)
        token = _gate.set(gate)
        try:
            outcome = await super().execute_activity(input)
        finally:
            _gate.reset(token)
        if gate.loses:
            self._keeper.gates.reach(task_id)
            self._keeper.gates.open(task_id)
            raise ApplicationError("its outcome was lost")
        if gate.phase == BEFORE_REPORT:
            await self._keeper.wait(task_id)
        return outcome


class _PatientWorkflow(WorkflowInboundInterceptor):
    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        super().init(_PatientCalls(outbound))


class _PatientCalls(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> ActivityHandle[Any]:
        input.start_to_close_timeout = max(input.start_to_close_timeout or PATIENCE, PATIENCE)
        return super().start_activity(input)

    def start_local_activity(self, input: StartLocalActivityInput) -> ActivityHandle[Any]:
        input.schedule_to_close_timeout = PATIENCE
        return super().start_local_activity(input)


def main() -> int:
    keeper = Gatekeeper(Gates(Path(os.environ[FOLDER_VARIABLE])))
    connect, send = worker.connect, OutsideHttp.send

    async def gated_connect(settings: Settings) -> Client:
        config = (await connect(settings)).config()
        config["interceptors"] = [keeper]
        return Client(**config)

    async def gated_send(self: OutsideHttp, *arguments: Any, **named: Any) -> RawReply:
        reply = await send(self, *arguments, **named)
        gate = _gate.get()
        if gate is not None and gate.phase == AFTER_REPLY:
            await keeper.wait((activity.info().workflow_id or "").removeprefix(WORKFLOW_ID_PREFIX))
        return reply

    seconds = PATIENCE.total_seconds()
    with ExitStack() as replaced:
        replaced.enter_context(patch.object(worker, "connect", gated_connect))
        replaced.enter_context(patch.object(OutsideHttp, "send", gated_send))
        replaced.enter_context(shorter_waits())
        for module in (outside_http, running_call):
            replaced.enter_context(patch.object(module, "REQUEST_SECONDS", seconds))
        for client in (ComfyUIClient, CreditsClient):
            patient = partial(client, read_seconds=seconds)
            replaced.enter_context(patch.object(worker, client.__name__, patient))
        return worker.main()


if __name__ == "__main__":
    sys.exit(main())
