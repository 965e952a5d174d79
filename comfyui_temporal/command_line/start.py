"""Start a task from the command line: a refusal becomes a sentence with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from temporalio.client import Client

from comfyui_temporal.client import start as task_start
from comfyui_temporal.client.start import Started
from comfyui_temporal.command_line.failures import TaskExists
from comfyui_temporal.contracts.tasks import TASK_QUEUE, ImageTask, TrainingTask

__all__ = ["Started", "start_image", "start_training"]


async def start_image(client: Client, task: ImageTask, *, task_queue: str = TASK_QUEUE) -> Started:
    """Start an image task, or find the run of the same input. Raises TaskExists, RPCError."""
    with _told():
        return await task_start.start_image(client, task, task_queue=task_queue)


async def start_training(client: Client, task: TrainingTask, *, task_queue: str = TASK_QUEUE) -> Started:
    """Start a training task, or find the run of the same input. Raises TaskExists, RPCError."""
    with _told():
        return await task_start.start_training(client, task, task_queue=task_queue)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except task_start.TaskExists as error:
        raise TaskExists(f"{error} Use another task_id, or see it with `comfyui-tasks show {error.task_id}`.") from None
