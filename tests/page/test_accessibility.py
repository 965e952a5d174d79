"""axe finds nothing at all: on every view, light and dark, in English and in Chinese."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, expect

from tests.conftest import unique
from tests.page.conftest import PAYER, Watched, opened
from tests.page.test_cards import ended_task
from tests.workflows.platform import task_id_of

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LOCALES = {"en": "en-US", "zh": "zh-CN"}
CHANNELS = [(scheme, language) for scheme in ("light", "dark") for language in LOCALES]
DESK = {"width": 1280, "height": 900}


class Views:
    """Looks at one view after another."""

    def __init__(self, page: Page, folder: Path | None) -> None:
        self._page = page
        self._folder = folder
        self.findings: list[str] = []

    async def look(self, name: str) -> None:
        found = await Axe().run(self._page)
        for violation in found.response["violations"]:
            for node in violation["nodes"]:
                self.findings.append(f"{name}: {violation['id']} ({violation['impact']}): {node['html'][:160]}")
        if self._folder:
            await self._page.screenshot(path=self._folder / f"{name}.png", full_page=False)


@pytest_asyncio.fixture(scope="session")
async def ids(watched: Watched) -> dict[str, str]:
    """A task of each kind."""
    platform = watched.platform
    training = await platform.start_training()
    image = await platform.start_image(prompt="a heron at dusk")
    await training.result()
    await image.result()
    error = {"code": "node_error", "message": "KSampler: the value is out of range."}
    failed = await ended_task(watched, PAYER[0], at=datetime.now(UTC), status="failed", error=error)
    gone = f"{watched.url}results/gone.png"
    broken = await ended_task(watched, PAYER[0], at=datetime.now(UTC), result_urls=[gone])
    await platform.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    running = await platform.start_waiting_image(task_id=unique("running"))
    asking = await platform.start_training(max_credits=None)
    return {
        "training": task_id_of(training),
        "image": task_id_of(image),
        "failed": failed,
        "broken": broken,
        "running": task_id_of(running),
        "asking": task_id_of(asking),
    }


async def _forms(page: Page, views: Views) -> None:
    await page.locator("#start > summary").click()
    await expect(page.locator("#extras input").first).to_be_visible(timeout=10_000)
    await views.look("form-image")
    await page.locator("#loras select").first.select_option(index=1)
    await expect(page.locator("#loras input").first).to_be_visible()
    await views.look("form-trained-model")
    await page.locator("[name=template_id]").select_option("upscale")
    await views.look("form-control-image")
    await page.locator("[name=kind]").select_option("trainings")
    await views.look("form-training")
    await page.locator("#start > summary").click()


async def _tasks(page: Page, views: Views, ids: dict[str, str]) -> None:
    await page.locator(f"[aria-label='{ids['image']}'] .picture").click()
    await expect(page.locator("dialog")).to_be_visible()
    await views.look("large")
    await page.keyboard.press("Escape")
    for name, task_id in ids.items():
        await page.evaluate("(id) => (location.hash = `task=${id}`)", task_id)
        await expect(page.locator("#detail .events")).to_be_visible(timeout=10_000)
        await expect(page.locator(f"#detail [aria-label='{task_id}']")).to_be_visible()
        await views.look(f"task-{name}")
    await page.evaluate("location.hash = ''")


@pytest.mark.parametrize(("scheme", "language"), CHANNELS)
async def test_axe_finds_nothing_on_any_view(
    browser: Browser, watched: Watched, ids: dict[str, str], scheme: str, language: str
) -> None:
    shots = os.environ.get("VIEWS")
    folder = Path(shots) / f"{scheme}-{language}" if shots else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "viewport": DESK,
        "color_scheme": scheme,
        "locale": LOCALES[language],
        "reduced_motion": "reduce",
    }
    async with opened(browser, watched, **options) as seen:
        page, views = seen.page, Views(seen.page, folder)
        await expect(page.locator("#needs article").first).to_be_visible(timeout=10_000)
        await expect(page.locator("#list article")).not_to_have_count(0)
        await views.look("list")
        await page.locator("#search").fill("no such picture")
        await expect(page.locator("#none")).to_be_visible()
        await views.look("list-empty")
        await page.locator("#search").fill("")
        await expect(page.locator("#list article").first).to_be_visible(timeout=10_000)
        await _forms(page, views)
        await _tasks(page, views, ids)
    async with opened(browser, watched, fragment="#", **options) as seen:
        views_without = Views(seen.page, folder)
        await expect(seen.page.locator("#token")).to_be_visible()
        await views_without.look("token")
    assert views.findings + views_without.findings == []
