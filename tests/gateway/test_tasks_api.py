"""Tasks over HTTP, with everything behind the gateway real: start, read, list, cancel, confirm."""

from __future__ import annotations

import base64
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from gateway.request_limits import MAX_BODY_BYTES
from gateway.task_bodies import task_id_by_key
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, OTHER_TOKEN, Api
from tests.gateway.serving import answer_to_head, token_for
from tests.store.facts import NOON, claim_of, new_task_id
from tests.waiting import until


def image(**fields: Any) -> dict[str, Any]:
    return {"template_id": "text-to-image", "prompt": "a lighthouse at dusk", **fields}


async def started(api: Api, **fields: Any) -> str:
    answer = await api.call("POST", "/images", image(**fields))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


async def test_an_image_is_started_read_and_handed_out(api: Api) -> None:
    answer = await api.call("POST", "/images", image(resolution="4k", priority="accelerated"))

    assert answer.status_code == 202
    body = answer.json()
    assert (body["tenant_id"], body["user_id"], body["status"]) == ("tenant-demo", "user-demo", "queued")
    assert answer.headers["location"] == f"/api/v1/tasks/{body['task_id']}"
    task = await api.ended(body["task_id"])
    assert (task["status"], task["stage"], task["progress"]) == ("completed", "delivery", 100.0)
    assert task["credits"] == {**task["credits"], "held": 44, "charged": 44, "returned": 0, "shortfall": 0}
    assert task["result_urls"] and task["exceptions"] == []
    events = (await api.call("GET", f"/{body['task_id']}/events")).json()
    assert isinstance(events, list)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert (events[0]["event"], events[-1]["event"]) == ("task.accepted", "task.completed")
    later = (await api.call("GET", f"/{body['task_id']}/events?after={events[1]['cursor']}&limit=1")).json()
    assert later == [events[2]]
    assert (await api.call("GET", f"/{body['task_id']}/events?after=2&limit=1")).json() == [events[2]]


async def test_a_training_is_confirmed_and_followed_in_its_log(api: Api) -> None:
    order = api.platform.training(max_credits=None)
    del order["max_credits"], order["tenant_id"], order["user_id"]
    task_id = (await api.call("POST", "/trainings", order)).json()["task_id"]

    async def asked() -> Any:
        return (await api.call("GET", f"/{task_id}")).json().get("confirmation")

    confirmation = await until(asked)
    low = await api.call("POST", f"/{task_id}/confirm-price", {"max_credits": confirmation["estimated_cost"]})
    assert low.json() == {"max_credits": confirmation["estimated_cost"]}
    raised = await api.call("POST", f"/{task_id}/confirm-price", {"max_credits": 5_000})
    assert (raised.status_code, raised.json()) == (200, {"max_credits": 5_000})

    task = await api.ended(task_id)
    assert task["status"] == "completed" and task["output"]["model_path"]
    log = (await api.call("GET", f"/{task_id}/training-log")).json()
    assert any(line["message"] for line in log["lines"])
    assert (await api.call("GET", f"/{task_id}/training-log?after={log['after']}")).json()["lines"] == []
    over = await api.call("POST", f"/{task_id}/confirm-price", {"max_credits": 6_000})
    assert (over.status_code, over.json()["code"]) == (409, "task_over")


async def test_the_same_body_under_the_same_id_is_one_task_and_another_is_refused(api: Api) -> None:
    order = image(task_id=unique("image"))

    first = await api.call("POST", "/images", order)
    again = await api.call("POST", "/images", order)
    spelled_out = await api.call("POST", "/images", {**order, "resolution": "hd", "tenant_id": "tenant-demo"})
    other = await api.call("POST", "/images", {**order, "prompt": "a dog"})
    of_a_stranger = await api.call("POST", "/images", order, token=OTHER_TOKEN)

    assert [first.status_code, again.status_code, spelled_out.status_code] == [202, 200, 200]
    assert again.json()["task_id"] == order["task_id"]
    for refused in (other, of_a_stranger):
        assert (refused.status_code, refused.json()["code"]) == (409, "task_exists")
    assert other.json() == of_a_stranger.json()
    await api.ended(order["task_id"])
    after_its_end = await api.call("POST", "/images", order)
    assert (after_its_end.status_code, after_its_end.json()["status"]) == (200, "completed")
    assert len(await api.platform.simulators.admin.comfyui.jobs(order["task_id"])) == 1


