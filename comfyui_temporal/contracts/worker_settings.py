"""What a worker says of itself when `doctor` asks: the addresses that its tasks use."""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.fields import OwnModel

WORKER_SETTINGS_WORKFLOW: Final = "WorkerSettingsWorkflow"
WORKER_SETTINGS_PREFIX: Final = "doctor-asks-"


class WorkerSettings(OwnModel):
    """Addresses, without any secret. `database` is host, port and name."""

    comfyui_url: str
    credits_url: str
    callback_base_url: str
    object_store_url: str
    database: str
    identity: str = ""
    """The worker's, as Temporal shows it."""
