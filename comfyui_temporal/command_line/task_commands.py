"""The commands about existing tasks: `watch`, `show`, `list`, `cancel`, `confirm`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from comfyui_temporal.command_line import inputs
from comfyui_temporal.command_line.app import EXIT_CODES, Json, app, followed, perform
from comfyui_temporal.command_line.connection import Connection, connection
from comfyui_temporal.command_line.failures import BadInput, CommandFailure, ExitCode
from comfyui_temporal.command_line.reports import details_lines, print_json, print_lines, print_rows
from comfyui_temporal.command_line.settings import CommandSettings, read_settings
from comfyui_temporal.command_line.terminal import confirmation_of
from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.tasks import CancelTask, Confirmation, ConfirmPrice, TaskStatus

TaskIdArgument = Annotated[str, typer.Argument(metavar="TASK_ID", help="The task's id, without `task-` before it.")]


@app.command(epilog=EXIT_CODES)
def watch(task_id: TaskIdArgument, as_json: Json = False) -> None:
    """Follow a task to its end.

    The exit code says how it ended.

    \b
    Example:
      comfyui-tasks watch cat-1 && echo delivered
    """

    async def work() -> ExitCode:
        known_id = _checked_id(task_id)
        async with connection(read_settings(CommandSettings)) as opened:
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
        known_id = _checked_id(task_id)
        async with connection(read_settings(CommandSettings)) as opened:
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
    """List tasks, newest first.

    If piped, prints one tab-separated line for each task.

    \b
    Examples:
      comfyui-tasks list --tenant tenant-demo --status running
      comfyui-tasks list --scene model.train --limit 100 --json
    """

    async def work() -> ExitCode:
        filters = inputs.given(
            TenantId=tenant,
            UserId=user,
            TaskStatus=status,
            TaskStage=stage,
            Scene=scene,
            TemplateId=template,
            TaskPriority=priority,
        )
        if status is not None and status not in set(TaskStatus):
            raise BadInput("Nothing was listed.", {"status": f"must be one of {', '.join(TaskStatus)}"})
        async with connection(read_settings(CommandSettings)) as opened:
            rows = [row async for row in opened.tasks.list(filters=filters, limit=limit)]
        if as_json:
            print_json([row.model_dump(mode="json") for row in rows])
        else:
            print_rows(Console(), rows)
        return ExitCode.COMPLETED

    perform(work, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def cancel(
    task_id: TaskIdArgument,
    reason: Annotated[str, typer.Option(help="Stored with the task.")] = "",
    as_json: Json = False,
) -> None:
    """Cancel a task and give its credits back.

    Prints `accepted`, or `too_late` if the task was delivered or over first.

    \b
    Example:
      comfyui-tasks cancel cat-1 --reason "wrong prompt"
    """

    async def work() -> ExitCode:
        known_id = _checked_id(task_id)
        wanted = inputs.read_model(CancelTask, {"reason": reason})
        async with connection(read_settings(CommandSettings)) as opened:
            outcome = await opened.tasks.cancel(known_id, wanted.reason)
        if as_json:
            print_json({"task_id": task_id, "outcome": outcome})
        else:
            Console().print(outcome)
        return ExitCode.COMPLETED if outcome == "accepted" else ExitCode.TOO_LATE

    perform(work, as_json=as_json)


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
        known_id = _checked_id(task_id)
        if max_credits is not None:
            inputs.read_model(ConfirmPrice, {"max_credits": max_credits})
        async with connection(read_settings(CommandSettings)) as opened:
            limit = max_credits if max_credits is not None else await _confirmed_price(opened, known_id)
            in_force = await opened.tasks.confirm(known_id, limit)
            wanted = await _confirmation_of(opened, known_id)
        if as_json:
            print_json({"task_id": task_id, "max_credits": in_force})
        else:
            is_short = wanted is not None and wanted.estimated_cost > in_force
            more = f" It costs {wanted.estimated_cost}, so the task keeps waiting." if wanted and is_short else ""
            Console().print(f"Confirmed: up to {in_force} points.{more}", highlight=False)
        return ExitCode.COMPLETED

    perform(work, as_json=as_json)


async def _confirmation_of(opened: Connection, task_id: str) -> Confirmation | None:
    """What the task waits to have confirmed; None if it does not wait, or no worker answers."""
    progress = (await opened.tasks.show(task_id)).progress
    return progress.confirmation if progress else None


async def _confirmed_price(opened: Connection, task_id: str) -> int:
    """The price that the task waits for, after the user has confirmed it in the terminal."""
    wanted = await _confirmation_of(opened, task_id)
    if wanted is None:
        raise BadInput(f"Task {task_id!r} waits for no confirmation now; use --max-credits to raise its ceiling.")
    if not sys.stdin.isatty():
        raise BadInput(f"Task {task_id!r} {confirmation_of(task_id, wanted)}")
    if not typer.confirm(f"{task_id} costs {wanted.estimated_cost} points. Confirm?", err=True):
        raise CommandFailure("Not confirmed: the task keeps waiting.")
    return wanted.estimated_cost


def _checked_id(task_id: str) -> str:
    checked: str = inputs.checked(CallerId, "task_id", task_id)
    return checked
