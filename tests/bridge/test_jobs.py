"""An image job through the bridge, from the POST to the picture."""

from __future__ import annotations

from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform


async def test_a_job_is_delivered(bridge: BridgePlatform, native: NativeServer) -> None:
    async with bridge.gpu(native):
        accepted = await bridge.submit()
        state = await bridge.ended(accepted["job_id"])
    assert state["error_details"] is None
    assert state["actual_cost"] == accepted["estimated_cost"] == 18
    picture = await bridge.http.get(state["result_urls"][0])
    assert picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    assert len(await native.admin.runs()) == 1
    await bridge.until(lambda: told(bridge, accepted["task_id"]))
    statuses = bridge.receiver.statuses(accepted["task_id"])
    assert [status for n, status in enumerate(statuses) if status not in statuses[:n]] == [
        "queued",
        "processing",
        "delivery",
    ]
    assert all(arrival.is_genuine for arrival in bridge.receiver.of(accepted["task_id"]))


async def told(bridge: BridgePlatform, task_id: str) -> bool:
    return "delivery" in bridge.receiver.statuses(task_id)
