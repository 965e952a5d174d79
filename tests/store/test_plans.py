"""Every statement of the gateway is served by an index: PostgreSQL's own plans, in a store that is not small."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from sqlalchemy import event

from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.tenant_limits import TenantLimits
from comfyui_temporal.contracts.uploads import FileKind
from proof.benchmarks.store_reads import fill, reads_of
from store import TaskStore
from store.uploads import Finished, Received
from tests.conftest import NewDatabase
from tests.store.facts import claim_of, fact, new_task_id, write_of

SMALL = "unseen_tasks"
"""It has a row only for each open task that the reconciler could not look at."""
Filled = tuple[TaskStore, "asyncpg.Connection[Any]"]


@pytest_asyncio.fixture(scope="module")
async def filled(new_database: NewDatabase) -> AsyncIterator[Filled]:
    """A store of 20,000 tasks and 80,000 events, 10,000 counted starts, and a separate connection to read plans."""
    dsn = await new_database()
    await fill(dsn, 1, 20_000, events_each=4)
    store, connection = TaskStore(dsn), await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO tenant_starts SELECT 'tenant-' || n % 100, 'start-' || n, now(), 1 "
        "FROM generate_series(1, 10000) n"
    )
    await connection.execute(
        "INSERT INTO tenant_streams SELECT 'tenant-' || n, 'process-' || p, 1 "
        "FROM generate_series(1, 1000) n, generate_series(1, 4) p"
    )
    await connection.execute(
        "INSERT INTO uploads SELECT 'upload-' || n, 'tenant-' || n % 100, 'user', NULL, 'image', 'x', 9, 9, '{}', "
        "'', '', now() - n * interval '1 second', now() + interval '1 day' - n * interval '1 minute', now() "
        "FROM generate_series(1, 10000) n"
    )
    await connection.execute("ANALYZE")
    yield store, connection
    await connection.close()
    await store.close()


@contextmanager
def statements_of(store: TaskStore) -> Iterator[list[tuple[str, Any]]]:
    """What is sent to PostgreSQL inside."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters[0] if isinstance(parameters, list) else parameters))

    engine = store._database._engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


async def steps_of(connection: asyncpg.Connection[Any], statement: str, parameters: Any) -> list[dict[str, Any]]:
    """The steps of PostgreSQL's plan."""
    explained = await connection.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *parameters)
    steps: list[dict[str, Any]] = []

    def walk(step: dict[str, Any]) -> None:
        steps.append(step)
        for inner in step.get("Plans", []):
            walk(inner)

    walk(json.loads(explained)[0]["Plan"])
    return steps


async def check_served(filled: Filled, work: Callable[[TaskStore], Awaitable[object]]) -> None:
    store, connection = filled
    with statements_of(store) as sent:
        await work(store)
    assert sent
    for statement, parameters in sent:
        for step in await steps_of(connection, statement, parameters):
            step_and_statement = f"{step['Node Type']} on {step.get('Relation Name')}: {statement}"
            assert step["Node Type"] != "Seq Scan" or step["Relation Name"] == SMALL, step_and_statement
            assert not (step["Node Type"] == "Sort" and "ORDER BY tasks.created_at" in statement), step_and_statement


READS = reads_of(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", READS)
async def test_no_read_walks_through_a_table(filled: Filled, name: str) -> None:
    await check_served(filled, lambda store: reads_of(store)[name](7))


@pytest.mark.parametrize(
    "filters",
    [{}, {"status": TaskStatus.COMPLETED}, {"scene": Scene.MODEL_TRAIN}],
    ids=["all", "by status", "by scene"],
)
async def test_a_page_begins_at_its_cursor(filled: Filled, filters: dict[str, Any]) -> None:
    page = await filled[0].tasks(tenant_id="tenant-7", limit=5, **filters)
    await check_served(filled, lambda store: store.tasks(tenant_id="tenant-7", cursor=page.cursor, limit=5, **filters))


async def test_the_queues_and_the_purge_read_only_the_rows_they_report(filled: Filled) -> None:
    await check_served(filled, lambda store: store.queue_states())
    await check_served(filled, lambda store: store.figures())
    await check_served(filled, lambda store: store.open_tasks(quiet_for=timedelta(minutes=1), limit=5))
    await check_served(filled, lambda store: store.ended_before(datetime.now(UTC) - timedelta(days=1)))
    await check_served(filled, lambda store: store.ended_of("tenant-7"))
    await check_served(filled, lambda store: store.undeletable("tenant-7"))
    await check_served(filled, lambda store: store.forget_claims("tenant-7"))
    ended = await filled[0].ended_before(datetime.now(UTC) - timedelta(days=1))
    await check_served(filled, lambda store: store.delete_tasks([task.task_id for task in ended]))


async def test_claims_and_writes_find_their_task(filled: Filled) -> None:
    task_id = new_task_id()
    await check_served(filled, lambda store: store.claim(claim_of(task_id)))
    await check_served(filled, lambda store: store.write(write_of(task_id, fact("a"))))


async def test_starts_and_streams_read_only_what_their_tenant_has(filled: Filled) -> None:
    limits = TenantLimits(starts_per_minute=1_000, bytes_per_minute=1_000_000, open_tasks=1_000, open_streams=1_000)
    await check_served(
        filled, lambda store: store.admit_start(tenant_id="tenant-7", task_id=new_task_id(), size=10, limits=limits)
    )
    await check_served(
        filled, lambda store: store.admit_stream(tenant_id="tenant-7", process_id="here", own_open=0, limits=limits)
    )


async def test_uploads_are_found_by_id_tenant_and_age(filled: Filled) -> None:
    limits = TenantLimits(open_uploads=1_000, upload_bytes=1_000_000_000)
    known = (await filled[0].uploads.some("tenant-7", ["upload-7", "upload-8"]))["upload-7"]
    part = Received(at_byte=9, size_bytes=1, name="x")
    new = known.model_copy(update={"upload_id": new_task_id()})
    whole = Finished(size_bytes=9, sha256="", kind=FileKind.IMAGE, content_type="image/png")
    await check_served(filled, lambda store: store.uploads.admit(new, limits))
    await check_served(filled, lambda store: store.uploads.one("upload-7"))
    await check_served(filled, lambda store: store.uploads.some("tenant-7", ["upload-7", "upload-8"]))
    await check_served(filled, lambda store: store.uploads.extend("upload-7", part))
    await check_served(filled, lambda store: store.uploads.finish("upload-7", whole))
    await check_served(filled, lambda store: store.uploads.expired(datetime.now(UTC) - timedelta(days=1)))
    await check_served(filled, lambda store: store.uploads.of_tenant("tenant-7"))
    await check_served(filled, lambda store: store.uploads.oldest())
    before = datetime.now(UTC) - timedelta(days=1)
    await check_served(filled, lambda store: store.uploads.forget_expired("upload-7", before))
    await check_served(filled, lambda store: store.uploads.forget(["upload-7"]))
