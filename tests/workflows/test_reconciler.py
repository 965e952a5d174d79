"""Runs terminated at every step of both flows: the reconciler finds them and gives back what they left (rule 8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.common import WorkflowIDReusePolicy
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from activities import closed_runs
from comfyui_temporal.contracts.give_back import give_back_id_of
from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder, ReconcileResult, reconcile_id_of
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.runs import RunSeen, describe_run
from proof.simulators.admin_wire import Fault
from proof.simulators.credits_profile import CreditsProfile
from runtime.reconciler_schedule import ensure_reconciler, last_pass, standing_reconciler
from runtime.settings import Settings
from store import StoreUnavailable, TaskStore
from tests.conftest import NewDatabase, unique
from tests.store.facts import claim_of, new_task_id
from tests.workflows.books import Ending, check_histories, ended, ended_without_its_run
from tests.workflows.payers import Payer, end_open_holds, new_payer, until_started
from tests.workflows.platform import Handle, Platform, answered, running_platform, task_id_of
from tests.workflows.resets import points_of, reset
from tests.workflows.test_settlement import cancelled_by_another_caller, start_reporting
from workflows import ledger_search, reconciler

HANG_SECONDS = 60.0
PAUSE_SECONDS = 0.3
ON_ONE_PASS = {"pause_seconds": PAUSE_SECONDS}


@pytest_asyncio.fixture(scope="module")
async def reconciled(
    temporal_env: WorkflowEnvironment,
    new_database: NewDatabase,
    tmp_path_factory: pytest.TempPathFactory,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    """A platform whose store holds no other test's rows: the reconciler looks at all of them."""
    store = TaskStore(await new_database())
    folder: Path = tmp_path_factory.mktemp("reconciled")
    running = running_platform(temporal_env, store, folder, speed=2_000, credits_profile=credits_profile)
    async with running as platform:
        platform.policy = {"deadline_factor": 5_000.0, "retry_after_seconds": [0.05, 0.05, 0.05]}
        platform.read_seconds = 1.0
        for gpu_type in ("rtx4090", "a100"):
            await platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
        async with platform.worker():
            yield platform
    await store.close()


async def reconcile(platform: Platform, **order: Any) -> ReconcileResult:
    """Run one pass and wait until its give-backs have ended."""
    passing: Handle = await platform.client.start_workflow(
        RECONCILE_WORKFLOW,
        ReconcileOrder(**{**ON_ONE_PASS, **order}),
        id=unique("reconcile"),
        task_queue=platform.task_queue,
        result_type=ReconcileResult,
    )
    result: ReconcileResult = await passing.result()
    await check_histories(platform, passing)
    for task_id in result.task_ids:
        handle: Handle = platform.client.get_workflow_handle(give_back_id_of(task_id))
        await handle.result()
        await check_histories(platform, handle)
    return result


@dataclass(frozen=True)
class Step:
    """A call that is out when its run is terminated. `acts`: whether the service had acted on it by then."""

    route: str
    acts: bool
    after_cancel: bool = False
    without_hold: bool = False
    """The hold is made to expire, so that the delivery is charged without it."""

    def __str__(self) -> str:
        return f"{self.route} {'after' if self.acts else 'before'}"


IMAGE_STEPS = [
    *(Step(route, acts) for route in ("submit_job", "estimate", "pre_deduct", "commit") for acts in (False, True)),
    *(Step(route, acts, after_cancel=True) for route in ("cancel_job", "cancel_hold") for acts in (False, True)),
    *(Step("charge", acts, without_hold=True) for acts in (False, True)),
]
TRAINING_STEPS = [
    *(
        Step(route, acts)
        for route in ("create_training", "estimate", "pre_deduct", "start_training", "commit")
        for acts in (False, True)
    ),
    *(Step(route, acts, after_cancel=True) for route in ("cancel_training", "cancel_hold") for acts in (False, True)),
]


