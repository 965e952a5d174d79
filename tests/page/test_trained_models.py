"""What was trained is used in an image: from the model's own card, and from the form, with its price."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from playwright.async_api import Browser, Locator, Page, Route, expect

from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.permissions import Scene
from store import StoredInput
from tests.conftest import unique
from tests.page.conftest import PAYER, Watched, opened
from tests.page.test_cards import token_of
from tests.page.test_form import form_opened, no_datasets, none_listed
from tests.page.test_page import card, is_live
from tests.store.facts import claim_of, end, write_of
from tests.workflows.platform import task_id_of

pytestmark = pytest.mark.browser


async def trained(watched: Watched) -> str:
    """A training of the page's tenant that has completed, in the store alone."""
    task_id, store = unique("trained"), watched.platform.store
    dataset = {"dataset_id": f"cats-of-{task_id}", "source_uri": f"s3://cats/tenant-demo/{task_id}/"}
    given = StoredInput(document={"template_id": "lora-train", "dataset": dataset})
    claim = claim_of(task_id, tenant_id=PAYER[0], user_id=PAYER[1], scene=Scene.MODEL_TRAIN, at=datetime.now(UTC))
    await store.claim(claim, given=given)
    output = TrainingOutput(model_path=f"s3://models/{task_id}.safetensors")
    await store.write(write_of(task_id, end(), status="completed", output=output))
    return task_id


def model(page: Page, place: int) -> Locator:
    return page.get_by_label(f"Trained model {place}")


def strengths(page: Page) -> Locator:
    return page.locator("#loras input:visible")


async def order_sent(page: Page) -> Any:
    async with page.expect_request(lambda request: request.method == "POST") as sent:
        await page.get_by_role("button", name="Start", exact=True).click()
    return (await sent.value).post_data_json


async def test_the_model_of_a_training_is_used_in_an_image_from_its_card(browser: Browser, watched: Watched) -> None:
    handle = await watched.platform.start_training()
    await handle.result()
    training = task_id_of(handle)
    async with opened(browser, watched) as seen:
        page = seen.page
        await form_opened(page)
        await page.get_by_label("Kind").select_option("Training")
        await page.evaluate("(id) => (location.hash = `task=${id}`)", training)
        using = page.locator("#detail").get_by_role("button", name=f"Use in an image: the model of {training}")
        await using.focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("textbox", name="Prompt")).to_be_focused(timeout=10_000)
        await expect(page.get_by_label("Kind")).to_have_value("images")
        await expect(model(page, 1)).to_have_value(training)
        await strengths(page).fill("0.8")
        await page.get_by_role("textbox", name="Prompt").fill("a heron of trained feathers")
        order = await order_sent(page)
        assert order["loras"] == [{"model_id": training, "strength": 0.8}]
        started = page.locator("#started")
        await expect(started).to_have_text(re.compile(r"^image-\w+ started$"), timeout=10_000)
        shown = card(page, str(await started.text_content()).split(maxsplit=1)[0])
        await expect(shown.get_by_text(f"{training} at 0.8")).to_be_visible(timeout=10_000)
        await expect(shown.locator(".status")).to_have_text("completed", timeout=20_000)


async def test_the_button_is_for_whoever_may_start_an_image_and_for_a_model_that_is_ready(
    browser: Browser, watched: Watched
) -> None:
    training = await trained(watched)
    reader = token_of("tenant-demo", "task.read")
    async with opened(browser, watched, fragment=f"#token={reader}") as seen:
        await is_live(seen.page)
        shown = card(seen.page, training)
        await expect(shown.get_by_role("button", name="Copy address")).to_be_visible(timeout=10_000)
        await expect(shown.get_by_role("button", name=re.compile("^Use in an image"))).to_have_count(0)


async def test_the_form_offers_as_many_models_as_the_template_takes_each_once_and_adds_their_price(
    browser: Browser, watched: Watched
) -> None:
    first, second = await trained(watched), await trained(watched)

    async def priced(route: Route) -> None:
        answer = await route.fetch()
        listed = await answer.json()
        for template in listed["templates"]:
            if template["template_id"] == "text-to-image":
                template["loras"] = {"most": 2, "points": 5}
        await route.fulfill(response=answer, body=json.dumps(listed))

    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/templates", priced)
        await form_opened(page)
        price = page.locator("#price")
        await expect(price).to_have_text("24 points", timeout=10_000)
        await expect(strengths(page)).to_have_count(0)
        await expect(page.get_by_label("Trained model 1, +5 points")).to_have_value("")
        await model(page, 1).select_option(first)
        await expect(price).to_have_text("29 points")
        await expect(model(page, 2).locator(f"option[value='{first}']")).to_be_disabled()
        await model(page, 2).select_option(second)
        await expect(price).to_have_text("34 points")
        await expect(model(page, 3)).to_have_count(0)
        await model(page, 1).focus()
        await model(page, 1).select_option("")
        await expect(price).to_have_text("29 points")
        await expect(model(page, 1)).to_be_focused()
        await strengths(page).fill("1.5")
        order = await order_sent(page)
        assert order["loras"] == [{"model_id": second, "strength": 1.5}]
        await page.get_by_label("Template").select_option("test-pattern")
        await expect(page.locator("#loras")).to_be_hidden()
        assert "loras" not in await order_sent(page)


