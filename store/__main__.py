"""`python -m store`: the tables of the configured database.

Migrate them, bind them to a Temporal namespace, purge what is older than the retention, forget a tenant, close an
unknown settlement.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Final

import typer
from pydantic import TypeAdapter, ValidationError
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.service import RPCError

from comfyui_temporal.contracts.errors import sentences_of
from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.process_end import run_and_end
from runtime import temporal_connection
from runtime.settings import Settings
from store.by_hand import Found
from store.database import address_of
from store.failures import StoreFailure, StoreUnavailable
from store.home import StoreHome
from store.migrate import migrate, revert
from store.task_files import FETCHED_MODELS, MODELS, RESULTS, TaskFiles
from store.task_store import TaskStore
from store.upkeep import EndedTask, Undeletable
from store.uploads import CLOCKS_DIFFER, LONG_AGO

RPC_TIMEOUT: Final = timedelta(seconds=5)
CANNOT_START: Final = 2
UPLOAD_GRACE: Final = timedelta(days=1)
"""For tasks that were started while every worker was away: they have no row yet. What a task with a row may name stays
as long as it is open (store/uploads.py)."""
LEFTOVER_AGE: Final = timedelta(days=1)
"""What a writer of today may still be writing is younger."""
FETCHED_MODEL_DAYS: Final = 30
"""A model that was fetched is used for jobs that begin within the same week (bridge/lora_files.py)."""

app = typer.Typer(add_completion=False, no_args_is_help=True, help="The task store's tables.")


def _settings() -> tuple[Settings, str]:
    """The settings and the database's DSN."""
    try:
        settings = Settings()
    except ValidationError as error:
        raise _refused(f"A setting is invalid: {'; '.join(sentences_of(error))}.") from None
    if settings.database_dsn is None:
        raise _refused(
            "No database is set: set COMFYUI_TEMPORAL_DATABASE_DSN=postgresql://user:password@host:port/database."
        )
    return settings, settings.database_dsn.get_secret_value()


def _refused(sentence: str, code: int = CANNOT_START) -> typer.Exit:
    """One sentence, without the usage that typer puts around an error of its own."""
    typer.echo(sentence, err=True)
    return typer.Exit(code)


@app.command("migrate")
def migrate_command(revision: Annotated[str, typer.Argument(help="The revision to migrate to.")] = "head") -> None:
    """Migrate the tables forward. Safe to repeat."""
    _run(_settings()[1], revision, forwards=True)


@app.command("revert")
def revert_command(revision: Annotated[str, typer.Argument(help="The revision to go back to, e.g. base.")]) -> None:
    """Migrate the tables back. Their data is lost."""
    _run(_settings()[1], revision, forwards=False)


