"""The demo and the commands on the real workflows: simulators, gateway, PostgreSQL, Temporal, a worker."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities.credits import CreditsClient
from activities.tokens import ServiceToken
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.server import server_of
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import CreditsSummary, ImageTask, TaskStatus, TrainingTask
from doctor.books import check_books
from doctor.finding import Verdict
from local_stack.demo import run_demo
from store import TaskStore
from tests.cli.test_tasks import Seen
from tests.waiting import until
from tests.workflows.platform import Platform, running_platform

PAYER = ("tenant-demo", "user-demo")


@pytest_asyncio.fixture(scope="module")
async def whole(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    """One platform for this module, where a training takes some two seconds."""
    folder = tmp_path_factory.mktemp("platform")
    async with running_platform(temporal_env, task_store, folder, speed=1_200) as platform, platform.worker():
        yield platform


@pytest.fixture(scope="module")
def stack(whole: Platform) -> StackDescription:
    """The platform, described as a local stack describes itself."""
    return whole.description()


@pytest.fixture(scope="module")
def real(whole: Platform, stack: StackDescription) -> Connection:
    return Connection(whole.client, server_of(stack), whole.task_queue)


async def test_the_demo_shows_both_tasks_and_that_the_books_agree(
    whole: Platform, stack: StackDescription, capsys: pytest.CaptureFixture[str]
) -> None:
    code = await asyncio.to_thread(run_demo, stack, whole.folder)
    output = capsys.readouterr().out
    assert code == 0, output
    assert re.search(r"demo-image-\w+ +(queued|processing|delivery) +\d+ %", output), (
        "progress is printed in lines where output is piped"
    )
    assert re.search(r"demo-training-\w+ +training +\d+ %", output)
    assert re.search(rf"image +{re.escape(whole.simulators.comfyui_url)}/results/\S+\.png", output)
    assert re.search(r"model +\S+", output)
    assert re.search(r"metrics +.*loss", output)
    assert len(re.findall(r"points +estimated \d+, held \d+, charged \d+, returned \d+", output)) == 2
    assert len(re.findall(r"Temporal UI +http://127.0.0.1:8233/namespaces/default/workflows/task-demo-", output)) == 2
    assert re.search(r"ok +ledger +balance \d+ = sum of", output)
    assert (await whole.simulators.admin.credits.balance_check()).ok


async def test_the_demo_fails_where_a_task_does(
    whole: Platform, stack: StackDescription, capsys: pytest.CaptureFixture[str]
) -> None:
    await whole.simulators.admin.comfyui.fault("job_fail", route="submit_job", code="node_error", node="KSampler")
    await whole.simulators.admin.comfyui.fault("job_refuse", route="create_training", code="model_missing")
    code = await asyncio.to_thread(run_demo, stack, whole.folder)
    output = capsys.readouterr().out
    assert code == 1
    assert "node_error" in output
    assert "model_missing" in output


async def test_the_books_check_fails_where_a_task_reports_another_charge(
    whole: Platform, stack: StackDescription, real: Connection
) -> None:
    started = await real.tasks.start(ImageTask.model_validate(whole.image()))
    outcome = await follow(real, started.task_id, Seen())
    assert outcome.credits is not None
    call_for = CallFor(task_id="books", tenant_id=PAYER[0], user_id=PAYER[1], scene=Scene.IMAGE_GENERATE)
    async with CreditsClient(stack.credits_url, ServiceToken(stack.service_tokens[PAYER[0]])) as credits:
        right = await check_books(credits, call_for, {started.task_id: outcome.credits})
        wrong = await check_books(credits, call_for, {started.task_id: CreditsSummary(charged=1)})
    assert [finding.verdict for finding in right] == [Verdict.OK, Verdict.OK]
    assert [finding.verdict for finding in wrong] == [Verdict.OK, Verdict.WRONG]


async def test_an_image_is_cancelled_and_given_back(whole: Platform, real: Connection) -> None:
    await whole.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    task = ImageTask.model_validate(whole.image())
    await real.tasks.start(task)
    await whole.until_held(task.task_id)
    assert await real.tasks.cancel(task.task_id, "wrong prompt") == "accepted"
    outcome = await follow(real, task.task_id, Seen())
    assert outcome.status is TaskStatus.CANCELLED
    assert outcome.credits is not None
    assert (outcome.credits.charged, outcome.credits.returned) == (0, outcome.credits.held)
    assert await real.tasks.cancel(task.task_id, "again") == "too_late"
    picture = await real.tasks.show(task.task_id)
    assert (picture.task.status, picture.task.ui_url is not None) == ("cancelled", True)


async def test_a_training_asks_for_its_price_and_goes_on_when_it_is_confirmed(
    whole: Platform, real: Connection
) -> None:
    task = TrainingTask.model_validate(whole.training(max_credits=None))
    await real.tasks.start(task)
    seen = Seen()
    following = asyncio.create_task(follow(real, task.task_id, seen))

    async def is_shown() -> bool:
        return any(progress.confirmation for progress in seen.progress)

    await until(is_shown)
    [wanted] = {progress.confirmation.estimated_cost for progress in seen.progress if progress.confirmation}
    assert await real.tasks.confirm(task.task_id, wanted) == wanted
    outcome = await following
    assert outcome.status is TaskStatus.COMPLETED, outcome
    assert outcome.credits is not None
    assert outcome.credits.charged is not None and 0 < outcome.credits.charged <= wanted

    async def listed() -> bool:
        filters = {"TaskId": task.task_id, "TaskStatus": "completed", "Scene": "model.train"}
        return [row.task_id async for row in real.tasks.list(filters=filters, limit=5)] == [task.task_id]

    await until(listed)
