"""Tasks whose data Temporal holds encrypted (docs/encryption.md): all that a real server stores is searched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client, WorkflowHistory
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from comfyui_temporal import HttpTasks, TaskError, Undecryptable
from comfyui_temporal.client.submission import start_task
from comfyui_temporal.client.temporal_tasks import TemporalTasks
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.scenes import AnyTask
from comfyui_temporal.contracts.size_budget import MAX_START_BYTES, json_bytes
from comfyui_temporal.contracts.tasks import (
    INPUT_MEMO,
    ImageTask,
    TaskStatus,
    TrainingTask,
    input_sha256_of,
    workflow_id_of,
)
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import TasksPlugin
from runtime.reconciler_schedule import ensure_reconciler, standing_reconciler
from store import TaskStore
from tests.conftest import unique
from tests.workflows.books import ended, ended_without_its_run, runs_of
from tests.workflows.platform import CALLERS, Handle, Platform, running_platform, task_id_of
from tests.workflows.test_replay import RECORDED
from worker import WORKFLOWS

OLD, NEW = EncryptionKey("2030", b"o" * 32), EncryptionKey("2031", b"n" * 32)
SAME_ID = EncryptionKey("2030", b"x" * 32)
MARK = "a lighthouse that only this prompt names"


@pytest_asyncio.fixture
async def encrypting(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> AsyncIterator[Platform]:
    """A platform whose client, gateway and worker have the keys OLD and NEW, and encrypt with OLD."""
    async with platform_with(PayloadEncryption([OLD, NEW]), temporal_env, task_store, tmp_path) as platform:
        yield platform


@asynccontextmanager
async def platform_with(
    encryption: PayloadEncryption, temporal_env: WorkflowEnvironment, store: TaskStore, folder: Path
) -> AsyncIterator[Platform]:
    client = await connected(temporal_env, encryption)
    async with running_platform(temporal_env, store, folder, client=client, speed=2_000) as platform:
        platform.policy = {"deadline_factor": 1_000.0, "retry_after_seconds": [0.05]}
        yield platform


async def connected(environment: WorkflowEnvironment, encryption: PayloadEncryption) -> Client:
    return await Client.connect(environment.client.service_client.config.target_host, plugins=[TasksPlugin(encryption)])


async def started(platform: Platform, task: AnyTask) -> Handle:
    """Started as clients and gateway start it, with memo, summary and search attributes."""
    begun = await start_task(platform.client, task, task_queue=platform.task_queue)
    return platform.client.get_workflow_handle(begun.handle.id, first_execution_run_id=begun.run_id)


def image(platform: Platform) -> ImageTask:
    return ImageTask.model_validate(platform.image(prompt=MARK, extras={"negative_prompt": MARK}))


async def held_by_temporal(platform: Platform, handle: Handle) -> bytes:
    """Everything that the server has of the task: each run's history, description, memo and attributes."""
    stored = b""
    for run in await runs_of(platform, handle):
        execution = WorkflowExecution(workflow_id=run.id, run_id=run.run_id or "")
        described = await platform.client.workflow_service.describe_workflow_execution(
            DescribeWorkflowExecutionRequest(namespace=platform.client.namespace, execution=execution)
        )
        stored += described.SerializeToString()
        async for event in run.fetch_history_events():
            stored += event.SerializeToString()
    return stored


async def undone_workflow_tasks(handle: Handle) -> list[str]:
    """The messages of the workflow tasks that failed, as an operator reads them without any key."""
    return [
        event.workflow_task_failed_event_attributes.failure.message
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED
    ]


async def test_nothing_of_an_image_is_legible_in_temporal(encrypting: Platform) -> None:
    task = image(encrypting)
    async with encrypting.worker():
        handle = await started(encrypting, task)
        ending = await ended(encrypting, handle)
    stored = await held_by_temporal(encrypting, handle)
    [address] = ending.result["result_urls"]
    names = (MARK, "lighthouse", input_sha256_of(task), address, encrypting.simulators.comfyui_url, "negative_prompt")
    assert [name for name in names if name.encode() in stored] == []
    assert handle.id.encode() in stored, "what is searched is the task"
    assert b"2030" in stored and b"tenant-demo" in stored, "key ids and search attributes can be read"


