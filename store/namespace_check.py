"""A task store belongs to one Temporal namespace. In any other, its tasks would look vanished and be given back.

Every process that acts on both checks this first. The first process that starts on an unbound store binds it, unless
its open tasks run somewhere else. `python -m store bind` binds it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import structlog
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.runs import describe_run
from runtime.required_settings import CannotStart, namespace_missing
from store import StoreFailure, StoreHome, TablesTooOld, TaskStore

FIRST_LOOK_SECONDS: Final = 2.0
"""A start waits this long for the answer. If store or Temporal is away, it continues and repeats the check."""
AGAIN_SECONDS: Final = 1.0
RPC_TIMEOUT: Final = timedelta(seconds=3)
OPEN_TASKS_LOOKED_AT: Final = 20

log = structlog.get_logger("store")


async def home_of(client: Client) -> StoreHome:
    """The client's namespace, with its id if we may read it. Raises RPCError, and CannotStart if there is none."""
    try:
        described = await client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=client.namespace), timeout=RPC_TIMEOUT
        )
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise namespace_missing(client.namespace, client.service_client.config.target_host) from None
        if error.status not in (RPCStatusCode.UNIMPLEMENTED, RPCStatusCode.PERMISSION_DENIED):
            raise
        return StoreHome(namespace=client.namespace)
    return StoreHome(namespace=client.namespace, namespace_id=described.namespace_info.id or None)


async def check_home(client: Client, store: TaskStore) -> None:
    """Return if the store belongs to the client's namespace, and bind an unbound one.

    Raises CannotStart if it belongs to another, if its tables are older than this code, or if there is no such
    namespace; StoreFailure or RPCError if this cannot be decided now.
    """
    try:
        await store.check_tables()
    except TablesTooOld as error:
        raise CannotStart(str(error)) from None
    ours = await home_of(client)
    home = await store.home()
    if home is None:
        if not await _knows_open_tasks(client, store):
            raise CannotStart(
                f"The task store at {store.address} has open tasks, and Temporal namespace {ours} knows none of them: "
                f"they would be given back as vanished. Correct COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE or "
                f"COMFYUI_TEMPORAL_DATABASE_DSN, or confirm it: {_bind(ours)}"
            )
        log.info("store_bound", database=store.address, namespace=ours.namespace)
    if home is None or home.namespace_id is None:
        home = await store.bind(ours)
    if not home.is_same(ours):
        raise CannotStart(
            f"The task store at {store.address} belongs to Temporal namespace {home}, and this process runs in {ours}: "
            "its tasks would be given back as vanished. Correct COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE or "
            f"COMFYUI_TEMPORAL_DATABASE_DSN, or bind the store again: {_bind(ours)}"
        )


def _bind(ours: StoreHome) -> str:
    return f"python -m store bind --namespace {ours.namespace}"


async def _knows_open_tasks(client: Client, store: TaskStore) -> bool:
    """Whether one of the store's oldest open tasks runs in the client's namespace, or it has no open task."""
    page = await store.open_tasks(quiet_for=timedelta(0), limit=OPEN_TASKS_LOOKED_AT)
    for row in page.tasks:
        try:
            await describe_run(client, row.workflow_id, row.first_execution_run_id, rpc_timeout=RPC_TIMEOUT)
        except RPCError as error:
            if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
                raise
        else:
            return True
    return not page.tasks


async def until_bound(client: Client, dsn: str) -> None:
    """Repeat the check until store and Temporal answer. Raises CannotStart as `check_home`, and for an invalid DSN."""
    try:
        store = TaskStore(dsn, pool_size=1)
    except ValueError as error:
        raise CannotStart(str(error)) from None
    try:
        while True:
            try:
                return await check_home(client, store)
            except (StoreFailure, RPCError, RuntimeError) as error:
                log.warning("namespace_of_store_unknown", database=store.address, reason=str(error)[:300])
            await asyncio.sleep(AGAIN_SECONDS)
    finally:
        await store.close()


async def _nothing() -> None:
    return


@asynccontextmanager
async def bound_store(
    client: Client,
    dsn: str,
    *,
    refused: Callable[[], object],
    then: Callable[[], Awaitable[None]] = _nothing,
) -> AsyncIterator[None]:
    """Inside, the store belongs to the client's namespace, or the check could not decide yet and continues.

    `then` runs once it is decided. `refused` is called if the store turns out to belong to another namespace after work
    has begun inside. Raises CannotStart, at the start or at the end.
    """

    async def look() -> None:
        await until_bound(client, dsn)
        await then()

    looking = asyncio.create_task(look())
    await asyncio.wait({looking}, timeout=FIRST_LOOK_SECONDS)
    if looking.done():
        looking.result()
    looking.add_done_callback(lambda task: None if task.cancelled() or task.exception() is None else refused())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait({looking})
    if not looking.cancelled():
        looking.result()
