"""The callback route (contract §2): each answer, and what a callback leaves behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import TaskStatus
from gateway.callback_body import MAX_BYTES_WITH_LOG
from gateway.callbacks import CallbackOutcome
from proof.site.callbacks import signed_headers
from runtime.settings import Settings
from store import TaskStore
from tests.conftest import unique
from tests.gateway.conftest import NewRun
from tests.gateway.serving import (
    Gateway,
    answer_to_head,
    delivery,
    kept_by,
    new_secret,
    served,
    tick,
    training_tick,
)
from tests.store.facts import claim_of, end, write_of


def task_id_of(name: str) -> str:
    return unique(name)


async def test_a_signed_callback_reaches_the_run(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("signed")
    run = await new_run(task_id)

    answer = await gateway.post(task_id, delivery(7, unknown_field={"x": 1}, stage_progress=140))

    assert (answer.status_code, answer.json()) == (202, {"outcome": "signalled"})
    [kept] = await kept_by(run)
    assert kept == {
        "task_id": task_id,
        "job_id": "job-1",
        "job_status": "delivery",
        "stage_progress": 100.0,
        "result_urls": ["https://images.example/1.png"],
        "actual_cost": 24,
        "sequence": 7,
    }


async def test_a_servers_secret_is_withdrawn_without_the_others(
    temporal_env: WorkflowEnvironment, task_store: TaskStore
) -> None:
    first, second = new_secret(), new_secret()

    async def statuses(*secrets: str) -> tuple[list[int], str]:
        async with served(temporal_env.client, task_store, *secrets) as gateway:
            answers = [await gateway.post(unique("unknown"), tick(1), secret=secret) for secret in (first, second)]
            return [answer.status_code for answer in answers], (await gateway.http.get("/metrics")).text

    # 404: the signature is good, the task is unknown.
    found, metrics = await statuses(f"gpu-1:{first}", f"gpu-2:{second}")
    assert found == [404, 404]
    assert 'gateway_callbacks_signed_total{secret="gpu-1"} 1.0' in metrics and 'secret="gpu-2"} 1.0' in metrics
    assert (await statuses(f"gpu-2:{second}"))[0] == [401, 404]
    with pytest.raises(ValueError, match="named gpu-1"):
        await statuses(f"gpu-1:{first}", f"gpu-1:{second}")
    signing = Settings(_env_file=None, callback_secrets=f"gpu-1:{first},{second}").signing_secret
    assert signing == first


def _headers(raw: bytes, **changes: str | None) -> dict[str, str]:
    headers = signed_headers(raw, SECRET_OF_NOBODY)
    headers.update({name.replace("_", "-"): value for name, value in changes.items() if value is not None})
    return {name: value for name, value in headers.items() if changes.get(name.replace("-", "_"), "") is not None}


SECRET_OF_NOBODY = new_secret()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="another secret"),
        pytest.param({"webhook_signature": None}, id="no signature"),
        pytest.param({"webhook_id": None}, id="no id"),
        pytest.param({"webhook_timestamp": None}, id="no timestamp"),
        pytest.param({"webhook_signature": ""}, id="empty signature"),
        pytest.param({"webhook_signature": "v1"}, id="no comma"),
        pytest.param({"webhook_signature": "v1,a,b"}, id="two commas"),
        pytest.param({"webhook_signature": "v1,%%%"}, id="no base64"),
        pytest.param({"webhook_signature": "v1,\u00e9"}, id="not ascii"),
        pytest.param({"webhook_signature": "v1a,AAAA"}, id="another version"),
        pytest.param({"webhook_timestamp": "soon"}, id="timestamp is text"),
        pytest.param({"webhook_timestamp": "nan"}, id="timestamp is nan"),
        pytest.param({"webhook_timestamp": "1e400"}, id="timestamp is infinite"),
        pytest.param({"webhook_timestamp": "9" * 400}, id="timestamp is huge"),
        pytest.param({"webhook_id": "x" * 300}, id="id is long"),
    ],
)
async def test_a_forged_callback_is_refused(gateway: Gateway, new_run: NewRun, changes: dict[str, str | None]) -> None:
    task_id = task_id_of("forged")
    raw = json.dumps({"task_id": task_id, **delivery(1)}).encode()
    headers = {name: value.encode() for name, value in _headers(raw, **changes).items()}

    answer = await gateway.http.post(f"/callbacks/comfyui/{task_id}", content=raw, headers=headers)  # type: ignore[arg-type]

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("raw", [b"\xff\xfe{}", b"{}tampered"], ids=["no UTF-8", "changed after signing"])
async def test_bytes_that_were_not_signed_are_refused(gateway: Gateway, raw: bytes) -> None:
    task_id = task_id_of("bytes")
    answer = await gateway.http.post(
        f"/callbacks/comfyui/{task_id}", content=raw, headers=signed_headers(b"{}", gateway.secret)
    )
    assert answer.status_code == 401


@pytest.mark.parametrize(("minutes", "status"), [(-6, 401), (-4, 202), (4, 202), (6, 401)])
async def test_a_signature_holds_for_five_minutes(gateway: Gateway, new_run: NewRun, minutes: int, status: int) -> None:
    task_id = task_id_of("age")
    await new_run(task_id)
    at = datetime.now(UTC) + timedelta(minutes=minutes)
    assert (await gateway.post(task_id, tick(1), at=at)).status_code == status


@pytest.fixture
async def second_secret(temporal_env: WorkflowEnvironment, task_store: TaskStore) -> AsyncIterator[tuple[Gateway, str]]:
    secret = new_secret()
    async with served(temporal_env.client, task_store, secret) as gateway:
        yield gateway, secret


async def test_both_secrets_hold_during_a_rotation(second_secret: tuple[Gateway, str], new_run: NewRun) -> None:
    gateway, secret = second_secret
    task_id = task_id_of("rotation")
    await new_run(task_id)
    assert (await gateway.post(task_id, tick(1, 1.0))).status_code == 202
    assert (await gateway.post(task_id, tick(2, 2.0), secret=secret)).status_code == 202
    assert (await gateway.post(task_id, tick(3, 3.0), secret=new_secret())).status_code == 401


async def test_a_body_that_names_another_task_is_refused(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("mine")
    run = await new_run(task_id)
    for body in (tick(1, task_id=task_id_of("other")), tick(1, task_id=None), tick(1, task_id=[task_id])):
        assert (await gateway.post(task_id, body)).status_code == 401
    assert await kept_by(run) == []


async def test_a_callback_for_an_unknown_task_is_answered_404(gateway: Gateway) -> None:
    for task_id in (task_id_of("unknown"), "x" * 200, "%2e%2e"):
        assert (await gateway.post(task_id, tick(1, task_id=task_id.replace("%2e", ".")))).status_code == 404


async def test_a_task_that_is_over_is_answered_200(gateway: Gateway, new_run: NewRun, task_store: TaskStore) -> None:
    closed = task_id_of("closed")
    run = await new_run(closed)
    await run.signal("end")
    await run.result()
    forgotten_by_temporal = task_id_of("claimed")
    await task_store.claim(claim_of(forgotten_by_temporal))

    for task_id in (closed, forgotten_by_temporal):
        answer = await gateway.post(task_id, delivery(9))
        assert (answer.status_code, answer.json()) == (200, {"outcome": "task_over"})


async def test_a_tick_of_a_task_that_is_over_is_answered_200(gateway: Gateway, task_store: TaskStore) -> None:
    await task_store.claim(claim_of(task_id := task_id_of("ended")))
    await task_store.write(write_of(task_id, end(), status=TaskStatus.COMPLETED))
    before = gateway.count(CallbackOutcome.TASK_OVER)

    answer = await gateway.post(task_id, tick(1))

    assert (answer.status_code, answer.json()) == (200, {"outcome": "task_over"})
    assert gateway.count(CallbackOutcome.TASK_OVER) == before + 1


def _filled(body: dict[str, Any], size: int) -> bytes:
    raw = json.dumps({**body, "filler": ""}).encode()
    return raw[:-2] + b"x" * (size - len(raw)) + raw[-2:]


@pytest.mark.parametrize(
    ("body", "size", "status"),
    [
        (tick(1), 64 * 1024, 202),
        (tick(1), 64 * 1024 + 1, 413),
        (training_tick(1), 64 * 1024 + 1, 413),
        (tick(1, log=[{"message": "a"}]), 64 * 1024 + 1, 413),
        (training_tick(1, log=[{"message": "a"}]), 256 * 1024, 202),
        (training_tick(1, log=[{"message": "a"}]), 256 * 1024 + 1, 413),
    ],
)
async def test_a_callback_may_not_be_larger_than_its_kind_allows(
    gateway: Gateway, new_run: NewRun, body: dict[str, Any], size: int, status: int
) -> None:
    task_id = task_id_of("size")
    await new_run(task_id)
    assert (await gateway.post(task_id, _filled({"task_id": task_id, **body}, size))).status_code == status


async def test_a_body_is_counted_while_it_is_read(gateway: Gateway) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * 16 * 1024

    answer = await gateway.http.post("/callbacks/comfyui/any", content=endless(), headers={"webhook-id": "a"})
    assert answer.status_code == 413


async def test_a_body_that_claims_to_be_too_large_is_refused_before_it_is_read(gateway: Gateway) -> None:
    head = {"Content-Length": str(MAX_BYTES_WITH_LOG + 1)}
    assert await answer_to_head(gateway.http, "POST", "/callbacks/comfyui/any", head) == 413


async def test_a_webhook_id_counts_within_its_task(gateway: Gateway, new_run: NewRun) -> None:
    tasks = [task_id_of("first"), task_id_of("second")]
    runs = [await new_run(task_id) for task_id in tasks]
    for task_id in tasks:
        assert (await gateway.post(task_id, tick(1), webhook_id="msg_1")).json() == {"outcome": "signalled"}
    assert [len(await kept_by(run)) for run in runs] == [1, 1]


async def test_a_replayed_id_is_taken_once(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("replay")
    run = await new_run(task_id)
    first = await gateway.post(task_id, tick(1, 1.0), webhook_id=f"{task_id}-a")
    again = await gateway.post(task_id, tick(2, 2.0), webhook_id=f"{task_id}-a")
    assert (first.json(), again.status_code, again.json()) == (
        {"outcome": "signalled"},
        202,
        {"outcome": "replayed"},
    )
    assert [kept["sequence"] for kept in await kept_by(run)] == [1]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"[]",
        b"null",
        b'{"task_id": NaN}',
        b"[" * 5_000,
        b'{"a": 1e999}',
    ],
    ids=["empty", "no JSON", "list", "null", "NaN", "deep", "infinite"],
)
async def test_what_is_signed_but_unreadable_is_not_repeated(gateway: Gateway, raw: bytes) -> None:
    before = gateway.count(CallbackOutcome.UNREADABLE)
    answer = await gateway.post(task_id_of("garbage"), raw)
    assert (answer.status_code, answer.json()) == (202, {"outcome": "unreadable"})
    assert gateway.count(CallbackOutcome.UNREADABLE) == before + 1


async def test_a_callback_with_wrong_fields_never_reaches_the_run(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("fields")
    run = await new_run(task_id)
    for body in (tick(1, job_status="flying"), tick(-1), tick(1, job_id=""), {"sequence": 1}):
        assert (await gateway.post(task_id, body)).json() == {"outcome": "unreadable"}
    assert await kept_by(run) == []


async def test_log_lines_go_to_the_training_log_and_never_into_the_signal(
    gateway: Gateway, new_run: NewRun, task_store: TaskStore
) -> None:
    task_id = task_id_of("log")
    run = await new_run(task_id)
    await task_store.claim(claim_of(task_id))
    await task_store.note_made(task_id, "job", "training-1")
    lines = [
        {"ts": "2026-03-01T12:00:00Z", "level": "warning", "message": "loss=0.5\0"},
        {"level": "shouting", "message": "m"},
    ]

    for _ in range(2):
        assert (await gateway.post(task_id, training_tick(4, log=lines))).status_code == 202
    assert (await gateway.post(task_id, training_tick(3, log=[{"message": "late"}]))).status_code == 202

    [kept] = await kept_by(run)
    assert "log" not in kept
    log = await task_store.training_log(task_id)
    assert [(line.position, line.sequence, line.line, line.level, line.message) for line in log] == [
        (1, 4, 1, "warning", "loss=0.5\ufffd"),
        (2, 4, 2, "info", "m"),
        (3, 3, 1, "info", "late"),
    ]


async def test_log_lines_of_a_training_that_is_not_the_tasks_are_left_out(
    gateway: Gateway, new_run: NewRun, task_store: TaskStore
) -> None:
    task_id = task_id_of("foreign-log")
    await new_run(task_id)
    await task_store.claim(claim_of(task_id))
    await task_store.note_made(task_id, "job", "training-1")
    await task_store.note_made(task_id, "job", "training-2")

    for training_id in ("training-2", "training-of-a-stranger"):
        tick = training_tick(
            1, training_id=training_id, log=[{"message": training_id}], output={"metrics": {"loss": 1}}
        )
        assert (await gateway.post(task_id, tick)).status_code == 202

    assert {line.training_id for line in await task_store.training_log(task_id)} == {"training-2"}


async def test_a_log_that_cannot_be_read_does_not_cost_the_message(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("badlog")
    run = await new_run(task_id)
    assert (await gateway.post(task_id, training_tick(1, log=[{"message": 7}]))).json() == {"outcome": "signalled"}
    assert [kept["training_status"] for kept in await kept_by(run)] == ["running"]


async def test_ticks_without_changes_are_not_signalled(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("ticks")
    run = await new_run(task_id)
    bodies = [
        tick(1, 10.2),
        tick(2, 10.9, queue_position=3, next_eta="2026-03-01T12:00:00Z"),
        tick(3, 11.0),
        tick(4, 11.0, estimated_time=3.5),
        tick(5, 11.0, estimated_time=3.5, gpu_slots=2),
        tick(2, 99.0),
        delivery(6),
        delivery(6),
        tick(7, 100.0, job_status="delivery", result_urls=[]),
        tick(1, 5.0, job_id="job-2"),
    ]

    answers = [(await gateway.post(task_id, body)).json()["outcome"] for body in bodies]

    s, c = "signalled", "coalesced"
    assert answers == [s, c, s, s, s, c, s, c, s, s]
    assert [(kept["job_id"], kept["sequence"]) for kept in await kept_by(run)] == [
        ("job-1", 1),
        ("job-1", 3),
        ("job-1", 4),
        ("job-1", 5),
        ("job-1", 6),
        ("job-1", 7),
        ("job-2", 1),
    ]


async def test_a_new_checkpoint_of_a_training_is_signalled(gateway: Gateway, new_run: NewRun) -> None:
    task_id = task_id_of("checkpoint")
    run = await new_run(task_id)
    checkpoint = {"uri": "s3://checkpoints/1", "epoch": 1, "step": 10, "gpu_hours_used": 0.5}
    bodies = [
        training_tick(1),
        training_tick(2, gpu_hours_used=0.1),
        training_tick(3, checkpoint=checkpoint),
        training_tick(4, checkpoint=checkpoint, gpu_hours=2.5),
        training_tick(5, training_status="checkpointing", checkpoint=checkpoint, gpu_hours=2.5),
        training_tick(6, training_status="checkpointing", checkpoint=checkpoint, gpu_hours=2.5, gpu_slots=2),
    ]
    for body in bodies:
        assert (await gateway.post(task_id, body)).status_code == 202
    assert [kept["sequence"] for kept in await kept_by(run)] == [1, 3, 4, 6]


async def test_healthz_answers_ok(gateway: Gateway) -> None:
    answer = await gateway.http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