async def test_nothing_of_a_training_and_of_a_failure_is_legible_in_temporal(encrypting: Platform) -> None:
    await encrypting.simulators.admin.comfyui.fault("job_fail", code="node_error", message=f"cannot draw {MARK}")
    training = encrypting.training(
        hyperparameters={"epochs": 4, "batch_size": 1, "learning_rate": 0.001, "trigger": MARK}
    )
    async with encrypting.worker():
        handle = await started(encrypting, TrainingTask.model_validate(training))
        ending = await ended(encrypting, handle)
        outcome = await TemporalTasks(encrypting.client).wait(training["task_id"])
    assert ending.code == "node_error"
    assert MARK in (outcome.sentence or ""), "whoever has the key reads why"
    stored = await held_by_temporal(encrypting, handle)
    assert MARK.encode() not in stored and training["dataset"]["source_uri"].encode() not in stored
    assert b"node_error" in stored, "operators see the code"


async def test_the_hash_of_an_input_is_keyed_in_memo_and_store(encrypting: Platform) -> None:
    task = image(encrypting)
    keyed = PayloadEncryption([OLD]).input_hash(task)
    assert keyed != input_sha256_of(task)
    handle = await started(encrypting, task)
    assert await (await handle.describe()).memo() == {INPUT_MEMO: keyed}
    async with encrypting.worker():
        await ended(encrypting, handle)
        bare = await encrypting.start_image(prompt=MARK)
        await ended(encrypting, bare)
    [memo, of_bare] = [(await (await run.describe()).memo())[INPUT_MEMO] for run in (handle, bare)]
    assert memo == await encrypting.store.claimed_input(task.task_id) == keyed
    assert of_bare == await encrypting.store.claimed_input(task_id_of(bare)), "a start without a memo gets one"


async def test_the_stored_input_is_encrypted_shown_to_callers_and_not_searched(encrypting: Platform) -> None:
    async with encrypting.worker():
        handle = await started(encrypting, image(encrypting))
        await ended(encrypting, handle)
    task_id = task_id_of(handle)

    stored = (await encrypting.store.inputs([task_id]))[task_id]
    async with httpx.AsyncClient(
        base_url=encrypting.gateway_url,
        headers={"authorization": f"Bearer {CALLERS.made_for('tenant-demo', 'user-demo')}"},
    ) as http:
        task = (await http.get(f"/api/v1/tasks/{task_id}")).json()
        by_prompt = (await http.get("/api/v1/tasks", params={"text": MARK})).json()["tasks"]
        by_id = (await http.get("/api/v1/tasks", params={"text": task_id})).json()["tasks"]

    assert stored.document is None and stored.sealed is not None and MARK.encode() not in stored.sealed
    assert task["input"]["prompt"] == MARK
    assert [[found["task_id"] for found in tasks] for tasks in (by_prompt, by_id)] == [[], [task_id]]


async def test_the_same_input_is_one_task_across_keys(encrypting: Platform, temporal_env: WorkflowEnvironment) -> None:
    """Started before encryption, under the old key and again under the new one."""
    task, other = image(encrypting), image(encrypting)
    plain = await connected(temporal_env, PayloadEncryption([OLD], encrypts=False))
    rotated = await connected(temporal_env, PayloadEncryption([NEW, OLD]))
    queue = encrypting.task_queue
    assert (await start_task(plain, task, task_queue=queue)).is_new
    assert (await start_task(encrypting.client, other, task_queue=queue)).is_new
    for client, started_before in ((encrypting.client, task), (rotated, task), (plain, other), (rotated, other)):
        assert not (await start_task(client, started_before, task_queue=queue)).is_new
    async with encrypting.worker():
        for each in (task, other):
            await ended(encrypting, encrypting.client.get_workflow_handle(workflow_id_of(each.task_id)))
    for each in (task, other):
        assert PayloadEncryption([NEW, OLD]).is_hash_of(await encrypting.store.claimed_input(each.task_id), each)


