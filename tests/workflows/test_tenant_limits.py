"""A tenant's limits where a task is started past the gateway: its claim is refused."""

from __future__ import annotations

import pytest
from temporalio.client import WorkflowFailureError

from comfyui_temporal.contracts.tenant_limits import TenantLimits
from tests.workflows.payers import new_payer
from tests.workflows.platform import Platform, task_id_of


async def test_a_task_started_past_the_gateway_is_bounded_by_the_worker(platform: Platform) -> None:
    platform.limits = TenantLimits(open_tasks=1)
    payer = await new_payer(platform)
    await platform.simulators.admin.comfyui.fault("job_stall", at=0.1, times=None)
    first = await platform.start(payer.image())
    await platform.until_held(task_id_of(first))
    second = await platform.start(payer.image())
    with pytest.raises(WorkflowFailureError) as failure:
        await second.result()
    assert getattr(failure.value.cause, "type", None) == "quota_exceeded"
    assert "has 1 open tasks, its limit" in str(failure.value.cause)
    task_id = task_id_of(second)
    assert await platform.simulators.admin.comfyui.jobs(task_id) == []
    assert await platform.simulators.admin.credits.holds(task_id) == []
    assert await platform.store.task(task_id) is None
    assert await platform.cancel(first) == "accepted"
    await first.result()
    third = await platform.start(payer.image())
    await platform.until_held(task_id_of(third))
    assert await platform.cancel(third) == "accepted"
