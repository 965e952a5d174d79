"""A Temporal client from our settings and Temporal's environment configuration."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client, Interceptor
from temporalio.runtime import Runtime
from temporalio.service import RetryConfig, RPCError, RPCStatusCode

from comfyui_temporal import connecting
from comfyui_temporal.encryption import encryption_by
from runtime import tracing
from runtime.required_settings import namespace_missing
from runtime.settings import Settings

LOOK_SECONDS: Final = 3.0


async def connect(
    settings: Settings,
    *,
    runtime: Runtime | None = None,
    lazy: bool = False,
    interceptors: Sequence[Interceptor] = (),
    retries: RetryConfig | None = None,
) -> Client:
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
        interceptors=[*tracing.interceptors(), *interceptors],
        retries=retries,
    )


async def check_namespace(client: Client) -> None:
    """Raises CannotStart if the server does not know the client's namespace. Any other answer decides nothing."""
    request = DescribeNamespaceRequest(namespace=client.namespace)
    try:
        await client.workflow_service.describe_namespace(request, timeout=timedelta(seconds=LOOK_SECONDS))
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise namespace_missing(client.namespace, client.service_client.config.target_host) from None
