"""A Temporal client from our settings and Temporal's environment configuration."""

from __future__ import annotations

from temporalio.client import Client
from temporalio.runtime import Runtime

from comfyui_temporal import connecting
from comfyui_temporal.encryption import encryption_by
from runtime import tracing
from runtime.settings import Settings


async def connect(settings: Settings, *, runtime: Runtime | None = None, lazy: bool = False) -> Client:
    """A client from Temporal's environment configuration; our `temporal_*` settings take precedence.

    Raises RuntimeError (temporalio: connection failed) if the server cannot be reached.
    """
    return await connecting.connect(
        address=settings.temporal_address,
        namespace=settings.temporal_namespace,
        profile=settings.temporal_profile,
        runtime=runtime,
        lazy=lazy,
        encryption=encryption_by(settings.encryption_keys),
        interceptors=tracing.interceptors(),
    )
