"""The commands about existing tasks: `watch`, `show`, `list`, `cancel`, `open`, `confirm`."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from comfyui_temporal.client.errors import TaskOver, UnknownTask
from comfyui_temporal.client.interface import CancelAnswer
from comfyui_temporal.command_line import inputs
from comfyui_temporal.command_line.app import EXIT_CODES, Json, app, followed, perform
from comfyui_temporal.command_line.connection import Connection, connection
from comfyui_temporal.command_line.failures import BadInput, CommandFailure, ExitCode
from comfyui_temporal.command_line.glances import glances
from comfyui_temporal.command_line.reports import details_lines, print_json, print_lines, print_rows, print_table
from comfyui_temporal.command_line.settings import CommandSettings, read_settings
from comfyui_temporal.command_line.terminal import confirmation_of, printable
from comfyui_temporal.contracts.comfyui import JobStatus, TaskPriority, TrainingStage
from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import (
    WORKFLOW_ID_PREFIX,
    CancelTask,
    Confirmation,
    ConfirmPrice,
    TaskStatus,
)

TaskIdArgument = Annotated[str, typer.Argument(metavar="TASK_ID", help="The task's id, or its workflow's: `task-…`.")]


@app.command(epilog=EXIT_CODES)
def watch(task_id: TaskIdArgument, as_json: Json = False) -> None:
    """Follow a task to its end.

    The exit code says how it ended.

    \b
    Example:
      comfyui-tasks watch cat-1 && echo delivered
    """

    async def work() -> ExitCode:
        async with _task(task_id) as (opened, known_id):
            return await followed(opened, known_id, as_json=as_json)

    perform(work, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def show(task_id: TaskIdArgument, as_json: Json = False) -> None:
    """Show one task.

    Stage and ETA while it runs, then result or failure; points, attempts and the link to the Temporal UI.

    \b
    Example:
      comfyui-tasks show cat-1 --json
    """

    async def work() -> ExitCode:
        async with _task(task_id) as (opened, known_id):
            details = await opened.tasks.show(known_id)
        if as_json:
            print_json(details)
        else:
            print_lines(Console(), details_lines(details))
        return ExitCode.COMPLETED

    perform(work, as_json=as_json)


@app.command("list", epilog=EXIT_CODES)
def list_command(
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    user: Annotated[str | None, typer.Option(help="Only this user's.")] = None,
    status: Annotated[str | None, typer.Option(help="queued, running, completed, failed or cancelled.")] = None,
    stage: Annotated[str | None, typer.Option(help="E.g. processing, training.")] = None,
    scene: Annotated[str | None, typer.Option(help="image.generate or model.train.")] = None,
    template: Annotated[str | None, typer.Option(help="Only tasks of this template.")] = None,
    priority: Annotated[str | None, typer.Option(help="standard or accelerated.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Maximum number of tasks.")] = 20,
    as_json: Json = False,
) -> None:
    """List tasks, newest first: how old each is, what it shows and its points.

    If piped, prints one tab-separated line for each task: id, scene, status, stage, tenant, priority, start.

    \b
    Examples:
      comfyui-tasks list --tenant tenant-demo --status running
      comfyui-tasks list --scene model.train --limit 100 --json
    """

    async def work() -> ExitCode:
        filters = inputs.given(
            TenantId=tenant,
            UserId=user,
            TaskStage=stage,
            Scene=scene,
            TemplateId=template,
            TaskPriority=priority,
        )
        inputs.one_of("status", status, [*TaskStatus])
        by_status = TaskStatus(status) if status else None
        inputs.one_of("stage", stage, [*JobStatus, *TrainingStage])
        inputs.one_of("scene", scene, [*Scene])
        inputs.one_of("priority", priority, [*TaskPriority])
        console = Console()
        async with connection(read_settings(CommandSettings)) as opened:
            rows = [row async for row in opened.tasks.list(status=by_status, filters=filters, limit=limit)]
            if console.is_terminal and not as_json:
                print_table(console, rows, await glances(opened, rows))
                return ExitCode.COMPLETED
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
        else:
            print_rows(rows)
        return ExitCode.COMPLETED

    perform(work, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def cancel(
    task_id: TaskIdArgument,
    reason: Annotated[str, typer.Option(help="Stored with the task.")] = "",
    as_json: Json = False,
) -> None:
    """Cancel a task and give its credits back.

    It is too late once the task was delivered or had ended: then nothing changes, and the exit code is 7.

    \b
    Example:
      comfyui-tasks cancel cat-1 --reason "wrong prompt"
    """

    async def work() -> ExitCode:
        wanted = inputs.read_model(CancelTask, {"reason": reason})
        async with _task(task_id) as (opened, known_id):
            outcome = await opened.tasks.cancel(known_id, wanted.reason)
        if as_json:
            print_json({"task_id": known_id, "outcome": outcome})
        else:
            Console().print(_CANCELLED[outcome].format(known_id), highlight=False, soft_wrap=True)
        return ExitCode.COMPLETED if outcome == "accepted" else ExitCode.TOO_LATE

    perform(work, as_json=as_json)


_CANCELLED: Final[dict[CancelAnswer, str]] = {
    "accepted": "Task {0} is being cancelled: its job is stopped and its credits are given back.",
    "too_late": "Too late: task {0} was delivered or had ended. Nothing was changed; see `comfyui-tasks show {0}`.",
}


@app.command("open", epilog=EXIT_CODES)
def open_command(task_id: TaskIdArgument) -> None:
    """Open a task's picture in the browser, and print its address.

    \b
    Example:
      comfyui-tasks open cat-1
    """

    async def work() -> ExitCode:
        async with _task(task_id) as (opened, known_id):
            details = await opened.tasks.show(known_id)
        outcome = details.outcome
        if outcome is None:
            raise CommandFailure(f"Task {known_id} has not ended: follow it with `comfyui-tasks watch {known_id}`.")
        if not outcome.result_urls:
            raise CommandFailure(f"Task {known_id} has no picture: see `comfyui-tasks show {known_id}`.")
        for url in outcome.result_urls:
            Console().print(Text(printable(url)), soft_wrap=True)
            typer.launch(url)
        return ExitCode.COMPLETED

    perform(work, as_json=False)


@app.command(epilog=EXIT_CODES)
def confirm(
    task_id: TaskIdArgument,
    max_credits: Annotated[
        int | None, typer.Option(help="The most it may cost, in points; can only be raised. Default: asks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Confirm a training's price, so that it starts.

    \b
    Examples:
      comfyui-tasks confirm lora-7                    (shows the price and asks)
      comfyui-tasks confirm lora-7 --max-credits 200
    """

    async def work() -> ExitCode:
        if max_credits is not None:
            inputs.read_model(ConfirmPrice, {"max_credits": max_credits})
        async with _task(task_id) as (opened, known_id):
            limit = max_credits if max_credits is not None else await _confirmed_price(opened, known_id)
            in_force = await opened.tasks.confirm(known_id, limit)
            wanted = await _confirmation_of(opened, known_id)
        if as_json:
            print_json({"task_id": known_id, "max_credits": in_force})
        else:
            is_short = wanted is not None and wanted.estimated_cost > in_force
            keeps = "keeps waiting" if wanted and wanted.confirm_by else "stops at its next checkpoint"
            more = f"It costs {wanted.estimated_cost}, so the task {keeps}." if wanted and is_short else ""
            goes_on = more or "The training goes on."
            Console().print(f"Task {known_id} may cost up to {in_force} points. {goes_on}", highlight=False)
        return ExitCode.COMPLETED

    perform(work, as_json=as_json)


