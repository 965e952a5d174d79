"""Image generation and model training on ComfyUI as durable Temporal workflows: the package that callers install.

    TemporalTasks(client)            tasks by Temporal, from a temporalio `Client`
    HttpTasks(base_url, token)       tasks over HTTP, by the gateway
    SyncTasks                        either of them without `async`
    ImageTask, TrainingTask          what to do; results and updates are models too
    TaskError                        what every call may raise; see comfyui_temporal/client/errors.py

Each name is imported at its first use: `comfyui_temporal.contracts` alone loads neither Temporal nor HTTP.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from comfyui_temporal.client.errors import (
        AccessDenied,
        CreditsRefused,
        GatewayUnavailable,
        InvalidInput,
        NamespaceMissing,
        TaskError,
        TaskExists,
        TaskOver,
        TemporalUnavailable,
        Unavailable,
        Undecryptable,
        UnexpectedReply,
        UnknownTask,
        WorkerUnavailable,
    )
    from comfyui_temporal.client.http_tasks import HttpTasks
    from comfyui_temporal.client.interface import Tasks
    from comfyui_temporal.client.models import StartedTask, TaskDetails, TaskOutcome, TaskSummary, TaskUpdate
    from comfyui_temporal.client.sync_tasks import SyncTasks
    from comfyui_temporal.client.temporal_tasks import TemporalTasks
    from comfyui_temporal.contracts.permissions import Scene
    from comfyui_temporal.contracts.tasks import ImageResult, ImageTask, TaskStatus, TrainingResult, TrainingTask
    from comfyui_temporal.contracts.uploads import InputKind, UploadView
    from comfyui_temporal.encryption import PayloadEncryption
    from comfyui_temporal.encryption_keys import EncryptionKey
    from comfyui_temporal.plugin import TasksPlugin

__all__ = [
    "AccessDenied",
    "CreditsRefused",
    "EncryptionKey",
    "GatewayUnavailable",
    "HttpTasks",
    "ImageResult",
    "ImageTask",
    "InputKind",
    "InvalidInput",
    "NamespaceMissing",
    "PayloadEncryption",
    "Scene",
    "StartedTask",
    "SyncTasks",
    "TaskDetails",
    "TaskError",
    "TaskExists",
    "TaskOutcome",
    "TaskOver",
    "TaskStatus",
    "TaskSummary",
    "TaskUpdate",
    "Tasks",
    "TasksPlugin",
    "TemporalTasks",
    "TemporalUnavailable",
    "TrainingResult",
    "TrainingTask",
    "Unavailable",
    "Undecryptable",
    "UnexpectedReply",
    "UnknownTask",
    "UploadView",
    "WorkerUnavailable",
]

_MODULE_OF: Final = {
    **dict.fromkeys(("ImageResult", "ImageTask", "TaskStatus", "TrainingResult", "TrainingTask"), "contracts.tasks"),
    **dict.fromkeys(("StartedTask", "TaskDetails", "TaskOutcome", "TaskSummary", "TaskUpdate"), "client.models"),
    "EncryptionKey": "encryption_keys",
    **dict.fromkeys(("InputKind", "UploadView"), "contracts.uploads"),
    "HttpTasks": "client.http_tasks",
    "PayloadEncryption": "encryption",
    "Scene": "contracts.permissions",
    "SyncTasks": "client.sync_tasks",
    "Tasks": "client.interface",
    "TasksPlugin": "plugin",
    "TemporalTasks": "client.temporal_tasks",
}
"""Every other exported name is an error."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'client.errors')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