async def test_a_key_is_rotated_in_the_middle_of_a_run(encrypting: Platform, temporal_env: WorkflowEnvironment) -> None:
    admin = encrypting.simulators.admin
    await admin.set_speed(1)
    task = image(encrypting)
    async with encrypting.worker(max_cached_workflows=0, max_concurrent_workflow_tasks=1):
        handle = await started(encrypting, task)
        await encrypting.until_held(task.task_id)
        await encrypting.until_settled(handle)
    encrypting.client = await connected(temporal_env, PayloadEncryption([NEW, OLD]))
    rotated = encrypting.client.get_workflow_handle(handle.id, first_execution_run_id=handle.first_execution_run_id)
    async with encrypting.worker():
        await admin.set_speed(2_000)
        assert (await ended(encrypting, rotated)).status is TaskStatus.COMPLETED
    stored = await held_by_temporal(encrypting, rotated)
    assert b"2030" in stored and b"2031" in stored and MARK.encode() not in stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "says"),
    [([], "which this process does not have"), ([NEW], "which this process does not have"), ([SAME_ID], "another key")],
    ids=["no key", "another id", "another key under the id"],
)
async def test_a_worker_without_the_key_leaves_the_run_to_the_one_that_has_it(
    encrypting: Platform, temporal_env: WorkflowEnvironment, keys: Sequence[EncryptionKey], says: str
) -> None:
    right, wrong = encrypting.client, await connected(temporal_env, PayloadEncryption(keys))
    task = image(encrypting)
    handle = await started(encrypting, task)

    async def failed() -> list[str]:
        return await undone_workflow_tasks(handle)

    encrypting.client = wrong
    async with encrypting.worker():
        [message, *_] = await encrypting.until(failed)
        assert "'2030'" in message and says in message
        with pytest.raises(Undecryptable, match="'2030'"):
            await TemporalTasks(wrong, task_queue=encrypting.task_queue).start(task)
    encrypting.client = right
    async with encrypting.worker():
        assert (await ended(encrypting, handle, exempt={"bug"})).status is TaskStatus.COMPLETED
        with pytest.raises(Undecryptable, match="'2030'"):
            await TemporalTasks(wrong).wait(task.task_id)


async def test_a_call_that_a_worker_without_the_key_takes_is_made_by_another(
    encrypting: Platform, temporal_env: WorkflowEnvironment
) -> None:
    """The worker with the key takes no calls at first, so the other one gets them."""
    right, wrong = encrypting.client, await connected(temporal_env, PayloadEncryption())
    task = image(encrypting)
    async with encrypting.worker(no_remote_activities=True):
        handle = await started(encrypting, task)
        encrypting.client = wrong
        async with encrypting.worker():

            async def refused() -> bool:
                pending = (await handle.describe()).raw_description.pending_activities
                return any("'2030'" in each.last_failure.cause.message for each in pending)

            await encrypting.until(refused)
    encrypting.client = right
    async with encrypting.worker():
        assert (await ended(encrypting, handle, exempt={"bug"})).status is TaskStatus.COMPLETED
    assert len(await encrypting.simulators.admin.comfyui.jobs(task.task_id)) == 1


async def test_a_run_that_began_without_encryption_goes_on_with_it(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path
) -> None:
    async with platform_with(PayloadEncryption(), temporal_env, task_store, tmp_path) as platform:
        await platform.simulators.admin.set_speed(1)
        async with platform.worker():
            handle = await started(platform, image(platform))
            await platform.until_held(task_id_of(handle))
        platform.client = await connected(temporal_env, PayloadEncryption([OLD]))
        async with platform.worker():
            await platform.simulators.admin.set_speed(2_000)
            again = platform.client.get_workflow_handle(handle.id, first_execution_run_id=handle.first_execution_run_id)
            ending = await ended(platform, again)
        assert ending.status is TaskStatus.COMPLETED
        stored = await held_by_temporal(platform, again)
        assert MARK.encode() in stored and b"2030" in stored, "what was stored before stays as it is"


async def test_a_terminated_encrypted_run_is_given_back(encrypting: Platform) -> None:
    await encrypting.simulators.admin.set_speed(1)
    async with encrypting.worker():
        handle = await started(encrypting, image(encrypting))
        await encrypting.until_held(task_id := task_id_of(handle))
        await handle.terminate("by a test")
        order = GiveBackOrder(task_id=task_id)
        await encrypting.client.execute_workflow(
            GIVE_BACK_WORKFLOW, order, id=give_back_id_of(task_id), task_queue=encrypting.task_queue
        )
        ending = await ended_without_its_run(encrypting, task_id)
    assert (ending.status, ending.charged) == (TaskStatus.FAILED, 0)


