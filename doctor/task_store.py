"""Checks the task store, if its address is known: its namespace, and tasks that could not be checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from temporalio.service import RPCError

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.settings import read_settings
from doctor.finding import Finding, note, ok, wrong
from runtime.reconciler_schedule import last_pass, standing_reconciler
from runtime.settings import Settings
from store import StoreFailure, TablesTooOld, TaskStore, UnseenTaskRow
from store.namespace_check import home_of

SHOWN: Final = 5


@asynccontextmanager
async def _opened(dsn: str) -> AsyncIterator[TaskStore]:
    store = TaskStore(dsn, pool_size=1)
    try:
        yield store
    finally:
        await store.close()


def _dsn(connection: Connection, settings: Settings) -> str | None:
    if settings.database_dsn is not None:
        return settings.database_dsn.get_secret_value()
    return connection.server.stack.database_dsn if connection.server.stack else None


async def refuse_strange_store(connection: Connection) -> None:
    """Raises BadInput if the configured task store belongs to another namespace than the task would run in.

    A task can be started without a store, so an unset or unavailable one is no reason to refuse.
    """
    dsn = _dsn(connection, read_settings(Settings))
    if not dsn:
        return
    try:
        async with _opened(dsn) as store:
            home, ours = await store.home(), await home_of(connection.client)
            address = store.address
    except (StoreFailure, RPCError, ValueError):
        return
    if home is not None and not home.is_same(ours):
        raise BadInput(
            f"The task store at {address} belongs to Temporal namespace {home}, and the task would run in {ours}: "
            "nothing was started. Correct COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE or COMFYUI_TEMPORAL_DATABASE_DSN."
        )


async def check_store(connection: Connection, settings: Settings) -> list[Finding]:
    """Findings about the task store; none if its address is not known here. Raises RPCError."""
    dsn = _dsn(connection, settings)
    if not dsn:
        return []
    try:
        async with _opened(dsn) as store:
            await store.check_tables()
            home, ours = await store.home(), await home_of(connection.client)
            unseen = await store.unseen_tasks()
            address = store.address
    except TablesTooOld as failure:
        return [wrong("task store", str(failure), "Workers and gateways of this version do not start on it.")]
    except (StoreFailure, ValueError) as failure:
        return [
            wrong("task store", str(failure), "Workers and gateway need it: correct COMFYUI_TEMPORAL_DATABASE_DSN.")
        ]
    if home is None:
        return [note("task store", f"{address} belongs to no namespace yet: the first worker binds it to its own")]
    if not home.is_same(ours):
        advice = f"Correct namespace or database, or bind it again: python -m store bind --namespace {ours.namespace}"
        return [wrong("task store", f"{address} belongs to Temporal namespace {home}, not to {ours}", advice)]
    return [ok("task store", f"{address} belongs to namespace {home.namespace!r}"), await _unseen(connection, unseen)]


async def _unseen(connection: Connection, unseen: list[UnseenTaskRow]) -> Finding:
    if not unseen:
        if not await _has_looked(connection):
            return note("open tasks", "no pass of the reconciler is known that has looked at them")
        return ok("open tasks", "the reconciler can check each of them")
    shown = [
        f"{task.task_id} (since {task.first_at:%Y-%m-%d %H:%M}, {task.times} times): {task.reason}" for task in unseen
    ]
    more = [f"and {len(unseen) - SHOWN} more: table unseen_tasks"] if len(unseen) > SHOWN else []
    return note(
        "open tasks",
        f"the reconciler cannot check {len(unseen)} of them: if such a run is over, nothing of it is given back yet",
        "\n      ".join(shown[:SHOWN] + more),
    )


async def _has_looked(connection: Connection) -> bool:
    try:
        standing = await standing_reconciler(connection.client, connection.task_queue)
        return standing is not None and await last_pass(connection.client, standing) is not None
    except RPCError:
        return False
