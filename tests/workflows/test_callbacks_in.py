"""A run survives anything that arrives as `comfyui_callback`; a valid message is applied once, the newest wins.

Signals go straight to the run here, past the gateway, as any client of the namespace could send them.
"""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.history.v1 import HistoryEvent
from temporalio.common import RawValue
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.platform import Handle, Platform, task_id_of

URL = "https://example.org/1.png"
FORGED = ("job_runs_out",)
"""A forged delivery: the job itself runs on, and a delivered task does not cancel its job."""


async def start_held(platform: Platform, **fields: Any) -> tuple[Handle, str]:
    """An image task whose credits are held, and its job's id."""
    handle = await platform.start_image(**fields)
    await platform.until_held(task_id_of(handle))
    return handle, (await platform.job(handle)).run_id


def delivery(job_id: str, sequence: int = 1_000, **fields: Any) -> dict[str, Any]:
    return {"job_id": job_id, "job_status": "delivery", "sequence": sequence, "result_urls": [URL], **fields}


def refused(progress: dict[str, Any]) -> int:
    count: int = progress["callbacks_refused"]
    return count


async def delivered(platform: Platform, handle: Handle, job_id: str) -> Ending:
    """Deliver at last: the messages before it have changed nothing."""
    await platform.callback(handle, **delivery(job_id))
    ending = await ended(platform, handle, exempt=FORGED)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["result_urls"] == [URL]
    assert ending.charged == 24
    return ending


def raw(data: bytes, encoding: bytes = b"json/plain") -> RawValue:
    return RawValue(Payload(metadata={"encoding": encoding}, data=data))


GOOD = b'{"job_id": "JOB", "job_status": "processing", "sequence": 5, "stage_progress": 50}'
HOSTILE: dict[str, list[RawValue]] = {
    "no argument": [],
    "two arguments": [raw(GOOD), raw(GOOD)],
    "null": [raw(b"null")],
    "an empty payload": [raw(b"")],
    "no JSON": [raw(b'{"job_id": ')],
    "no UTF-8": [raw(b'{"job_id": "\xff\xfe"}')],
    "a list": [raw(b"[" + GOOD + b"]")],
    "a text": [raw(b'"delivery"')],
    "a number": [raw(b"17")],
    "an empty object": [raw(b"{}")],
    "binary null": [RawValue(Payload(metadata={"encoding": b"binary/null"}))],
    "bytes": [raw(GOOD, b"binary/plain")],
    "another service's encoding": [raw(GOOD, b"json/encrypted")],
    "no encoding": [RawValue(Payload(data=GOOD))],
    "nested without end": [raw(b"[" * 100_000)],
    "nested inside a field": [raw(GOOD[:-1] + b', "extra": ' + b"[" * 5_000 + b"]" * 5_000 + b"}")],
    "another task's": [raw(GOOD[:-1] + b', "task_id": "another-task"}')],
    "a task id that is no text": [raw(GOOD[:-1] + b', "task_id": 17}')],
    "a number without end": [raw(GOOD.replace(b"5,", b"1e400,"))],
    "a number of 5000 digits": [raw(GOOD.replace(b"5,", b"9" * 5_000 + b","))],
    "a sequence beyond 2^53": [raw(GOOD.replace(b"5,", b"9007199254740993,"))],
    "a negative sequence": [raw(GOOD.replace(b"5,", b"-5,"))],
    "a sequence that is true": [raw(GOOD.replace(b"5,", b"true,"))],
    "NaN": [raw(GOOD.replace(b"5,", b"NaN,"))],
    "an unknown status": [raw(GOOD.replace(b"processing", b"exploding"))],
    "a lone surrogate in an id": [raw(GOOD.replace(b"JOB", b"\\ud800"))],
    "an id that climbs": [raw(GOOD.replace(b"JOB", b"../../jobs"))],
    "an id of dots": [raw(GOOD.replace(b"JOB", b".."))],
    "a result that is a script": [
        raw(GOOD.replace(b"processing", b"delivery")[:-1] + b', "result_urls": ["javascript:alert(1)"]}')
    ],
    "larger than is taken": [raw(GOOD[:-1] + b', "extra": "' + b"x" * 300_000 + b'"}')],
    "a job that was never requested": [raw(GOOD)],
}


