"""The typer application, options that commands share, and how a command ends.

A checkout adds its own commands to `app`, and checks to `checks_before_start` (starter.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

import typer
from rich.console import Console

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import CommandFailure, ExitCode, exit_code_of
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.reports import outcome_lines, print_failure, print_json, print_lines
from comfyui_temporal.command_line.terminal import watchers

EXIT_CODES = """\b
Exit codes:
  0  done: the task completed, or the command did what it says
  1  the task failed, or a check found something wrong
  2  bad input: nothing was started
  3  the task was cancelled
  4  Temporal, or a worker behind it, cannot be reached
  5  the task id is taken by another input
  6  no such task
  7  too late: the task was over first
"""

app = typer.Typer(
    name="comfyui-tasks",
    help="Start and follow ComfyUI image and training tasks that run as Temporal workflows.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

CheckBeforeStart = Callable[[Connection], Awaitable[None]]
checks_before_start: list[CheckBeforeStart] = []
"""Each may raise CommandFailure. Then nothing is started."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document; progress goes to standard error.")]


def perform(work: Callable[[], Awaitable[ExitCode]], *, as_json: bool) -> None:
    """Run one command. Its failures are printed as sentences, and the process ends with its exit code."""
    try:
        code = asyncio.run(_awaited(work))
    except CommandFailure as failure:
        print_failure(Console(stderr=True), failure, as_json=as_json)
        code = failure.exit_code
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. A started task continues: see `comfyui-tasks list`.")
        code = ExitCode.INTERRUPTED
    raise typer.Exit(int(code))


async def _awaited(work: Callable[[], Awaitable[ExitCode]]) -> ExitCode:
    return await work()


async def followed(opened: Connection, task_id: str, *, as_json: bool) -> ExitCode:
    """Show a task until it ends, then how it ended."""
    await opened.tasks.find(task_id)  # fails before any bar is drawn
    with watchers(Console(stderr=as_json), [task_id]) as rows:
        outcome = await follow(opened, task_id, rows[task_id])
        rows[task_id].ended(outcome.status.value)
    if as_json:
        print_json(outcome)
    else:
        print_lines(Console(), outcome_lines(outcome))
    return exit_code_of(outcome.status)
