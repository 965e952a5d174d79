"""What a client may start a run with: bad input ends it cleanly without any call; an id names one task."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.history.v1 import WorkflowExecutionContinuedAsNewEventAttributes
from temporalio.client import WorkflowFailureError
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError

from comfyui_temporal.contracts.continuation import Continuation
from comfyui_temporal.contracts.give_back import GiveBackRun
from comfyui_temporal.contracts.handed_on import Doubtful
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW, TaskStatus, workflow_id_of
from tests.workflows.books import CLOSE_EVENT, check_histories, ended
from tests.workflows.platform import Handle, Platform, task_id_of
from tests.workflows.resets import points_of, reset
from workflows.guards import NotReadHere, validated

Task = dict[str, Any]
MOST_SECONDS = 2


def raw(data: bytes, encoding: bytes = b"json/plain") -> RawValue:
    return RawValue(Payload(metadata={"encoding": encoding}, data=data))


def as_text(task: Task, old: str, new: str) -> list[Any]:
    """The task as JSON in which a text was exchanged: none of our JSON libraries would write such text."""
    text = json.dumps(task)
    assert old in text
    return [raw(text.replace(old, new).encode())]


async def assert_refused(platform: Platform, handle: Handle, code: str = "input_invalid") -> str:
    """Assert that the run failed in time with this code and without any call; its sentence.

    Its details are a result, but where the input could not be read.
    """
    with pytest.raises(WorkflowFailureError) as failed:
        await handle.result()
    cause = failed.value.cause
    assert isinstance(cause, ApplicationError)
    assert cause.type == code
    if code == "input_invalid":
        assert cause.details == ()
    else:
        [result] = cause.details
        assert (result["status"], result["error_details"]["code"], result["credits"]["held"]) == ("failed", code, 0)
    described = await handle.describe()
    assert described.close_time is not None
    assert described.close_time - described.start_time < timedelta(seconds=MOST_SECONDS)
    await check_histories(platform, handle)
    return cause.message


async def requests_of(platform: Platform, task_id: str) -> list[Any]:
    admin = platform.simulators.admin
    return [
        *await admin.comfyui.requests_seen(task_id=task_id),
        *await admin.credits.requests_seen(task_id=task_id),
    ]


async def start_raw(platform: Platform, workflow: str, task_id: str, arguments: list[Any]) -> Handle:
    return await platform.client.start_workflow(
        workflow, args=arguments, id=workflow_id_of(task_id), task_queue=platform.task_queue
    )


NOT_ONE_OBJECT: dict[str, Callable[[Task], list[Any]]] = {
    "no argument": lambda task: [],
    "null": lambda task: [None],
    "two arguments": lambda task: [task, task],
    "the second one null": lambda task: [task, None],
    "a list": lambda task: [[task]],
    "a text": lambda task: ["task"],
    "a number": lambda task: [17],
    "no JSON": lambda task: [raw(b'{"task_id": ')],
    "no UTF-8": lambda task: [raw(b'{"task_id": "\xff\xfe"}')],
    "nested without end": lambda task: [raw(b"[" * 100_000)],
    "an empty payload": lambda task: [raw(b"")],
    "bytes": lambda task: [b"\x00\x01\x02"],
    "binary null": lambda task: [raw(b"", b"binary/null")],
    "another service's encoding": lambda task: [raw(json.dumps(task).encode(), b"json/encrypted")],
    "no encoding": lambda task: [RawValue(Payload(data=json.dumps(task).encode()))],
    "two of another encoding": lambda task: [raw(b"x", b"json/encrypted"), raw(b"y", b"json/encrypted")],
}
BAD_FIELDS: dict[str, Task] = {
    "unknown field": {"callback_url": "https://example.org/"},
    "id of another alphabet": {"tenant_id": "tenant/../demo"},
    "id too long": {"user_id": "u" * 65},
    "null id": {"tenant_id": None},
    "NUL": {"user_id": "user\x00demo"},
    "negative ceiling": {"max_credits": -1},
    "ceiling of nothing": {"max_credits": 0},
    "ceiling with a fraction": {"max_credits": 10.5},
    "ceiling as text": {"max_credits": "10"},
    "ceiling beyond 64 bits": {"max_credits": 10**30},
    "unknown priority": {"priority": "urgent"},
    "no waiting at all": {"options": {"poll_after_seconds": 0}},
    "unknown option": {"options": {"prices": {}}},
    "forged state": {"carried": Continuation().model_dump(mode="json")},
}
BAD_IMAGE_FIELDS: dict[str, Task] = {
    "empty object as prompt": {"prompt": {}},
    "blank prompt": {"prompt": " \n\t"},
    "huge prompt": {"prompt": "x" * (16 * 1024 + 1)},
    "NUL in the prompt": {"prompt": "a\x00b"},
    "unknown resolution": {"resolution": "8k"},
    "extras nested too deep": {"extras": {"seed": json.loads("[" * 40 + "]" * 40)}},
    "extras too large": {"extras": {"seed": "x" * 40_000}},
    "too many controls": {"controls": [{"image_url": "https://example.org/c.png"}] * 17},
    "strength out of range": {"controls": [{"image_url": "https://example.org/c.png", "strength": 11}]},
}
BAD_TRAINING_FIELDS: dict[str, Task] = {
    "no epoch": {"hyperparameters": {"epochs": 0, "batch_size": 1, "learning_rate": 0.1}},
    "half an epoch": {"hyperparameters": {"epochs": 1.5, "batch_size": 1, "learning_rate": 0.1}},
    "no learning": {"hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0}},
    "no hyperparameters": {"hyperparameters": {}},
    "NUL in a name": {"hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "a\0b": 1}},
    "NUL in a name within": {"hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "a": {"\0": 1}}},
    "a path that climbs": {
        "dataset": {"dataset_id": "faces", "source_uri": "file:///data/", "files": ["../../etc/passwd"]}
    },
    "a window that closes before it opens": {
        "window": {"not_before": "2031-01-02T00:00:00Z", "not_after": "2031-01-01T00:00:00Z"}
    },
    "an instant without offset": {"window": {"not_before": "2031-01-02T00:00:00"}},
}


@pytest.mark.parametrize("workflow", [IMAGE_WORKFLOW, TRAINING_WORKFLOW])
@pytest.mark.parametrize("arguments", NOT_ONE_OBJECT.values(), ids=NOT_ONE_OBJECT)
async def test_a_start_without_one_object_is_refused(
    brisk_platform: Platform, workflow: str, arguments: Callable[[Task], list[Any]]
) -> None:
    task = brisk_platform.image() if workflow == IMAGE_WORKFLOW else brisk_platform.training()
    handle = await start_raw(brisk_platform, workflow, task["task_id"], arguments(task))
    await assert_refused(brisk_platform, handle)
    assert await requests_of(brisk_platform, task["task_id"]) == []
    assert await brisk_platform.store.task(task["task_id"]) is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *[
            pytest.param("image", fields, id=f"image: {name}")
            for name, fields in (BAD_FIELDS | BAD_IMAGE_FIELDS).items()
        ],
        *[
            pytest.param("training", fields, id=f"training: {name}")
            for name, fields in (BAD_FIELDS | BAD_TRAINING_FIELDS).items()
        ],
    ],
)
async def test_a_bad_field_is_named_and_nothing_is_called(brisk_platform: Platform, kind: str, fields: Task) -> None:
    task = brisk_platform.image(**fields) if kind == "image" else brisk_platform.training(**fields)
    handle = await brisk_platform.start(task)
    sentence = await assert_refused(brisk_platform, handle)
    assert next(iter(fields)) in sentence
    assert await requests_of(brisk_platform, task["task_id"]) == []
    assert await brisk_platform.store.task(task["task_id"]) is None


REFUSED: dict[str, Task] = {
    "unknown field": BAD_FIELDS["unknown field"],
    "blank prompt": BAD_IMAGE_FIELDS["blank prompt"],
    "forged state": BAD_FIELDS["forged state"],
}
UNREADABLE = {"unknown priority": BAD_FIELDS["unknown priority"]}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED)
async def test_a_run_that_was_refused_is_refused_again_when_it_is_reset(brisk_platform: Platform, fields: Task) -> None:
    """No worker has accepted its input: the store knows no claim of it."""
    handle = await brisk_platform.start(task := brisk_platform.image(**fields))
    sentence = await assert_refused(brisk_platform, handle)
    [point] = await points_of(brisk_platform, handle)
    run = await reset(brisk_platform, handle, point)
    assert await assert_refused(brisk_platform, run) == sentence
    assert await requests_of(brisk_platform, task["task_id"]) == []
    assert await brisk_platform.store.task(task["task_id"]) is None


@pytest.mark.parametrize("fields", (REFUSED | UNREADABLE).values(), ids=REFUSED | UNREADABLE)
async def test_each_run_of_a_cron_schedule_whose_input_is_refused_is_refused(
    brisk_platform: Platform, fields: Task
) -> None:
    """The next run continues from the refused one: nobody has accepted it."""
    task = brisk_platform.image(**fields)
    run = await brisk_platform.start(task, cron_schedule="@every 1s")
    for _ in range(3):
        failed = await asyncio.wait_for(_followed(run), 20)
        assert failed.failure.application_failure_info.type == "input_invalid"
        assert next(iter(fields)) in failed.failure.message
        run = brisk_platform.client.get_workflow_handle(run.id, run_id=failed.new_execution_run_id)
    await run.terminate("by a test")
    assert await requests_of(brisk_platform, task["task_id"]) == []
    assert await brisk_platform.store.task(task["task_id"]) is None


async def _followed(run: Handle) -> WorkflowExecutionContinuedAsNewEventAttributes:
    """How a run ended that another one of its schedule follows; waits for its end."""
    [end] = [event async for event in run.fetch_history_events(wait_new_event=True, event_filter_type=CLOSE_EVENT)]
    return end.workflow_execution_continued_as_new_event_attributes


@pytest.mark.parametrize("field", ["task_id", "tenant_id", "user_id", "template_id", "prompt"])
async def test_a_missing_field_is_named(brisk_platform: Platform, field: str) -> None:
    task = brisk_platform.image()
    handle = await start_raw(
        brisk_platform, IMAGE_WORKFLOW, task["task_id"], [{k: v for k, v in task.items() if k != field}]
    )
    assert field in await assert_refused(brisk_platform, handle)
    assert await requests_of(brisk_platform, task["task_id"]) == []


@pytest.mark.parametrize(
    "number", ["Infinity", "-Infinity", "NaN", "1e400", "9" * 5_000, '"Infinity"'], ids=lambda number: number[:10]
)
async def test_an_infinite_number_is_refused(brisk_platform: Platform, number: str) -> None:
    task = brisk_platform.image(options={"deadline_factor": 1.25})
    handle = await start_raw(brisk_platform, IMAGE_WORKFLOW, task["task_id"], as_text(task, "1.25", number))
    await assert_refused(brisk_platform, handle)
    assert await requests_of(brisk_platform, task["task_id"]) == []


@pytest.mark.parametrize("field", ["prompt", "tenant_id", "extras"])
async def test_a_lone_surrogate_is_refused(brisk_platform: Platform, field: str) -> None:
    value: Any = {"negative_prompt": "MARK"} if field == "extras" else "MARK"
    task = brisk_platform.image(**{field: value})
    handle = await start_raw(brisk_platform, IMAGE_WORKFLOW, task["task_id"], as_text(task, "MARK", "\\ud800"))
    await assert_refused(brisk_platform, handle)
    assert await requests_of(brisk_platform, task["task_id"]) == []


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_task_under_another_workflow_id_is_refused(brisk_platform: Platform, kind: str) -> None:
    task = brisk_platform.image() if kind == "image" else brisk_platform.training()
    workflow = IMAGE_WORKFLOW if kind == "image" else TRAINING_WORKFLOW
    handle: Handle = await brisk_platform.client.start_workflow(
        workflow, task, id=f"another-{task['task_id']}", task_queue=brisk_platform.task_queue
    )
    assert "task_id" in await assert_refused(brisk_platform, handle)
    assert await requests_of(brisk_platform, task["task_id"]) == []
    assert await brisk_platform.store.task(task["task_id"]) is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        pytest.param("image", {"extras": {"gold_frame": True}}, id="an extra that has no price"),
        pytest.param("training", {"base_model": "another"}, id="a base model that has no price"),
        pytest.param(
            "training",
            {"dataset": {"dataset_id": "faces", "source_uri": "file:///etc/"}},
            id="a dataset outside the tenant's own folder",
        ),
        pytest.param("training", {"resume_from": "file:///etc/passwd"}, id="a checkpoint outside it"),
    ],
)
async def test_what_only_the_policy_can_refuse_is_an_accepted_task_that_failed(
    brisk_platform: Platform, kind: str, fields: Task
) -> None:
    task = brisk_platform.image(**fields) if kind == "image" else brisk_platform.training(**fields)
    ending = await ended(brisk_platform, handle := await brisk_platform.start(task))
    assert ending.code == "input_invalid"
    assert await requests_of(brisk_platform, task_id_of(handle)) == []


@pytest.mark.parametrize("starter", ["the reconciler", "a caller"])
def test_a_give_back_that_a_newer_reconciler_starts_waits_for_a_worker_that_can_read_it(
    monkeypatch: pytest.MonkeyPatch, starter: str
) -> None:
    """Refused, it would end, and the credits would stay held until a newer worker happens to take the next one."""
    parent = SimpleNamespace() if starter == "the reconciler" else None
    info = SimpleNamespace(parent=parent, continued_run_id=None, run_id="r", first_execution_run_id="r")
    monkeypatch.setattr(workflow, "info", lambda: info)
    monkeypatch.setattr(workflow.unsafe, "is_replaying", lambda: False)
    with pytest.raises(NotReadHere if starter == "the reconciler" else ApplicationError):
        validated(Doubtful("reason: String should have at most 500 characters"), GiveBackRun)


# One id, one task


async def traces(platform: Platform, task_id: str) -> list[Any]:
    """Everything that a task has left anywhere."""
    return [
        await requests_of(platform, task_id),
        await platform.store.events(task_id),
        await platform.store.task(task_id),
        await platform.simulators.admin.credits.ledger(task_id),
        await platform.simulators.admin.comfyui.jobs(task_id),
    ]


@pytest.mark.parametrize("first_ends", [TaskStatus.COMPLETED, TaskStatus.FAILED], ids=str)
@pytest.mark.parametrize("second_is", ["image", "training"])
async def test_a_second_run_after_the_first_has_ended_is_refused_and_touches_nothing(
    brisk_platform: Platform, first_ends: TaskStatus, second_is: str
) -> None:
    task = brisk_platform.image()
    if first_ends is TaskStatus.FAILED:
        await brisk_platform.simulators.admin.comfyui.fault(
            "job_fail", route="submit_job", task_id=task["task_id"], code="node_error"
        )
    first = await ended(brisk_platform, await brisk_platform.start(task))
    assert first.status is first_ends
    before = await traces(brisk_platform, task["task_id"])
    second = task if second_is == "image" else brisk_platform.training(task_id=task["task_id"])
    await assert_refused(brisk_platform, await brisk_platform.start(second), "task_exists")
    assert await traces(brisk_platform, task["task_id"]) == before


@pytest.mark.parametrize("second_is", ["image", "training"])
async def test_no_second_run_starts_while_the_first_one_is_open(brisk_platform: Platform, second_is: str) -> None:
    task = brisk_platform.image()
    await brisk_platform.simulators.admin.comfyui.fault(
        "job_stall", route="submit_job", task_id=task["task_id"], while_queued=True
    )
    handle = await brisk_platform.start(task)
    await brisk_platform.until_held(task["task_id"])
    second = task if second_is == "image" else brisk_platform.training(task_id=task["task_id"])
    with pytest.raises(WorkflowAlreadyStartedError):
        await brisk_platform.start(second)
    await brisk_platform.simulators.admin.comfyui.act((await brisk_platform.job(handle)).run_id, "finish")
    ending = await ended(brisk_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
