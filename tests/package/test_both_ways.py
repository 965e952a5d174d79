"""The same calls by Temporal and over HTTP: the same effects, the same models, the same errors."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from comfyui_temporal import (
    HttpTasks,
    ImageResult,
    ImageTask,
    InvalidInput,
    Scene,
    TaskExists,
    TaskOver,
    Tasks,
    TaskStatus,
    TaskUpdate,
    TemporalTasks,
    TrainingTask,
    UnknownTask,
)
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, give_back_id_of
from comfyui_temporal.contracts.tasks import TaskDelay
from tests.conftest import unique
from tests.waiting import until
from tests.workflows.platform import Platform


def image(whole: Platform, **changes: object) -> ImageTask:
    return ImageTask.model_validate(whole.image(**changes))


async def test_the_end_is_yielded_once_though_the_run_closes_later(
    whole: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress says that the task has ended before its run closes, for example while the store is away."""
    task = image(whole)
    await whole.simulators.admin.comfyui.fault("job_stall", task_id=task.task_id, at=0.4)
    ended_already = TaskUpdate(task_id=task.task_id, status=TaskStatus.CANCELLED)
    reads = 0

    async def read_update(*_: object) -> TaskUpdate:
        nonlocal reads
        reads += 1
        return ended_already

    async def was_read_twice() -> bool:
        return reads > 1

    async with TemporalTasks(whole.client, task_queue=whole.task_queue) as tasks:
        await tasks.start(task)
        monkeypatch.setattr(tasks, "read_update", read_update)
        following = asyncio.create_task(updates_of(tasks, task.task_id))
        await until(was_read_twice)
        await tasks.cancel(task.task_id)
        assert [update.status for update in await following] == [TaskStatus.CANCELLED]


async def updates_of(tasks: Tasks, task_id: str) -> list[TaskUpdate]:
    return [update async for update in tasks.follow(task_id)]


