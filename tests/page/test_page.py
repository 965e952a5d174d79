"""What a person sees and does on the live page, in a real browser, against a running platform."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, expect

from tests.conftest import unique
from tests.page.conftest import UI_URL, Watched, opened

pytestmark = pytest.mark.browser


def card(page: Page, task_id: str) -> Locator:
    return page.get_by_role("article", name=task_id)


async def is_live(page: Page) -> None:
    await expect(page.locator("#connection")).to_have_text("live", timeout=10_000)


async def started_by_form(page: Page) -> str:
    """Fill the form in by keyboard and start an image; its task id."""
    await page.get_by_text("Start a task").focus()
    await page.keyboard.press("Enter")
    await page.get_by_role("textbox", name="Prompt").fill("<b onclick=alert(1)>a lighthouse</b>")
    await expect(page.locator("#price")).to_have_text("24 points", timeout=10_000)
    await page.get_by_role("button", name="Start", exact=True).focus()
    await page.keyboard.press("Enter")
    started = page.locator("#started")
    await expect(started).to_have_text(re.compile(r"^image-\w+ started$"), timeout=10_000)
    return str(await started.text_content()).split(maxsplit=1)[0]


async def test_a_task_is_started_seen_moving_and_its_picture_shown(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await is_live(page)
        assert "token" not in page.url, "the token is removed from the address immediately"
        task_id = await started_by_form(page)
        shown = card(page, task_id)
        await expect(shown.locator(".now")).to_have_text(
            re.compile("(Waiting for a GPU|Generating) · (done in|next step)"), timeout=10_000
        )
        await expect(shown.locator(".status")).to_have_text("completed", timeout=20_000)
        picture = shown.get_by_role("img", name=f"result 1 of {task_id}")
        await expect(picture).to_be_visible(timeout=10_000)
        await picture.scroll_into_view_if_needed()
        await page.wait_for_function(
            "image => image.complete && image.naturalWidth > 0", arg=await picture.element_handle()
        )
        await expect(shown.locator(".money")).to_have_text("24 points charged")
        link = shown.get_by_role("link", name="in the Temporal UI")
        assert await link.get_attribute("href") == f"http://127.0.0.1:8233/namespaces/default/workflows/task-{task_id}"


async def test_a_task_is_cancelled_by_its_button(browser: Browser, watched: Watched) -> None:
    await watched.platform.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    handle = await watched.platform.start_image()
    task_id = handle.id.removeprefix("task-")
    await watched.platform.until_held(task_id)
    async with opened(browser, watched) as seen:
        shown = card(seen.page, task_id)
        button = shown.get_by_role("button", name="Cancel")
        await button.focus()
        await seen.page.keyboard.press("Enter")
        await expect(shown.locator(".status")).to_have_text("cancelled", timeout=10_000)
        await expect(shown.locator(".money")).to_have_text("nothing charged", timeout=5_000)
        await expect(button).to_be_hidden()


async def test_a_cut_connection_is_resumed_and_nothing_is_missed(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        await is_live(seen.page)
        watched.cable.pull()
        await expect(seen.page.locator("#connection")).to_have_text(re.compile("retrying|connecting"))
        handle = await watched.platform.start_image()
        await handle.result()
        watched.cable.plug_in()
        await is_live(seen.page)
        missed = card(seen.page, handle.id.removeprefix("task-"))
        await expect(missed.locator(".status")).to_have_text("completed", timeout=5_000)
        live = await watched.platform.start_image()
        await expect(card(seen.page, live.id.removeprefix("task-"))).to_be_visible(timeout=5_000)
        await live.result()


async def test_a_training_asks_for_its_price_is_confirmed_and_shows_its_loss(
    browser: Browser, watched: Watched
) -> None:
    async with opened(browser, watched) as seen:
        await is_live(seen.page)
        handle = await watched.platform.start_training(max_credits=None)
        shown = card(seen.page, handle.id.removeprefix("task-"))
        await expect(shown.locator(".confirm p")).to_have_text(re.compile(r"^The price is \d+ points"), timeout=10_000)
        await shown.get_by_label("Limit in points").fill("900")
        await shown.get_by_role("button", name="Confirm").click()
        await expect(shown.locator(".loss svg")).to_be_visible(timeout=25_000)
        await expect(shown.locator(".status")).to_have_text("completed", timeout=25_000)
        await expect(shown.get_by_text(re.compile("^model file:")).first).to_be_visible(timeout=5_000)
        await expect(shown.locator(".loss figcaption")).to_have_text(re.compile(r"loss 0\.\d+ after epoch 4"))


async def test_a_failed_task_says_why_and_text_from_outside_stays_text(browser: Browser, watched: Watched) -> None:
    markup = "<img src=x onerror=alert(1)>"
    await watched.platform.simulators.admin.comfyui.fault(
        "job_fail", route="submit_job", code="node_error", node="KSampler", message=markup
    )
    async with opened(browser, watched) as seen:
        await is_live(seen.page)
        handle = await watched.platform.start_image()
        shown = card(seen.page, handle.id.removeprefix("task-"))
        await expect(shown.locator(".status")).to_have_text("failed", timeout=15_000)
        await expect(shown.locator(".error")).to_have_text(re.compile("node_error: .*"), timeout=5_000)
        assert await shown.locator("img").count() == 0


async def test_addresses_that_are_no_web_addresses_become_neither_link_nor_picture(
    browser: Browser, watched: Watched
) -> None:
    async with opened(browser, watched) as seen:
        answers = await seen.page.evaluate(
            """async (addresses) => {
                const { webAddress } = await import("/page/card.js");
                return addresses.map(webAddress);
            }""",
            ["javascript:alert(1)", " JaVaScRiPt:alert(1)", "data:text/html,x", "//x", "https://images.example/1.png"],
        )
        assert answers == [None, None, None, None, "https://images.example/1.png"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_small_screen_and_axe_finds_nothing_serious(
    browser: Browser, watched: Watched, scheme: Any
) -> None:
    handle = await watched.platform.start_image(task_id=unique("a-task-with-a-long-name-" + "x" * 20))
    await handle.result()
    screen: Any = {"width": 360, "height": 740}
    async with opened(browser, watched, viewport=screen, color_scheme=scheme, reduced_motion="reduce") as seen:
        page = seen.page
        await is_live(page)
        await expect(page.get_by_role("article").first).to_be_visible()
        await page.get_by_text("Start a task").click()
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        found = (await Axe().run(page)).response["violations"]
        assert [violation["id"] for violation in found if violation["impact"] in ("serious", "critical")] == []
        await page.get_by_label("Kind").select_option("Training")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360


async def test_every_action_is_reached_by_tab(browser: Browser, watched: Watched) -> None:
    await watched.platform.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    handle = await watched.platform.start_image()
    task_id = handle.id.removeprefix("task-")
    async with opened(browser, watched) as seen:
        page = seen.page
        await expect(card(page, task_id)).to_be_visible(timeout=10_000)
        reached: set[str] = set()
        for _ in range(40):
            await page.keyboard.press("Tab")
            reached.add(
                await page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()")
            )
        assert {"Start a task", f"Cancel {task_id}", f"{task_id} in the Temporal UI"} <= reached
    await watched.platform.cancel(handle)


async def test_without_a_good_token_it_asks_for_one(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched, fragment="#token=nonsense") as seen:
        page = seen.page
        await expect(page.get_by_role("alert")).to_contain_text("token", timeout=10_000)
        await page.get_by_label("Token", exact=True).fill(watched.token)
        await page.get_by_role("button", name="Connect").click()
        await is_live(page)
        await page.reload()
        await is_live(page)


async def test_an_outage_is_shown_and_the_link_leads_to_the_tenants_tasks(browser: Browser, watched: Watched) -> None:
    task_id = unique("image")
    credits = watched.platform.simulators.admin.credits
    fault = await credits.fault("drop", route="pre_deduct", task_id=task_id, times=None)
    async with opened(browser, watched) as seen:
        await is_live(seen.page)
        handle = await watched.platform.start_image(task_id=task_id)
        told = card(seen.page, task_id).locator(".error")
        await expect(told).to_have_text(re.compile(r"^credits_unavailable: .* pre_deduct failed \d"), timeout=30_000)
        await expect(told).to_have_text(re.compile("since .* until "))
        href = await seen.page.locator("#temporal").get_attribute("href")
        await credits.remove_fault(fault)
        await handle.result()
        await expect(told).to_be_hidden(timeout=20_000)
    address = urlsplit(href or "")
    assert f"{address.scheme}://{address.netloc}{address.path}" == f"{UI_URL}/namespaces/default/workflows"
    [query] = parse_qs(address.query)["query"]
    assert query == "TenantId = 'tenant-demo' AND WorkflowType IN ('ImageGenerationWorkflow', 'TrainingWorkflow')"
    assert [run async for run in watched.platform.client.list_workflows(query)], "the server can read it"