async def test_any_message_is_survived_and_counted(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    for number, (name, arguments) in enumerate(HOSTILE.items(), start=1):
        mine = [
            RawValue(Payload(metadata=value.payload.metadata, data=value.payload.data.replace(b"JOB", job_id.encode())))
            if name != "a job that was never requested"
            else value
            for value in arguments
        ]
        await handle.signal(CALLBACK_SIGNAL, args=mine)

        async def counted(number: int = number) -> bool:
            return refused(await direct_platform.progress(handle)) == number

        try:
            await direct_platform.until(counted, seconds=3)
        except AssertionError:
            pytest.fail(f"{name}: {refused(await direct_platform.progress(handle))} refused, expected {number}")
    await delivered(direct_platform, handle, job_id)


async def test_a_training_survives_any_message_too(direct_platform: Platform) -> None:
    handle = await direct_platform.start_training()
    await direct_platform.until_held(task_id_of(handle))
    training_id = (await direct_platform.job(handle)).run_id
    for arguments in HOSTILE.values():
        await handle.signal(CALLBACK_SIGNAL, args=arguments)
    odd = {"training_id": training_id, "training_status": "running", "sequence": 3}
    await direct_platform.callback(handle, **odd, training_stage="baking")
    await direct_platform.callback(handle, **odd, gpu_hours=-1)  # an estimate only informs: taken without it
    await direct_platform.callback(handle, **odd, log=[{"message": "x"}] * 10_001)
    output = {"model_path": "file:///models/1", "version": "1", "metrics": {"loss": 0.1}}
    end = {"training_id": training_id, "training_status": "completed", "training_stage": "publishing", "sequence": 9}
    await direct_platform.callback(handle, **end, output=output, gpu_hours_used=0.5)
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["output"]["model_path"] == "file:///models/1"
    assert refused(await direct_platform.progress(handle)) == len(HOSTILE) + 2


@pytest.mark.parametrize("sign", [b"\\ud800", b"\\u0000"], ids=["lone surrogate", "NUL"])
async def test_invalid_text_in_a_message_is_repaired(direct_platform: Platform, sign: bytes) -> None:
    handle, job_id = await start_held(direct_platform)
    body = json.dumps(delivery(job_id, result_urls=[], error_details={"code": "node_error", "message": "SIGN"}))
    await handle.signal(CALLBACK_SIGNAL, raw(body.encode().replace(b"SIGN", sign)))
    ending = await ended(direct_platform, handle)
    assert ending.code == "node_error"
    assert ending.result["error_details"]["message"] == "\ufffd"


async def test_fields_that_only_inform_never_cost_a_message(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    odd = {
        "next_eta": "soon",
        "estimated_time": "long",
        "gpu_slots": -3,
        "queue_position": {},
        "stage_progress": "half",
    }
    await direct_platform.callback(handle, **delivery(job_id), **odd)
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert ending.status is TaskStatus.COMPLETED


BEYOND_MEASURE: list[dict[str, Any]] = [
    {"next_eta": "9999-12-31T23:59:59-14:00", "estimated_time": 1e308},
    {"next_eta": "0001-01-01T00:00:00+14:00", "estimated_time": -1},
    {"queue_position": 10**19, "gpu_slots": 10**19},
    {"queue_position": -(10**18), "stage_progress": 1e308},
]
"""Values that JSON can hold and PostgreSQL, UTC or a timer cannot."""


async def test_out_of_range_values_cost_an_image_no_event(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    for sequence, fields in enumerate(BEYOND_MEASURE, start=1):
        status = "queued" if sequence % 2 else "processing"
        await direct_platform.callback(handle, job_id=job_id, job_status=status, sequence=sequence, **fields)
        await direct_platform.until(lambda status=status: is_written(direct_platform, handle, status))  # type: ignore[misc]
    await delivered(direct_platform, handle, job_id)


async def is_written(platform: Platform, handle: Handle, stage: str) -> bool:
    """Whether the task's row and its newest event are of this stage."""
    row = await platform.store.task(task_id_of(handle))
    return row is not None and row.stage == stage and (await platform.store.events(row.task_id))[-1].stage == stage


async def test_out_of_range_values_cost_a_training_no_event(direct_platform: Platform) -> None:
    handle = await direct_platform.start_training()
    await direct_platform.until_held(task_id_of(handle))
    training_id = (await direct_platform.job(handle)).run_id
    running = {"training_id": training_id, "training_status": "running", "training_stage": "training"}
    checkpoint = {"uri": "file:///1", "epoch": 10**19, "step": -(10**18), "gpu_hours_used": 0.5}
    await direct_platform.callback(handle, **running, sequence=1, checkpoint=checkpoint, **BEYOND_MEASURE[0])
    output = {"model_path": "file:///models/1", "version": "1", "metrics": {"loss": 10**19}}
    end = {"training_id": training_id, "training_status": "completed", "training_stage": "publishing", "sequence": 9}
    await direct_platform.callback(handle, **end, output=output, gpu_hours_used=1.0)
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert "task.checkpoint training" in ending.kinds


async def test_a_burst_of_300_in_any_order_ends_where_the_newest_says(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    ticks = [
        {"job_id": job_id, "job_status": "processing", "sequence": n, "stage_progress": n / 3} for n in range(1, 301)
    ]
    random.Random(7).shuffle(ticks)
    await asyncio.gather(*(direct_platform.callback(handle, **tick) for tick in ticks))

    async def newest() -> bool:
        return bool((await direct_platform.progress(handle))["progress"] == 100.0)

    await direct_platform.until(newest)
    ending = await delivered(direct_platform, handle, job_id)
    assert len(ending.events) < 30, "progress is published at most once a second"


async def test_the_last_progress_of_a_burst_is_published_a_second_later_even_if_nothing_follows(
    direct_platform: Platform,
) -> None:
    handle, job_id = await start_held(direct_platform)
    for n in range(1, 31):
        await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=n, stage_progress=n)

    async def published() -> list[TaskEvent]:
        events = await direct_platform.store.events(task_id_of(handle))
        return events if events[-1].progress == 30 else []

    running = [event for event in await direct_platform.until(published) if event.event is EventType.RUNNING]
    gaps = [(later.ts - earlier.ts).total_seconds() for earlier, later in pairwise(running)]
    assert running[0].progress == 1
    assert gaps and min(gaps) >= 1, "at most one a second"
    assert len(await timers(handle, "6 wait: record (progress held back)")) <= len(gaps), (
        "one timer a burst, none a message"
    )
    await delivered(direct_platform, handle, job_id)


async def timers(handle: Handle, summary: str) -> list[HistoryEvent]:
    """The timers of this summary that the run has started."""
    return [
        event
        async for event in handle.fetch_history_events()
        if event.HasField("timer_started_event_attributes") and json.loads(event.user_metadata.summary.data) == summary
    ]


async def test_a_task_that_ends_within_the_second_waits_for_no_progress(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    for n in (1, 2):
        await direct_platform.callback(handle, job_id=job_id, job_status="processing", sequence=n, stage_progress=n)
    await direct_platform.cancel(handle)
    ending = await ended(direct_platform, handle)
    assert ending.status is TaskStatus.CANCELLED
    assert [event.progress for event in ending.events if event.event is EventType.RUNNING] == [1]
    assert ending.events[-1].progress == 2


async def test_a_delivery_that_overtakes_the_submitting_call_counts_once(direct_platform: Platform) -> None:
    task = direct_platform.image()
    comfyui = direct_platform.simulators.admin.comfyui
    await comfyui.fault("delay", route="submit_job", task_id=task["task_id"], when="after", seconds=0.6)
    handle = await direct_platform.start(task)
    job_id = (await direct_platform.job(handle)).run_id
    for _ in range(2):
        await direct_platform.callback(handle, **delivery(job_id))
    progress = await direct_platform.progress(handle)
    assert progress["job_id"] is None, "the call has not answered yet"
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.charged == 24
    held = next(i for i, event in enumerate(ending.events) if event.event == "credits.updated")
    assert not any(event.result_urls for event in ending.events[: held + 1]), "no result is published before the hold"


async def test_a_failure_that_overtakes_the_submitting_call_ends_the_task(direct_platform: Platform) -> None:
    task = direct_platform.image()
    comfyui = direct_platform.simulators.admin.comfyui
    await comfyui.fault("delay", route="submit_job", task_id=task["task_id"], when="after", seconds=0.6)
    handle = await direct_platform.start(task)
    job_id = (await direct_platform.job(handle)).run_id
    details = {"code": "model_missing", "message": "no such model"}
    await direct_platform.callback(handle, **delivery(job_id, result_urls=[], error_details=details))
    ending = await ended(direct_platform, handle)
    assert ending.code == "model_missing"


async def test_messages_of_an_earlier_job_are_counted_and_never_applied(direct_platform: Platform) -> None:
    handle, first = await start_held(direct_platform)
    details = {"code": "gpu_preempted", "message": "gone"}
    await direct_platform.callback(handle, job_id=first, job_status="processing", sequence=3, error_details=details)

    async def second() -> str | None:
        progress = await direct_platform.progress(handle)
        return progress["job_id"] if progress["attempts"] == 2 and progress["job_id"] != first else None

    job_id = await direct_platform.until(second)
    assert job_id is not None
    await direct_platform.callback(handle, **delivery(first, result_urls=["https://example.org/stale.png"]))
    await direct_platform.callback(handle, **delivery(first, result_urls=[], error_details=details))

    async def both_counted() -> bool:
        return refused(await direct_platform.progress(handle)) == 2

    await direct_platform.until(both_counted)
    ending = await delivered(direct_platform, handle, job_id)
    assert ending.result["attempts"] == 2


async def test_a_failure_reported_after_the_delivery_changes_nothing(direct_platform: Platform) -> None:
    task = direct_platform.image()
    commit_fails = await direct_platform.simulators.admin.credits.fault(
        "error", route="commit", task_id=task["task_id"]
    )
    handle = await direct_platform.start(task)
    await direct_platform.until_held(task["task_id"])
    job_id = (await direct_platform.job(handle)).run_id
    await direct_platform.callback(handle, **delivery(job_id))
    await direct_platform.until_hit("commit", commit_fails)
    details = {"code": "node_error", "message": "after all"}
    await direct_platform.callback(handle, **delivery(job_id, 2_000, result_urls=[], error_details=details))
    ending = await ended(direct_platform, handle, exempt=FORGED)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)


async def test_a_message_after_the_end_finds_no_run_and_changes_nothing(direct_platform: Platform) -> None:
    handle, job_id = await start_held(direct_platform)
    before = await delivered(direct_platform, handle, job_id)
    with pytest.raises(RPCError) as error:
        await direct_platform.callback(handle, **delivery(job_id, 2_000))
    assert error.value.status is RPCStatusCode.NOT_FOUND
    assert await ended(direct_platform, handle, exempt=FORGED) == before


# Any sequence of messages


@dataclass(frozen=True)
class Message:
    """One callback as drawn; `end`: None, `urls` or the code it fails with."""

    sequence: int
    status: str
    progress: float | None
    end: str | None

    def body(self, job_id: str) -> dict[str, Any]:
        body: dict[str, Any] = {"job_id": job_id, "job_status": self.status, "sequence": self.sequence}
        if self.progress is not None:
            body["stage_progress"] = self.progress
        if self.end == "urls":
            return body | {"job_status": "delivery", "result_urls": [f"https://example.org/{self.sequence}.png"]}
        return body | ({"error_details": {"code": self.end, "message": "drawn"}} if self.end else {})


messages = st.builds(
    Message,
    sequence=st.integers(0, 12),
    status=st.sampled_from(["queued", "processing", "processing", "delivery"]),
    progress=st.none() | st.floats(-20, 150, allow_nan=False),
    end=st.sampled_from([None] * 12 + ["urls", "node_error"]),
)


def first_end(drawn: list[Message]) -> Message:
    """A second, naive reading of contract §2: a lower or equal sequence is not applied, and an end stays."""
    newest = -1
    for message in drawn:
        if message.sequence > newest:
            newest = message.sequence
            if message.end:
                return message
    raise AssertionError("the last message is an end")


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=st.lists(st.lists(messages, max_size=14), min_size=3, max_size=3))
async def test_any_sequence_of_messages_makes_one_result_and_progress_never_goes_back(
    direct_platform: Platform, drawn: list[list[Message]]
) -> None:
    await asyncio.gather(*(_one_sequence(direct_platform, sequence) for sequence in drawn))


async def _one_sequence(platform: Platform, drawn: list[Message]) -> None:
    drawn = [*drawn, Message(sequence=1_000, status="delivery", progress=100.0, end="urls")]
    handle, job_id = await start_held(platform)
    reached: dict[str | None, float] = {}
    with suppress(RPCError):  # it has ended before
        for message in drawn:
            await platform.callback(handle, **message.body(job_id))
            progress = await platform.progress(handle)
            assert progress["progress"] >= reached.get(progress["stage"], 0.0), drawn
            assert 0 <= progress["progress"] <= 100
            reached = {progress["stage"]: progress["progress"]}
    end = first_end(drawn)
    ending = await ended(platform, handle, exempt=FORGED if end.end == "urls" else ())
    if end.end == "urls":
        assert ending.result["result_urls"] == [f"https://example.org/{end.sequence}.png"], drawn
        assert ending.charged == 24
    else:
        assert ending.code == end.end, drawn
