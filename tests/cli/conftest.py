"""Small workflows under the real names, so that the command line is tested against every course of a task.

They answer the queries and updates of contract §8; a task's prompt or template selects what it does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import structlog
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker
from typer.testing import CliRunner

from activities.worker_settings import WorkerSettingsActivities
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.server import Server
from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.errors import ErrorDetails
from comfyui_temporal.contracts.start_answer import Reached, StartAnswer, WaitUntilHeld
from comfyui_temporal.contracts.task_store import TaskState
from comfyui_temporal.contracts.tasks import (
    IMAGE_WORKFLOW,
    TRAINING_WORKFLOW,
    CancelTask,
    CancelTaskOutcome,
    Confirmation,
    ConfirmPrice,
    ConfirmPriceOutcome,
    CreditsSummary,
    ImageProgress,
    ImageResult,
    ImageTask,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
    TrainingTask,
)
from comfyui_temporal.contracts.worker_settings import WorkerSettings
from comfyui_temporal.plugin import TasksPlugin
from starter import app
from tests.conftest import unique
from workflows.worker_settings import WorkerSettingsWorkflow

PROJECT = Path(__file__).parents[2]
CREDITS = CreditsSummary(estimated=24, held=24, charged=24, returned=0, pre_deduct_ids=["pd-1"])


@workflow.defn(name=IMAGE_WORKFLOW, sandboxed=False)
class ScriptedImage:
    @workflow.init
    def __init__(self, task: ImageTask) -> None:
        self.task = task
        self.status = TaskStatus.RUNNING
        self.stage = "processing"
        self.progress = 10.0
        self.delivered = False

    @workflow.run
    async def run(self, task: ImageTask) -> ImageResult:
        result = ImageResult(task_id=task.task_id, status=TaskStatus.COMPLETED, attempts=1, credits=CREDITS)
        if task.prompt == "fail":
            failed = result.model_copy(update={"status": TaskStatus.FAILED, "credits": CreditsSummary(estimated=24)})
            sentence = "credits refused the hold: \x1b[2Jbalance too low."
            raise ApplicationError(sentence, failed, type="insufficient_balance", non_retryable=True)
        if task.prompt == "a long story":
            workflow.continue_as_new(task.model_copy(update={"prompt": "a cat"}))
        self.delivered = self.delivered or task.prompt == "a lighthouse at dusk"
        await workflow.wait_condition(lambda: self.delivered or self.status is TaskStatus.CANCELLED)
        if self.status is TaskStatus.CANCELLED:
            return result.model_copy(update={"status": TaskStatus.CANCELLED, "credits": CreditsSummary(estimated=24)})
        self.status, self.stage, self.progress = TaskStatus.COMPLETED, "delivery", 100.0
        return result.model_copy(update={"job_id": "job-1", "result_urls": ["http://127.0.0.1/results/job-1/0.png"]})

    @workflow.signal
    def deliver(self) -> None:
        self.delivered = True

    @workflow.signal
    def advance(self, progress: float) -> None:
        self.progress = progress

    @workflow.query(name="progress")
    def read_progress(self) -> ImageProgress:
        return ImageProgress(
            task_id=self.task.task_id, status=self.status, stage=self.stage, progress=self.progress, attempts=1
        )

    @workflow.query
    def credits(self) -> CreditsSummary:
        return CreditsSummary(estimated=24, held=24)

    @workflow.update
    def wait_until_held(self, _request: WaitUntilHeld) -> StartAnswer:
        if self.task.prompt == "too dear":
            error = ErrorDetails(code="insufficient_balance", message="The balance is 3.", retryable=False)
            return StartAnswer(reached=Reached.ENDED, state=TaskState(version=1, status=TaskStatus.FAILED, error=error))
        held = CreditsSummary(estimated=24, held=24, pre_deduct_count=1)
        return StartAnswer(reached=Reached.HELD, state=TaskState(version=1, status=TaskStatus.QUEUED, credits=held))

    @workflow.update
    def cancel_task(self, order: CancelTask) -> CancelTaskOutcome:
        self.status = TaskStatus.CANCELLED
        return CancelTaskOutcome(outcome="accepted")


@workflow.defn(name=TRAINING_WORKFLOW, sandboxed=False)
class ScriptedTraining:
    @workflow.init
    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self.confirm_by = datetime(2030, 1, 1, tzinfo=UTC)
        self.ceiling = task.max_credits or 0

    @workflow.run
    async def run(self, task: TrainingTask) -> TrainingResult:
        await workflow.wait_condition(lambda: self.ceiling >= 180)
        return TrainingResult(
            task_id=task.task_id,
            status=TaskStatus.COMPLETED,
            training_id="tr-1",
            attempts=1,
            credits=CREDITS,
            output=TrainingOutput(model_path="models/tr-1.safetensors", version="1", metrics={"loss": 0.12}),
        )

    @workflow.query(name="progress")
    def read_progress(self) -> TrainingProgress:
        wanted = Confirmation(estimated_cost=180, current_balance=1000, confirm_by=self.confirm_by)
        return TrainingProgress(
            task_id=self.task.task_id,
            status=TaskStatus.QUEUED,
            confirmation=wanted if self.ceiling < 180 else None,
        )

    @workflow.query
    def credits(self) -> CreditsSummary:
        return CreditsSummary(estimated=180)

    @workflow.update
    def confirm_price(self, order: ConfirmPrice) -> ConfirmPriceOutcome:
        self.ceiling = max(self.ceiling, order.max_credits)
        return ConfirmPriceOutcome(max_credits=self.ceiling)

    @confirm_price.validator
    def _not_lower(self, order: ConfirmPrice) -> None:
        if order.max_credits < 180:
            raise ApplicationError("180 points are asked for, less confirms nothing.", type="input_invalid")


@activity.defn
async def nothing() -> None:
    """Never called: with it the worker polls for activities too, as a whole one does."""


USED = WorkerSettings(
    comfyui_url="http://127.0.0.1:9",
    credits_url="http://127.0.0.1:9",
    callback_base_url="",
    object_store_url="",
    database="",
)
"""What the worker of these tests says that it uses; a test changes it."""


@pytest.fixture(autouse=True)
def no_logs_among_the_output() -> Iterator[None]:
    """Services of this test log in the process whose standard output is judged."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def client(temporal_env: WorkflowEnvironment) -> Client:
    config = temporal_env.client.config()
    config["plugins"] = [TasksPlugin()]
    return Client(**config)


