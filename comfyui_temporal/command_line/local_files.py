"""Local files of an image task: uploaded by the gateway, and named in the task by the addresses of their uploads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.client.errors import InvalidInput, TaskError
from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.contracts.tasks import ImageTask, workflow_id_of
from comfyui_temporal.contracts.uploads import InputKind, is_upload

NO_GATEWAY: Final = (
    "Nothing was started: a local file is uploaded by the gateway, and none is known for this tenant. Set "
    "COMFYUI_TEMPORAL_GATEWAY_URL and COMFYUI_TEMPORAL_GATEWAY_TOKEN, or give an https:// or storage address."
)


def local_path(address: str) -> Path | None:
    """The file on this machine that an address means; None where it is an address of something else."""
    return None if "://" in address or is_upload(address) else Path(address)


async def with_uploads(opened: Connection, task: ImageTask, files: Mapping[str, str]) -> ImageTask:
    """The task, its local control images uploaded, and `files` (extra → path) too. Raises BadInput.

    Where the task was started before, a file that it has already keeps its address: the repeat is the same task.
    """
    controls = {number: path for number, each in enumerate(task.controls) if (path := local_path(each.image_url))}
    if not controls and not files:
        return task
    tasks = opened.gateway.tasks_of(task.tenant_id) if opened.gateway else None
    if tasks is None:
        raise BadInput(NO_GATEWAY)
    before = await _input_before(opened, task.task_id)
    sent, extras = list(task.controls), dict(task.extras)
    async with aclosing(tasks):
        for number, path in controls.items():
            address = await _address_of(tasks, path, InputKind.IMAGE, _found(before, "controls", number, "image_url"))
            sent[number] = sent[number].model_copy(update={"image_url": address})
        for name, text in files.items():
            given, known = local_path(text), _found(before, "extras", name)
            extras[name] = text if given is None else await _address_of(tasks, given, None, known)
    return task.model_copy(update={"controls": sent, "extras": extras})


async def _input_before(opened: Connection, task_id: str) -> Any:
    """The input that the task was started with; None if there is no such task. A continued run has it as `task`."""
    handle = opened.client.get_workflow_handle(workflow_id_of(task_id))
    try:
        async for event in handle.fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            [given, *_] = await opened.client.data_converter.decode(payloads)
            return given.get("task", given) if isinstance(given, dict) else None
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    return None


def _found(value: Any, *places: str | int) -> str | None:
    """What is there in an input of any shape; None if nothing is."""
    for place in places:
        try:
            value = value[place]
        except (KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, str) else None


async def _address_of(tasks: HttpTasks, path: Path, kind: InputKind | None, known: str | None) -> str:
    try:
        if known is not None and is_upload(known) and await _has_content_of(tasks, known, path):
            return known
        return (await tasks.upload(path, kind=kind)).address
    except OSError as error:
        raise BadInput(f"Nothing was started: {path} cannot be read: {error.strerror}.") from None
    except TaskError as error:
        raise BadInput(f"Nothing was started: {path} was not uploaded. {error.sentence}") from None


async def _has_content_of(tasks: HttpTasks, address: str, path: Path) -> bool:
    try:
        checksum = (await tasks.uploaded(address)).sha256
    except InvalidInput:  # it has expired
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == checksum