async def test_an_image_is_started_followed_and_shown(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    async with tasks:
        started = await tasks.start(task)
        again = await tasks.start(task)
        updates = [update async for update in tasks.follow(task.task_id)]
        outcome = await tasks.wait(task.task_id)
        details = await tasks.show(task.task_id)
    assert (started.is_new, again.is_new) == (True, False)
    assert started.workflow_id == again.workflow_id == f"task-{task.task_id}"
    assert (updates[-1].status, updates[-1].stage, updates[-1].progress) == (TaskStatus.COMPLETED, "delivery", 100.0)
    assert not any(update.status.is_end() for update in updates[:-1])
    assert [update.progress for update in updates if update.stage == "processing"] == sorted(
        update.progress for update in updates if update.stage == "processing"
    )
    assert outcome.status is TaskStatus.COMPLETED and isinstance(outcome.result, ImageResult)
    assert outcome.result.result_urls and outcome.credits is not None
    assert outcome.credits.charged == outcome.credits.held > 0
    assert (details.outcome, details.progress, details.credits) == (outcome, None, outcome.credits)


async def test_another_input_under_the_id_is_refused(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    async with tasks:
        await tasks.start(task)
        with pytest.raises(TaskExists) as raised:
            await tasks.start(task.model_copy(update={"prompt": "a dog"}))
        assert (raised.value.task_id, raised.value.code) == (task.task_id, "task_exists")


async def test_a_cancel_gives_the_credits_back_and_a_second_one_is_too_late(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    async with tasks:
        await tasks.start(task)
        await whole.until_held(task.task_id)

        async def shown_as_held() -> bool:
            details = await tasks.show(task.task_id)
            assert details.outcome is None and details.progress is not None
            return details.credits is not None and details.credits.held > 0

        await until(shown_as_held)
        assert await tasks.cancel(task.task_id, "wrong prompt") == "accepted"
        outcome = await tasks.wait(task.task_id)
        assert await tasks.cancel(task.task_id) == "too_late"
    assert outcome.status is TaskStatus.CANCELLED and outcome.credits is not None
    assert (outcome.credits.charged, outcome.credits.returned) == (0, outcome.credits.held)


async def test_a_training_waits_for_its_price(whole: Platform, tasks: Tasks) -> None:
    task = TrainingTask.model_validate(whole.training(max_credits=None))
    waiting: list[TaskUpdate] = []
    async with tasks:
        await tasks.start(task)
        async for update in tasks.follow(task.task_id):
            if update.confirmation is not None and not waiting:
                waiting.append(update)
                with pytest.raises(InvalidInput) as refused:
                    await tasks.confirm(task.task_id, 0)
                assert "max_credits" in refused.value.fields
                price = update.confirmation.estimated_cost
                assert await tasks.confirm(task.task_id, price) == price
        outcome = await tasks.wait(task.task_id)
        with pytest.raises(TaskOver, match="over"):
            await tasks.confirm(task.task_id, 10_000)
    assert waiting and outcome.status is TaskStatus.COMPLETED
    assert outcome.credits is not None and 0 < (outcome.credits.charged or 0) <= price


async def test_a_failure_says_code_and_sentence(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    await whole.simulators.admin.comfyui.fault(
        "job_fail", route="submit_job", task_id=task.task_id, code="node_error", node="KSampler"
    )
    async with tasks:
        await tasks.start(task)
        updates = [update async for update in tasks.follow(task.task_id)]
        outcome = await tasks.wait(task.task_id)
    assert updates[-1].status is outcome.status is TaskStatus.FAILED
    assert outcome.code == "node_error" and outcome.sentence
    assert updates[-1].error_details is not None and updates[-1].error_details.code == "node_error"


async def test_a_task_that_does_not_exist_is_named(tasks: Tasks) -> None:
    missing = unique("missing")
    async with tasks:
        for call in (tasks.show(missing), tasks.wait(missing), tasks.cancel(missing), tasks.confirm(missing, 10)):
            with pytest.raises(UnknownTask, match=missing):
                await call
        with pytest.raises(UnknownTask, match=missing):
            await anext(tasks.follow(missing))


async def test_lists_are_filtered_and_bounded(whole: Platform, tasks: Tasks) -> None:
    async with tasks:
        ids = {(await tasks.start(image(whole))).task_id for _ in range(2)}
        for task_id in ids:
            await tasks.wait(task_id)

        async def listed() -> bool:
            found = [row async for row in tasks.list(status=TaskStatus.COMPLETED, scene=Scene.IMAGE_GENERATE, limit=50)]
            assert {row.status for row in found} <= {"completed"} and {row.scene for row in found} <= {"image.generate"}
            return ids <= {row.task_id for row in found}

        await until(listed)
        assert len([row async for row in tasks.list(limit=1)]) == 1
        assert [row async for row in tasks.list(limit=0)] == []


async def test_both_ways_see_the_same_task(whole: Platform, token: str) -> None:
    task = image(whole)
    by_temporal = TemporalTasks(whole.client, task_queue=whole.task_queue)
    async with HttpTasks(whole.gateway_url, token) as over_http:
        await over_http.start(task)
        assert not (await by_temporal.start(task)).is_new
        assert await by_temporal.wait(task.task_id) == await over_http.wait(task.task_id)
        ours, theirs = await by_temporal.show(task.task_id), await over_http.show(task.task_id)
        # Temporal alone knows the run; the two clocks are those of two servers.
        differing = {"run_id", "started_at", "ended_at", "ui_url"}
        assert ours.task.model_dump(exclude=differing) == theirs.task.model_dump(exclude=differing)


async def test_an_outage_says_what_is_tried_since_when_and_until_when(whole: Platform, tasks: Tasks) -> None:
    task = image(whole)
    admin = whole.simulators.admin.credits
    fault = await admin.fault("drop", route="pre_deduct", task_id=task.task_id, times=None)
    async with tasks:
        await tasks.start(task)

        async def delayed() -> TaskDelay | None:
            delay = next(iter((await tasks.show(task.task_id)).delays), None)
            return delay if delay is not None and delay.tries > 1 else None

        delay = await until(delayed)
        assert delay.since is not None and delay.until is not None
        assert (delay.code, delay.call) == ("credits_unavailable", "pre_deduct")
        assert whole.simulators.credits_url in delay.sentence and "COMFYUI_TEMPORAL_CREDITS_URL" in delay.sentence
        assert delay.until - delay.since == timedelta(minutes=15), "the limit that holds"
        await admin.remove_fault(fault)
        assert (await tasks.wait(task.task_id)).status is TaskStatus.COMPLETED
        assert (await tasks.show(task.task_id)).delays == []


async def test_a_poll_that_fails_is_limited_by_the_jobs_deadline(whole: Platform, token: str) -> None:
    task = image(whole)
    comfyui = whole.simulators.admin.comfyui
    await comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    fault = await comfyui.fault("drop", route="get_job", task_id=task.task_id, times=None)
    by_temporal = TemporalTasks(whole.client, task_queue=whole.task_queue)
    options = {"options": {"poll_after_seconds": 0.1}}
    await by_temporal.start(ImageTask.model_validate(task.model_dump(exclude_unset=True) | options))

    async def delayed() -> TaskDelay | None:
        return next(iter((await by_temporal.show(task.task_id)).delays), None)

    delay = await until(delayed)
    assert delay.since is not None
    assert (delay.code, delay.until) == ("comfyui_unavailable", None)
    assert delay.limit is not None and "deadline" in delay.limit
    await comfyui.remove_fault(fault)
    assert await by_temporal.cancel(task.task_id) == "accepted"
    await by_temporal.wait(task.task_id)


async def test_a_terminated_task_says_the_same_about_its_money_both_ways(whole: Platform, token: str) -> None:
    task = image(whole)
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job", task_id=task.task_id)
    by_temporal = TemporalTasks(whole.client, task_queue=whole.task_queue)
    async with HttpTasks(whole.gateway_url, token) as over_http:
        started = await by_temporal.start(task)
        await whole.until_held(task.task_id)

        async def recorded() -> bool:
            credits = (await over_http.show(task.task_id)).credits
            return credits is not None and credits.held > 0

        await until(recorded)
        await whole.client.get_workflow_handle(started.workflow_id).terminate("by a test")
        ours, theirs = await by_temporal.show(task.task_id), await over_http.show(task.task_id)
        assert ours.credits == theirs.credits and ours.credits is not None
        assert (ours.credits.settlement, ours.credits.returned) == ("open", 0)
        assert [delay.code for delay in ours.delays] == [delay.code for delay in theirs.delays] == ["terminated"]
        assert ours.outcome is not None and ours.outcome.sentence == theirs.delays[0].sentence
        assert "reconciler looks next" in theirs.delays[0].sentence or "not scheduled" in theirs.delays[0].sentence
        admin = whole.simulators.admin.credits
        fault = await admin.fault("drop", route="cancel_hold", task_id=task.task_id, times=None)
        handle = await whole.client.start_workflow(
            GIVE_BACK_WORKFLOW,
            {"task_id": task.task_id},
            id=give_back_id_of(task.task_id),
            task_queue=whole.task_queue,
        )
        for way in (by_temporal, over_http):

            async def delayed(way: TemporalTasks | HttpTasks = way) -> list[TaskDelay] | None:
                delays = (await way.show(task.task_id)).delays
                return delays if len(delays) > 1 else None

            begun, tried = await until(delayed)
            assert "gives job and credits back now" in begun.sentence and begun.next_try_at is None
            assert (tried.call, tried.code) == ("cancel_hold", "credits_unavailable")
            assert tried.since is not None
        await admin.remove_fault(fault)
        await handle.result()
        ours, theirs = await by_temporal.show(task.task_id), await over_http.show(task.task_id)
    assert ours.credits == theirs.credits and ours.credits is not None
    assert (ours.credits.settlement, ours.credits.returned) == ("settled", ours.credits.held)
    assert ours.delays == theirs.delays == []
    assert ours.outcome is not None and theirs.outcome is not None
    assert ours.outcome.status is theirs.outcome.status is TaskStatus.FAILED
    assert "given back" in (ours.outcome.sentence or "") and "given back" in (theirs.outcome.sentence or "")
