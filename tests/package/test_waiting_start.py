"""`start(…, wait_for="held")`: by Temporal, over HTTP and without `async` it tells the same."""

from __future__ import annotations

import asyncio

import pytest

from comfyui_temporal import (
    CreditsRefused,
    HttpTasks,
    ImageTask,
    InvalidInput,
    StartedTask,
    SyncTasks,
    TaskExists,
    Tasks,
    TaskStatus,
    TemporalTasks,
    TrainingTask,
)
from comfyui_temporal.contracts.tasks import workflow_id_of
from tests.conftest import unique
from tests.workflows.payers import new_payer
from tests.workflows.platform import CALLERS, Platform

HD = 24


def image(whole: Platform, **changes: object) -> ImageTask:
    return ImageTask.model_validate(whole.image(**changes))


async def test_a_start_tells_what_is_held_and_so_does_its_repeat(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    async with tasks:
        started = await tasks.start(task, wait_for="held")
        again = await tasks.start(task, wait_for="held")
        with pytest.raises(TaskExists):
            await tasks.start(task.model_copy(update={"prompt": "a dog"}), wait_for="held")
        outcome = await tasks.wait(task.task_id)
        late = await tasks.start(task, wait_for="held")
    assert (started.is_new, again.is_new, late.is_new) == (True, False, False)
    for told in (started, again):
        assert told.credits is not None and (told.reached, told.credits.held) == ("held", HD)
    assert late.reached in ("held", "ended") and outcome.status is TaskStatus.COMPLETED


@pytest.mark.parametrize("way", ["temporal", "http"])
async def test_refused_credits_are_an_error_with_their_sentence_also_for_a_repeat(whole: Platform, way: str) -> None:
    payer = await new_payer(whole, HD - 1)
    token = CALLERS.made_for(payer.tenant_id, payer.user_id)
    tasks: Tasks = (
        HttpTasks(whole.gateway_url, token)
        if way == "http"
        else TemporalTasks(whole.client, task_queue=whole.task_queue)
    )
    task = ImageTask.model_validate(payer.image())
    async with tasks:
        for _ in range(2):
            with pytest.raises(CreditsRefused, match=f"cost {HD} points and the balance is {HD - 1}") as refused:
                await tasks.start(task, wait_for="held")
            assert refused.value.code == "insufficient_balance"
        assert (await tasks.wait(task.task_id)).code == "insufficient_balance"
        with pytest.raises(InvalidInput, match="no_such_extra"):
            unknown = payer.image(extras={"no_such_extra": True})
            await tasks.start(ImageTask.model_validate(unknown), wait_for="held")


async def test_a_training_tells_its_price_then_that_it_is_held(whole: Platform, tasks: Tasks) -> None:
    task = TrainingTask.model_validate(whole.training(max_credits=None))
    async with tasks:
        started = await tasks.start(task, wait_for="held")
        assert started.reached == "confirmation" and started.confirmation is not None
        price = started.confirmation.estimated_cost
        await tasks.confirm(task.task_id, price)
        held = await tasks.start(task, wait_for="held")
        assert held.credits is not None and (held.reached, held.credits.held) == ("held", price)
        await tasks.wait(task.task_id)


async def test_one_that_waited_before_the_price_was_known_tells_in_the_end_that_it_is_held(
    whole: Platform, tasks: Tasks
) -> None:
    task = TrainingTask.model_validate(whole.training(max_credits=None))
    admin, given = whole.simulators.admin, {"task_id": task.task_id, "seconds": 1, "times": None}
    not_made = await admin.comfyui.fault("rate_limit", route="create_training", **given)
    handle = whole.client.get_workflow_handle(workflow_id_of(task.task_id))

    async def has_job() -> bool:
        return bool((await whole.progress(handle))["job_id"])

    async with tasks:
        assert (await tasks.start(task, wait_for="held", wait_seconds=1)).reached is None
        await whole.until_hit("create_training", not_made)
        not_priced = await admin.credits.fault("rate_limit", route="estimate", **given)
        await admin.comfyui.remove_fault(not_made)
        await whole.until(has_job)
        assert (await tasks.start(task, wait_for="held", wait_seconds=1)).reached is None
        await admin.credits.remove_fault(not_priced)
        asked = await tasks.start(task, wait_for="held")
        assert asked.reached == "confirmation" and asked.confirmation is not None
        await tasks.confirm(task.task_id, asked.confirmation.estimated_cost)
        held = [await tasks.start(task, wait_for="held") for _ in range(2)]
        assert [started.reached for started in held] == ["held", "held"]
        await tasks.wait(task.task_id)


async def test_without_a_worker_it_returns_after_its_seconds(whole: Platform) -> None:
    async with TemporalTasks(whole.client, task_queue=unique("nobody")) as tasks:
        started = await tasks.start(image(whole), wait_for="held", wait_seconds=0.5)
    assert (started.is_new, started.reached) == (True, None)


async def test_it_is_the_same_without_async(whole: Platform, token: str) -> None:
    def script() -> StartedTask:
        with SyncTasks.over_http(whole.gateway_url, token) as tasks:
            return tasks.start(image(whole), wait_for="held", wait_seconds=20)

    assert (await asyncio.to_thread(script)).reached == "held"
