"""The shown price is the one that is held: confirming it is enough for a training from the start (contract §5)."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from comfyui_temporal.command_line.terminal import confirmation_of
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.tasks import Confirmation, TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import Payer, entries_of, holds_of, new_payer
from tests.workflows.platform import Handle, Platform, task_id_of

PRINTED = re.compile(r"--max-credits (\d+)`$")


async def shown_price(platform: Platform, handle: Handle) -> int | None:
    """The points that `show` prints for `confirm`, once the task waits for it; None where it goes on without."""

    async def asks_or_runs() -> dict[str, Any] | None:
        progress = await platform.progress(handle)
        runs = await platform.simulators.admin.comfyui.jobs(task_id_of(handle))
        has_begun = bool(runs) and (runs[-1].phase in ("waiting", "working") or runs[-1].is_over)
        return progress if progress["confirmation"] or has_begun else None

    progress = await platform.until(asks_or_runs)
    assert progress is not None
    if progress["confirmation"] is None:
        return None
    printed = PRINTED.search(confirmation_of(task_id_of(handle), Confirmation.model_validate(progress["confirmation"])))
    assert printed is not None
    return int(printed[1])


async def start_priced(
    platform: Platform, payer: Payer, *, estimate: int, table: PriceTable, hours: float, **fields: Any
) -> Handle:
    """A training that costs `estimate` by the service, and by the worker's table what `hours` cost."""
    platform.policy = platform.policy | {"prices": table}
    task = payer.training(max_credits=None, **fields)
    admin = platform.simulators.admin
    fields = {"selected_cost": estimate, "estimated_cost": estimate}
    await admin.credits.fault("alter", route="estimate", tenant_id=payer.tenant_id, fields=fields, times=None)
    lie = {"gpu_hours": hours}
    await admin.comfyui.fault(
        "job_lie",
        route="create_training",
        task_id=task["task_id"],
        at=0,
        reply=lie,
        fields=lie | {"gpu_hours_used": hours},
    )
    return await platform.start(task)


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    estimate=st.integers(0, 2_000),
    base=st.integers(0, 500),
    per_hour=st.integers(0, 200),
    included=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    hours=st.floats(0.6, 40).map(lambda hours: round(hours, 3)),
    priority=st.sampled_from(["standard", "accelerated"]),
)
@example(estimate=0, base=120, per_hour=60, included=1.0, hours=0.6, priority="standard")
@example(estimate=120, base=120, per_hour=60, included=1.0, hours=1.5, priority="standard")
@example(estimate=0, base=0, per_hour=0, included=1.0, hours=1.0, priority="standard")
async def test_confirming_what_is_shown_holds_the_training(
    brisk_platform: Platform,
    estimate: int,
    base: int,
    per_hour: int,
    included: float,
    hours: float,
    priority: str,
) -> None:
    """With a balance of exactly that price: one hold, the larger of both prices, and no shortfall at the end."""
    policy = brisk_platform.policy
    table = PriceTable(training_base=base, points_per_gpu_hour=per_hour, included_gpu_hours=included)
    price = table.training(base_model="base", accelerated=priority == "accelerated", gpu_hours=hours)
    payer = await new_payer(brisk_platform, max(estimate, price))
    try:
        handle = await start_priced(
            brisk_platform, payer, estimate=estimate, table=table, hours=hours, priority=priority
        )
        shown = await shown_price(brisk_platform, handle)
        assert (shown or 0) == max(estimate, price)
        if shown is not None:
            await handle.execute_update("confirm_price", {"max_credits": shown})
        ending = await ended(brisk_platform, handle)
    finally:
        brisk_platform.policy = policy
    assert (ending.code, ending.charged, ending.result["credits"]["shortfall"]) == (None, price, 0), ending
    assert [hold.amount for hold in await holds_of(brisk_platform, handle)] == ([shown] if shown else [])
    assert len(await entries_of(brisk_platform, handle)) == (2 if shown else 0)
    assert ending.exceptions == ([] if estimate == price else ["prices_differ"])


async def test_an_estimate_of_0_falls_back_to_the_table_price(brisk_platform: Platform) -> None:
    """What the payer reads of it: the price, what is missing of it, and the option that costs it."""
    payer = await new_payer(brisk_platform, 100)
    handle = await start_priced(brisk_platform, payer, estimate=0, table=PriceTable(), hours=0.6)
    assert await shown_price(brisk_platform, handle) == 120
    confirmation = (await brisk_platform.progress(handle))["confirmation"]
    assert (confirmation["current_balance"], confirmation["suggest_topup"]) == (100, 20)
    assert {option["priority"]: option["total_cost"] for option in confirmation["options"]}["standard"] == 120
    await payer.has(120)
    await handle.execute_update("confirm_price", {"max_credits": 120})
    ending = await ended(brisk_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 120)


async def test_an_image_that_job_and_estimate_call_free_is_free_and_the_three_prices_are_recorded(
    brisk_platform: Platform,
) -> None:
    """Held is the larger of the job's price and the estimate; the table only limits it (contract §5)."""
    payer = await new_payer(brisk_platform, 0)
    task = payer.image()
    admin = brisk_platform.simulators.admin
    await admin.credits.fault("alter", route="estimate", tenant_id=payer.tenant_id, fields={"selected_cost": 0})
    lie: dict[str, Any] = {"reply": {"estimated_cost": 0}, "fields": {"actual_cost": 24}}
    await admin.comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], **lie)
    ending = await ended(brisk_platform, handle := await brisk_platform.start(task))
    assert (ending.status, ending.charged, await holds_of(brisk_platform, handle)) == (TaskStatus.COMPLETED, 0, [])
    assert sorted(ending.exceptions) == ["cost_above_hold", "prices_differ"]


async def test_a_hold_granted_above_its_request_is_used_up_to_the_request(brisk_platform: Platform) -> None:
    payer = await new_payer(brisk_platform)
    task = payer.image(max_credits=24)
    admin = brisk_platform.simulators.admin
    await admin.credits.fault("alter", route="pre_deduct", tenant_id=payer.tenant_id, fields={"frozen_amount": 500})
    await admin.comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], fields={"actual_cost": 400})
    ending = await ended(brisk_platform, await brisk_platform.start(task))
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 24)
    assert "cost_above_hold" in ending.exceptions
