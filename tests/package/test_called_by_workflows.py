"""Another workflow calls ours: as a child, by signal, by a schedule (docs/calling.md), with the public package only.

The caller's worker is a stranger's: Temporal's own converter, its sandbox, and the document's code.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import (
    Client,
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleSpec,
    WorkflowExecutionStatus,
    WorkflowFailureError,
)
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError, CancelledError, ChildWorkflowError
from temporalio.worker import Worker
from temporalio.workflow import ParentClosePolicy

from comfyui_temporal import ImageTask
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from tests.conftest import unique
from tests.package.parents import Parent
from tests.workflows.books import ended, ended_without_its_run
from tests.workflows.platform import Handle, Platform

PAGE = Path(__file__).parents[2] / "docs" / "calling.md"


@pytest.fixture(scope="module")
def example(whole: Platform, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The document's code as a module that the sandbox can load, on this platform's task queue."""
    [code] = re.findall(r"<!-- example: python calling -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder, name = tmp_path_factory.mktemp("caller"), unique("caller").replace("-", "_")
    (folder / f"{name}.py").write_text(code.replace('COMFYUI = "comfyui"', f'COMFYUI = "{whole.task_queue}"'))
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


@pytest_asyncio.fixture
async def caller(whole: Platform, example: ModuleType) -> AsyncIterator[Client]:
    """A stranger's client, with a worker on its own task queue `queue_of(client)`."""
    address = whole.client.service_client.config.target_host
    client = await Client.connect(address, data_converter=pydantic_data_converter, identity=unique("caller"))
    workflows = [example.Poster, example.Overseer, example.Nightly, Parent]
    async with Worker(client, task_queue=queue_of(client), workflows=workflows):
        yield client


def queue_of(client: Client) -> str:
    return f"queue-of-{client.identity}"


async def start(client: Client, workflow: str, *arguments: Any) -> Handle:
    return await client.start_workflow(workflow, args=arguments, id=unique("caller"), task_queue=queue_of(client))


def child_of(whole: Platform, task_id: str) -> Handle:
    return whole.client.get_workflow_handle(f"task-{task_id}")


async def stalled(whole: Platform, task_id: str, route: str = "submit_job") -> None:
    """This task's job runs until somebody cancels it."""
    await whole.simulators.admin.comfyui.fault("job_stall", route=route, task_id=task_id, at=0.3)


async def test_a_child_delivers_to_its_parent(whole: Platform, caller: Client) -> None:
    task = ImageTask.model_validate(whole.image())
    urls = await (await start(caller, "Poster", task)).result()
    ending = await ended(whole, child_of(whole, task.task_id))
    assert ending.status == "completed" and urls == ending.result["result_urls"]
    assert ending.charged == ending.result["credits"]["charged"] > 0


async def test_a_child_that_fails_tells_its_parent_the_code(whole: Platform, caller: Client) -> None:
    task = ImageTask.model_validate(whole.image(max_credits=1))
    with pytest.raises(WorkflowFailureError) as failed:
        await (await start(caller, "Poster", task)).result()
    assert isinstance(failed.value.cause, ApplicationError) and failed.value.cause.type == "price_mismatch"
    assert (await ended(whole, child_of(whole, task.task_id))).charged == 0


@pytest.mark.parametrize("bad", [{"prompt": 7}, {"surprise": True}, {"carried": {}}], ids=str)
async def test_a_childs_bad_input_is_the_callers(whole: Platform, caller: Client, bad: dict[str, Any]) -> None:
    """A stranger's parent is not one of our runs: what it gives is read strictly, and leaves nothing stuck."""
    task = whole.image(**bad)
    await start(caller, "Parent", task, whole.task_queue, None)
    child = child_of(whole, task["task_id"])
    await whole.until(lambda: has_begun(child))
    with pytest.raises(WorkflowFailureError) as failed:
        await asyncio.wait_for(child.result(), 15)
    assert isinstance(failed.value.cause, ApplicationError) and failed.value.cause.type == "input_invalid"


async def has_begun(handle: Handle) -> bool:
    try:
        return bool(await handle.describe())
    except Exception:
        return False


async def test_a_cancelled_parent_waits_until_its_child_has_given_back(whole: Platform, caller: Client) -> None:
    task = ImageTask.model_validate(whole.image())
    await stalled(whole, task.task_id)
    parent = await start(caller, "Poster", task)
    await whole.until_held(task.task_id)
    await parent.cancel()
    with pytest.raises(WorkflowFailureError) as cancelled:
        await parent.result()
    cause = cancelled.value.cause
    assert isinstance(cause, CancelledError) or (
        isinstance(cause, ChildWorkflowError) and isinstance(cause.cause, CancelledError)
    )
    child = child_of(whole, task.task_id)
    assert (await child.describe()).status is WorkflowExecutionStatus.CANCELED
    ending = await ended(whole, child)
    assert (ending.status, ending.charged) == ("cancelled", 0)


@pytest.mark.parametrize("policy", [ParentClosePolicy.REQUEST_CANCEL, ParentClosePolicy.ABANDON, None])
async def test_what_becomes_of_a_child_when_its_parent_ends(
    whole: Platform, caller: Client, policy: ParentClosePolicy | None
) -> None:
    task = whole.image()
    await stalled(whole, task["task_id"])
    parent = await start(caller, "Parent", task, whole.task_queue, policy)
    await whole.until_held(task["task_id"])
    child = child_of(whole, task["task_id"])
    await whole.until_settled(child)
    await parent.signal("end")
    await parent.result()
    if policy is ParentClosePolicy.ABANDON:
        await whole.until_settled(child)
        assert (await child.describe()).status is WorkflowExecutionStatus.RUNNING
        await whole.cancel(child)
    if policy is not None:
        ending = await ended(whole, child)
        assert (ending.status, ending.charged) == ("cancelled", 0)
        return
    # The default: nothing of the child runs any more, and what it held stays held until somebody gives it back.
    await whole.until(lambda: is_terminated(child))
    assert [hold.phase for hold in await whole.simulators.admin.credits.holds(task["task_id"])] == ["open"]
    await whole.client.execute_workflow(
        GIVE_BACK_WORKFLOW,
        GiveBackOrder(task_id=task["task_id"]),
        id=give_back_id_of(task["task_id"]),
        task_queue=whole.task_queue,
    )
    assert (await ended_without_its_run(whole, task["task_id"])).charged == 0


async def is_terminated(handle: Handle) -> bool:
    return (await handle.describe()).status is WorkflowExecutionStatus.TERMINATED


async def test_another_workflow_confirms_and_cancels_by_signal(whole: Platform, caller: Client) -> None:
    unwanted, training = whole.image(), whole.training(max_credits=None)
    await stalled(whole, unwanted["task_id"])
    image, trained = await whole.start(unwanted), await whole.start(training)
    await whole.until_held(unwanted["task_id"])

    async def waits_for_its_price() -> bool:
        return bool((await whole.progress(trained))["confirmation"])

    await whole.until(waits_for_its_price)
    await (await start(caller, "Overseer", training["task_id"], unwanted["task_id"])).result()
    cancelled, completed = await ended(whole, image), await ended(whole, trained)
    assert (cancelled.status, cancelled.charged) == ("cancelled", 0)
    assert cancelled.events[-1].message == "the campaign is over"
    assert completed.status == "completed" and 0 < completed.charged <= 500


async def test_a_task_that_is_over_or_missing_does_not_fail_the_workflow_that_signals_it(
    whole: Platform, caller: Client
) -> None:
    over, unwanted = whole.image(), whole.image()
    await stalled(whole, unwanted["task_id"])
    image, cancelled = await whole.start(over), await whole.start(unwanted)
    await image.result()
    await whole.until_held(unwanted["task_id"])
    await (await start(caller, "Overseer", over["task_id"], unwanted["task_id"])).result()
    assert (await ended(whole, cancelled)).status == "cancelled", "the first one's end keeps the second from nothing"
    await (await start(caller, "Overseer", unique("missing"), unwanted["task_id"])).result()


async def test_signals_that_cannot_be_read_are_counted_and_do_nothing(whole: Platform) -> None:
    task = whole.training(max_credits=None)
    handle = await whole.start(task)

    async def waiting() -> dict[str, Any] | None:
        progress = await whole.progress(handle)
        return progress if progress["confirmation"] else None

    before = await whole.until(waiting)
    assert before is not None
    bad: list[tuple[str, object]] = [
        ("cancel_task", argument) for argument in (7, {"reason": 1}, {"more": 1}, "text", None)
    ]
    bad += [("confirm_price", argument) for argument in (7, {}, {"max_credits": "x"}, {"max_credits": -1}, None)]
    for signal, argument in bad:
        await handle.signal(signal, argument)
    await handle.signal("confirm_price", args=[{"max_credits": 1_000}, 2])

    async def counted() -> bool:
        return bool((await whole.progress(handle))["callbacks_refused"] == before["callbacks_refused"] + len(bad) + 1)

    await whole.until(counted)
    assert await waiting(), "it still waits for its price"
    await handle.signal("cancel_task", {})  # a reason may be left out
    assert (await ended(whole, handle)).status == "cancelled"


async def test_a_schedule_starts_a_task_by_way_of_a_workflow(whole: Platform, caller: Client) -> None:
    template = ImageTask.model_validate(whole.image(task_id="replaced"))
    name = unique("nightly")
    action = ScheduleActionStartWorkflow("Nightly", template, id=name, task_queue=queue_of(caller))
    schedule = await caller.create_schedule(
        name, Schedule(action=action, spec=ScheduleSpec()), trigger_immediately=True
    )
    run = await first_run(whole, caller, name)
    task_id = await caller.get_workflow_handle(run).result()
    await schedule.delete()
    ending = await ended(whole, child_of(whole, task_id))
    assert re.fullmatch(r"nightly-\d{8}-\d{6}", task_id) and ending.status == "completed"


async def test_a_schedule_that_starts_the_task_itself_is_refused(whole: Platform, caller: Client) -> None:
    """The server adds the time to the id, and a task's workflow id is its task id."""
    task = ImageTask.model_validate(whole.image())
    action = ScheduleActionStartWorkflow(
        "ImageGenerationWorkflow", task, id=f"task-{task.task_id}", task_queue=whole.task_queue
    )
    name = unique("direct")
    schedule = await caller.create_schedule(
        name, Schedule(action=action, spec=ScheduleSpec()), trigger_immediately=True
    )
    run = await first_run(whole, caller, name)
    await schedule.delete()
    with pytest.raises(WorkflowFailureError) as failed:
        await asyncio.wait_for(caller.get_workflow_handle(run).result(), 15)
    assert isinstance(failed.value.cause, ApplicationError) and failed.value.cause.type == "input_invalid"


def once(action: ScheduleActionStartWorkflow) -> Schedule:
    """A schedule that starts nothing by itself."""
    return Schedule(action=action, spec=ScheduleSpec())


async def first_run(whole: Platform, client: Client, schedule: str) -> str:
    """The workflow id of what a schedule started first."""

    async def started() -> str | None:
        described = await client.get_schedule_handle(schedule).describe(rpc_timeout=timedelta(seconds=5))
        actions = described.info.recent_actions
        return str(getattr(actions[0].action, "workflow_id")) if actions else None  # noqa: B009

    run = await whole.until(started)
    assert run is not None
    return run
