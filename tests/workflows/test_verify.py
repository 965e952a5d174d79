"""`python -m doctor.verify` on a real server: what would be stuck on this build is named before it is deployed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio import workflow
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.comfyui import TrainingAccepted
from comfyui_temporal.contracts.continuation import ImageRun, TrainingRun
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, ImageResult, TrainingResult
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.plugin import TasksPlugin
from doctor import verify
from doctor.replay import Bounds, CouldNotLook, replay_namespace
from doctor.verify import THIS_BUILD, exit_code_of, lines_of
from local_stack.ports import any_free_port
from runtime.settings import Settings
from store import TaskStore
from tests.conftest import server_config, temporal_binary, unique
from tests.workflows.books import ended
from tests.workflows.platform import Handle, Platform, running_platform
from workflows.gpu_window import check_gpus
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

PROJECT = Path(__file__).parents[2]
KEYS = "k1:" + "QUFB" * 10 + "QUE="
ENCRYPTED = "encrypted"


@workflow.defn(name="TrainingWorkflow")
class UnpatchedTraining(TrainingWorkflow):
    """A build that makes one more call, and forgot the patch."""

    @workflow.run
    async def run(self, task: TrainingRun) -> TrainingResult:
        return await super().run(task)

    async def create(self) -> TrainingAccepted:
        await check_gpus(self.outside, self.task.gpu_type)
        return await super().create()


@workflow.defn(name="ImageGenerationWorkflow")
class UnreadableImage(ImageGenerationWorkflow):
    """A build that cannot read what today's runs hold, and says so with a caller's text."""

    @workflow.run
    async def run(self, task: ImageRun) -> ImageResult:
        raise KeyError(task.prompt)


@pytest_asyncio.fixture(scope="module")
async def own_server() -> AsyncIterator[WorkflowEnvironment]:
    """A server of this file's own: others leave runs behind that no build goes on with."""
    async with await WorkflowEnvironment.start_local(
        search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
        dev_server_existing_path=temporal_binary(),
        dev_server_extra_args=[*server_config(), "--namespace", ENCRYPTED],
    ) as environment:
        yield environment


@pytest.fixture(scope="module")
def address(own_server: WorkflowEnvironment) -> str:
    return own_server.client.service_client.config.target_host


