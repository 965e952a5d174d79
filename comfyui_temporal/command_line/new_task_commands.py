"""The commands that start a task: `generate` and `train`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from comfyui_temporal.client.models import StartedTask
from comfyui_temporal.command_line import inputs
from comfyui_temporal.command_line.app import EXIT_CODES, Json, app, checks_before_start, followed, perform
from comfyui_temporal.command_line.connection import Connection, connection
from comfyui_temporal.command_line.failures import ExitCode
from comfyui_temporal.command_line.local_files import with_uploads
from comfyui_temporal.command_line.reports import print_json
from comfyui_temporal.command_line.server import BY_DEFAULT, find_server, user_of
from comfyui_temporal.command_line.settings import CommandSettings, read_settings
from comfyui_temporal.command_line.terminal import confirmation_of
from comfyui_temporal.contracts.scenes import AnyTask
from comfyui_temporal.contracts.start_answer import MAX_WAIT_SECONDS, Reached, WaitFor
from comfyui_temporal.contracts.tasks import ImageTask, TrainingTask

Model = TypeVar("Model", bound=BaseModel)
Prepare = Callable[[Connection], Awaitable[AnyTask]]
"""What is done with the task once there is a connection."""
NoWait = Annotated[bool, typer.Option("--no-wait", help="Start the task and return; `watch` follows it.")]
WaitHeld = Annotated[
    bool,
    typer.Option("--wait-held", help="Start the task and return once its credits are held or refused (60 s at most)."),
]
Tenant = Annotated[str | None, typer.Option(help="The tenant that pays. Local stack: tenant-demo or tenant-other.")]
User = Annotated[str | None, typer.Option(help="Default on the local stack: the tenant's own user.")]
TaskId = Annotated[str | None, typer.Option(help="Default: a new one. The same id and input twice is one task.")]
Priority = Annotated[str | None, typer.Option(help="standard (default) or accelerated.")]
MaxCredits = Annotated[int | None, typer.Option(help="The most this task may cost, in points.")]
InputFile = Annotated[
    str | None, typer.Option("--input", metavar="FILE", help="The whole input as JSON, `-` for standard input.")
]


_MISSING: Final = {
    "tenant_id": "name it with --tenant",
    "prompt": "give it in quotation marks after `generate`",
    "dataset": "name its folder or address with --dataset",
}
_NO_STACK: Final = (
    "no local stack runs in this folder that would know the tenant's user. Start it with `make up`, or name a user "
    "with --user, and your own server with --address"
)
_NO_USER: Final = "name the user with --user: the local stack knows no user of this tenant"


def _read_task(model: type[Model], values: dict[str, Any]) -> Model:
    """The task. On the local stack a tenant's user is known; elsewhere it must be given. Raises BadInput."""
    tenant_id = values.get("tenant_id")
    hints = _MISSING
    if isinstance(tenant_id, str) and "user_id" not in values:
        server = find_server(read_settings(CommandSettings))
        values = values | inputs.given(user_id=user_of(server.stack, tenant_id))
        is_unnamed = server.named_by == BY_DEFAULT
        hints = _MISSING | {"user_id": _NO_STACK if is_unnamed else _NO_USER if server.stack else "name it with --user"}
    return inputs.read_model(model, values, hints)


