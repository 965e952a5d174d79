"""A Temporal client by Temporal's own environment configuration, with this package's plugin.

https://docs.temporal.io/develop/environment-configuration
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from temporalio.client import Client, Interceptor
from temporalio.envconfig import ClientConfig
from temporalio.runtime import Runtime

from comfyui_temporal.encryption import NO_ENCRYPTION, PayloadEncryption
from comfyui_temporal.plugin import TasksPlugin

DEFAULT_ADDRESS: Final = "localhost:7233"
DEFAULT_NAMESPACE: Final = "default"


async def connect(
    *,
    address: str | None = None,
    namespace: str | None = None,
    profile: str | None = None,
    runtime: Runtime | None = None,
    lazy: bool = False,
    encryption: PayloadEncryption = NO_ENCRYPTION,
    interceptors: Sequence[Interceptor] = (),
) -> Client:
    """A client; `address` (`host:port`) and `namespace` take precedence over the environment configuration.

    Raises RuntimeError (temporalio: connection failed) if the server cannot be reached and `lazy` is false.
    """
    options: dict[str, Any] = {**ClientConfig.load_client_connect_config(profile=profile)}
    options["target_host"] = address or options.get("target_host") or DEFAULT_ADDRESS
    options["namespace"] = namespace or options.get("namespace") or DEFAULT_NAMESPACE
    return await Client.connect(**options, plugins=[TasksPlugin(encryption, interceptors)], runtime=runtime, lazy=lazy)