async def test_an_idempotency_key_gives_one_task_per_tenant(api: Api) -> None:
    key = unique("order of today/")

    first = await api.call("POST", "/images", image(), X_Idempotency_Key=key.replace(" ", "+"))
    again = await api.call("POST", "/images", image(), X_Idempotency_Key=key.replace(" ", "+"))
    other = await api.call("POST", "/images", image(prompt="a dog"), X_Idempotency_Key=key.replace(" ", "+"))
    stranger = await api.call("POST", "/images", image(), token=OTHER_TOKEN, X_Idempotency_Key=key.replace(" ", "+"))

    assert (first.status_code, again.status_code, other.status_code, stranger.status_code) == (202, 200, 409, 202)
    assert first.json()["task_id"] == again.json()["task_id"] != stranger.json()["task_id"]
    bad = await api.call("POST", "/images", image(), X_Idempotency_Key="with blanks")
    assert (bad.status_code, bad.json()["code"]) == (422, "input_invalid")


async def test_an_id_made_from_a_key_can_be_neither_taken_nor_probed(api: Api) -> None:
    key = unique("key")
    foreseen = task_id_by_key("tenant-demo", key)

    async def taken_by_a_stranger(**headers: str) -> Any:
        answer = await api.call("POST", "/images", image(task_id=foreseen), token=OTHER_TOKEN, **headers)
        return answer.status_code, answer.json()

    before = [await taken_by_a_stranger(), await taken_by_a_stranger(X_Idempotency_Key=key)]
    own = await api.call("POST", "/images", image(), X_Idempotency_Key=key)
    after = [await taken_by_a_stranger(), await taken_by_a_stranger(X_Idempotency_Key=key)]

    assert (own.status_code, own.json()["task_id"]) == (202, foreseen)
    assert before == after
    for status, problem in before:
        assert (status, problem["code"], problem["fields"][0]["field"]) == (422, "input_invalid", "task_id")
    named = await api.call("POST", "/images", image(task_id=foreseen), X_Idempotency_Key=key)
    assert (named.status_code, named.json()["task_id"]) == (200, foreseen)


async def test_the_list_is_the_tenants_own_newest_first_with_filters_and_pages(api: Api) -> None:
    tenant = unique("tenant")
    token = token_for(tenant, "user-a")
    ids = []
    for number in range(3):
        answer = await api.call("POST", "/images", image(prompt=f"picture {number}"), token=token)
        ids.append(answer.json()["task_id"])
        # The credits service does not know this tenant: each fails at its estimate, which is quick.

        async def has_failed(task_id: str = ids[-1]) -> bool:
            task = (await api.call("GET", f"/{task_id}", token=token)).json()
            return bool(task["status"] == "failed")

        await until(has_failed)

    first = (await api.call("GET", "?limit=2", token=token)).json()
    rest = (await api.call("GET", f"?limit=2&cursor={first['cursor']}", token=token)).json()

    assert [task["task_id"] for task in first["tasks"] + rest["tasks"]] == ids[::-1]
    assert rest["cursor"] is None
    assert len((await api.call("GET", "?status=failed&scene=image.generate", token=token)).json()["tasks"]) == 3
    assert (await api.call("GET", "?scene=model.train", token=token)).json()["tasks"] == []
    assert (await api.call("GET", "?status=completed", token=token)).json()["tasks"] == []
    exceptions = (await api.call("GET", f"/{ids[0]}", token=token)).json()["exceptions"]
    assert [record["key"] for record in exceptions] == ["end"]


