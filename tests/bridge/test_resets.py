"""Jobs and trainings that an operator resets in Temporal: what was delivered stays."""

from __future__ import annotations

from bridge.calls import COPY_RESULTS
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform, Json
from tests.bridge.resets import reset_before
from tests.bridge.test_cleaning import is_closed
from tests.bridge.test_trainings import MODELS, created, ended, file_of, post_action, state_of


async def test_a_delivered_job_that_is_reset_to_its_copy_keeps_its_picture(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    async with bridge.gpu(native):
        job = await bridge.submit()
        (url,) = (await bridge.ended(job["job_id"]))["result_urls"]
        await bridge.until(lambda: is_closed(bridge, job["job_id"]))
        delivered = (await bridge.http.get(url)).content
        assert delivered
        await reset_before(bridge, job["job_id"], COPY_RESULTS)
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
    assert (await bridge.http.get(url)).content == delivered
    (again,) = state["result_urls"]
    assert (await bridge.http.get(again)).content == delivered


async def test_a_training_that_is_reset_to_its_first_copy_keeps_its_checkpoint_and_is_trained_to_the_end(
    bridge: BridgePlatform, native: NativeServer
) -> None:
    await native.admin.set(models=MODELS)
    async with bridge.gpu(native):
        training_id = (await created(bridge))["training_id"]
        await post_action(bridge, training_id, "start")

        async def first_checkpoint() -> Json | None:
            checkpoint: Json | None = (await state_of(bridge, training_id))["checkpoint"]
            return checkpoint

        checkpoint = await bridge.until(first_checkpoint)
        assert checkpoint is not None
        first = file_of(checkpoint["uri"])
        trained = first.read_bytes()
        assert trained
        assert (await ended(bridge, training_id))["error_details"] is None
        await bridge.until(lambda: is_closed(bridge, training_id))
        await reset_before(bridge, training_id, COPY_RESULTS)
        state = await ended(bridge, training_id)
    assert state["error_details"] is None, state
    assert first.read_bytes() == trained
    assert state["checkpoint"]["step"] == 6
    assert file_of(state["checkpoint"]["uri"]).stat().st_size
    assert file_of(state["output"]["model_path"]).stat().st_size
