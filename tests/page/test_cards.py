"""What a card tells and offers: results, money, one bar, what was asked for, and the task's own page."""

from __future__ import annotations

import io
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from playwright.async_api import Browser, Page, Request, expect

from bridge.result_routes import result_routes
from bridge.storage import SignedAddresses, Storage
from comfyui_temporal.contracts.tasks import TaskStatus
from store import StoredInput
from tests.conftest import unique
from tests.page.conftest import Watched, opened
from tests.page.test_page import card, is_live
from tests.served_app import served_app
from tests.store.facts import NOON, claim_of, end, fact, write_of
from tests.workflows.platform import CALLERS, task_id_of

pytestmark = pytest.mark.browser


def token_of(tenant: str, *scopes: str) -> str:
    return CALLERS.made_for(tenant, "user-a", *([scopes] if scopes else []))


async def ended_task(watched: Watched, tenant: str, *, at: datetime = NOON, **state: Any) -> str:
    """A task that has ended, in the store alone."""
    task_id = unique("image")
    store = watched.platform.store
    given = StoredInput(document={"template_id": "text-to-image", "prompt": "a paper city"})
    await store.claim(claim_of(task_id, tenant_id=tenant, at=at), given=given)
    await store.write(write_of(task_id, end(), **{"status": TaskStatus.COMPLETED, **state}))
    return task_id


async def test_an_image_fills_its_card_opens_large_and_is_run_again_with_another_seed(
    browser: Browser, watched: Watched
) -> None:
    handle = await watched.platform.start_image(prompt="a heron at dusk", extras={"seed": 7})
    await handle.result()
    task_id = task_id_of(handle)
    options: Any = {"permissions": ["clipboard-read", "clipboard-write"]}
    async with opened(browser, watched, **options) as seen:
        page = seen.page
        await is_live(page)
        shown = card(page, task_id)
        await expect(shown.get_by_role("heading")).to_have_text("a heron at dusk")
        await expect(shown.get_by_text("seed 7")).to_be_visible()
        frame, media = await shown.bounding_box(), await shown.get_by_role("img").bounding_box()
        assert frame and media and media["width"] > frame["width"] - 4
        await shown.get_by_role("button", name=f"Open result 1 of {task_id} large").click()
        large = page.get_by_role("dialog")
        await expect(large.get_by_role("link", name="Download")).to_have_attribute("href", re.compile(r"/results/"))
        await large.get_by_role("button", name="Copy the prompt").click()
        assert await page.evaluate("navigator.clipboard.readText()") == "a heron at dusk"
        await large.get_by_role("button", name="Copy link").click()
        assert "/results/" in await page.evaluate("navigator.clipboard.readText()")
        await page.keyboard.press("Escape")
        await expect(large).to_be_hidden()
        await shown.get_by_role("button", name=f"Run {task_id} again with another seed").click()
        again = page.locator("#list article").first
        await expect(again).not_to_have_attribute("aria-label", task_id, timeout=10_000)
        await expect(again.get_by_role("heading")).to_have_text("a heron at dusk")
        await expect(again.get_by_text(re.compile(r"seed (?!7\b)\d+"))).to_be_visible()


async def test_a_seed_of_64_bits_is_shown_and_run_again_as_it_is(browser: Browser, watched: Watched) -> None:
    seed, platform = 2**64 - 1, watched.platform
    handle = await platform.start_image(prompt="a heron of large numbers", extras={"seed": seed})
    await handle.result()
    task_id = task_id_of(handle)
    async with opened(browser, watched) as seen:
        page = seen.page
        await is_live(page)
        shown = card(page, task_id)
        await expect(shown.get_by_text(f"seed {seed}")).to_be_visible()
        await shown.get_by_role("button", name=f"Run {task_id} again", exact=True).click()
        await expect(page.locator("#started")).to_have_text(re.compile(r"^image-\w+ started$"), timeout=10_000)
        again = str(await page.locator("#started").text_content()).split(maxsplit=1)[0]
        await expect(card(page, again).get_by_text(f"seed {seed}")).to_be_visible(timeout=10_000)
        await page.evaluate("(id) => (location.hash = `task=${id}`)", again)
        await expect(page.locator("#detail")).to_contain_text(f"Seed: {seed}", timeout=10_000)
    stored = (await platform.store.inputs([again]))[again]
    assert (stored.document or {})["extras"] == {"seed": seed}