async def test_a_task_whose_row_cannot_be_read_hides_no_other_from_the_list(api: Api, postgres_dsn: str) -> None:
    """A newer gateway may know a status that this one does not."""
    tenant = unique("tenant")
    token = token_for(tenant, "user-a")
    older, unreadable, newer = (new_task_id() for _ in range(3))
    for number, task_id in enumerate((older, unreadable, newer)):
        at = NOON + timedelta(seconds=number)
        await api.platform.store.claim(claim_of(task_id, tenant_id=tenant, at=at))
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute("UPDATE tasks SET status = 'archived' WHERE task_id = $1", unreadable)
    await connection.close()

    listed = await api.call("GET", "", token=token)
    first = (await api.call("GET", "?limit=2", token=token)).json()
    rest = (await api.call("GET", f"?limit=2&cursor={first['cursor']}", token=token)).json()

    assert listed.status_code == 200
    assert [task["task_id"] for task in listed.json()["tasks"]] == [newer, older]
    assert [task["task_id"] for task in first["tasks"] + rest["tasks"]] == [newer, older]


async def test_a_cancelled_task_is_charged_nothing_and_one_that_is_over_is_too_late(api: Api) -> None:
    task_id = unique("image")
    await api.platform.simulators.admin.comfyui.fault("job_stall", task_id=task_id)
    await started(api, task_id=task_id)
    await api.platform.until_held(task_id)

    answer = await api.call("POST", f"/{task_id}/cancel", {"reason": "ordered twice"})

    assert (answer.status_code, answer.json()) == (200, {"outcome": "accepted"})
    task = await api.ended(task_id)
    assert (task["status"], task["credits"]["charged"], task["result_urls"]) == ("cancelled", 0, [])
    again = await api.call("POST", f"/{task_id}/cancel")
    assert (again.status_code, again.json()) == (200, {"outcome": "too_late"})


NOTHING_STARTED: dict[str, dict[str, Any]] = {
    "prompt": image(prompt=" \u3000"),
    "unknown": image(unknown=1),
    "task_id": image(task_id="a/b"),
    "resolution": image(resolution="8k"),
    "max_credits": image(max_credits=1.5),
    "extras.a": image(extras={"a": 2**70}),
    "template_id": image(template_id="x" * 65),
    "controls.0.strength": image(controls=[{"image_url": "https://a.example/1.png", "strength": -1}]),
}


@pytest.mark.parametrize("field", NOTHING_STARTED)
async def test_a_bad_field_is_named_and_nothing_is_started(api: Api, field: str) -> None:
    answer = await api.http.post(
        "/api/v1/tasks/images",
        json=NOTHING_STARTED[field],
        headers={"Authorization": f"Bearer {DEMO_TOKEN}"},
    )
    body = answer.json()
    assert (answer.status_code, body["code"]) == (422, "input_invalid"), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in [problem["field"] for problem in body["fields"]]