async def hanging(platform: Platform, task: dict[str, Any], step: Step) -> tuple[Handle, Fault]:
    """A task whose calls of this step get no answer, with the first one out."""
    task_id = task["task_id"]
    admin = platform.simulators.admin
    if step.after_cancel or step.without_hold:
        await admin.comfyui.fault("job_stall", task_id=task_id)
    fault = await platform.service_of(step.route).fault(
        "delay",
        route=step.route,
        seconds=HANG_SECONDS,
        when="after" if step.acts else "before",
        task_id=task_id,
        times=None,
    )
    keeps_keys = platform.simulators.credits_profile.keeps_keys
    if step == Step("pre_deduct", acts=False) and not keeps_keys:
        # Else it would act after its minute: a second hold, taken when all is over, that no one could know of.
        await admin.credits.fault("drop", route="pre_deduct", task_id=task_id, when="before")
    handle = await platform.start(task)
    if step.after_cancel or step.without_hold:
        await platform.until_held(task_id)
    if step.after_cancel:
        await handle.cancel()
    if step.without_hold:
        await end_open_holds(platform, handle)
        await admin.comfyui.act((await platform.job(handle)).run_id, "finish")
    await platform.until_hit(step.route, fault)
    return handle, fault


async def terminated(platform: Platform, task: dict[str, Any], step: Step) -> str:
    handle, fault = await hanging(platform, task, step)
    if step.acts:
        await platform.until(lambda: _acted(platform, step.route, task["task_id"]))
    await handle.terminate(f"by a test, in {step}")
    await platform.service_of(step.route).remove_fault(fault)
    return task_id_of(handle)


async def _acted(platform: Platform, route: str, task_id: str) -> bool:
    """Whether the service has acted; its answer is still on the way."""
    admin = platform.simulators.admin
    match route:
        case "submit_job" | "create_training":
            return bool(await admin.comfyui.jobs(task_id))
        case "pre_deduct":
            return bool(await admin.credits.holds(task_id))
        case "commit" | "cancel_hold":
            return all(hold.phase != "open" for hold in await admin.credits.holds(task_id))
        case "charge":
            return any(entry.kind == "charge" for entry in await admin.credits.ledger(task_id))
        case _:
            return True


async def all_given_back(platform: Platform, scene: str, steps: list[Step]) -> dict[str, Ending]:
    """Terminate one task in each step, let the reconciler pass once, and check every task's books."""
    makes = platform.image if scene == "image" else platform.training
    ids = await asyncio.gather(*(terminated(platform, makes(), step) for step in steps))
    await asyncio.sleep(PAUSE_SECONDS)  # rows count as quiet after it
    result = await reconcile(platform)
    assert set(ids) <= set(result.task_ids)
    return {str(step): await ended_without_its_run(platform, id_) for step, id_ in zip(steps, ids, strict=True)}


@pytest.mark.slow
async def test_images_terminated_in_each_call_are_given_back(reconciled: Platform) -> None:
    endings = await all_given_back(reconciled, "image", IMAGE_STEPS)
    for step, ending in endings.items():
        # Delivered and charged, or never charged: what happened first decides.
        was_charged = step in ("commit after", "charge before", "charge after")
        assert ending.status is (TaskStatus.COMPLETED if was_charged else TaskStatus.FAILED), step
        assert ending.charged == (24 if was_charged else 0), step
        assert bool(ending.result["result_urls"]) is was_charged, step


@pytest.mark.slow
async def test_trainings_terminated_in_each_call_are_given_back(reconciled: Platform) -> None:
    endings = await all_given_back(reconciled, "training", TRAINING_STEPS)
    for step, ending in endings.items():
        is_completed = step == "commit after"
        assert ending.status is (TaskStatus.COMPLETED if is_completed else TaskStatus.FAILED), step


async def test_open_runs_are_left_alone_and_the_stream_shows_the_others(reconciled: Platform) -> None:
    waiting, left = [await waiting_image(reconciled) for _ in range(2)]
    await left.terminate("by a test")
    await asyncio.sleep(PAUSE_SECONDS)
    found = (await reconcile(reconciled)).task_ids
    assert task_id_of(left) in found and task_id_of(waiting) not in found
    ending = await ended_without_its_run(reconciled, task_id_of(left))
    assert ending.kinds[-2:] == ["credits.updated processing", "task.failed processing"]
    assert ending.code == "internal" and "internal" in ending.exceptions
    assert (await waiting.describe()).status is WorkflowExecutionStatus.RUNNING
    assert (await reconcile(reconciled)).task_ids == []
    await reconciled.cancel(waiting)
    await ended(reconciled, waiting)


