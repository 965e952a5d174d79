"""The demo: one image and one training at the same time on a local stack, with progress bars and a check of the ledger.

On real ComfyUI servers: one image, which needs no model.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from activities.credits import CreditsClient
from activities.outside_http import OutsideFailure
from activities.tokens import ServiceToken
from comfyui_temporal.client.models import StartedTask, TaskOutcome
from comfyui_temporal.command_line.connection import Connection, open_connection, sentences
from comfyui_temporal.command_line.failures import CommandFailure, ExitCode
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.inputs import read_model
from comfyui_temporal.command_line.reports import outcome_lines, print_failure, print_lines
from comfyui_temporal.command_line.server import server_of, user_of
from comfyui_temporal.command_line.settings import CommandSettings, read_settings
from comfyui_temporal.command_line.terminal import watchers
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus, TrainingTask
from doctor.books import LedgerUnreadable, check_books
from doctor.finding import Finding, Verdict, wrong
from doctor.report import print_findings
from local_stack.dataset import demo_dataset

TENANT: Final = "tenant-demo"
RUN_FOLDER: Final = Path(__file__).parent.parent / ".run"
LIMIT_SECONDS: Final = 900.0
"""Beyond it something is stuck, even at the slowest speed. The demo then fails instead of waiting forever."""


@dataclass(frozen=True)
class DemoTasks:
    """`training` is None on real servers, which may have no model to train."""

    image: ImageTask
    training: TrainingTask | None


def run_demo(stack: StackDescription, folder: Path = RUN_FOLDER, *, page_url: str | None = None) -> int:
    """Run the demo and print it. Returns 0 only if both tasks completed and the ledger agrees. `folder`: `.run`."""
    console = Console()
    try:
        return asyncio.run(_demo(console, stack, folder, page_url))
    except CommandFailure as failure:
        print_failure(Console(stderr=True), failure, as_json=False)
        return int(failure.exit_code)


async def _demo(console: Console, stack: StackDescription, folder: Path, page_url: str | None) -> int:
    settings = read_settings(CommandSettings)
    opened = await open_connection(server_of(stack), settings)
    with sentences(opened):
        tasks = real_tasks(stack) if is_bridged(stack) else simulated_tasks(stack, folder)
        started = [await opened.tasks.start(tasks.image)]
        if tasks.training is not None:
            started.append(await opened.tasks.start(tasks.training))
        _announce(console, opened, page_url, started)
        outcomes = await _followed(console, opened, started)
    for outcome in outcomes:
        console.print()
        print_lines(console, outcome_lines(outcome))
    findings = await _books(stack, outcomes)
    console.print()
    print_findings(console, findings)
    went_well = all(outcome.status is TaskStatus.COMPLETED for outcome in outcomes)
    agree = all(finding.verdict is Verdict.OK for finding in findings)
    return int(ExitCode.COMPLETED if went_well and agree else ExitCode.FAILED)


def is_bridged(stack: StackDescription) -> bool:
    """Whether real ComfyUI servers are behind this stack."""
    return any(name.startswith("gpu-") for name in stack.pids)


def simulated_tasks(stack: StackDescription, folder: Path) -> DemoTasks:
    return demo_tasks(stack, demo_dataset(folder, TENANT))


def real_tasks(stack: StackDescription) -> DemoTasks:
    """One image that any server can make: it needs no model. Raises BadInput as `demo_tasks` does."""
    image: dict[str, Any] = {
        "task_id": f"demo-image-{secrets.token_hex(4)}",
        "tenant_id": TENANT,
        "user_id": user_of(stack, TENANT),
        "template_id": "test-pattern",
        "prompt": "the first picture through the bridge",
        "priority": "accelerated",
    }
    return DemoTasks(read_model(ImageTask, image), None)


def demo_tasks(stack: StackDescription, dataset: Path) -> DemoTasks:
    """The two inputs. Raises BadInput if the stack has no token for the demo's tenant."""
    run = secrets.token_hex(4)
    payer = {"tenant_id": TENANT, "user_id": user_of(stack, TENANT)}
    image: dict[str, Any] = {
        "task_id": f"demo-image-{run}",
        "template_id": "text-to-image",
        "prompt": "a lighthouse in a storm, oil on canvas",
        "resolution": "4k",
        "priority": "accelerated",
        "extras": {"hires_fix": True, "seed": 7},
    }
    training: dict[str, Any] = {
        "task_id": f"demo-training-{run}",
        "template_id": "lora-train",
        "priority": "accelerated",
        "dataset": {"dataset_id": "demo-cats", "source_uri": dataset.absolute().as_uri() + "/"},
        "hyperparameters": {"epochs": 4, "batch_size": 2, "learning_rate": 1e-4},
        "max_credits": 500,
    }
    return DemoTasks(read_model(ImageTask, payer | image), read_model(TrainingTask, payer | training))


def _announce(console: Console, opened: Connection, page_url: str | None, started: list[StartedTask]) -> None:
    if page_url:
        console.print("The live page, with a token of the demo's tenant that lives for minutes:")
        console.print(Text(f"  {page_url}", style="dim"), soft_wrap=True)
    console.print("One image and one training, at the same time:" if len(started) > 1 else "One image:")
    for task in started:
        link = opened.tasks.ui_link(task.workflow_id, task.run_id) or ""
        console.print(Text(f"  {task.task_id}  {link}", style="dim"), soft_wrap=True)


async def _followed(console: Console, opened: Connection, started: list[StartedTask]) -> list[TaskOutcome]:
    with watchers(console, [task.task_id for task in started]) as rows:

        async def one(task: StartedTask) -> TaskOutcome:
            outcome = await follow(opened, task.task_id, rows[task.task_id])
            rows[task.task_id].ended(outcome.status.value)
            return outcome

        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                return list(await asyncio.gather(*(one(task) for task in started)))
        except TimeoutError:
            raise CommandFailure(
                f"The demo's tasks did not end within {LIMIT_SECONDS:g} s: see them in the Temporal UI, and the "
                "stack's logs with `make logs`."
            ) from None


async def _books(stack: StackDescription, outcomes: list[TaskOutcome]) -> list[Finding]:
    """Read through the credits API with a service token of the tenant."""
    reported = {outcome.task_id: outcome.credits for outcome in outcomes if outcome.credits is not None}
    call_for = CallFor(
        task_id="demo", tenant_id=TENANT, user_id=user_of(stack, TENANT) or "", scene=Scene.IMAGE_GENERATE
    )
    try:
        async with CreditsClient(stack.credits_url, ServiceToken(stack.service_tokens[TENANT])) as credits:
            return await check_books(credits, call_for, reported)
    except (OutsideFailure, LedgerUnreadable) as failure:
        return [wrong("ledger", str(failure), "Without the ledger the charges cannot be checked.")]