BAD_BODIES: dict[str, bytes] = {
    "no JSON": b"{",
    "an array": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "nothing": b"",
    "not UTF-8": b'{"prompt": "\xff"}',
    "not a number": b'{"template_id": "t", "prompt": "x", "options": {"deadline_factor": NaN}}',
    "infinite": b'{"template_id": "t", "prompt": "x", "options": {"deadline_factor": 1e999}}',
    "thousands of digits": b'{"template_id": "t", "prompt": "x", "max_credits": ' + b"9" * 5_000 + b"}",
    "deep": b'{"template_id": "t", "prompt": "x", "extras": {"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}}",
    "40 deep": b'{"template_id": "t", "prompt": "x", "extras": {"a": ' + b"[" * 40 + b"]" * 40 + b"}}",
    "a NUL": b'{"template_id": "t", "prompt": "x\\u0000"}',
    "a lone surrogate": b'{"template_id": "t", "prompt": "\\ud800"}',
    "a lone surrogate as a name": b'{"template_id": "t", "prompt": "x", "\\ud800": 1}',
    "a prompt too long": b'{"template_id": "t", "prompt": "' + b"x" * 17_000 + b'"}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_body_that_is_no_order_is_a_clear_problem(api: Api, name: str) -> None:
    headers = {"Authorization": f"Bearer {DEMO_TOKEN}", "Content-Type": "application/json"}
    answer = await api.http.post("/api/v1/tasks/images", content=BAD_BODIES[name], headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "input_invalid"), answer.text


async def test_a_body_beyond_the_limit_is_refused_before_it_is_read(api: Api) -> None:
    headers = {"Authorization": f"Bearer {DEMO_TOKEN}", "Content-Type": "application/json"}
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        for _ in range(200):
            sent += 1
            yield b" " * 4096

    answer = await api.http.post("/api/v1/tasks/images", content=endless(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    of_files = len(base64.b64encode(bytes(api.uploads.inline_bytes)))
    for path, most in (("/images", MAX_BODY_BYTES + of_files), ("/an-id/cancel", MAX_BODY_BYTES)):
        stated = headers | {"Content-Length": str(most + 1)}
        assert await answer_to_head(api.http, "POST", f"/api/v1/tasks{path}", stated) == 413


@pytest.mark.parametrize("query", ["?limit=0", "?limit=201", "?status=done", "?scene=x", "?unknown=1"])
async def test_a_bad_query_is_named(api: Api, query: str) -> None:
    answer = await api.call("GET", query)
    assert (answer.status_code, answer.json()["code"]) == (422, "input_invalid")
    assert answer.json()["fields"][0]["field"] == query[1:].partition("=")[0]


async def test_a_foreign_cursor_is_refused(api: Api) -> None:
    first, second = await started(api), await started(api)
    await api.ended(first)
    cursor = (await api.call("GET", f"/{first}/events")).json()[0]["cursor"]
    answer = await api.call("GET", f"/{second}/events?after={cursor}")
    assert (answer.status_code, answer.json()["code"]) == (400, "cursor_invalid")


def packed(*parts: str) -> str:
    """A cursor of any content, in the form of the store's own."""
    return base64.urlsafe_b64encode("\n".join(parts).encode()).decode().rstrip("=")


BAD_CURSORS = {
    "no cursor": "nonsense",
    "empty": "",
    "NUL": "%00",
    "not ASCII": "%C3%A9",
    "too long": "A" * 3_000,
    "year 1, east": packed("l", "0001-01-01T00:00:00+14:00", "t"),
    "year 9999, west": packed("l", "9999-12-31T23:59:59-14:00", "t"),
    "without offset": packed("l", "2026-01-01T00:00:00", "t"),
    "an offset of seconds": packed("l", "2026-01-01T00:00:00+23:59:59", "t\0"),
    "a NUL inside": packed("l", "2026-01-01T00:00:00+00:00", "t\0"),
    "a number": packed("l", "0", ""),
    "an event's": packed("e", "t", "1"),
    "a sequence beyond 64 bits": packed("e", "{task_id}", "9" * 30),
}


@pytest.mark.parametrize("name", BAD_CURSORS)
async def test_a_malformed_cursor_is_a_problem_at_every_route(
    api: Api, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    cursor = BAD_CURSORS[name]
    paths = [f"?cursor={cursor}", f"/{{task_id}}/events?after={cursor}"]
    if cursor:
        paths.append(f"/stream/sse?task_id={{task_id}}&cursor={cursor}")
    task_id = await started(api)
    for path in paths:
        answer = await api.call("GET", path.replace("{task_id}", task_id))
        assert (answer.status_code, answer.json()["code"]) == (400, "cursor_invalid"), (path, answer.text)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00"])
async def test_a_cursor_at_the_end_of_time_is_a_place_as_any(api: Api, at: str) -> None:
    assert (await api.call("GET", f"?cursor={packed('l', at, 't')}")).status_code == 200


async def test_an_image_has_no_price_to_confirm(api: Api) -> None:
    answer = await api.call("POST", f"/{await started(api)}/confirm-price", {"max_credits": 100})
    assert (answer.status_code, answer.json()["code"]) == (422, "input_invalid")


async def test_unknown_routes_and_methods_are_problems_too(api: Api) -> None:
    for method, path, status, code in (
        ("GET", "/no/such/route", 404, "route_unknown"),
        ("DELETE", "/image-1", 405, "method_not_allowed"),
        ("GET", f"/{unique('unknown')}", 404, "task_unknown"),
    ):
        answer = await api.call(method, path)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_pages_of_allowed_origins_may_call_with_credentials(api: Api) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://evil.example", None)):
        answer = await api.http.options("/api/v1/tasks/images", headers={"Origin": origin, **asked})
        assert answer.headers.get("access-control-allow-origin") == allowed