async def waiting_image(platform: Platform) -> Handle:
    task_id = unique("image")
    await platform.simulators.admin.comfyui.fault("job_stall", task_id=task_id)
    handle = await platform.start_waiting_image(task_id=task_id)
    await platform.until_stage(handle, "processing")
    return handle


async def test_a_second_run_under_the_id_hides_nothing_that_the_first_one_left(reconciled: Platform) -> None:
    """Pitfall 24: the newest run under an id need not be the one that claimed it."""
    handle = await waiting_image(reconciled)
    task_id = task_id_of(handle)
    await handle.terminate("by a test")
    await started_again(reconciled, reconciled.image(task_id=task_id))
    await asyncio.sleep(PAUSE_SECONDS)
    assert task_id in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task_id)
    assert ending.status is TaskStatus.FAILED and "terminated" in str(ending.events[-1].message)


async def started_again(platform: Platform, task: dict[str, Any]) -> None:
    """A second run under the id of a task whose run has ended: it ends as soon as it claims the task."""
    second = await platform.start(task, id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE)
    with pytest.raises(Exception, match="execution failed"):
        await second.result()


@pytest.mark.parametrize("first", ["kept", "deleted"])
async def test_a_second_run_under_the_id_hides_nothing_that_a_reset_run_charged(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Of 2,460 points the run that a reset made has charged 2,000: the price is in its history alone."""
    monkeypatch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
    task = (await new_payer(reconciled)).training(max_credits=5_000)
    handle, second_part = await between_two_parts(reconciled, task, is_reset=True)
    await reconciled.client.get_workflow_handle(handle.id).terminate("by a test")
    await reconciled.simulators.admin.credits.remove_fault(second_part)
    await started_again(reconciled, task)
    if first == "deleted":
        hide_run(monkeypatch, handle.first_execution_run_id or "")
    await asyncio.sleep(PAUSE_SECONDS)
    assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 2_460)
    assert ending.result["credits"]["shortfall"] == 0


def hide_run(patch: pytest.MonkeyPatch, hidden: str) -> None:
    """Temporal has deleted this run, whose retention is over."""

    async def without_it(client: Client, workflow_id: str, run_id: str | None = None, **options: Any) -> RunSeen:
        if run_id == hidden:
            raise RPCError("workflow not found", RPCStatusCode.NOT_FOUND, b"")
        return await describe_run(client, workflow_id, run_id, **options)

    patch.setattr(closed_runs, "describe_run", without_it)


async def between_two_parts(
    platform: Platform, task: dict[str, Any], *, is_reset: bool = False
) -> tuple[Handle, Fault]:
    """A training of 2,460 points, whose hold was given back by another caller: 2,000 are charged, and the call for the
    rest is out. `is_reset`: the run was reset before its delivery.
    """
    comfyui, credits = platform.simulators.admin.comfyui, platform.simulators.admin.credits
    await comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    second = await credits.fault("delay", route="charge", task_id=task["task_id"], seconds=HANG_SECONDS, nth=2)
    handle = await start_reporting(platform, task, gpu_hours=40, gpu_hours_used=40)
    run = await until_started(platform, handle)
    # Ordered to finish in its first moment it would end with its own hours.
    await comfyui.act(run.run_id, "lie", fields={"gpu_hours": 40, "gpu_hours_used": 40})
    if is_reset:
        await reset(platform, handle, (await points_of(platform, handle))[-1])
    await cancelled_by_another_caller(platform, Payer(platform, task["tenant_id"]), handle)

    async def is_being_charged() -> bool:
        """A job may be ordered to finish a moment before it stalls."""
        await comfyui.act(run.run_id, "finish")
        return any(fault.fault_id == second.fault_id and fault.hits for fault in await credits.faults())

    await platform.until(is_being_charged)
    return handle, second


async def test_a_continued_run_that_was_terminated_is_given_back(reconciled: Platform) -> None:
    kept, reconciled.policy = reconciled.policy, {**reconciled.policy, "continue_as_new_signals": 3}
    handle = await waiting_image(reconciled)
    reconciled.policy = kept
    for sequence in range(3):
        await reconciled.callback(handle, job_id="another", job_status="processing", sequence=sequence)
    latest: Handle = reconciled.client.get_workflow_handle(handle.id)

    async def is_continued() -> bool:
        return (await latest.describe()).run_id != handle.first_execution_run_id

    await reconciled.until(is_continued)
    await latest.terminate("by a test")
    await asyncio.sleep(PAUSE_SECONDS)
    assert task_id_of(handle) in (await reconcile(reconciled)).task_ids
    assert (await ended_without_its_run(reconciled, task_id_of(handle))).status is TaskStatus.FAILED


async def test_rows_without_any_run_are_closed_page_by_page(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_runs, "PAGE_SIZE", 2)
    monkeypatch.setattr(reconciler, "MAX_CLOSED", 4)
    ids = [new_task_id() for _ in range(7)]
    for task_id in ids:
        await reconciled.store.claim(claim_of(task_id))
    await asyncio.sleep(PAUSE_SECONDS)
    result = await reconcile(reconciled)
    assert result.given_back == len(ids) > len(result.task_ids), "it was continued as new"
    await reconcile(reconciled)
    for task_id in ids:
        row = await reconciled.store.task(task_id)
        assert row is not None and row.status is TaskStatus.FAILED and row.error is not None


async def test_its_schedule_is_made_once_and_finds_what_was_left(reconciled: Platform) -> None:
    settings = Settings(
        _env_file=None,
        task_queue=reconciled.task_queue,
        reconcile_every_seconds=1,
        reconcile_pause_seconds=PAUSE_SECONDS,
    )
    assert await standing_reconciler(reconciled.client, reconciled.task_queue) is None
    handle = await waiting_image(reconciled)
    schedule = reconciled.client.get_schedule_handle(reconcile_id_of(reconciled.task_queue))
    try:
        await ensure_reconciler(reconciled.client, settings.model_copy(update={"reconcile_every_seconds": 3_600}))
        await ensure_reconciler(reconciled.client, settings)
        await handle.terminate("by a test")

        async def is_given_back() -> bool:
            row = await reconciled.store.task(task_id_of(handle))
            return row is not None and row.ended_at is not None

        await reconciled.until(is_given_back)
        await ended_without_its_run(reconciled, task_id_of(handle))
        described = await standing_reconciler(reconciled.client, reconciled.task_queue)
        assert described is not None and await last_pass(reconciled.client, described) is not None
        await schedule.pause(note="by a test")
        await ensure_reconciler(reconciled.client, settings)
        described = await standing_reconciler(reconciled.client, reconciled.task_queue)
        assert described is not None and described.schedule.state.paused
    finally:
        await schedule.delete()


async def test_a_run_terminated_after_its_commit_shows_what_was_returned(reconciled: Platform) -> None:
    """24 points were held and 20 committed: the events add up to that."""
    task = reconciled.image()
    lost = await reconciled.simulators.admin.credits.fault("drop", route="commit", task_id=task["task_id"], times=None)
    handle = await start_reporting(reconciled, task, actual_cost=20)
    await reconciled.until_hit("commit", lost)
    await handle.terminate("by a test")
    await reconciled.simulators.admin.credits.remove_fault(lost)
    await asyncio.sleep(PAUSE_SECONDS)
    assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 20)
    assert sum(event.credits_delta or 0 for event in ending.events) == -20


@pytest.mark.parametrize("is_policy", [False, True], ids=["shortfall", "shortfall charged"])
async def test_a_run_terminated_in_its_commit_has_its_shortfall_recorded(reconciled: Platform, is_policy: bool) -> None:
    """120 points were held and 240 used. No charge was requested: the policy is not in the history's requests."""
    task = reconciled.training()
    lost = await reconciled.simulators.admin.credits.fault("drop", route="commit", task_id=task["task_id"], times=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reconciled.policy, "charge_shortfall", is_policy)
        handle = await start_reporting(reconciled, task, gpu_hours_used=3)
        await reconciled.until_hit("commit", lost)
    await handle.terminate("by a test")
    await reconciled.simulators.admin.credits.remove_fault(lost)
    await asyncio.sleep(PAUSE_SECONDS)
    assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)
    assert ending.result["credits"]["shortfall"] == 120
    assert "shortfall" in ending.exceptions