async def test_results_that_cannot_be_loaded_say_so_and_others_play(browser: Browser, watched: Watched) -> None:
    tenant = unique("tenant")
    gone = f"{watched.url}results/"
    urls = [f"{gone}1.png", f"{gone}2.png", f"{gone}3.mp4", f"{gone}view?filename=4.flac"]
    task_id = await ended_task(watched, tenant, result_urls=urls)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        shown = card(seen.page, task_id)
        await expect(shown.locator(".broken")).to_have_count(4, timeout=10_000)
        await expect(shown.get_by_role("link", name="Open its address").first).to_have_attribute("href", urls[0])
        kinds = await seen.page.evaluate(
            """async (urls) => {
                const { drawResults } = await import("/page/results.js");
                const list = document.createElement("ul");
                drawResults(list, urls, "t", () => {});
                return [...list.querySelectorAll("img, video, audio")].map((media) => media.localName);
            }""",
            urls,
        )
        assert kinds == ["img", "img", "video", "audio"]


async def shown(page: Page, function: str, task: dict[str, Any]) -> Any:
    script = f"async (task) => (await import('/page/card.js')).{function}(task)"
    return await page.evaluate(script, task)


async def test_money_is_one_phrase_and_progress_one_number(browser: Browser, watched: Watched) -> None:
    nothing = {"estimated": 0, "held": 0, "charged": 0, "returned": 0, "shortfall": 0, "settlement": "open"}
    paid = {**nothing, "held": 24, "charged": 24, "settlement": "settled"}
    async with opened(browser, watched) as seen:

        async def money(status: str, credits: dict[str, Any], **fields: Any) -> Any:
            return await shown(seen.page, "moneyOf", {"status": status, "credits": credits, **fields})

        assert await money("queued", {**nothing, "estimated": 24}) == "about 24 points"
        assert await money("running", {**nothing, "held": 1200}) == "1,200 points held"
        assert await money("queued", nothing, confirmation={"estimated_cost": 120}) == "120 points, not confirmed yet"
        assert await money("completed", paid) == "24 points charged"
        assert await money("completed", {**paid, "shortfall": 6}) == "24 points charged, 6 could not be"
        unpaid = {**paid, "charged": 0, "shortfall": 24}
        assert await money("completed", unpaid) == "0 points charged, 24 could not be"
        assert await money("completed", {**paid, "charged": 0, "returned": 24}) == "nothing charged"
        assert await money("failed", {**nothing, "held": 24, "returned": 24}) == "nothing charged"
        unknown = {**nothing, "charged": None, "settlement": "unknown"}
        assert await money("failed", unknown) == "not known yet what was charged"

        async def whole(scene: str, stage: str | None, progress: float, status: str = "running") -> Any:
            task = {"scene": scene, "stage": stage, "progress": progress, "status": status}
            return await shown(seen.page, "wholeOf", task)

        image = [("queued", 0), ("queued", 100), ("processing", 50), ("processing", 100), ("delivery", 100)]
        assert [await whole("image.generate", *at) for at in image] == [0, 0.1, 0.5, 0.9, 1]
        assert await whole("model.train", None, 0, "queued") == 0
        assert await whole("model.train", "training", 40) == pytest.approx(0.4)


async def test_the_bar_of_the_whole_task_never_goes_back(browser: Browser, watched: Watched) -> None:
    tenant, task_id = unique("tenant"), unique("image")
    store = watched.platform.store
    await store.claim(claim_of(task_id, tenant_id=tenant))

    async def written(version: int, stage: str, progress: float, attempt: int) -> None:
        shown = fact(f"{version}", stage=stage, progress=progress, attempt=attempt)
        state: dict[str, Any] = {"stage": stage, "progress": progress, "attempts": attempt}
        await store.write(write_of(task_id, shown, version=version, **state))

    await written(2, "processing", 75, 1)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        await is_live(seen.page)
        shown = card(seen.page, task_id)
        bar = shown.get_by_role("progressbar")
        await expect(bar).to_have_attribute("aria-valuenow", "70")
        await expect(bar).to_have_attribute("aria-valuetext", "Generating, 70% of the whole task")
        await written(3, "queued", 0, 2)
        await expect(shown.locator(".status")).to_have_text("running, attempt 2")
        await expect(shown.locator(".now")).to_have_text(re.compile("Waiting for a GPU"))
        await expect(bar).to_have_attribute("aria-valuenow", "70")


