"""The form: what ComfyUI offers, with the price beside the button; and what it is where nothing is listed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

from tests.page.conftest import Watched, opened
from tests.page.test_page import card, is_live
from tests.workflows.platform import task_id_of

pytestmark = pytest.mark.browser


async def form_opened(page: Page) -> None:
    await is_live(page)
    await page.get_by_text("Start a task").click()


async def test_the_form_offers_templates_with_extras_and_tells_the_price_before_it_is_paid(
    browser: Browser, watched: Watched
) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await form_opened(page)
        price, template = page.locator("#price"), page.get_by_label("Template")
        await expect(price).to_have_text("24 points", timeout=10_000)
        names = ["text-to-image", "image-to-image", "upscale", "test-pattern"]
        assert await template.locator("option").all_text_contents() == names
        await expect(page.locator("#template-summary")).to_have_text("A picture of a prompt.")
        resolutions = await page.get_by_label("Resolution").locator("option").all_text_contents()
        assert resolutions == ["sd, 18 points", "hd, 24 points", "4k, 32 points"]
        await page.get_by_label("Resolution").select_option("4k")
        await page.get_by_label("hires_fix, +8 points").check()
        await expect(price).to_have_text("40 points")
        await page.get_by_label("Priority").select_option("accelerated")
        await expect(price).to_have_text("52 points")
        await page.get_by_role("spinbutton", name="Images").fill("3")
        await expect(price).to_have_text("156 points")
        await page.get_by_label("What must not be in it").fill("people")
        await page.get_by_role("textbox", name="Prompt").fill("a lighthouse of extras")
        await page.get_by_role("button", name="Start", exact=True).click()
        started = page.locator("#started")
        await expect(started).to_have_text(re.compile(r"^image-\w+ started$"), timeout=10_000)
        shown = card(page, str(await started.text_content()).split(maxsplit=1)[0])
        await expect(shown.locator(".money")).to_have_text("156 points charged", timeout=20_000)
        await expect(shown.locator("img")).to_have_count(3)
        await expect(shown).to_contain_text("3 images")


async def test_a_control_image_and_a_trainings_base_model_are_asked_for_where_they_are_needed(
    browser: Browser, watched: Watched
) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await form_opened(page)
        price = page.locator("#price")
        await expect(price).to_have_text("24 points", timeout=10_000)
        image = page.get_by_label("Address of the control image")
        await expect(image).to_have_count(0)
        await page.get_by_label("Template").select_option("upscale")
        assert await image.get_attribute("required") is not None
        async with page.expect_request("**/api/v1/tasks/images") as sent:
            await image.fill("https://images.example/1.png")
            await page.get_by_role("button", name="Start", exact=True).click()
        order: Any = (await sent.value).post_data_json
        assert order["controls"] == [{"image_url": "https://images.example/1.png"}]
        await page.get_by_label("Kind").select_option("Training")
        await expect(page.get_by_label("Template")).to_have_value("lora-train")
        included = " with 1 h of GPU time; each further hour costs 60"
        await expect(price).to_have_text(f"120 points{included}")
        await page.get_by_label("Base model").select_option("sdxl")
        await expect(price).to_have_text(f"150 points{included}")


async def none_listed(route: Route) -> None:
    """As the gateway answers where ComfyUI lists no templates (tests/gateway/test_templates.py)."""
    await route.fulfill(status=503, content_type="application/problem+json", json={"code": "route_not_offered"})


async def test_where_no_template_is_listed_the_form_tells_what_the_same_cost_and_offers_known_datasets(
    browser: Browser, watched: Watched
) -> None:
    handle = await watched.platform.start_training()
    await handle.result()
    await (await watched.platform.start_image(resolution="4k", priority="accelerated")).result()
    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/templates", none_listed)
        await is_live(page)
        await expect(card(page, task_id_of(handle))).to_be_visible()
        await page.get_by_text("Start a task").click()
        price = page.locator("#price")
        await page.get_by_label("Resolution").select_option("4k")
        await page.get_by_label("Priority").select_option("accelerated")
        await expect(price).to_have_text("44 points the last time")
        await page.get_by_label("Template").fill("nothing-like-it")
        await expect(price).to_have_text(re.compile("not known here yet"))
        await page.get_by_label("Kind").select_option("Training")
        await page.get_by_label("Dataset", exact=True).fill("faces")
        await page.get_by_label("Dataset", exact=True).blur()
        await expect(page.get_by_label("Address of the dataset")).to_have_value(re.compile("/tenant-demo/faces$"))
