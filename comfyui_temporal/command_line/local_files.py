"""Local files of an image task: uploaded by the gateway, and named in the task by the addresses of their uploads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

from comfyui_temporal.client.errors import TaskError
from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.contracts.tasks import ImageTask
from comfyui_temporal.contracts.uploads import InputKind, is_upload

NO_GATEWAY: Final = (
    "Nothing was started: a local file is uploaded by the gateway, and none is known for this tenant. Set "
    "COMFYUI_TEMPORAL_GATEWAY_URL and COMFYUI_TEMPORAL_GATEWAY_TOKEN, or give an https:// or storage address."
)


def local_path(address: str) -> Path | None:
    """The file on this machine that an address means; None where it is an address of something else."""
    return None if "://" in address or is_upload(address) else Path(address)


async def with_uploads(opened: Connection, task: ImageTask, files: Mapping[str, str]) -> ImageTask:
    """The task, its local control images uploaded, and `files` (extra → path) too. Raises BadInput."""
    controls = {number: path for number, each in enumerate(task.controls) if (path := local_path(each.image_url))}
    if not controls and not files:
        return task
    tasks = opened.gateway.tasks_of(task.tenant_id) if opened.gateway else None
    if tasks is None:
        raise BadInput(NO_GATEWAY)
    sent, extras = list(task.controls), dict(task.extras)
    async with aclosing(tasks):
        for number, path in controls.items():
            address = await _address_of(tasks, path, InputKind.IMAGE)
            sent[number] = sent[number].model_copy(update={"image_url": address})
        for name, text in files.items():
            given = local_path(text)
            extras[name] = text if given is None else await _address_of(tasks, given, None)
    return task.model_copy(update={"controls": sent, "extras": extras})


async def _address_of(tasks: HttpTasks, path: Path, kind: InputKind | None) -> str:
    try:
        return (await tasks.upload(path, kind=kind)).address
    except OSError as error:
        raise BadInput(f"Nothing was started: {path} cannot be read: {error.strerror}.") from None
    except TaskError as error:
        raise BadInput(f"Nothing was started: {path} was not uploaded. {error.sentence}") from None