@pytest.fixture(scope="session")
def server(temporal_env: WorkflowEnvironment) -> Server:
    address = temporal_env.client.service_client.config.target_host
    return Server(address, "default", "named by the test")


@pytest_asyncio.fixture(scope="session")
async def opened(client: Client, server: Server) -> AsyncIterator[Connection]:
    """A connection to a task queue that a worker with the scripted workflows serves."""
    queue = unique("queue")
    workflows = [ScriptedImage, ScriptedTraining, WorkerSettingsWorkflow]
    activities = [nothing, WorkerSettingsActivities(USED).worker_settings]
    async with Worker(client, task_queue=queue, workflows=workflows, activities=activities):
        yield Connection(client, server, queue)


def image_task(**changes: Any) -> ImageTask:
    values = {"task_id": unique("image"), "tenant_id": "tenant-a", "user_id": "ann", "template_id": "text-to-image"}
    return ImageTask.model_validate(values | {"prompt": "a cat"} | changes)


def training_task(**changes: Any) -> TrainingTask:
    values = {
        "task_id": unique("training"),
        "tenant_id": "tenant-a",
        "user_id": "ann",
        "template_id": "lora-train",
        "dataset": {"dataset_id": "cats", "source_uri": "file:///data/tenant-a/cats/"},
        "hyperparameters": {"epochs": 1, "batch_size": 1, "learning_rate": 0.1},
    }
    return TrainingTask.model_validate(values | changes)


@dataclass(frozen=True)
class Ended:
    exit_code: int
    out: str
    err: str


def _environment(connection: Connection | None, environment: dict[str, str] | None) -> dict[str, str]:
    named = {"COLUMNS": "100"}
    if connection is not None:
        named["COMFYUI_TEMPORAL_TEMPORAL_ADDRESS"] = connection.server.address
        named["COMFYUI_TEMPORAL_TASK_QUEUE"] = connection.task_queue
    return named | (environment or {})


async def run_command(
    *arguments: str, connection: Connection | None = None, environment: dict[str, str] | None = None
) -> Ended:
    """One command, piped, in a thread of this process: its output is caught, so run one at a time."""
    result = await asyncio.to_thread(
        CliRunner().invoke, app, list(arguments), env=_environment(connection, environment)
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


async def start_process(
    *arguments: str,
    connection: Connection | None = None,
    cwd: Path = PROJECT,
    environment: dict[str, str] | None = None,
) -> asyncio.subprocess.Process:
    """The command line as a script starts it: a process of its own, piped."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROJECT / "starter.py"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, **_environment(connection, environment)},
    )


async def run_process(*arguments: str, cwd: Path = PROJECT, environment: dict[str, str] | None = None) -> Ended:
    """`start_process`, waited for."""
    process = await start_process(*arguments, cwd=cwd, environment=environment)
    out, err = await asyncio.wait_for(process.communicate(), timeout=30)
    return Ended(process.returncode or 0, out.decode(), err.decode())
