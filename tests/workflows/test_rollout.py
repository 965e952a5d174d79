"""Two builds side by side: a ramp, a rollback, and every run ends with its ledger balanced (docs/operations.md).

The commands are those of the document, with this test's names in place of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.api.deployment.v1 import WorkerDeploymentVersion
from temporalio.api.enums.v1 import EventType, TaskQueueType, VersioningBehavior
from temporalio.api.workflowservice.v1 import DescribeWorkerDeploymentVersionRequest
from temporalio.client import WorkflowExecutionStatus, WorkflowHistory
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer

from comfyui_temporal.contracts.comfyui import TrainingAccepted
from comfyui_temporal.contracts.continuation import TrainingRun
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW, GiveBackOrder, give_back_id_of
from comfyui_temporal.contracts.reconcile import RECONCILE_WORKFLOW, ReconcileOrder
from comfyui_temporal.contracts.tasks import TrainingResult
from comfyui_temporal.plugin import TasksPlugin
from runtime.health_page import is_polling
from runtime.required_settings import CannotStart, read_settings
from store import TaskStore
from tests.conftest import temporal_binary, unique
from tests.workflows.books import ended, runs_of
from tests.workflows.platform import FLOWS, Handle, Platform, running_platform, task_id_of
from tests.workflows.record_histories import HISTORIES
from worker import VERSIONED, WORKFLOWS, deployment_of
from workflows.gpu_window import check_gpus
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
PATCH = "gpus-checked-twice"
NAMES = ("COMFYUI_TEMPORAL_DEPLOYMENT_NAME", "COMFYUI_TEMPORAL_BUILD_ID")


@workflow.defn(name="TrainingWorkflow")
class NextTraining(TrainingWorkflow):
    """The next build's training: one more call, behind a patch."""

    @workflow.run
    async def run(self, task: TrainingRun) -> TrainingResult:
        return await super().run(task)

    async def create(self) -> TrainingAccepted:
        if workflow.patched(PATCH):
            await check_gpus(self.outside, self.task.gpu_type)
        return await super().create()


NEXT_FLOWS = (ImageGenerationWorkflow, NextTraining)
FLOWS_OF = {"1.4.0": FLOWS, "1.5.0": NEXT_FLOWS, "1.5.1": NEXT_FLOWS}


def documented(*words: str) -> str:
    """The only command of the document that contains these words."""
    text = OPERATIONS.read_text(encoding="utf-8").partition("## Rolling out")[2].partition("\n## ")[0]
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    [found] = [line for line in blocks.splitlines() if all(word in line for word in words)]
    return found


