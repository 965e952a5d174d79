"""What a client of the event stream relies on: every event once, in order, from any cursor."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from comfyui_temporal.contracts.task_events import TaskEvent
from gateway import streams_hub
from store import TaskStore
from tests.conftest import unique
from tests.streams.serving import Streams, Writer, stream_token_for, streams_on, token_for


async def test_history_comes_first_then_what_happens_then_the_end(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, 3)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as reader:
        await reader.until_received(task_id, 4)
        await writer.write(task_id, 2, progress=50.0)
        await reader.until_received(task_id, 6)
        await writer.end(task_id)
        await reader.until_ended()
    assert reader.seqs(task_id) == [1, 2, 3, 4, 5, 6, 7]
    assert [frame["event"] for frame in reader.frames if "id" in frame][0::6] == ["task.accepted", "task.completed"]
    assert all(frame["id"] == json.loads(frame["data"])["cursor"] for frame in reader.frames if "id" in frame)
    assert await streams.status(writer.tenant_id, f"task_id={task_id}", **{"last-event-id": reader.last_id}) == 204


async def test_frames_hold_the_same_as_the_kept_history(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, message="line one\nline two \u2028 </script> ünï", credits_delta=-24)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as reader:
        await reader.until_received(task_id, 2)
    kept = await writer.store.events(task_id)
    assert [TaskEvent.model_validate(event) for event in reader.events] == kept
    assert [frame["event"] for frame in reader.frames if "id" in frame] == [event["event"] for event in reader.events]


@pytest.mark.parametrize("by", ["cursor", "last-event-id"])
async def test_a_stream_resumes_where_it_was_left(streams: Streams, writer: Writer, by: str) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, 2)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as first:
        await first.until_received(task_id, 3)
    await writer.write(task_id, 2)
    query = f"task_id={task_id}" + (f"&cursor={first.last_id}" if by == "cursor" else "")
    headers = {"last-event-id": first.last_id} if by == "last-event-id" else {}
    async with streams.opened(writer.tenant_id, query, headers=headers) as second:
        await second.until_received(task_id, 5)
        await writer.write(task_id)
        await second.until_received(task_id, 6)
    assert second.seqs(task_id) == [4, 5, 6]


async def test_last_event_id_takes_precedence_over_the_cursor_of_the_address(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.write(task_id, 3)
    async with streams.opened(writer.tenant_id, f"task_id={task_id}") as first:
        await first.until_received(task_id, 4)
    old = next(frame["id"] for frame in first.frames if "id" in frame)
    headers = {"last-event-id": first.last_id}
    async with streams.opened(writer.tenant_id, f"task_id={task_id}&cursor={old}", headers=headers) as second:
        await writer.write(task_id)
        await second.until_received(task_id, 5)
    assert second.seqs(task_id) == [5]


async def test_several_tasks_in_one_stream_are_resumed_each_at_its_place(streams: Streams, writer: Writer) -> None:
    one, two, three = [await writer.begun() for _ in range(3)]
    await writer.write(two, 4)
    async with streams.opened(writer.tenant_id, f"task_id={one}&subscribe={two},{three}") as first:
        await first.until_received(two, 5)
        await writer.write(three, 2)
        await first.until_received(three, 3)
        await writer.end(one)
        await first.until_received(one, 2)
    await writer.write(two)
    headers = {"last-event-id": first.last_id}
    async with streams.opened(writer.tenant_id, f"subscribe={three},{two},{one}", headers=headers) as second:
        await second.until_received(two, 6)
        await writer.end(three)
        await writer.end(two)
        await second.until_ended()
    assert first.seqs(one) + second.seqs(one) == [1, 2]
    assert first.seqs(two) + second.seqs(two) == [1, 2, 3, 4, 5, 6, 7]
    assert first.seqs(three) + second.seqs(three) == [1, 2, 3, 4]


async def test_an_events_own_cursor_is_good_for_a_stream_of_several(streams: Streams, writer: Writer) -> None:
    one, two = await writer.begun(), await writer.begun()
    await writer.write(one, 3)
    cursor = (await writer.store.events(one))[1].cursor
    async with streams.opened(writer.tenant_id, f"subscribe={one},{two}&cursor={cursor}") as reader:
        await reader.until_received(two, 1)
        await reader.until_received(one, 4)
    assert (reader.seqs(one), reader.seqs(two)) == ([3, 4], [1])


async def test_nothing_is_lost_or_doubled_at_the_seam_while_a_task_moves(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    last = 400

    async def move() -> None:
        for _ in range((last - 1) // 7):
            await writer.write(task_id, 7)

    async def reconnect_repeatedly() -> list[int]:
        seen: list[int] = []
        cursor = ""
        while not seen or seen[-1] < last:
            async with streams.opened(writer.tenant_id, f"task_id={task_id}{cursor}") as reader:
                seq = len(seen) + 17
                await reader.until_received(task_id, min(seq, last))
                seen += reader.seqs(task_id)
                cursor = f"&cursor={reader.last_id}"
        return seen

    _, *seen = await asyncio.gather(move(), *(reconnect_repeatedly() for _ in range(5)))
    assert seen == [list(range(1, last + 1))] * 5


async def test_all_tasks_of_the_tenant_from_now_on(streams: Streams, writer: Writer) -> None:
    before = await writer.begun()
    await writer.write(before, 3)
    stranger = Writer(writer.store, unique("tenant"))
    async with streams.opened(writer.tenant_id, "subscribe=*") as reader:
        await reader.until(lambda _: writer.tenant_id in streams.hub.watched_tenants)
        new = await writer.begun()
        await writer.write(new, 2)
        await writer.write(before, 2)
        foreign = await stranger.begun()
        await writer.end(new)
        await reader.until_received(new, 4)
        await reader.until_received(before, 6)
    assert (reader.seqs(new), reader.seqs(before)) == ([1, 2, 3, 4], [5, 6])
    assert reader.seqs(foreign) == []
    assert not any("id" in frame for frame in reader.frames), "it cannot be resumed, so browsers must not try"


async def test_open_tasks_are_old_however_many_there_are(
    streams: Streams, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_hub, "HEADS_PAGE", 2)
    old = [await writer.begun() for _ in range(5)]
    await writer.write(old[0], 3)
    async with streams.opened(writer.tenant_id, "subscribe=*") as reader:
        await reader.until(lambda _: writer.tenant_id in streams.hub.watched_tenants)
        for task_id in old:
            await writer.write(task_id)
        await reader.until(lambda reader: len(reader.events) >= 5)
    assert [reader.seqs(task_id) for task_id in old] == [[5], [2], [2], [2], [2]]


async def test_a_stream_of_one_task_says_its_events_under_the_tasks_own_address(
    streams: Streams, writer: Writer
) -> None:
    task_id = await writer.begun()
    async with streams.opened(writer.tenant_id, f"/api/v1/tasks/{task_id}/events") as reader:
        await reader.until_received(task_id, 1)
        await writer.end(task_id)
        await reader.until_ended()
    assert reader.seqs(task_id) == [1, 2]


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("", 422, "input_invalid"),
        ("task_id=a/b", 422, "input_invalid"),
        ("subscribe=" + ",".join(f"t{n}" for n in range(51)), 422, "input_invalid"),
        ("task_id=a&subscribe=*", 422, "input_invalid"),
        ("task_id=none&cursor=%00%FF", 400, "cursor_invalid"),
        ("task_id=none&cursor=" + "A" * 3000, 400, "cursor_invalid"),
        ("task_id=none", 404, "task_unknown"),
    ],
)
async def test_what_cannot_be_streamed_is_a_problem(streams: Streams, query: str, status: int, code: str) -> None:
    headers = {"authorization": f"Bearer {token_for('tenant-a')}"}
    answer = await streams.http.get(f"/api/v1/tasks/stream/sse?{query}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"


async def test_another_tenants_task_is_unknown_alone_and_among_ones_own(streams: Streams, writer: Writer) -> None:
    own = await writer.begun()
    foreign = await Writer(writer.store, unique("tenant")).begun()
    assert await streams.status(writer.tenant_id, f"task_id={foreign}") == 404
    assert await streams.status(writer.tenant_id, f"subscribe={foreign},{unique('none')}") == 404
    await writer.end(own)
    headers = {"authorization": f"Bearer {token_for(writer.tenant_id)}"}
    answer = await streams.http.get(f"/api/v1/tasks/stream/sse?subscribe={own},{foreign}", headers=headers)
    assert answer.status_code == 200
    assert answer.text.startswith(f": unknown tasks are left out: {foreign}\n"), "in the first frame's comment"
    assert foreign not in answer.text.partition("\n")[2] and own in answer.text


async def test_streams_take_a_stream_token_in_the_address_or_a_cookie_and_only_one_with_the_right_scope(
    streams: Streams, writer: Writer
) -> None:
    task_id = await writer.begun()
    await writer.end(task_id)
    path = f"/api/v1/tasks/stream/sse?task_id={task_id}"

    async def status(more: str = "", **headers: Any) -> int:
        return (await streams.http.get(path + more, headers=headers)).status_code

    good = token_for(writer.tenant_id)
    assert await status() == 401
    assert await status(f"&token={stream_token_for(writer.tenant_id)}") == 200
    assert await status(f"&token={good}") == 401
    assert await status(f"&token={good}", authorization=f"Bearer {good}") == 401
    assert await status(cookie=f"comfyui_temporal_token={good}") == 200
    assert await status(cookie=f"comfyui_temporal_token={good}", origin="https://elsewhere.example") == 403
    assert await status(f"&token={stream_token_for(writer.tenant_id, scopes=[])}") == 403


async def test_the_config_gives_addresses_and_a_token_for_streams_alone(streams: Streams, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.end(task_id)
    headers = {"authorization": f"Bearer {token_for(writer.tenant_id)}"}
    config = (await streams.http.get("/api/v1/tasks/stream/config", headers=headers)).json()
    assert config["ws_url"] == f"ws://127.0.0.1:{streams.port}/api/v1/tasks/stream/ws"
    assert all(seconds > 0 for seconds in config["retry_backoff_seconds"])
    answer = await streams.http.get(f"{config['sse_url']}?task_id={task_id}&token={config['token']}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_where_ended_streams_are_kept_an_ended_task_opened_again_is_no_failure(
    task_store: TaskStore, writer: Writer
) -> None:
    """The platform's page opens an ended task again, and counts a stream that does not open as a failure."""
    task_id = await writer.begun()
    await writer.end(task_id)
    async with streams_on(task_store, heartbeat_seconds=1, keeps_ended=True) as kept:
        async with kept.opened(writer.tenant_id, f"task_id={task_id}") as first:
            await first.until_received(task_id, 2)
            cursor = first.last_id
        async with kept.opened(writer.tenant_id, f"task_id={task_id}&cursor={cursor}") as again:
            await again.until(lambda reader: len(reader.frames) >= 3)
            beats = [frame["event"] for frame in again.frames if "event" in frame]
            assert set(beats) == {"system.heartbeat"} and not again.has_ended
        live = await writer.begun()
        async with kept.opened(writer.tenant_id, f"task_id={live}") as following:
            await writer.end(live)
            await following.until_received(live, 2)
            await following.until(lambda reader: reader.frames[-1].get("event") == "system.heartbeat")
            assert not following.has_ended, "it does not end under a client that watches"


async def test_an_end_comes_in_the_words_of_the_setting(task_store: TaskStore, writer: Writer) -> None:
    task_id = await writer.begun()
    await writer.end(task_id)
    words = {"completed": "success", "cancelled": "failed"}
    async with (
        streams_on(task_store, status_words=words) as worded,
        worded.opened(writer.tenant_id, f"task_id={task_id}") as reader,
    ):
        await reader.until_ended()
    assert [(event["event"], event["status"]) for event in reader.events] == [
        ("task.accepted", "queued"),
        ("task.completed", "success"),
    ]
    assert TaskEvent.model_validate(reader.events[-1]).status == "completed", "our own clients read it by its type"