# Terminated between two parts of a charge


@pytest.mark.parametrize("balance", ["enough", "short"])
async def test_a_run_terminated_while_it_charges_its_shortfall_is_charged_to_the_end_or_leaves_a_record(
    reconciled: Platform, balance: str
) -> None:
    """Of 4,860 points 120 were held and committed. The rest takes three parts; the run ends while the second is out."""
    payer = await new_payer(reconciled)
    credits = reconciled.simulators.admin.credits
    task = payer.training(max_credits=5_000)
    second = await credits.fault("delay", route="charge", task_id=task["task_id"], seconds=HANG_SECONDS, nth=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reconciled.policy, "charge_shortfall", True)
        handle = await start_reporting(reconciled, task, gpu_hours_used=80)
        await reconciled.until_hit("charge", second)
    await handle.terminate("by a test")
    await credits.remove_fault(second)
    if balance == "short":
        await payer.has(100)
    await asyncio.sleep(PAUSE_SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
        assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    charged = 4_860 if balance == "enough" else 2_120
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, charged)
    assert ending.result["credits"]["shortfall"] == 4_860 - charged
    recorded = set(ending.exceptions) - {"prices_differ"}
    assert recorded == (set() if balance == "enough" else {"shortfall"})


@pytest.mark.parametrize("ledger", ["by kind", "by reason"])
@pytest.mark.parametrize("balance", ["enough", "short"])
async def test_a_run_terminated_between_two_parts_of_a_charge_is_charged_to_the_end_or_leaves_a_record(
    reconciled: Platform, ledger: str, balance: str
) -> None:
    """2,460 points are charged as 2,000 and 460; the run is terminated while the second is out."""
    payer = await new_payer(reconciled)
    credits = reconciled.simulators.admin.credits
    if ledger == "by reason":
        await credits.fault("plain_ledger", tenant_id=payer.tenant_id)
    task = payer.training(max_credits=5_000)
    handle, second = await between_two_parts(reconciled, task)
    await handle.terminate("by a test")
    await credits.remove_fault(second)
    if balance == "short":
        await payer.has(100)
    await asyncio.sleep(PAUSE_SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
        assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    charged = 2_460 if balance == "enough" else 2_000
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, charged)
    assert ending.result["credits"]["shortfall"] == 2_460 - charged
    recorded = set(ending.exceptions) - {"prices_differ"}  # an estimate may ignore the hours
    assert recorded == (set() if balance == "enough" else {"shortfall"})


