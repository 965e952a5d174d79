"""The typer application, options that commands share, and how a command ends.

A checkout adds its own commands to `app`, and checks to `checks_before_start` (starter.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from typer.core import TyperGroup

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import CommandFailure, ExitCode, exit_code_of
from comfyui_temporal.command_line.follow import follow
from comfyui_temporal.command_line.reports import outcome_lines, print_failure, print_json, print_lines
from comfyui_temporal.command_line.settings import be_verbose, use_flags
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

PROGRAM: Final = "comfyui-tasks"
_flags = typer.Typer(add_completion=False)


@_flags.command()
def _taken(
    *,
    address: Annotated[str | None, typer.Option(help="Temporal's host:port.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Temporal's namespace.")] = None,
    task_queue: Annotated[str | None, typer.Option(help="The task queue of the workers.")] = None,
    gateway: Annotated[str | None, typer.Option(help="The gateway whose streams are followed.")] = None,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say which addresses and names are used, and what named them.")
    ] = False,
) -> None:
    """The flags that every command has. Without them: the environment, `.env`, the local stack."""
    use_flags(temporal_address=address, temporal_namespace=namespace, task_queue=task_queue, gateway_url=gateway)
    be_verbose(verbose)


class _Commands(TyperGroup):
    """Every command has the flags of `_taken`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None and all(option.name != "verbose" for option in command.params):
            shared = typer.main.get_command(_flags)
            command.params.extend(option for option in shared.params if option.name != "help")
            command.callback = _with_flags(
                command.callback or (lambda: None), {option.name for option in shared.params}
            )
        return command


def _with_flags(command: Callable[..., Any], names: set[str | None]) -> Callable[..., Any]:
    def run(**given: Any) -> Any:
        _taken(**{name: given.pop(name) for name in names & given.keys() if name})
        return command(**given)

    return run


app = typer.Typer(
    name=PROGRAM,
    cls=_Commands,
    help="Start and follow ComfyUI image and training tasks that run as Temporal workflows.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("comfyui-temporal")
        except PackageNotFoundError:
            number = "(a checkout)"
        typer.echo(f"{PROGRAM} {number}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _program(
    *,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """The program's own options."""


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