async def _confirmation_of(opened: Connection, task_id: str) -> Confirmation | None:
    """What the task waits to have confirmed; None if it does not wait, or no worker answers."""
    progress = (await opened.tasks.show(task_id)).progress
    return progress.confirmation if progress else None


async def _confirmed_price(opened: Connection, task_id: str) -> int:
    """The price that the task waits for, after the user has confirmed it in the terminal."""
    details = await opened.tasks.show(task_id)
    if details.outcome is not None:
        raise TaskOver(f"Task {task_id!r} is over: its price can no longer be confirmed.")
    wanted = details.progress.confirmation if details.progress else None
    if wanted is None:
        raise BadInput(f"Task {task_id!r} waits for no confirmation now; use --max-credits to raise its ceiling.")
    if not sys.stdin.isatty():
        raise BadInput(f"Task {task_id!r} {confirmation_of(task_id, wanted)}")
    if not typer.confirm(f"{task_id} costs {wanted.estimated_cost} points. Confirm?", err=True):
        raise CommandFailure("Not confirmed: the task keeps waiting.")
    return wanted.estimated_cost


@asynccontextmanager
async def _task(given: str) -> AsyncIterator[tuple[Connection, str]]:
    """The connection and the task's id; `given` may be its workflow's id. Raises BadInput for an id that none has."""
    task_id: str = inputs.checked(CallerId, "task_id", given)
    async with connection(read_settings(CommandSettings)) as opened:
        shorter = task_id.removeprefix(WORKFLOW_ID_PREFIX)
        if shorter not in ("", task_id):
            with suppress(UnknownTask):
                await opened.tasks.find(task_id)
                shorter = task_id
        yield opened, shorter or task_id