@app.command("bind")
def bind_command(
    namespace: Annotated[str, typer.Option(help="The Temporal namespace that the tasks run in.")],
) -> None:
    """Bind the store to a Temporal namespace, even if it belonged to another one.

    Use it only if the store's tasks really run there, for example after a move: the reconciler gives back every open
    task that the namespace does not know. Stop workers and gateways of the other namespace first.
    """
    dsn = _settings()[1]
    try:
        before = asyncio.run(_bind(dsn, namespace))
    except (StoreFailure, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    was = f"it belonged to {before}" if before else "it was not bound before"
    typer.echo(f"The task store at {address_of(dsn)} now belongs to Temporal namespace {namespace!r}; {was}.")


async def _bind(dsn: str, namespace: str) -> StoreHome | None:
    """The previous binding. The first process that starts in the namespace adds the namespace's id."""
    store = TaskStore(dsn, pool_size=1)
    try:
        before = await store.home()
        await store.rebind(StoreHome(namespace=namespace))
        return before
    finally:
        await store.close()


@app.command("purge")
def purge_command() -> None:
    """Delete tasks that ended longer ago than RETENTION_DAYS, with events, logs and results. Safe to repeat.

    Results, models and checkpoints that are older than RESULT_RETENTION_DAYS and MODEL_RETENTION_DAYS are deleted too.
    So are uploads a day after they expired, unless an open task may name them, what killed processes have left on
    disks, and records of the audit log, by AUDIT_RETENTION_DAYS. The claims of ids are kept: no id is ever used twice.
    """
    _finish(_purge(*_settings()))


@app.command("forget")
def forget_command(tenant_id: Annotated[str, typer.Argument(help="The tenant, as its tokens name it.")]) -> None:
    """Delete everything of a tenant: rows, events, logs, uploads, datasets' copies, results and models.

    Safe to repeat.

    Refused while a task of it is open. Prints what Temporal still holds, and for how long. The ids of its tasks stay
    taken, without the tenant's name. Withdraw its tokens first: a task that it starts meanwhile is not deleted.
    """
    try:
        TypeAdapter(CallerId).validate_python(tenant_id)
    except ValidationError:
        raise typer.BadParameter("A tenant's id has 1 to 64 letters, digits, '-' or '_'.") from None
    _finish(_forget(*_settings(), tenant_id))


@app.command("settle")
def settle_command(
    task_id: Annotated[str, typer.Argument(help="The task.")],
    charged: Annotated[int, typer.Option(help="The points that the ledger shows as charged for the task.")],
    returned: Annotated[int, typer.Option(help="The points that it shows as returned.")],
    by: Annotated[str, typer.Option(help="Who read the ledger.")],
    reason: Annotated[str, typer.Option(help="What the ledger shows, and why nobody but a person can tell.")],
) -> None:
    """Close an unknown settlement by hand, after a look at the ledger. Safe to repeat.

    Refused while the task is open, and where its settlement is known. Moves no points: it records in the task's row
    what became of them, who says so and why. The task's events and its run's result stay as they are.
    """
    try:
        found = Found(task_id=task_id, charged=charged, returned=returned, by=by, reason=reason)
    except ValidationError as error:
        raise _refused(f"An option is invalid: {'; '.join(sentences_of(error))}.") from None
    _finish(_settle(_settings()[1], found))


async def _settle(dsn: str, found: Found) -> None:
    store = TaskStore(dsn, pool_size=1)
    try:
        await store.check_tables()
        is_new = await store.settle_by_hand(found)
    finally:
        await store.close()
    typer.echo(
        f"Task {found.task_id}: {found.charged} points charged, {found.returned} returned, settled"
        f"{f' by {found.by}' if is_new else ' before, with these figures; nothing was changed'}."
    )


def _finish(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except (StoreFailure, CannotForget, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


class CannotForget(Exception):
    """Why a tenant is not forgotten yet. The text says what to do."""


@asynccontextmanager
async def _opened(settings: Settings, dsn: str) -> AsyncIterator[tuple[TaskStore, TaskFiles]]:
    """Raises ValueError, StoreFailure."""
    files = TaskFiles(
        bridge_store_url=settings.bridge_store_url,
        object_store_url=settings.object_store_url,
        uploads_url=settings.uploads_url,
    )
    store = TaskStore(dsn, pool_size=1)
    try:
        await store.check_tables()
        yield store, files
    finally:
        await store.close()


async def _purge(settings: Settings, dsn: str) -> None:
    now = datetime.now(UTC)
    before = now - timedelta(days=settings.retention_days)
    async with _opened(settings, dsn) as (store, files):
        tasks, deleted = await _deleted(store, files, partial(store.ended_before, before))
        for days, folders in (
            (settings.result_retention_days, RESULTS),
            (settings.model_retention_days, MODELS),
            (FETCHED_MODEL_DAYS, FETCHED_MODELS),
        ):
            if days is not None:
                deleted += await files.delete_older(folders, now - timedelta(days=days))
        deleted += await files.delete_leftovers(now - LEFTOVER_AGE)
        uploads, of_uploads = await _deleted_expired(store, files, now - UPLOAD_GRACE)
        oldest = await store.uploads.oldest()
        # An upload's row is older than its files.
        of_uploads += await files.delete_uploads_older(now - UPLOAD_GRACE if oldest is None else oldest - CLOCKS_DIFFER)
        audited = now - timedelta(days=settings.audit_retention_days)
        records = 0
        while some := await store.delete_audit_before(audited):
            records += some
    typer.echo(f"{tasks} tasks that ended before {before:%Y-%m-%d %H:%M} UTC were deleted, and {deleted} files.")
    typer.echo(f"{uploads} uploads that had expired were deleted, and {of_uploads} files of uploads.")
    typer.echo(f"{records} records of the audit log were deleted.")


async def _forget(settings: Settings, dsn: str, tenant_id: str) -> None:
    async with _opened(settings, dsn) as (store, files):
        _refuse_open(tenant_id, await store.undeletable(tenant_id))
        tasks, deleted = await _deleted(store, files, partial(store.ended_of, tenant_id))
        deleted += await files.delete_models_of(tenant_id)
        deleted += await _deleted_uploads(store, files, tenant_id)
        deleted += await files.delete_uploads_of(tenant_id)
        while not await store.forget_claims(tenant_id):
            pass
        started = await store.undeletable(tenant_id)
    typer.echo(f"Tenant {tenant_id}: {tasks} tasks and {deleted} files were deleted. Their ids stay taken, without it.")
    typer.echo(await _left_in_temporal(settings, tenant_id))
    _refuse_open(tenant_id, started)


async def _deleted(
    store: TaskStore, files: TaskFiles, some: Callable[[], Awaitable[list[EndedTask]]]
) -> tuple[int, int]:
    """Deletes tasks, `some` at a time, until none is left: files first, because only the rows name them.

    In many short transactions, so that other processes do not wait for it.
    """
    tasks = deleted = 0
    while ended := await some():
        deleted += await files.delete_of(ended)
        ids = [task.task_id for task in ended]
        while not await store.delete_tasks(ids):
            pass
        tasks += len(ids)
    return tasks, deleted


async def _deleted_uploads(store: TaskStore, files: TaskFiles, tenant_id: str) -> int:
    """Deletes the uploads of a tenant, files first. Returns how many files."""
    deleted = 0
    while found := await store.uploads.of_tenant(tenant_id):
        deleted += await files.delete_uploads(found)
        await store.uploads.forget([each.upload_id for each in found])
    return deleted


async def _deleted_expired(store: TaskStore, files: TaskFiles, before: datetime) -> tuple[int, int]:
    """Deletes uploads that expired, each row before its files. Returns how many, and how many files.

    A repeat of an order may have kept an upload longer since it was found. Files without a row are found by their age.
    """
    uploads = deleted = 0
    since = LONG_AGO
    while found := await store.uploads.expired(before, since=since):
        since = found[-1].expires_at
        for each in found:
            if await store.uploads.forget_expired(each.upload_id, before):
                deleted += await files.delete_uploads([each])
                uploads += 1
    return uploads, deleted


def _refuse_open(tenant_id: str, found: Undeletable) -> None:
    if found.open:
        raise CannotForget(
            f"Tenant {tenant_id} has {found.open} open tasks, which were not deleted ({', '.join(found.open_ids)}"
            f"{', …' if found.open > len(found.open_ids) else ''}). End them first, so that job and credits are given "
            "back: `comfyui-tasks cancel TASK_ID`, or POST /api/v1/tasks/TASK_ID/cancel. Then repeat the command."
        )
    if found.unsettled:
        raise CannotForget(
            f"Tenant {tenant_id} has {found.unsettled} ended tasks of which it is unknown whether they were charged, "
            "which were not deleted. Their ledger is read hourly for a day after their end: repeat the command then."
        )


async def _left_in_temporal(settings: Settings, tenant_id: str) -> str:
    query = f'TenantId = "{tenant_id}"'
    try:
        client = await temporal_connection.connect(settings)
        runs = (await client.count_workflows(query, rpc_timeout=RPC_TIMEOUT)).count
        described = await client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=client.namespace), timeout=RPC_TIMEOUT
        )
    except (RPCError, RuntimeError):
        raise CannotForget(
            "Temporal could not be asked what it still holds: check COMFYUI_TEMPORAL_TEMPORAL_ADDRESS and repeat the "
            "command."
        ) from None
    if not runs:
        return f"Temporal's namespace {client.namespace!r} holds no run of the tenant."
    kept = described.config.workflow_execution_retention_ttl.ToTimedelta()
    return (
        f"Temporal's namespace {client.namespace!r} still holds {runs} runs of the tenant, with their inputs and "
        f"results: each for {kept / timedelta(days=1):g} days after its end, so until "
        f"{datetime.now(UTC) + kept:%Y-%m-%d %H:%M} UTC at the latest. To delete them now: "
        f"temporal workflow delete --namespace {client.namespace} --query '{query}'"
    )


def _run(dsn: str, revision: str, *, forwards: bool) -> None:
    try:
        asyncio.run(migrate(dsn, revision=revision) if forwards else revert(dsn, revision=revision))
    except (StoreUnavailable, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"The tables at {address_of(dsn)} are at revision {revision}.")


if __name__ == "__main__":
    run_and_end(app)