async def test_a_charge_that_was_refused_is_not_sent_again(
    reconciled: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part was refused, and the run terminated before it could record that. The payer has points by now."""
    payer = await new_payer(reconciled)
    credits = reconciled.simulators.admin.credits
    task = payer.training(max_credits=5_000)
    await reconciled.simulators.admin.comfyui.fault("job_stall", route="create_training", task_id=task["task_id"])
    handle = await start_reporting(reconciled, task, gpu_hours=40, gpu_hours_used=40)
    run = await until_started(reconciled, handle)
    await cancelled_by_another_caller(reconciled, payer, handle)
    await payer.has(2_100)
    await reconciled.until_settled(handle)

    async def are_both_answered() -> bool:
        await reconciled.simulators.admin.comfyui.act(run.run_id, "finish")
        return await answered(handle, "charge") == 2

    with monkeypatch.context() as patch:
        patch.setattr(reconciled.store, "write", _store_away)
        await reconciled.until(are_both_answered)
        await handle.terminate("by a test")
    await payer.has(5_000)
    await asyncio.sleep(PAUSE_SECONDS)
    monkeypatch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
    assert task["task_id"] in (await reconcile(reconciled)).task_ids
    ending = await ended_without_its_run(reconciled, task["task_id"])
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 2_000)
    assert ending.result["credits"]["shortfall"] == 460
    parts = [seen.key for seen in await credits.requests_seen("charge", task["task_id"])]
    assert parts.count(f"{task['task_id']}:charge:2") == 1


async def _store_away(*_: Any, **__: Any) -> None:
    raise StoreUnavailable("The task store is away.")
