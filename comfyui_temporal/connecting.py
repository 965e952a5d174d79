"""A Temporal client by Temporal's own environment configuration, with this package's plugin.

https://docs.temporal.io/develop/environment-configuration
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from temporalio.client import Client, Interceptor
from temporalio.envconfig import ClientConfig
from temporalio.runtime import Runtime
from temporalio.service import RetryConfig

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
    retries: RetryConfig | None = None,
) -> Client:
    """A client; `address` (`host:port`) and `namespace` take precedence over the environment configuration.

    `retries`: how long the SDK tries a request again; default: its own.

    Raises RuntimeError (temporalio: connection failed) if the server cannot be reached and `lazy` is false.
    """
    options: dict[str, Any] = {**ClientConfig.load_client_connect_config(profile=profile)}
    options["target_host"] = address or options.get("target_host") or DEFAULT_ADDRESS
    options["namespace"] = namespace or options.get("namespace") or DEFAULT_NAMESPACE
    plugins = [TasksPlugin(encryption, interceptors)]
    return await Client.connect(**options, plugins=plugins, runtime=runtime, lazy=lazy, retry_config=retries)
