"""Tasks that name uploads, and orders that hold files themselves."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from comfyui_temporal.contracts.size_budget import MAX_EXTRAS_BYTES
from comfyui_temporal.contracts.tasks import workflow_id_of
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS
from gateway.body_memory import BodyMemory
from gateway.request_limits import MAX_BODY_BYTES
from gateway.uploads import Uploads
from runtime.caller_tokens import Caller
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, OTHER_TOKEN, Api
from tests.gateway.serving import answer_to_head, bearer, served, token_for
from tests.gateway.test_uploads import PNG, UPLOADS, WAV

LARGE = PNG + b"x" * 150_000


async def sent(api: Api, content: bytes, *, token: str = DEMO_TOKEN) -> dict[str, Any]:
    answer = await api.http.post(UPLOADS, content=content, headers=bearer(token))
    assert answer.status_code == 201, answer.text
    view: dict[str, Any] = answer.json()
    return view


def order(*controls: str, **fields: Any) -> dict[str, Any]:
    given = {"template_id": "image-to-image", "prompt": "a lighthouse", "task_id": unique("image")}
    return {**given, "controls": [{"image_url": address} for address in controls], **fields}


def inline(content: bytes, content_type: str = "image/png") -> str:
    return f"data:{content_type};base64,{base64.b64encode(content).decode()}"


def problems_of(answer: httpx.Response) -> dict[str, str]:
    """Field → message of a refusal with 422."""
    assert (answer.status_code, answer.json()["code"]) == (422, "input_invalid"), answer.text
    return {each["field"]: each["message"] for each in answer.json()["fields"]}


def kept(api: Api, upload_id: str, tenant_id: str = "tenant-demo") -> Path:
    return api.platform.folder / "uploads" / tenant_id / upload_id


async def test_a_task_names_an_upload_as_its_control_image(api: Api) -> None:
    upload = await sent(api, PNG)
    answer = await api.call("POST", "/images", order(upload["address"]))
    assert answer.status_code == 202, answer.text
    task = await api.ended(answer.json()["task_id"])
    assert task["status"] == "completed", task
    assert task["input"]["controls"][0]["image_url"] == f"upload:{upload['upload_id']}"


async def test_an_upload_that_cannot_be_used_is_refused_by_its_field_and_nothing_starts(
    api: Api, postgres_dsn: str
) -> None:
    theirs = await sent(api, PNG, token=OTHER_TOKEN)
    sound, expired = await sent(api, WAV), await sent(api, PNG)
    headers = bearer(DEMO_TOKEN) | {"Tus-Resumable": "1.0.0", "Upload-Length": "1000"}
    begun = (await api.http.post(UPLOADS, headers=headers)).json()
    connection = await asyncpg.connect(postgres_dsn)
    past = datetime.now(UTC) - timedelta(seconds=1)
    await connection.execute("UPDATE uploads SET expires_at = $1 WHERE upload_id = $2", past, expired["upload_id"])
    await connection.close()
    addresses = {
        theirs["address"]: "there is no upload",
        "upload:unknown": "there is no upload unknown of this tenant",
        sound["address"]: "is a WAV, MP3, FLAC or Ogg sound; a PNG, JPEG, GIF or WebP picture is needed",
        expired["address"]: "has expired",
        begun["address"]: "is not complete: 0 of 1000 bytes are there",
        "upload:../tenant-other/x": "must be upload:UPLOAD_ID",
        "upload:": "must be upload:UPLOAD_ID",
    }
    asked = order(*addresses)
    found = problems_of(await api.call("POST", "/images", asked))
    for number, message in enumerate(addresses.values()):
        assert message in found[f"controls.{number}.image_url"]
    assert await api.platform.store.claimed_input(asked["task_id"]) is None
    asked = order(extras={"mask": theirs["address"]})
    assert "there is no upload" in problems_of(await api.call("POST", "/images", asked))["extras.mask"]


async def test_users_that_are_kept_apart_name_their_own_uploads_only(api: Api) -> None:
    upload = await sent(api, PNG)
    neighbour = token_for("tenant-demo", "user-neighbour")
    async with served(
        api.platform.client,
        api.platform.store,
        task_queue=api.platform.task_queue,
        own_tasks_only=True,
        uploads=api.uploads,
    ) as apart:
        headers = bearer(neighbour)
        assert (await apart.http.get(f"{UPLOADS}/{upload['upload_id']}", headers=headers)).status_code == 404
        answer = await apart.http.post("/api/v1/tasks/images", json=order(upload["address"]), headers=headers)
        assert "there is no upload" in problems_of(answer)["controls.0.image_url"]


async def test_a_file_within_an_order_becomes_an_upload_and_is_in_no_history(api: Api) -> None:
    body = order(inline(LARGE))
    del body["task_id"]
    key = unique("key")
    answers = [await api.call("POST", "/images", body, X_Idempotency_Key=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 200], answers[0].text
    task_id = answers[0].json()["task_id"]
    assert answers[1].json()["task_id"] == task_id
    task = await api.ended(task_id)
    assert task["status"] == "completed", task
    address = task["input"]["controls"][0]["image_url"]
    assert kept(api, address.removeprefix("upload:")).read_bytes() == LARGE
    handle = api.platform.client.get_workflow_handle(workflow_id_of(task_id))
    history = (await handle.fetch_history()).to_json()
    row = await api.platform.store.inputs([task_id])
    for text in (history, json.dumps(task), row[task_id].model_dump_json()):
        assert base64.b64encode(LARGE).decode()[:60] not in text and "base64," not in text
    body["controls"] = [{"image_url": inline(PNG)}]
    other = await api.call("POST", "/images", body, X_Idempotency_Key=key)
    assert (other.status_code, other.json()["code"]) == (409, "task_exists")


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_file_of_an_order_that_is_repeated_later_is_kept_as_if_it_were_new(
    api: Api, postgres_dsn: str, is_deleted: bool
) -> None:
    """Its first try stored the file and started nothing; by the second one it had expired, or nearly."""
    uploads = Uploads(api.platform.store, api.uploads, lambda _tenant: NO_LIMITS, BodyMemory())
    caller = Caller(tenant_id="tenant-demo", user_id="user-demo", scopes=[], expires_at=0)
    first = await uploads.keep(caller, upload_id := unique("upload"), LARGE, None)
    connection = await asyncpg.connect(postgres_dsn)
    age = "UPDATE uploads SET expires_at = now() + $2::interval WHERE upload_id = $1"
    await connection.execute(age, upload_id, timedelta(hours=-2 if is_deleted else 2))
    if is_deleted:
        kept(api, upload_id).unlink()
    again = await uploads.keep(caller, upload_id, LARGE, None)
    assert await connection.fetchval("SELECT expires_at FROM uploads WHERE upload_id = $1", upload_id) >= (
        first.expires_at
    )
    assert again.expires_at >= first.expires_at and again.whole_at == first.whole_at
    assert kept(api, upload_id).read_bytes() == LARGE
    await connection.close()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("data:image/png;base64,not base64!", "is not base64"),
        ("data:image/png;base64,", "is an empty file"),
        ("data:image/png,plain", "must be written like data:image/png;base64,"),
        (inline(b"<html>" * 50), "is none of these: a PNG"),
        (inline(WAV, "image/png"), "is a WAV, MP3, FLAC or Ogg sound"),
        ("https://images.example/" + "x" * 2_048, "more than 2048 characters"),
    ],
)
async def test_a_file_within_an_order_that_cannot_be_used_is_refused_by_its_field(
    api: Api, value: str, message: str
) -> None:
    asked = order(value)
    answer = await api.call("POST", "/images", asked)
    assert message in problems_of(answer)["controls.0.image_url"]
    assert not value[30:90] or value[30:90] not in answer.text
    assert await api.platform.store.claimed_input(asked["task_id"]) is None


async def test_a_file_within_an_extra_counts_as_the_address_that_it_becomes(api: Api) -> None:
    texts = {f"text-{n}": "x" * 1_000 for n in range(32)}
    room = MAX_EXTRAS_BYTES - len(repr({**texts, "mask": ""}))
    texts["text-0"] += "x" * (room - 20)
    found = problems_of(await api.call("POST", "/images", order(extras={**texts, "mask": inline(PNG)})))
    assert "must not be larger than" in found["extras"]
    found = problems_of(await api.call("POST", "/images", order(extras={"mask": "data:image/png;base64,!"})))
    assert "mask is not base64" in found["extras"]


async def test_files_within_an_order_may_have_so_many_bytes_together(api: Api) -> None:
    half = PNG + b"x" * (140 * 1024)
    found = problems_of(await api.call("POST", "/images", order(inline(half), inline(half + b"."))))
    assert "and may have 262144: upload them first" in found["controls.0.image_url"]
    beyond = await api.call("POST", "/images", order(inline(LARGE * 4)))
    assert (beyond.status_code, beyond.json()["code"]) == (413, "too_large")


async def test_a_strangers_order_may_not_be_longer_for_the_files_in_it(api: Api) -> None:
    head = {"Content-Length": str(MAX_BODY_BYTES + 1), "Content-Type": "application/json"}
    assert await answer_to_head(api.http, "POST", "/api/v1/tasks/images", head) == 413
    head["Authorization"] = "Bearer x"
    assert await answer_to_head(api.http, "POST", "/api/v1/tasks/images", head) == 413
    assert await answer_to_head(api.http, "POST", UPLOADS, head) == 401


async def test_where_nothing_can_be_uploaded_no_order_holds_or_names_a_file(api: Api) -> None:
    async with served(api.platform.client, api.platform.store, task_queue=api.platform.task_queue) as bare:
        for address in ("upload:an-id", inline(PNG)):
            asked = order(address)
            answer = await bare.http.post("/api/v1/tasks/images", json=asked, headers=bearer(DEMO_TOKEN))
            assert "none can be made here" in problems_of(answer)["controls.0.image_url"]
            assert await api.platform.store.claimed_input(asked["task_id"]) is None
