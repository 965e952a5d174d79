"""A Temporal client by settings and Temporal's environment configuration."""

from __future__ import annotations

from typing import Any

from temporalio.client import Client
from temporalio.envconfig import ClientConfig
from temporalio.runtime import Runtime

from comfyui_temporal.plugin import TasksPlugin
from runtime.settings import Settings


async def connect(settings: Settings, *, runtime: Runtime | None = None, lazy: bool = False) -> Client:
    """A client by Temporal's environment configuration, our `temporal_*` settings going before it.

    Raises RuntimeError (temporalio: connection failed) where the server cannot be reached.
    """
    profile = ClientConfig.load_client_connect_config(profile=settings.temporal_profile)
    options: dict[str, Any] = {**profile}
    options["target_host"] = settings.temporal_address or options.get("target_host") or "localhost:7233"
    options["namespace"] = settings.temporal_namespace or options.get("namespace") or "default"
    return await Client.connect(**options, plugins=[TasksPlugin()], runtime=runtime, lazy=lazy)
