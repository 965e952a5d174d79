"""Who polls a task queue, in all of its partitions.

A plain description of a queue has the pollers of its root partition alone. With four partitions, the server's default
and Temporal Cloud's, that may be half of them.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

from temporalio.api.enums.v1 import DescribeTaskQueueMode, TaskQueueType
from temporalio.api.taskqueue.v1 import PollerInfo, TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

_NOT_OFFERED: Final = (
    RPCStatusCode.UNIMPLEMENTED,
    RPCStatusCode.INVALID_ARGUMENT,
    RPCStatusCode.PERMISSION_DENIED,
)
"""The mode that reads every partition is deprecated: a server may no longer have it."""


async def pollers_of(
    client: Client, task_queue: str, kind: TaskQueueType.ValueType, *, within: timedelta
) -> list[PollerInfo]:
    """The newest poll of each identity. Raises RPCError."""
    # The plain one too: it is newer by some seconds, and has the pollers of worker deployments.
    plain, everywhere = await asyncio.gather(
        client.workflow_service.describe_task_queue(
            DescribeTaskQueueRequest(
                namespace=client.namespace, task_queue=TaskQueue(name=task_queue), task_queue_type=kind
            ),
            timeout=within,
        ),
        _in_all_partitions(client, task_queue, kind, within),
    )
    newest: dict[str, PollerInfo] = {}
    for poller in [*plain.pollers, *everywhere]:
        known = newest.get(poller.identity)
        if known is None or known.last_access_time.ToNanoseconds() < poller.last_access_time.ToNanoseconds():
            newest[poller.identity] = poller
    return list(newest.values())


async def _in_all_partitions(
    client: Client, task_queue: str, kind: TaskQueueType.ValueType, within: timedelta
) -> list[PollerInfo]:
    request = DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=TaskQueue(name=task_queue),
        task_queue_types=[kind],
        api_mode=DescribeTaskQueueMode.DESCRIBE_TASK_QUEUE_MODE_ENHANCED,
        report_pollers=True,
    )
    try:
        seen = await client.workflow_service.describe_task_queue(request, timeout=within)
    except RPCError as error:
        if error.status in _NOT_OFFERED:
            return []
        raise
    return [
        poller
        for version in seen.versions_info.values()
        for of_kind, info in version.types_info.items()
        if of_kind == kind
        for poller in info.pollers
    ]
