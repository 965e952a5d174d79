"""The form: what ComfyUI offers, with the price beside the button; and what it is where nothing is listed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import Browser, Page, Route, expect

from tests.conftest import unique
from tests.page.conftest import Watched, opened
from tests.page.test_cards import token_of
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


@pytest.mark.parametrize("fault", ["swallowed", "bad gateway"])
async def test_an_order_whose_answer_is_lost_is_one_task_when_start_is_pressed_again(
    browser: Browser, watched: Watched, fault: str
) -> None:
    tenant, begun = unique("tenant"), []

    async def lost(route: Route) -> None:
        begun.append(await (await route.fetch()).json())
        await (route.abort() if fault == "swallowed" else route.fulfill(status=502, body="<html>"))

    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        await form_opened(page)
        await page.route("**/api/v1/tasks/images", lost, times=1)
        start = page.get_by_role("button", name="Start", exact=True)
        await start.click()
        text = "may have arrived" if fault == "swallowed" else "The gateway answered 502"
        await expect(page.locator("#problem")).to_contain_text(text)
        await start.click()
        await expect(page.locator("#started")).to_have_text(f"{begun[0]['task_id']} started", timeout=10_000)
        await expect(page.locator("#problem")).to_be_hidden()
        await start.click()
        await expect(page.locator("#started")).not_to_contain_text(begun[0]["task_id"], timeout=10_000)
        await expect(page.locator("#started")).to_contain_text("started", timeout=10_000)
        await expect(page.locator("#list article")).to_have_count(2, timeout=10_000)


PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"
DROPPED = """([name, text]) => {
  const dropped = new DataTransfer();
  dropped.items.add(new File([text], name));
  return dropped;
}"""


async def test_a_file_of_this_device_is_uploaded_by_choice_and_by_drop(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await form_opened(page)
        await expect(page.locator("#price")).to_have_text("24 points", timeout=10_000)
        await page.get_by_label("Template").select_option("upscale")
        address, file = page.get_by_label("Address of the control image"), page.get_by_label("or a file from this")
        page_file = await page.evaluate_handle(DROPPED, ["page.html", "<html>"])
        await address.dispatch_event("drop", {"dataTransfer": page_file})
        await expect(page.locator("#problem")).to_contain_text("By its first bytes the file is none of these")
        await expect(address).to_have_value("")
        await file.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PNG})
        await expect(address).to_have_value(re.compile(r"^upload:\w+$"))
        chosen = await address.input_value()
        dropped = await page.evaluate_handle(DROPPED, ["b.gif", "GIF89a"])
        await address.dispatch_event("drop", {"dataTransfer": dropped})
        await expect(address).not_to_have_value(chosen)
        async with page.expect_response("**/api/v1/tasks/images") as started:
            await page.get_by_role("button", name="Start", exact=True).click()
        answer = await started.value
        order: Any = answer.request.post_data_json
        assert answer.status == 202, await answer.text()
        assert order["controls"] == [{"image_url": await address.input_value()}]


async def with_a_mask(route: Route) -> None:
    """One template, as a bridge lists one that takes a mask."""
    extras = {"mask": {"type": "mask", "points": 3, "required": False}, "sound": {"type": "audio", "points": 0}}
    template = {"template_id": "inpaint", "scene": "image.generate", "summary": "", "inputs": {}, "controls": []}
    prices = {"resolutions": {"hd": {"points": 24}}, "accelerated_points": 12, "is_available": True}
    await route.fulfill(json={"templates": [{**template, **prices, "extras": extras}]})


async def test_an_extra_that_is_a_file_is_given_by_address_or_uploaded(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/templates", with_a_mask)
        await form_opened(page)
        price = page.locator("#price")
        await expect(price).to_have_text("24 points", timeout=10_000)
        mask, sound = page.get_by_label("mask, +3 points, optional"), page.get_by_label("sound, optional")
        await page.get_by_label("or a file from this").first.set_input_files(
            {"name": "mask.png", "mimeType": "image/png", "buffer": PNG}
        )
        await expect(mask).to_have_value(re.compile(r"^upload:\w+$"))
        await expect(price).to_have_text("27 points")
        await sound.fill("https://sounds.example/1.wav")
        async with page.expect_request("**/api/v1/tasks/images") as sent:
            await page.get_by_role("button", name="Start", exact=True).click()
        order: Any = (await sent.value).post_data_json
        assert order["extras"] == {"mask": await mask.input_value(), "sound": "https://sounds.example/1.wav"}


async def none_listed(route: Route) -> None:
    """As the gateway answers where ComfyUI lists no templates (tests/gateway/test_templates.py)."""
    await route.fulfill(status=503, content_type="application/problem+json", json={"code": "route_not_offered"})


async def no_datasets(route: Route) -> None:
    """As the gateway answers where no datasets are listed (tests/gateway/test_datasets.py)."""
    await route.fulfill(status=503, content_type="application/problem+json", json={"code": "route_not_offered"})


def filled(watched: Watched, tenant: str, name: str, files: int) -> str:
    """A dataset of the tenant; its address."""
    folder = watched.platform.folder / "datasets" / tenant / name
    folder.mkdir(parents=True)
    for number in range(files):
        (folder / f"{number}.txt").write_text("a picture")
    return f"{folder.as_uri()}/"


async def test_a_dataset_is_chosen_by_its_name_or_typed_by_its_address(browser: Browser, watched: Watched) -> None:
    tenant, name = unique("tenant"), "cats"
    cats, empty = filled(watched, tenant, name, 3), filled(watched, tenant, "no cats", 0)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        await form_opened(page)
        await page.get_by_label("Kind").select_option("Training")
        dataset, address = page.get_by_role("combobox", name="Dataset"), page.get_by_label("Address of the dataset")
        await expect(dataset.locator(f"option[value='{cats}']")).to_have_text(f"{name}, 3 files", timeout=10_000)
        await expect(dataset.locator(f"option[value='{empty}']")).to_be_disabled()
        await expect(address).to_be_hidden()
        await dataset.select_option(cats)
        async with page.expect_response("**/api/v1/tasks/trainings") as started:
            await page.get_by_role("button", name="Start", exact=True).click()
        answer = await started.value
        assert answer.status == 202, await answer.text()
        order: Any = answer.request.post_data_json
        assert order["dataset"] == {"dataset_id": name, "source_uri": cats}
        await dataset.select_option("another one, by its address")
        await page.get_by_label("Id of the dataset").fill("dogs")
        await address.fill("s3://nowhere/tenant-demo/dogs/")
        async with page.expect_request("**/api/v1/tasks/trainings") as sent:
            await page.get_by_role("button", name="Start", exact=True).click()
        order = (await sent.value).post_data_json
        assert order["dataset"] == {"dataset_id": "dogs", "source_uri": "s3://nowhere/tenant-demo/dogs/"}


async def test_datasets_are_offered_in_chinese_on_a_small_screen_and_what_was_typed_stays(
    browser: Browser, watched: Watched
) -> None:
    cats = filled(watched, tenant := unique("tenant"), name := "cats", 1)
    screen: Any = {"width": 360, "height": 740}
    given: Any = {"viewport": screen, "locale": "zh-CN", "fragment": f"#token={token_of(tenant)}"}
    async with opened(browser, watched, **given) as seen:
        page = seen.page
        await page.route("**/api/v1/datasets", no_datasets)
        await expect(page.locator("#connection")).to_have_text("实时", timeout=10_000)
        await page.locator("#start > summary").click()
        await page.get_by_label("类型").select_option("训练")
        await page.get_by_label("数据集地址").fill("s3://elsewhere/")
        await page.unroute("**/api/v1/datasets")
        for _ in range(2):
            await page.locator("#start > summary").click()
        dataset = page.get_by_role("combobox", name="数据集", exact=True)
        await expect(dataset.locator(f"option[value='{cats}']")).to_have_text(f"{name}，1 个文件", timeout=10_000)
        await expect(page.get_by_label("数据集地址")).to_have_value("s3://elsewhere/")
        await expect(page.get_by_label("数据集地址")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_where_no_template_is_listed_the_form_tells_what_the_same_cost_and_offers_known_datasets(
    browser: Browser, watched: Watched
) -> None:
    handle = await watched.platform.start_training()
    await handle.result()
    await (await watched.platform.start_image(resolution="4k", priority="accelerated")).result()
    async with opened(browser, watched) as seen:
        page = seen.page
        await page.route("**/api/v1/templates", none_listed)
        await page.route("**/api/v1/datasets", no_datasets)
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
        await page.get_by_label("Id of the dataset").fill("faces")
        await page.get_by_label("Id of the dataset").blur()
        await expect(page.get_by_label("Address of the dataset")).to_have_value(re.compile("/tenant-demo/faces$"))
