"""A task of several images: one hold, one charge of as many times the price, and all of them handed out."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus, input_document, input_sha256_of
from tests.workflows.books import ended
from tests.workflows.payers import holds_of, new_payer
from tests.workflows.platform import Platform, sent

HD = 18 + 6
IDS = {"task_id": "t", "tenant_id": "a", "user_id": "b", "template_id": "text-to-image", "prompt": "a cat"}


@pytest.mark.on_both_profiles
async def test_several_images_are_held_and_charged_once_each_at_the_price_of_one(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform, 4 * (HD + 8))
    task = payer.image(images=4, extras={"hires_fix": True, "steps": 30})
    handle = await quick_platform.start(task)
    ending = await ended(quick_platform, handle)
    assert (ending.status, ending.charged) == (TaskStatus.COMPLETED, 4 * (HD + 8))
    assert len(set(ending.result["result_urls"])) == 4
    assert len(await holds_of(quick_platform, handle)) == 1
    row = await quick_platform.store.task(task["task_id"])
    assert row is not None
    assert row.prices.job == row.prices.estimate == row.prices.table == 4 * (HD + 8)
    assert [call["body"]["images"] for call in await sent(handle, "submit_job")] == [4]


async def test_a_balance_for_three_of_four_images_begins_nothing(quick_platform: Platform) -> None:
    payer = await new_payer(quick_platform, 4 * HD - 1)
    handle = await quick_platform.start(payer.image(images=4))
    ending = await ended(quick_platform, handle)
    assert (ending.code, ending.charged) == ("insufficient_balance", 0)
    assert await sent(handle, "submit_job") == []


@pytest.mark.parametrize("accelerated", [False, True])
def test_an_estimate_by_its_own_base_price_comes_to_the_table_s_price(accelerated: bool) -> None:
    table = PriceTable(lora=5)
    order = {"resolution": "4k", "accelerated": accelerated, "extras": {"upscaler": "x"}, "loras": 2, "images": 16}
    base = table.image(resolution="4k", accelerated=accelerated, extras={})
    assert base + sum(table.points_of_order(**order).values()) == table.image(**order)  # type: ignore[arg-type]


def test_a_task_of_one_image_is_what_it_was() -> None:
    """A worker that does not know the field takes it, and its hash is that of the task without the field."""
    plain, one = ImageTask.model_validate(IDS), ImageTask.model_validate({**IDS, "images": 1})
    assert "images" not in one.model_dump_json()
    assert input_sha256_of(one) == input_sha256_of(plain)
    assert input_sha256_of(ImageTask.model_validate({**IDS, "images": 2})) != input_sha256_of(plain)
    document = input_document(one)
    assert document is not None and "images" not in document


@pytest.mark.parametrize("images", [0, 17, -1, 1.5, "2", True, None])
def test_a_number_of_images_out_of_range_is_refused(images: object) -> None:
    with pytest.raises(ValidationError, match="images"):
        ImageTask.model_validate({**IDS, "images": images})


def test_seeds_are_as_large_as_comfyuis() -> None:
    assert ImageTask.model_validate({**IDS, "extras": {"seed": 2**64 - 1}}).extras["seed"] == 2**64 - 1
    with pytest.raises(ValidationError, match="64 bits"):
        ImageTask.model_validate({**IDS, "extras": {"seed": 2**64}})
