"""Pictures of the page for README and documents: `make screenshots` writes them to docs/images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from tests.page.conftest import Watched, opened

pytestmark = pytest.mark.browser

PROMPTS = ("a lighthouse in a storm, oil on canvas", "a heron at dusk, long exposure", "a paper city, isometric")
DESK = {"width": 1280, "height": 1150}
SHOTS: dict[str, dict[str, Any]] = {
    "page-light": {"viewport": DESK, "color_scheme": "light"},
    "page-dark": {"viewport": DESK, "color_scheme": "dark"},
    "page-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
DECODED = "() => Promise.all([...document.querySelectorAll('#list img')].slice(0, 2).map((image) => image.decode()))"


async def _shown(page: Page) -> None:
    """Everything that the pictures show is there."""
    await expect(page.locator("#needs .confirm p").first).to_be_visible(timeout=10_000)
    await expect(page.locator("#list .loss svg").first).to_be_attached(timeout=10_000)
    await expect(page.locator("#list img").nth(1)).to_be_attached(timeout=10_000)
    if page.viewport_size == DESK:
        await page.evaluate(DECODED)


@pytest.mark.slow
async def test_the_pages_pictures_are_made(browser: Browser, watched: Watched, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    platform = watched.platform
    await (await platform.start_training()).result()
    for number, prompt in enumerate(PROMPTS):
        await (await platform.start_image(prompt=prompt, extras={"seed": 7 + number}, resolution="4k")).result()
    await platform.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    running = await platform.start_waiting_image(prompt="a glass whale over a harbour", priority="accelerated")
    asking = await platform.start_training(max_credits=None)
    for name, options in SHOTS.items():
        async with opened(browser, watched, **options) as seen:
            await _shown(seen.page)
            await seen.page.screenshot(path=folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 10_000
    await platform.cancel(running)
    await platform.cancel(asking)