@app.command(epilog=EXIT_CODES)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the image shows.")] = None,
    *,
    tenant: Tenant = None,
    user: User = None,
    template: Annotated[str | None, typer.Option(help="Template to run; default text-to-image.")] = None,
    resolution: Annotated[str | None, typer.Option(help="sd, hd (default) or 4k.")] = None,
    priority: Priority = None,
    extra: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=VALUE]", help="An extra, e.g. hires_fix. Repeatable.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE|URL[,STRENGTH]", help="A control image; a file is uploaded. Repeatable."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE|URL", help="A file for an extra, e.g. mask=mask.png; uploaded. Repeatable."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK_ID[:STRENGTH]|URL,SHA256[,STRENGTH]",
            help="A model that a training of the tenant made, or a safetensors file at an allowed address. Repeatable.",
        ),
    ] = None,
    images: Annotated[int | None, typer.Option(help="How many images, 1 to 16; each has the same price.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same image.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image must not show.")] = None,
    max_credits: MaxCredits = None,
    task_id: TaskId = None,
    input_file: InputFile = None,
    no_wait: NoWait = False,
    wait_held: WaitHeld = False,
    as_json: Json = False,
) -> None:
    """Start an image task and follow it to its end.

    \b
    Examples:
      comfyui-tasks generate "a cat" --tenant tenant-demo
      comfyui-tasks generate "a cat" --tenant tenant-demo --resolution 4k --priority accelerated --extra hires_fix
      comfyui-tasks generate "a cat" --tenant tenant-demo --images 4 --extra aspect_ratio=16:9
      comfyui-tasks generate "a cat" --tenant tenant-demo --task-id cat-1 --no-wait --json
      comfyui-tasks generate "a cat" --tenant tenant-demo --lora train-cats:0.8
      comfyui-tasks generate "a cat" --tenant tenant-demo --template image-to-image --control sketch.png,0.6
      comfyui-tasks generate --input docs/examples/tasks/image-task.json
    """

    async def work() -> ExitCode:
        values = inputs.read_file(input_file)
        extras = values.get("extras", {})
        extras = (extras if isinstance(extras, dict) else {}) | inputs.named_values("extras", extra or [])
        extras |= inputs.given(seed=seed, negative_prompt=negative_prompt)
        values |= inputs.given(
            prompt=prompt,
            tenant_id=tenant,
            user_id=user,
            template_id=template,
            resolution=resolution,
            priority=priority,
            extras=extras or None,
            controls=inputs.controls(control) if control else None,
            loras=inputs.loras(lora) if lora else None,
            images=images,
            max_credits=max_credits,
            task_id=task_id,
        )
        values = {"task_id": inputs.new_task_id("image"), "template_id": "text-to-image"} | values
        task = _read_task(ImageTask, values)
        files = inputs.named_files(file or [])

        async def prepared(opened: Connection) -> ImageTask:
            return await with_uploads(opened, task, files)

        return await _start(task, prepared, no_wait=no_wait, wait_held=wait_held, as_json=as_json)

    perform(work, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def train(
    *,
    dataset: Annotated[
        str | None, typer.Option(help="Folder or file://, s3://, gs://, az:// address under the tenant's own prefix.")
    ] = None,
    tenant: Tenant = None,
    user: User = None,
    template: Annotated[str | None, typer.Option(help="Template to run; default lora-train.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Model to start from; default base.")] = None,
    dataset_id: Annotated[str | None, typer.Option(help="Default: the last part of the dataset's address.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="Take only this file of the dataset. Repeatable.")] = None,
    manifest: Annotated[
        str | None, typer.Option(help="Take only the files in this JSON array, stored under the tenant's own prefix.")
    ] = None,
    manifest_sha256: Annotated[
        str | None, typer.Option(help="Checksum of the manifest; computed if the manifest is a local file.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="At least 1; default 10.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="At least 1; default 4.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Above 0; default 0.0001.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other hyperparameter. Repeatable.")
    ] = None,
    priority: Priority = None,
    gpu_type: Annotated[str | None, typer.Option(help="Train on this type of GPU only.")] = None,
    max_credits: Annotated[
        int | None, typer.Option(help="Confirm every price up to this many points; without it `confirm` is needed.")
    ] = None,
    resume_from: Annotated[str | None, typer.Option(help="Checkpoint to resume from.")] = None,
    not_before: Annotated[str | None, typer.Option(help="Start no earlier than this ISO 8601 time.")] = None,
    not_after: Annotated[str | None, typer.Option(help="Start no later than this, else the task ends.")] = None,
    task_id: TaskId = None,
    input_file: InputFile = None,
    no_wait: NoWait = False,
    wait_held: WaitHeld = False,
    as_json: Json = False,
) -> None:
    """Start a training task and follow it to its end.

    Without --max-credits the task waits until its price is confirmed with `comfyui-tasks confirm`.

    \b
    Examples:
      comfyui-tasks train --dataset .run/datasets/tenant-demo/cats --tenant tenant-demo --max-credits 500
      comfyui-tasks train --dataset s3://data/tenant-a/cats/ --tenant tenant-a --user ann --epochs 20 --no-wait
      comfyui-tasks train --input docs/examples/tasks/training-task.json
    """

    async def work() -> ExitCode:
        values = inputs.read_file(input_file)
        chosen = {
            "dataset": _dataset(
                values.get("dataset"),
                dataset,
                inputs.given(
                    dataset_id=dataset_id,
                    files=file or None,
                    manifest=inputs.manifest(manifest, manifest_sha256) if manifest else None,
                ),
            ),
            "hyperparameters": _hyperparameters(
                values.get("hyperparameters"),
                inputs.named_values("hyperparameters", parameter or [])
                | inputs.given(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate),
            ),
            "window": inputs.given(not_before=not_before, not_after=not_after) or None,
        }
        values |= inputs.given(
            tenant_id=tenant,
            user_id=user,
            template_id=template,
            base_model=base_model,
            priority=priority,
            gpu_type=gpu_type,
            max_credits=max_credits,
            resume_from=resume_from,
            task_id=task_id,
            **chosen,
        )
        values = {"task_id": inputs.new_task_id("training"), "template_id": "lora-train"} | values
        task = _read_task(TrainingTask, values)
        inputs.check_list_fits(task)
        return await _start(task, no_wait=no_wait, wait_held=wait_held, as_json=as_json)

    perform(work, as_json=as_json)


def _dataset(from_file: Any, address: str | None, chosen: dict[str, Any]) -> Any:
    if address is None and not chosen:
        return from_file
    source_uri = inputs.dataset_address(address) if address else None
    named = inputs.given(dataset_id=inputs.dataset_name(source_uri)) if source_uri else {}
    base = from_file if isinstance(from_file, dict) else {}
    return base | inputs.given(source_uri=source_uri) | named | chosen


def _hyperparameters(from_file: Any, chosen: dict[str, Any]) -> Any:
    if from_file is None:
        return {"epochs": 10, "batch_size": 4, "learning_rate": 1e-4} | chosen
    return from_file | chosen if isinstance(from_file, dict) else from_file


async def _start(
    task: AnyTask, prepared: Prepare | None = None, *, no_wait: bool, wait_held: bool, as_json: bool
) -> ExitCode:
    returns = no_wait or wait_held
    async with connection(read_settings(CommandSettings)) as opened:
        for check in checks_before_start:
            await check(opened)
        task = await prepared(opened) if prepared else task
        wait_for: WaitFor | None = "held" if wait_held else None
        started = await opened.tasks.start(task, wait_for=wait_for, wait_seconds=MAX_WAIT_SECONDS)
        ui_url = opened.tasks.ui_link(started.workflow_id, started.run_id)
        if returns and as_json:
            left_out = None if wait_held else {"reached", "credits", "confirmation"}
            print_json(started.model_dump(mode="json", exclude=left_out) | {"ui_url": ui_url})
            return ExitCode.COMPLETED
        _announce(started, ui_url, Console(stderr=as_json), returns=returns, wait_held=wait_held)
        return ExitCode.COMPLETED if returns else await followed(opened, started.task_id, as_json=as_json)


def _announce(started: StartedTask, ui_url: str | None, console: Console, *, returns: bool, wait_held: bool) -> None:
    console.print(f"{'Started' if started.is_new else 'Already started:'} task {started.task_id}", highlight=False)
    if ui_url:
        console.print(Text(ui_url, style="dim"), soft_wrap=True)
    if wait_held:
        console.print(_sentence_of(started), highlight=False, soft_wrap=True)
    if returns:
        console.print(f"Follow it: comfyui-tasks watch {started.task_id}", highlight=False)


def _sentence_of(started: StartedTask) -> str:
    """What a start that waits reached, as a sentence."""
    match started.reached:
        case Reached.HELD if started.credits is not None:
            return f"{started.credits.held} points are held."
        case Reached.CONFIRMATION if started.confirmation is not None:
            return f"It {confirmation_of(started.task_id, started.confirmation)}"
        case Reached.ENDED:
            return f"It has ended: comfyui-tasks show {started.task_id}"
        case _:
            return "No credits are held yet; the task goes on."