async def test_encrypted_histories_replay(encrypting: Platform) -> None:
    async with encrypting.worker():
        handle = await started(encrypting, image(encrypting))
        await ended(encrypting, handle)
    history = await handle.fetch_history()
    with_key = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin(PayloadEncryption([NEW, OLD]))], debug_mode=True)
    await with_key.replay_workflow(history)
    with pytest.raises(Exception, match="'2030'"):
        await Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin()], debug_mode=True).replay_workflow(history)


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda path: path.stem)
async def test_histories_from_before_replay_with_keys(recorded: Path) -> None:
    history = json.loads(recorded.read_text())  # noqa: ASYNC240
    workflow_id = history["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    replayer = Replayer(workflows=WORKFLOWS, plugins=[TasksPlugin(PayloadEncryption([NEW]))], debug_mode=True)
    await replayer.replay_workflow(WorkflowHistory.from_json(workflow_id, history))


async def test_the_longest_summary_and_key_id_are_taken(
    encrypting: Platform, temporal_env: WorkflowEnvironment
) -> None:
    """Encrypted, a run's summary must stay below the server's limit for one: 400 bytes by default."""
    longest = PayloadEncryption([EncryptionKey("k" * 64, b"k" * 32)])
    encrypting.client = await connected(temporal_env, longest)
    ids = {name: unique(name).ljust(64, "x") for name in ("task_id", "tenant_id", "user_id", "template_id")}
    training = encrypting.training(**ids, base_model="b" * 64)
    training["dataset"] = {"dataset_id": "d" * 64, "source_uri": training["dataset"]["source_uri"]}
    handle = await started(encrypting, TrainingTask.model_validate(training))
    await handle.terminate("by a test")


async def test_the_largest_input_is_taken(encrypting: Platform) -> None:
    training = encrypting.training()
    training["dataset"]["files"] = [f"{n:05}".ljust(200, "x") for n in range(10_000)]
    missing = MAX_START_BYTES - json_bytes(TrainingTask.model_validate(training))
    training["dataset"]["files"] = [f"{n:05}".ljust(200 + missing // 10_000, "x") for n in range(10_000)]
    task = TrainingTask.model_validate(training)
    assert MAX_START_BYTES - 10_000 < json_bytes(task) <= MAX_START_BYTES
    handle = await started(encrypting, task)
    await handle.terminate("by a test")


async def test_a_task_that_cannot_be_compared_is_not_taken_for_another(
    encrypting: Platform, temporal_env: WorkflowEnvironment
) -> None:
    """It was started without a memo, so only its encrypted input says what it is."""
    task = encrypting.image()
    handle = await encrypting.start(task)
    wrong = TemporalTasks(await connected(temporal_env, PayloadEncryption()), task_queue=encrypting.task_queue)
    with pytest.raises(Undecryptable, match="'2030'"):
        await wrong.start(ImageTask.model_validate(task))
    await handle.terminate("by a test")


async def test_a_gateway_without_the_key_says_so(encrypting: Platform, temporal_env: WorkflowEnvironment) -> None:
    """Another client started the task with a key of its own; no worker has taken it yet."""
    task = image(encrypting)
    stranger = await connected(temporal_env, PayloadEncryption([SAME_ID]))
    await start_task(stranger, task, task_queue=encrypting.task_queue)
    token = CALLERS.made_for(task.tenant_id, task.user_id)
    async with HttpTasks(encrypting.gateway_url, token) as tasks:
        with pytest.raises(TaskError, match="COMFYUI_TEMPORAL_ENCRYPTION_KEYS"):
            await tasks.start(task)
    await stranger.get_workflow_handle(workflow_id_of(task.task_id)).terminate("by a test")


async def test_the_reconcilers_schedule_can_be_renewed_under_another_key(
    encrypting: Platform, temporal_env: WorkflowEnvironment
) -> None:
    settings = encrypting.settings().model_copy(update={"task_queue": encrypting.task_queue})
    for encryption in (PayloadEncryption(), PayloadEncryption([OLD]), PayloadEncryption([NEW])):
        client = await connected(temporal_env, encryption)
        await ensure_reconciler(client, settings)
        assert await standing_reconciler(client, encrypting.task_queue) is not None
    await client.get_schedule_handle(f"reconcile-{encrypting.task_queue}").delete()