async def test_a_strength_out_of_range_is_not_sent(browser: Browser, watched: Watched) -> None:
    training = await trained(watched)
    async with opened(browser, watched) as seen:
        page = seen.page
        await form_opened(page)
        await model(page, 1).select_option(training)
        for wrong in ("2.5", "-1", ""):
            await strengths(page).fill(wrong)
            assert not await page.evaluate("document.getElementById('start-form').checkValidity()")


async def test_where_no_template_takes_a_model_the_page_says_so(browser: Browser, watched: Watched) -> None:
    training = await trained(watched)

    async def none_takes(route: Route) -> None:
        answer = await route.fetch()
        listed = await answer.json()
        for template in listed["templates"]:
            template["loras"] = None
        await route.fulfill(response=answer, body=json.dumps(listed))

    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/templates", none_takes)
        await is_live(page)
        await card(page, training).get_by_role("button", name=re.compile("^Use in an image")).click()
        await expect(page.locator("#problem")).to_have_text("No template here takes a trained model.", timeout=10_000)
        await page.unroute("**/api/v1/templates")
        await page.route("**/api/v1/templates", none_listed)
        await page.reload()
        await is_live(page)
        await card(page, training).get_by_role("button", name=re.compile("^Use in an image")).click()
        await expect(model(page, 1)).to_have_value(training, timeout=10_000)
        await expect(page.locator("#price")).to_have_text(re.compile("not known here yet"))


async def test_models_are_offered_in_chinese_on_a_small_screen_and_a_failed_list_leaves_the_form_usable(
    browser: Browser, watched: Watched
) -> None:
    training = await trained(watched)
    screen: Any = {"width": 360, "height": 740}
    async with opened(browser, watched, viewport=screen, locale="zh-CN") as seen:
        page = seen.page
        await expect(page.locator("#connection")).to_have_text("实时", timeout=10_000)
        await card(page, training).get_by_role("button", name=f"用于图像：{training} 的模型").click()
        await expect(page.get_by_label("训练得到的模型 1")).to_have_value(training, timeout=10_000)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360

        async def refused(route: Route) -> None:
            await route.fulfill(status=503, content_type="application/problem+json", json={"code": "store_unavailable"})

        await page.route("**/api/v1/tasks?scene=model.train*", refused)
        await page.reload()
        await expect(page.locator("#connection")).to_have_text("实时", timeout=10_000)
        await page.locator("#start > summary").click()
        await expect(page.locator("#price")).to_have_text("24 积分", timeout=10_000)
        await expect(page.locator("#loras")).to_be_hidden()


async def test_a_training_is_ordered_with_the_defaults_of_the_command_line_or_with_what_is_filled_in(
    browser: Browser, watched: Watched
) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/datasets", no_datasets)
        await form_opened(page)
        await page.get_by_label("Kind").select_option("Training")
        await page.get_by_label("Id of the dataset").fill("cats")
        await page.get_by_label("Address of the dataset").fill("s3://nowhere/tenant-demo/cats/")
        order = await order_sent(page)
        assert order["hyperparameters"] == {"epochs": 10, "batch_size": 4, "learning_rate": 0.0001}
        for label, value in (("Epochs", "3"), ("Batch size", "2"), ("Learning rate", "0.002")):
            await page.get_by_label(label).fill(value)
        order = await order_sent(page)
        assert order["hyperparameters"] == {"epochs": 3, "batch_size": 2, "learning_rate": 0.002}
        await page.get_by_label("Learning rate").fill("0")
        assert not await page.evaluate("document.getElementById('start-form').checkValidity()")


async def test_datasets_of_earlier_trainings_are_offered_though_their_tasks_are_not_shown(
    browser: Browser, watched: Watched
) -> None:
    training = await trained(watched)
    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/datasets", no_datasets)
        await is_live(page)
        await page.locator("#search").fill("no such task")
        await expect(page.locator("#none")).to_be_visible(timeout=10_000)
        await page.get_by_text("Start a task").click()
        await page.get_by_label("Kind").select_option("Training")
        dataset = page.get_by_label("Id of the dataset")
        await expect(page.locator(f"#datasets option[value='cats-of-{training}']")).to_be_attached(timeout=10_000)
        await dataset.fill(f"cats-of-{training}")
        await dataset.blur()
        await expect(page.get_by_label("Address of the dataset")).to_have_value(f"s3://cats/tenant-demo/{training}/")
