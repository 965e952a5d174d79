"""`.run/stack.json`: how a stack on this machine describes itself (contract §8)."""

from __future__ import annotations

from comfyui_temporal.contracts.fields import OwnModel


class StackDescription(OwnModel):
    """Everything that a client needs. The file has mode 0600 because it contains secrets."""

    temporal_address: str
    namespace: str
    task_queue: str
    ui_url: str
    comfyui_url: str
    credits_url: str
    gateway_url: str
    database_dsn: str
    callback_secret: str
    pids: dict[str, int] = {}
    """Name of a part → its process id."""
    tokens: dict[str, str] = {}
    """Tenant → JWT of its user with every scope, for the gateway; valid for 24 hours."""
    service_tokens: dict[str, str] = {}
    """Tenant → JWT of its user with every scope, for ComfyUI and the credits service; valid for 24 hours."""
    admin_token: str
    """For the simulators' fault switchboard and clock."""