async def test_a_task_has_a_page_of_its_own_with_what_was_asked_and_what_happened(
    browser: Browser, watched: Watched
) -> None:
    handle = await watched.platform.start_training()
    await handle.result()
    task_id = task_id_of(handle)
    async with opened(browser, watched) as seen:
        page = seen.page
        await is_live(page)
        await page.get_by_role("link", name=f"Details of {task_id}").click()
        detail = page.locator("#detail")
        await expect(detail.get_by_text("Hyperparameters")).to_be_visible(timeout=10_000)
        await expect(detail.get_by_text(re.compile("Epochs: \\d+"))).to_be_visible()
        assert not re.search(r"null|[{}]", await detail.inner_text()), "JSON is not for people"
        await expect(detail.get_by_text(re.compile(r"estimated, \d+ held, \d+ charged"))).to_be_visible()
        await expect(detail.get_by_text("task.completed")).to_be_visible()
        await expect(detail.locator("pre")).to_have_text(re.compile("loss="))
        await expect(detail.locator(".loss text").first).to_be_visible()
        await expect(page.locator("#all")).to_be_hidden()
        await page.reload()
        await expect(detail.get_by_text("task.completed")).to_be_visible(timeout=10_000)
        await page.get_by_role("link", name="All tasks").click()
        await expect(card(page, task_id)).to_be_visible()


async def test_the_time_that_is_left_is_that_of_the_whole_task_and_never_below_zero(
    browser: Browser, watched: Watched
) -> None:
    tenant, task_id = unique("tenant"), unique("image")
    store, began = watched.platform.store, datetime.now(UTC)
    await store.claim(claim_of(task_id, tenant_id=tenant, at=began))

    async def reported(version: int, minutes: float, next_eta: datetime | None) -> None:
        figures: dict[str, Any] = {"stage": "processing", "progress": 10.0 * version, "next_eta": next_eta}
        tick = fact(f"job:{version}", ts=datetime.now(UTC), job_id="job", sequence=version, **figures)
        await store.write(write_of(task_id, tick, version=version, job_id="job", estimated_time=minutes, **figures))

    await reported(1, 10.0, began + timedelta(minutes=1))
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        now = card(seen.page, task_id).locator(".now")
        await expect(now).to_have_text(re.compile(r"^Generating · done in 9:5\d$"), timeout=10_000)
        first = await now.text_content()
        await expect(now).not_to_have_text(str(first), timeout=3_000)
        # The stage ends after the whole task: the newer word counts.
        await reported(2, 10.0, began + timedelta(minutes=20))
        await expect(now).to_have_text(re.compile(r"^Generating · done in (19|20):\d\d$"), timeout=5_000)
        await reported(3, 0.001, None)
        await expect(now).to_have_text("Generating · done in a moment", timeout=5_000)


async def test_a_card_loads_a_small_picture_and_the_large_view_the_whole(
    browser: Browser, watched: Watched, tmp_path: Path
) -> None:
    storage, tenant = Storage(tmp_path.as_uri()), unique("tenant")
    out = io.BytesIO()
    Image.effect_noise((2048, 2048), 40).save(out, "PNG")
    await storage.write("results/job/1.png", out.getvalue())
    app, loaded = FastAPI(), dict[str, int]()
    async with served_app(app) as port:
        signed = SignedAddresses(f"http://127.0.0.1:{port}", "a secret of this test")
        app.include_router(result_routes(storage, signed))
        address = signed.address("results/job/1.png", expires=int(time.time()) + 600)
        task_id = await ended_task(watched, tenant, result_urls=[address])
        async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:

            def note(request: Request) -> None:
                if "/comfyui/files/" in request.url:
                    loaded[request.url.removeprefix(address)] = 1

            seen.page.on("request", note)
            picture = card(seen.page, task_id).get_by_role("img")
            await expect(picture).to_be_visible(timeout=10_000)
            await seen.page.wait_for_function(
                "image => image.complete && image.naturalWidth", arg=await picture.element_handle()
            )
            assert list(loaded) == ["&width=512"], "and not the whole file"
            assert (tmp_path / "results/job/.thumbnails/512/1.png.webp").stat().st_size < len(out.getvalue()) / 10
            await card(seen.page, task_id).get_by_role("button", name=re.compile("^Open result 1")).click()
            large = seen.page.get_by_role("dialog").get_by_role("img")
            await seen.page.wait_for_function(
                "image => image.complete && image.naturalWidth === 2048", arg=await large.element_handle()
            )
            assert list(loaded) == ["&width=512", ""]
