"""Asks a worker which services it uses, and compares them with the ones that were examined."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Final

from temporalio.client import WorkflowFailureError
from temporalio.service import RPCError

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.worker_settings import (
    WORKER_SETTINGS_PREFIX,
    WORKER_SETTINGS_WORKFLOW,
    WorkerSettings,
)
from doctor.finding import Finding, note, ok, wrong

ASK_SECONDS: Final = 4.0


async def ask_worker(connection: Connection) -> WorkerSettings | None:
    """What the worker that answers uses; None if none says so: there is none, or it is of an earlier release."""
    try:
        used: WorkerSettings = await connection.client.execute_workflow(
            WORKER_SETTINGS_WORKFLOW,
            id=f"{WORKER_SETTINGS_PREFIX}{secrets.token_hex(6)}",
            task_queue=connection.task_queue,
            result_type=WorkerSettings,
            execution_timeout=timedelta(seconds=ASK_SECONDS),
            static_summary="doctor asks what the worker uses",
        )
        return used
    except (WorkflowFailureError, RPCError):
        return None


def compare(used: WorkerSettings | None, *, comfyui_url: str, credits_url: str) -> list[Finding]:
    """Whether the worker calls the services that are examined."""
    if used is None:
        return [
            note(
                "worker's services",
                "no worker says which services it calls: what is examined may be others",
                "Start a worker of this release.",
            )
        ]
    examined = {"ComfyUI": (used.comfyui_url, comfyui_url), "the credits service": (used.credits_url, credits_url)}
    others = [(name, theirs, here) for name, (theirs, here) in examined.items() if theirs != here]
    if not others:
        return [ok("worker's services", f"{used.identity} calls {used.comfyui_url} and {used.credits_url}")]
    return [
        wrong(
            "worker's services",
            f"{used.identity} calls {name} at {theirs}; {here} is set here, and no task uses it",
            "Start the worker with these settings, or run doctor with the worker's.",
        )
        for name, theirs, here in others
    ]
