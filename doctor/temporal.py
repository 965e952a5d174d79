"""What tasks need from Temporal: namespace, retention, search attributes, a worker. Reads only."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from temporalio.api.enums.v1 import IndexedValueType, TaskQueueType
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.submission import RPC_TIMEOUT
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.reconcile import reconcile_id_of
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from comfyui_temporal.encryption import encryption_of
from doctor.finding import Finding, note, ok, wrong
from runtime.pollers import pollers_of
from runtime.reconciler_schedule import last_pass, standing_reconciler

LEAST_RETENTION: Final = timedelta(days=30)
"""As long as idempotency keys live: with less, a finished task could be started, and paid, again."""


async def check_temporal(connection: Connection) -> list[Finding]:
    """All findings about the server. Without the namespace nothing more can be checked."""
    server = connection.server
    findings = [ok("Temporal", f"answers at {server.address} (named by {server.named_by})")]
    try:
        findings.append(await _retention(connection))
    except RPCError as error:
        advice = f"Create it: temporal operator namespace create --namespace {server.namespace} --retention 30d"
        if error.status is not RPCStatusCode.NOT_FOUND:
            advice = "Check the credentials (TEMPORAL_API_KEY, TLS) and that they may read this namespace."
        return [*findings, wrong("namespace", f"{server.namespace!r}: {error.message}", advice)]
    return [
        *findings,
        await _search_attributes(connection),
        await _workers(connection),
        await _reconciler(connection),
        _encryption(connection),
    ]


def _encryption(connection: Connection) -> Finding:
    encryption = encryption_of(connection.client)
    others = ", ".join(encryption.key_ids[encryption.encrypts :])
    reads = f"; {others} can be read" if others else ""
    if not encryption.encrypts:
        return note("encryption", f"what Temporal holds is not encrypted{reads}", "See docs/encryption.md.")
    return ok("encryption", f"what Temporal holds is encrypted with the key {encryption.key_ids[0]}{reads}")


async def _retention(connection: Connection) -> Finding:
    namespace = connection.server.namespace
    described = await connection.client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=namespace), timeout=RPC_TIMEOUT
    )
    retention = described.config.workflow_execution_retention_ttl.ToTimedelta()
    if retention >= LEAST_RETENTION:
        return ok("namespace", f"{namespace!r} keeps runs for {retention.days} days")
    return wrong(
        "namespace",
        f"{namespace!r} keeps runs for {retention.total_seconds() / 86_400:g} days only: idempotency keys live 30 days",
        f"Raise it: temporal operator namespace update --namespace {namespace} --retention 30d",
    )


async def _search_attributes(connection: Connection) -> Finding:
    namespace = connection.server.namespace
    try:
        listed = await connection.client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=namespace), timeout=RPC_TIMEOUT
        )
    except RPCError as error:
        return note(
            "search attributes",
            f"cannot be read: {error.message}",
            f"Check that {', '.join(SEARCH_ATTRIBUTES)} exist with type Keyword.",
        )
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    missing = [name for name in SEARCH_ATTRIBUTES if name not in listed.custom_attributes]
    mistyped = [name for name in SEARCH_ATTRIBUTES if listed.custom_attributes.get(name, keyword) != keyword]
    if mistyped:
        advice = "A type cannot be changed: use another namespace and create them there as Keyword."
        return wrong("search attributes", f"not of type Keyword: {', '.join(mistyped)}", advice)
    if missing:
        names = " ".join(f"--name {name} --type Keyword" for name in missing)
        advice = f"Create them: temporal operator search-attribute create --namespace {namespace} {names}"
        return wrong("search attributes", f"missing: {', '.join(missing)}", advice)
    return ok("search attributes", f"all {len(SEARCH_ATTRIBUTES)} exist with type Keyword")


async def _workers(connection: Connection) -> Finding:
    queue = connection.task_queue
    pollers: dict[str, int] = {}
    kinds = {
        "workflows": TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        "activities": TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
    }
    for kind, queue_type in kinds.items():
        pollers[kind] = len(await pollers_of(connection.client, queue, queue_type, within=RPC_TIMEOUT))
    idle = [kind for kind, count in pollers.items() if not count]
    if idle:
        return wrong(
            "worker",
            f"nothing polls task queue {queue!r} for {' and '.join(idle)}",
            "Start one with `python worker.py`, with the same server, namespace and COMFYUI_TEMPORAL_TASK_QUEUE.",
        )
    return ok("worker", f"{max(pollers.values())} polling task queue {queue!r}")


async def _reconciler(connection: Connection) -> Finding:
    queue = connection.task_queue
    try:
        standing = await standing_reconciler(connection.client, queue)
    except RPCError as error:
        return note("reconciler", f"its schedule cannot be read: {error.message}")
    if standing is None:
        return note(
            "reconciler",
            f"there is no schedule {reconcile_id_of(queue)!r}: what a terminated run left behind is not given back",
            "A worker creates it at its start, if it may: start one, or let it create schedules in this namespace.",
        )
    every = standing.schedule.spec.intervals[0].every if standing.schedule.spec.intervals else None
    if standing.schedule.state.paused:
        return note("reconciler", "its schedule is paused", f"temporal schedule toggle --unpause -s {standing.id}")
    last = await last_pass(connection.client, standing)
    if last is not None and last.not_started:
        return note(
            "reconciler",
            f"its last pass could not start {last.not_started} give-backs; the next one tries again",
            f"See the runs of {standing.id!r} in the Temporal UI, and the worker's log.",
        )
    return ok("reconciler", f"checks every {every} for tasks whose run has ended")
