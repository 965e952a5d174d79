"""The platform's present front-end client, unchanged: its addresses, its parameters, what it reads of the answers."""

from __future__ import annotations

import json
from typing import Any

from gateway.access import TOKEN_COOKIE
from tests.conftest import unique
from tests.gateway.conftest import DEMO_TOKEN, Api

ORIGIN = "https://app.example"
BY_COOKIE = {"origin": ORIGIN, "cookie": f"{TOKEN_COOKIE}={DEMO_TOKEN}", "accept": "text/event-stream"}
"""As a browser sends it for `new EventSource(url, {withCredentials: true})` on a page of another origin."""
STREAM = "/api/v1/tasks/stream/sse"


def frames_of(text: str) -> list[dict[str, Any]]:
    """The frames that hold data, as EventSource gives them: id, event and the parsed data."""
    frames = []
    for block in text.split("\n\n"):
        lines = dict(line.partition(": ")[::2] for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            frames.append({**lines, "data": json.loads(lines["data"])})
    return frames


def seqs_of(frames: list[dict[str, Any]], task_id: str) -> list[int]:
    return [frame["data"]["seq"] for frame in frames if frame["data"].get("task_id") == task_id]


async def test_it_streams_two_tasks_by_cookie_and_resumes_until_nothing_is_left(api: Api) -> None:
    tasks = [unique("image"), unique("image")]
    handles = [await api.platform.start_image(task_id=task_id) for task_id in tasks]
    for handle in handles:
        await api.platform.until_held(handle.id.removeprefix("task-"))
    query = f"task_id={tasks[0]}&subscribe={tasks[1]}"

    answer = await api.http.get(f"{STREAM}?{query}", headers=BY_COOKIE, timeout=30)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = frames_of(answer.text)
    for frame in frames:
        assert frame["data"]["event"] == frame["event"], "the type stands in every payload too"
        if frame["event"] != "system.heartbeat":
            assert frame["data"]["cursor"] == frame["id"]
    for task_id in tasks:
        events = [frame["event"] for frame in frames if frame["data"].get("task_id") == task_id]
        assert seqs_of(frames, task_id) == list(range(1, len(events) + 1))
        assert (events[0], events[-1]) == ("task.accepted", "task.completed")

    half = frames[len(frames) // 2]
    rest = await api.http.get(f"{STREAM}?{query}&cursor={half['id']}", headers=BY_COOKIE)
    for task_id in tasks:
        assert seqs_of(frames_of(rest.text), task_id) == seqs_of(frames[len(frames) // 2 + 1 :], task_id)
    over = await api.http.get(f"{STREAM}?{query}", headers={**BY_COOKIE, "last-event-id": frames[-1]["id"]})
    assert (over.status_code, over.content) == (204, b""), "or a browser comes back for ever"
    for told_to_the_page in (answer, rest, over):
        assert told_to_the_page.headers["access-control-allow-origin"] == ORIGIN
        assert told_to_the_page.headers["access-control-allow-credentials"] == "true"


async def test_its_history_is_an_array_and_a_refusal_can_be_read_by_the_page(api: Api) -> None:
    task_id = unique("image")
    await (await api.platform.start_image(task_id=task_id)).result()
    history = await api.call("GET", f"/{task_id}/events?limit=2", Origin=ORIGIN)
    assert isinstance(history.json(), list) and len(history.json()) == 2
    assert history.headers["access-control-allow-origin"] == ORIGIN

    unknown = await api.http.get(f"{STREAM}?task_id={unique('unknown')}", headers=BY_COOKIE)
    assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (404, ORIGIN)
    foreign = await api.http.get(f"{STREAM}?task_id={task_id}", headers={**BY_COOKIE, "origin": "https://evil.example"})
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers


async def test_its_users_see_why_a_task_failed_what_it_cost_and_what_came_back(api: Api) -> None:
    comfyui = api.platform.simulators.admin.comfyui
    good, bad = unique("image"), unique("image")
    await comfyui.fault("job_fail", route="submit_job", task_id=bad, code="node_error", node="KSampler")
    ends = {}
    for task_id in (good, bad):
        await api.platform.start_image(task_id=task_id)
        task = await api.ended(task_id)
        history = (await api.call("GET", f"/{task_id}/events")).json()
        streamed = frames_of((await api.http.get(f"{STREAM}?task_id={task_id}", headers=BY_COOKIE, timeout=30)).text)
        assert streamed[-1]["data"] == history[-1]
        assert all(event["credits"] is None and event["failure_reason"] is None for event in history[:-1])
        assert [event["ts"] for event in history] == sorted(event["ts"] for event in history)
        ends[task_id] = (task, history[-1])
    task, end = ends[good]
    assert end["credits"] == {"final_cost": task["credits"]["charged"], "refund": task["credits"]["returned"]}
    assert end["credits"]["final_cost"] > 0 and end["failure_reason"] is None
    task, end = ends[bad]
    assert end["credits"] == {"final_cost": 0, "refund": task["credits"]["held"]}
    assert "KSampler" in end["failure_reason"] or task["error"]["message"] in end["failure_reason"]


async def test_a_refusal_carries_code_and_message(api: Api) -> None:
    refused = [
        await api.call("GET", f"/{unique('none')}"),
        await api.call("POST", "/images", {"template_id": "text-to-image"}),
        await api.http.get("/api/v1/tasks"),
        await api.http.get("/nowhere"),
        await api.http.post("/callbacks/comfyui/nobody", content=b"{}"),
    ]
    for answer in refused:
        body = answer.json()
        assert body["code"] and body["message"] == body["detail"], answer.text


async def test_a_preflight_with_the_headers_of_such_clients_passes(api: Api) -> None:
    sent = "x-request-id,authorization,cache-control,last-event-id,content-type,x-idempotency-key"
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": sent}
    for path in (STREAM, "/api/v1/tasks/images"):
        answer = await api.http.options(path, headers={"Origin": ORIGIN, **asked})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN), answer.text
        allowed = answer.headers["access-control-allow-headers"].lower()
        assert all(name in allowed for name in sent.split(","))
        foreign = await api.http.options(path, headers={"Origin": "https://evil.example", **asked})
        assert foreign.status_code == 400
