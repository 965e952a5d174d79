"""The audit log: who acted or was refused, by which token; nothing of it can be changed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from comfyui_temporal.contracts.permissions import Operation, Scope
from gateway.tokens import StreamTokens
from runtime.caller_tokens import Caller
from store import AuditRecord, TaskStore
from tests.conftest import NewDatabase, unique
from tests.gateway.conftest import Api
from tests.gateway.serving import TOKEN_SECRET, bearer, token_for
from tests.waiting import until

IMAGE = {"template_id": "text-to-image", "prompt": "a lighthouse at dusk"}


async def records_of(dsn: str, tenant_id: str, count: int) -> list[dict[str, Any]]:
    """A tenant's records, once there are `count`: they are written after the answer."""
    connection = await asyncpg.connect(dsn)

    async def read() -> list[dict[str, Any]]:
        rows = await connection.fetch("SELECT * FROM audit_log WHERE tenant_id = $1 ORDER BY at", tenant_id)
        return [dict(row) for row in rows] if len(rows) >= count else []

    try:
        found: list[dict[str, Any]] = await until(read)
        return found
    finally:
        await connection.close()


async def test_who_starts_cancels_confirms_and_rolls_back_is_recorded_with_the_answer(
    api: Api, postgres_dsn: str
) -> None:
    tenant, task_id = unique("tenant"), unique("image")
    token = token_for(tenant, "ada", jti="token-7")
    order = {**IMAGE, "task_id": task_id}
    for path, body in (
        ("/images", order),
        ("/images", order),
        ("/images", {**order, "prompt": "a dog"}),
        (f"/{task_id}/confirm-price", {"max_credits": 5}),
        (f"/{task_id}/cancel", None),
        (f"/{task_id}/rollback", {"reason": "a mistake"}),
        (f"/{unique('unknown')}/cancel", None),
    ):
        await api.call("POST", path, body, token=token)
    await api.call("GET", f"/{task_id}", token=token)

    records = await records_of(postgres_dsn, tenant, 7)

    assert [(record["operation"], record["status"], record["code"]) for record in records[:5]] == [
        ("start_image_task", 202, None),
        ("start_image_task", 200, None),
        ("start_image_task", 409, "task_exists"),
        ("confirm_price", 422, "input_invalid"),
        ("cancel_task", 200, None),
    ]
    assert [record["operation"] for record in records[5:]] == ["roll_back", "cancel_task"]
    assert records[6]["code"] == "task_unknown"
    assert {(record["user_id"], record["token_id"]) for record in records} == {("ada", "token-7")}
    assert [record["task_id"] for record in records[:6]] == [task_id, task_id, None, task_id, task_id, task_id]


async def test_a_refused_caller_is_recorded_by_a_hash_that_is_no_part_of_the_token(api: Api, postgres_dsn: str) -> None:
    tenant = unique("tenant")
    token = token_for(tenant, "eve", scopes=[Scope.TASK_CANCEL])
    caller = Caller(tenant_id=tenant, user_id="eve", scopes=[], expires_at=time.time() + 60, token_id="first")
    stream_token = StreamTokens(TOKEN_SECRET).made_for(caller)
    url = str(api.http.base_url).replace("http", "ws", 1)
    with capture_logs() as lines:
        assert (await api.call("POST", "/images", IMAGE, token=token)).status_code == 403
        assert (await api.call("GET", "", token=token)).status_code == 403
        with pytest.raises(InvalidStatus):
            await connect(f"{url}/api/v1/tasks/stream/ws?task_id=x&token={stream_token}")
        assert (await api.call("GET", "", token=stream_token)).status_code == 403
        records = await records_of(postgres_dsn, tenant, 4)
        assert (await api.call("POST", "/images", IMAGE, token="nonsense")).status_code == 401

    assert {(record["status"], record["code"]) for record in records} == {(403, "not_authorized")}
    assert [record["operation"] for record in records] == ["start_image_task", *["read_task"] * 3]
    hashed = hashlib.sha256(token.rpartition(".")[0].encode()).hexdigest()[:16]
    assert [record["token_id"] for record in records] == [hashed, hashed, "first", "first"]
    logged = [line for line in lines if line["event"] == "audit"]
    assert [(line["tenant_id"], line["status"]) for line in logged] == [*[(tenant, 403)] * 4, (None, 401)]
    assert token not in str(lines) and stream_token not in str(lines)


async def test_records_are_in_the_order_of_their_answers_although_a_later_one_is_stored_first(
    api: Api, task_store: TaskStore, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, second_is_stored = task_store.append_audit, asyncio.Event()

    async def slowly_first(record: AuditRecord) -> None:
        if record.status == 202:
            await second_is_stored.wait()
        await append(record)
        second_is_stored.set()

    monkeypatch.setattr(task_store, "append_audit", slowly_first)
    tenant = unique("tenant")
    for _ in range(2):
        await api.call("POST", "/images", {**IMAGE, "task_id": f"image-{tenant}"}, token=token_for(tenant))
    assert [record["status"] for record in await records_of(postgres_dsn, tenant, 2)] == [202, 200]


async def test_an_action_counts_although_its_record_cannot_be_stored(
    api: Api, task_store: TaskStore, monkeypatch: pytest.MonkeyPatch, new_database: NewDatabase
) -> None:
    away = TaskStore("postgresql://nobody@127.0.0.1:1/none")
    monkeypatch.setattr(task_store, "append_audit", away.append_audit)
    tenant = unique("tenant")
    with capture_logs() as lines:
        answer = await api.http.post("/api/v1/tasks/images", json=IMAGE, headers=bearer(token_for(tenant)))

        async def is_logged() -> bool:
            return any(line["event"] == "audit_not_stored" and line["tenant_id"] == tenant for line in lines)

        await until(is_logged)
    assert answer.status_code == 202
    await away.close()


async def test_the_log_is_append_only_and_only_its_retention_deletes(new_database: NewDatabase) -> None:
    dsn = await new_database()
    store, connection = TaskStore(dsn), await asyncpg.connect(dsn)
    now = datetime.now(UTC)
    record = AuditRecord(at=now, operation=Operation.CANCEL_TASK, status=200, tenant_id="t", user_id="u", token_id="j")
    await store.append_audit(record)
    await connection.execute(
        "INSERT INTO audit_log (at, operation, status, tenant_id, user_id, token_id) "
        "VALUES (now() - interval '40 days', 'cancel_task', 200, 'old', 'u', 'j')"
    )
    for statement in (
        "UPDATE audit_log SET user_id = 'somebody'",
        "DELETE FROM audit_log WHERE tenant_id = 't'",
        "TRUNCATE audit_log",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await connection.execute(statement)
    month = datetime.now(UTC) - timedelta(days=30)
    assert [await store.delete_audit_before(month) for _ in range(2)] == [1, 0]
    assert await connection.fetchval("SELECT string_agg(tenant_id, ',') FROM audit_log") == "t"
    await connection.close()
    await store.close()