@dataclass
class Rollout:
    """A deployment of its own on a platform's task queue; `workers` are its builds' running workers."""

    platform: Platform
    deployment: str = field(default_factory=lambda: unique("deployment"))
    workers: dict[str, AsyncExitStack] = field(default_factory=dict)

    async def start(self, build: str) -> None:
        """One worker of a build, that Temporal sees poll with it."""
        self.workers[build] = opened = AsyncExitStack()
        await opened.enter_async_context(self.platform.worker(flows=FLOWS_OF[build], build=(self.deployment, build)))
        await self.platform.until(lambda: self._is_known(build))

    async def stop(self, build: str) -> None:
        await self.workers.pop(build).aclose()

    async def _is_known(self, build: str) -> bool:
        version = WorkerDeploymentVersion(deployment_name=self.deployment, build_id=build)
        client = self.platform.client
        request = DescribeWorkerDeploymentVersionRequest(namespace=client.namespace, deployment_version=version)
        try:
            described = await client.workflow_service.describe_worker_deployment_version(request)
        except RPCError:  # it has not been heard of yet
            return False
        kinds = {queue.type for queue in described.version_task_queues}
        return kinds >= {TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY}

    async def run(self, command: str) -> str:
        """A command of the document; what it prints. Repeated while the server still works on the batch before."""
        named = command.replace("PATCH", PATCH).replace("comfyui", self.deployment)

        async def done() -> str | None:
            code, said = await self._temporal(*shlex.split(named)[1:])
            assert code == 0 or "concurrent batch operations" in said, f"{named}: {said}"
            return said if code == 0 else None

        return str(await self.platform.until(done))

    async def _temporal(self, *arguments: str) -> tuple[int, str]:
        address = self.platform.client.service_client.config.target_host
        process = await asyncio.create_subprocess_exec(
            temporal_binary(),
            *arguments,
            *("--address", address),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, (out + (err if process.returncode else b"")).decode()

    async def until_at(self, builds: dict[Handle, str]) -> None:
        async def arrived() -> bool:
            return [await version_of(handle) for handle in builds] == list(builds.values())

        await self.platform.until(arrived)

    async def until_open(self, build: str, count: int) -> None:
        """Wait until so many runs of the build are open, as the document counts them."""
        command = documented("workflow count").replace("1.5.0", build)
        query = shlex.split(command.replace("comfyui", self.deployment))[-1]

        async def counted() -> bool:
            return (await self.platform.client.count_workflows(query)).count == count

        await self.platform.until(counted)
        assert f"{count}" in await self.run(command)


async def version_of(handle: Handle) -> str | None:
    """The build that the newest run is routed to; None for an unversioned one."""
    info = (await handle.describe()).raw_description.workflow_execution_info.versioning_info
    pinned = info.versioning_override.pinned.version.build_id
    return pinned or info.deployment_version.build_id or None


async def builds_of(platform: Platform, handle: Handle) -> list[str]:
    """The builds that completed the workflow tasks of all runs, each once, in order."""
    builds: list[str] = []
    for run in await runs_of(platform, handle):
        async for event in run.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                done = event.workflow_task_completed_event_attributes
                builds.append(done.deployment_version.build_id)
    return list(dict.fromkeys(builds))


@pytest_asyncio.fixture
async def rollout(temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path) -> AsyncIterator[Rollout]:
    """No worker yet. Jobs run at their real pace until `quickly`: tasks are open for as long as a scenario needs."""
    async with running_platform(temporal_env, task_store, tmp_path, speed=1.0) as platform:
        platform.policy |= {"deadline_factor": 1_000.0, "continue_as_new_signals": 2}
        for gpu_type in ("rtx4090", "a100"):
            await platform.simulators.admin.comfyui.set_gpus(gpu_type, 100)
        rolled = Rollout(platform)
        try:
            yield rolled
        finally:
            for build in list(rolled.workers):
                await rolled.stop(build)


async def quickly(platform: Platform) -> None:
    """From here an image takes a quarter of a second."""
    await platform.simulators.admin.set_speed(2_000)


async def waiting(platform: Platform, begin: Callable[[], Awaitable[Handle]], count: int) -> list[Handle]:
    """So many tasks, each with its credits held and its job begun."""
    handles = [await begin() for _ in range(count)]

    async def all_held() -> bool:
        held = {hold.task_id for hold in await platform.simulators.admin.credits.holds() if hold.phase == "open"}
        return held >= {task_id_of(handle) for handle in handles}

    await platform.until(all_held, seconds=90)
    return handles


async def on_both(platform: Platform, begin: Callable[[], Awaitable[Handle]], at_least: int) -> list[Handle]:
    """Tasks, some begun by either build: their ids decide, so a few more may be needed."""
    handles = await waiting(platform, begin, at_least)
    while len({await version_of(handle) for handle in handles}) < 2:
        handles += await waiting(platform, begin, 1)
        assert len(handles) < at_least + 20, "a ramp of 50 % sends some to either build"
    return handles


async def test_a_ramp_and_a_rollback_lose_nothing(rollout: Rollout) -> None:
    """Runs begun unversioned go over; the ramp splits new ones; after the rollback images stay and trainings return."""
    platform = rollout.platform
    async with platform.worker():
        earlier = [
            *await waiting(platform, platform.start_image, 1),
            *await waiting(platform, platform.start_training, 1),
        ]
        assert [await version_of(handle) for handle in earlier] == [None, None]
    await rollout.start("1.4.0")
    await rollout.run(documented("set-current-version", "1.4.0"))
    assert await is_polling(platform.client, platform.task_queue, platform.client.identity), "its health page is green"
    await rollout.start("1.5.0")
    await rollout.run(documented("set-ramping-version", "50"))
    images = await on_both(platform, platform.start_image, 3)
    trainings = await on_both(platform, platform.start_training, 2)
    begun = {handle: await version_of(handle) for handle in images}
    patched = [handle for handle in trainings if await version_of(handle) == "1.5.0"]
    # The visibility store is behind the runs: the command finds what it lists.
    await rollout.until_open("1.5.0", len(patched) + Counter(begun.values())["1.5.0"])
    await rollout.run(documented("update-options", "PATCH", "pinned"))
    await rollout.until_at(dict.fromkeys(patched, "1.5.0"))
    await rollout.run(documented("set-ramping-version", "--delete"))
    await quickly(platform)
    for handle in [*earlier, *images, *trainings]:
        ending = await ended(platform, handle)
        assert (ending.status, ending.exceptions) == ("completed", []), handle.id
    for handle, build in begun.items():
        assert await builds_of(platform, handle) == [build], "a pinned run, continued as new, stays on its build"
    for handle in trainings:
        assert (await builds_of(platform, handle))[-1] == ("1.5.0" if handle in patched else "1.4.0")
    for handle in earlier:
        assert (await builds_of(platform, handle))[0] == "", "begun unversioned"
        assert (await builds_of(platform, handle))[-1] in {"1.4.0", "1.5.0"}
    assert await behaviours(images + trainings) == Counter(PINNED=len(images), AUTO_UPGRADE=len(trainings))


async def behaviours(handles: list[Handle]) -> Counter[str]:
    """What the workers say of the runs, not what an operator has overridden."""
    found: Counter[str] = Counter()
    for handle in handles:
        info = (await handle.describe()).raw_description.workflow_execution_info.versioning_info
        found[VersioningBehavior.Name(info.behavior).removeprefix("VERSIONING_BEHAVIOR_")] += 1
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_what_a_withdrawn_build_has_begun_is_moved_and_ends(rollout: Rollout) -> None:
    """Many tasks; the new build's only worker goes too early; images are moved, trainings go to the mended build."""
    platform = rollout.platform
    await rollout.start("1.4.0")
    await rollout.run(documented("set-current-version", "1.4.0"))
    await rollout.start("1.5.0")
    await rollout.run(documented("set-ramping-version", "50"))
    images = await on_both(platform, platform.start_image, 16)
    trainings = await on_both(platform, platform.start_training, 6)
    patched = [handle for handle in trainings if await version_of(handle) == "1.5.0"]
    stranded = [handle for handle in images if await version_of(handle) == "1.5.0"]
    await rollout.until_open("1.5.0", len(patched) + len(stranded))
    await rollout.run(documented("set-ramping-version", "--delete"))  # in the wrong order, as in a hurry
    await rollout.run(documented("update-options", "PATCH", "pinned"))
    await rollout.until_at(dict.fromkeys(patched, "1.5.0"))
    await rollout.stop("1.5.0")
    await quickly(platform)
    for handle in set(images) - set(stranded):
        assert (await ended(platform, handle)).status == "completed"
    for handle in stranded + patched:
        assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING, "it waits for its build"
    await rollout.start("1.5.1")
    await rollout.run(documented("set-current-version", "1.5.1"))
    await rollout.run(documented("update-options", "PATCH", "unspecified"))
    await rollout.run(documented("workflow update-options", "auto_upgrade"))
    for handle in [*images, *trainings]:
        ending = await ended(platform, handle)
        assert (ending.status, ending.exceptions) == ("completed", []), handle.id
    await rollout.until_open("1.5.0", 0)


@pytest.mark.slow
async def test_versions_are_switched_off_again(rollout: Rollout) -> None:
    """New runs and trainings go to unversioned workers; images end where they began."""
    platform = rollout.platform
    await rollout.start("1.4.0")
    await rollout.run(documented("set-current-version", "1.4.0"))
    [image] = await waiting(platform, platform.start_image, 1)
    [training] = await waiting(platform, platform.start_training, 1)
    async with platform.worker():
        await rollout.run(documented("set-current-version", "--unversioned"))
        await quickly(platform)
        later = await platform.start_image()
        for handle in (image, training, later):
            assert (await ended(platform, handle)).status == "completed"
        assert await builds_of(platform, image) == ["1.4.0"]
        assert await builds_of(platform, training) == ["1.4.0", ""]
        assert await builds_of(platform, later) == [""]


async def test_an_image_whose_build_is_gone_is_reset_to_the_current_one(rollout: Rollout) -> None:
    platform = rollout.platform
    await quickly(platform)
    await rollout.start("1.4.0")
    await rollout.run(documented("set-current-version", "1.4.0"))
    image = await platform.start_image()
    first = await ended(platform, image)
    await rollout.start("1.5.0")
    await rollout.run(documented("set-current-version", "1.4.0").replace("1.4.0", "1.5.0"))
    await rollout.stop("1.4.0")
    await rollout.run(documented("workflow reset").replace("task-ID", image.id))
    again = platform.client.get_workflow_handle(image.id)
    assert (await asyncio.wait_for(again.result(), 20))["status"] == first.status == "completed"
    assert await platform.simulators.admin.credits.charged(image.id.removeprefix("task-")) == first.charged


@pytest.mark.slow
async def test_give_backs_and_passes_of_the_reconciler_move_on(rollout: Rollout) -> None:
    """A give-back does not wait for the build that began it: its worker goes in the middle of the work."""
    platform = rollout.platform
    await rollout.start("1.4.0")
    await rollout.run(documented("set-current-version", "1.4.0"))
    [left] = await waiting(platform, platform.start_image, 1)
    await platform.until_settled(left)
    await left.terminate("to be given back")
    task_id = left.id.removeprefix("task-")
    fault = await platform.simulators.admin.credits.fault("error", route="cancel_hold", status=503, times=None)
    giving = await platform.client.start_workflow(
        GIVE_BACK_WORKFLOW, GiveBackOrder(task_id=task_id), id=give_back_id_of(task_id), task_queue=platform.task_queue
    )
    looking = await platform.client.start_workflow(
        RECONCILE_WORKFLOW, ReconcileOrder(), id=unique("reconcile"), task_queue=platform.task_queue
    )
    await platform.until_hit("cancel_hold", fault)
    await looking.result()
    await rollout.start("1.5.0")
    await rollout.run(documented("set-current-version", "1.4.0").replace("1.4.0", "1.5.0"))
    await rollout.stop("1.4.0")
    await platform.simulators.admin.remove_faults()
    await giving.result()
    assert await builds_of(platform, giving) == ["1.4.0", "1.5.0"]
    assert await behaviours([giving, looking]) == Counter(AUTO_UPGRADE=2)


@pytest.mark.parametrize("recorded", sorted(HISTORIES.glob("image_*.json")), ids=lambda path: path.stem)
async def test_what_a_versioned_worker_runs_replays_unversioned_histories(recorded: Path) -> None:
    replayer = Replayer(
        workflows=[VERSIONED.get(each, each) for each in WORKFLOWS], plugins=[TasksPlugin()], debug_mode=True
    )
    history = json.loads(recorded.read_text())  # noqa: ASYNC240
    workflow_id = history["events"][0]["workflowExecutionStartedEventAttributes"]["workflowId"]
    await replayer.replay_workflow(WorkflowHistory.from_json(workflow_id, history))


@pytest.mark.parametrize("missing", NAMES)
def test_half_of_a_version_is_refused(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "some-name")
    assert deployment_of(read_settings()) is not None
    monkeypatch.delenv(missing)
    with pytest.raises(CannotStart, match="deployment_name and build_id must be set together"):
        read_settings()


def test_without_a_deployment_workers_are_unversioned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert deployment_of(read_settings()) is None


@pytest.mark.parametrize("name", ["a.b", "a:b", "", "a b", "-a"])
def test_a_deployment_name_that_temporal_would_misread_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES[0], name)
    monkeypatch.setenv(NAMES[1], "1.4.0")
    with pytest.raises(CannotStart, match="deployment_name"):
        read_settings()