class Lived:
    """A namespace with an open image, an open training, a completed image, and a run of somebody else."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.client = platform.client
        self.open: dict[str, Handle] = {}


@pytest_asyncio.fixture(scope="module", params=["plain", ENCRYPTED])
async def lived(
    request: pytest.FixtureRequest,
    own_server: WorkflowEnvironment,
    address: str,
    task_store: TaskStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Lived]:
    is_encrypted = request.param == ENCRYPTED
    plugin = TasksPlugin(PayloadEncryption.parse(KEYS)) if is_encrypted else TasksPlugin()
    client = await Client.connect(address, namespace=ENCRYPTED if is_encrypted else "default", plugins=[plugin])
    running = running_platform(own_server, task_store, tmp_path_factory.mktemp("lived"), speed=2_000, client=client)
    async with running as platform, platform.worker():
        platform.policy |= {"deadline_factor": 1_000.0}
        await ended(platform, await platform.start_image(), exempt=["history"] if is_encrypted else ())
        lived = Lived(platform)
        lived.open["image"] = await stalled(platform, platform.image())
        lived.open["training"] = await stalled(platform, platform.training())
        await client.start_workflow("Foreign", id=unique("foreign"), task_queue=unique("nobody"))
        yield lived


async def stalled(platform: Platform, task: dict[str, object]) -> Handle:
    route = "create_training" if "dataset" in task else "submit_job"
    await platform.simulators.admin.comfyui.fault("job_stall", route=route, task_id=str(task["task_id"]), at=0.3)
    handle = await platform.start(task)
    await platform.until_held(str(task["task_id"]))
    await platform.until_settled(handle)
    return handle


async def test_a_good_build_passes(lived: Lived) -> None:
    report = await replay_namespace(lived.client, THIS_BUILD, Bounds())
    assert exit_code_of(report) == 0, lines_of(report)
    assert report.replayed == {"open": 2, "closed": 1}
    assert report.notes == ["1 runs of other workflow types were not replayed: Foreign."]


async def test_an_unpatched_change_is_named_with_its_run(lived: Lived) -> None:
    changed = [UnpatchedTraining if each is TrainingWorkflow else each for each in THIS_BUILD]
    report = await replay_namespace(lived.client, changed, Bounds())
    assert exit_code_of(report) == verify.EXIT_STUCK
    [sentence] = report.failures
    training = lived.open["training"]
    assert training.id in sentence and str(training.first_execution_run_id) in sentence and "open" in sentence
    assert "workflow.patched" in sentence and "docs/versioning.md" in sentence and "\n" not in sentence


async def test_what_cannot_be_read_is_named_without_what_it_carries(lived: Lived) -> None:
    changed = [UnreadableImage if each is ImageGenerationWorkflow else each for each in THIS_BUILD]
    report = await replay_namespace(lived.client, changed, Bounds(closed=0))
    [sentence] = report.failures
    assert lived.open["image"].id in sentence and "cannot replay its history (KeyError)" in sentence
    assert "lighthouse" not in sentence


@pytest.mark.parametrize(
    ("bounds", "says", "left_out"),
    [
        (Bounds(history_bytes=1), "larger than 0 MiB. Raise --megabytes", 3),
        (Bounds(seconds=0), "within 0 s. Raise --seconds", 3),
        (Bounds(closed=0, history_bytes=1), "2 open runs were not replayed", 2),
    ],
)
async def test_what_a_bound_leaves_out_is_said(lived: Lived, bounds: Bounds, says: str, left_out: int) -> None:
    report = await replay_namespace(lived.client, THIS_BUILD, bounds)
    assert exit_code_of(report) == verify.EXIT_NOT_LOOKED
    assert report.replayed == {"open": 0, "closed": 0}
    assert any(says in line for line in report.left_out), report.left_out
    assert sum(int(line.split()[0]) for line in report.left_out) == left_out


@pytest.mark.parametrize("lived", [ENCRYPTED], indirect=True)
async def test_without_the_keys_nothing_is_said_of_the_build(lived: Lived, address: str) -> None:
    without = await Client.connect(address, namespace=ENCRYPTED, plugins=[TasksPlugin()])
    with pytest.raises(CouldNotLook, match="COMFYUI_TEMPORAL_ENCRYPTION_KEYS"):
        await replay_namespace(without, THIS_BUILD, Bounds())


@pytest.mark.parametrize("lived", [ENCRYPTED], indirect=True)
async def test_the_command_ends_by_what_it_found(lived: Lived, address: str) -> None:
    code, out, err = await command(address, lived.client.namespace, KEYS)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "2 open and 1 closed runs were replayed on this build: 3 of them go on."


@pytest.mark.parametrize("lived", [ENCRYPTED], indirect=True)
async def test_a_key_that_only_the_workers_use_is_missed_too(lived: Lived, address: str) -> None:
    """The run's input is plain: its caller has no keys. What the worker wrote into its history is not."""
    without = await Client.connect(address, namespace=ENCRYPTED, plugins=[TasksPlugin()])
    task = lived.platform.image()
    await without.start_workflow(
        "ImageGenerationWorkflow", task, id=f"task-{task['task_id']}", task_queue=lived.platform.task_queue
    )
    await lived.platform.until_held(str(task["task_id"]))
    with pytest.raises(CouldNotLook, match=f"{task['task_id']} cannot be decrypted here"):
        await replay_namespace(without, THIS_BUILD, Bounds())


async def test_a_namespace_that_is_not_there_is_named(address: str) -> None:
    settings = Settings(_env_file=None, temporal_address=address, temporal_namespace="elsewhere")
    with pytest.raises(CouldNotLook, match=r"'elsewhere'.*TEMPORAL_NAMESPACE"):
        await verify.verify(settings, Bounds())


async def test_a_server_that_cannot_be_reached_is_named() -> None:
    nowhere = f"127.0.0.1:{any_free_port()}"
    code, out, err = await command(nowhere, "default", "")
    assert (code, out) == (verify.EXIT_NOT_LOOKED, "")
    assert f"Temporal at {nowhere} cannot be reached" in err and err.count("\n") == 1


async def command(address: str, namespace: str, keys: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    given = {"TEMPORAL_ADDRESS": address, "TEMPORAL_NAMESPACE": namespace} | ({"ENCRYPTION_KEYS": keys} if keys else {})
    environment = {**os.environ, **{f"COMFYUI_TEMPORAL_{name}": value for name, value in given.items()}}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "doctor.verify"),
        cwd=PROJECT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, out.decode(), err.decode()
