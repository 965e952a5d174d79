"""500 tasks on the page, with pictures: no long frame while it is scrolled, nor while 20 events a second arrive."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from playwright.async_api import Browser, Page

from bridge.result_routes import result_routes
from bridge.storage import SignedAddresses, Storage
from comfyui_temporal.contracts.tasks import TaskStatus
from store import StoredInput
from tests.conftest import unique
from tests.page.conftest import Watched, opened
from tests.page.test_cards import token_of
from tests.page.test_page import is_live
from tests.served_app import served_app
from tests.store.facts import claim_of, end, fact, write_of

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(300)]

TASKS = 500
EVENTS_PER_SECOND = 20
SECONDS = 8
LONGEST_WORK_MILLISECONDS = 60
"""The most processor time of one piece of the page's work: other programs on the machine do not count."""
LONGEST_FRAME_MILLISECONDS = 500
"""By the clock, on a machine that does other things too. On an idle one it is below 100."""
WATCH = """() => {
    window.frames_seen = [];
    let before = performance.now();
    const frame = (now) => {
        window.frames_seen.push(now - before);
        before = now;
        requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
}"""
LISTED = """async (count) => {
    const list = document.getElementById("list");
    while (list.children.length !== count) await new Promise(requestAnimationFrame);
}"""
TAKEN = "() => window.frames_seen.splice(0)"
SCROLL = """async (seconds) => {
    // Nothing is read of the layout in between: that would be the test's own work.
    const bottom = document.documentElement.scrollHeight - innerHeight;
    const ends = performance.now() + seconds * 1000;
    let [at, step] = [0, 90];
    while (performance.now() < ends) {
        at += step;
        if (at >= bottom || at <= 0) step = -step;
        scrollTo(0, at);
        await new Promise(requestAnimationFrame);
    }
}"""


@dataclass
class Looks:
    """What each part of the test cost the page."""

    page: Page
    browser: Browser
    seen: list[dict[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def at(self, what: str) -> AsyncIterator[None]:
        await self.page.evaluate(TAKEN)
        await self.browser.start_tracing(page=self.page, categories=["toplevel"])
        yield
        frames = sorted(await self.page.evaluate(TAKEN))
        work = longest_work(json.loads(await self.browser.stop_tracing()))
        middle, most = frames[len(frames) // 2], frames[int(len(frames) * 0.95)]
        times = {"p50": round(middle), "p95": round(most), "longest frame": round(frames[-1]), "longest work": work}
        self.seen.append({"what": what, "frames": len(frames), **times})
        print(self.seen[-1])


def longest_work(trace: dict[str, Any]) -> int:
    """Of the page's main thread, in milliseconds of processor time."""
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    work: dict[tuple[int, int], list[int]] = {}
    for event in events:
        place = event["pid"], event["tid"]
        if names.get(place) == "CrRendererMain":
            work.setdefault(place, []).append(event.get("tdur", 0))
    _, busiest = max((len(times), times) for times in work.values())
    return max(busiest) // 1000


async def filled(watched: Watched, tenant: str, address: str) -> list[str]:
    """As many tasks as the page keeps; half of them are done and have a picture, the others run."""
    store, began = watched.platform.store, datetime.now(UTC) - timedelta(hours=1)
    ids = [unique("image") for _ in range(TASKS)]

    async def one(number: int, task_id: str) -> None:
        given = StoredInput(document={"template_id": "text-to-image", "prompt": f"a lighthouse, picture {number}"})
        await store.claim(claim_of(task_id, tenant_id=tenant, at=began + timedelta(seconds=number)), given=given)
        if number % 2:
            done: dict[str, Any] = {"status": TaskStatus.COMPLETED, "result_urls": [address]}
            await store.write(write_of(task_id, end(), version=1, **done))
        else:
            await store.write(write_of(task_id, fact("1", stage="processing", progress=1.0), version=1))

    for start in range(0, TASKS, 20):
        await asyncio.gather(*(one(n, ids[n]) for n in range(start, start + 20)))
    return [task_id for number, task_id in enumerate(ids) if not number % 2]


@asynccontextmanager
async def events(watched: Watched, running: list[str]) -> AsyncIterator[None]:
    """20 a second, of one running task after another."""

    async def write() -> None:
        began, store = time.monotonic(), watched.platform.store
        for number in range(10**6):
            await asyncio.sleep(max(0.0, began + number / EVENTS_PER_SECOND - time.monotonic()))
            version = 2 + number // len(running)
            shown: dict[str, Any] = {"stage": "processing", "progress": min(99.0, 5.0 * version)}
            tick = fact(f"tick:{version}", ts=datetime.now(UTC), **shown)
            await store.write(write_of(running[number % len(running)], tick, version=version, **shown))

    writing = asyncio.create_task(write())
    yield
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing


async def test_five_hundred_tasks_are_scrolled_and_followed_without_a_stutter(
    browser: Browser, watched: Watched, tmp_path: Path
) -> None:
    storage, tenant, app = Storage(tmp_path.as_uri()), unique("tenant"), FastAPI()
    out = io.BytesIO()
    Image.effect_noise((2048, 2048), 40).save(out, "PNG")
    await storage.write("results/job/1.png", out.getvalue())
    async with served_app(app) as port:
        signed = SignedAddresses(f"http://127.0.0.1:{port}", "a secret of this test")
        app.include_router(result_routes(storage, signed))
        address = signed.address("results/job/1.png", expires=int(time.time()) + 600)
        running = await filled(watched, tenant, address)
        options: Any = {"viewport": {"width": 1280, "height": 900}}
        async with opened(browser, watched, fragment=f"#token={token_of(tenant)}", **options) as seen:
            page = seen.page
            await is_live(page)
            await page.evaluate(WATCH)
            looks = Looks(page, browser)
            async with looks.at("loading page after page"):
                # Playwright's own look-ups lay the page out: none is made while it is measured.
                for count in range(30, TASKS, 30):
                    await page.evaluate(LISTED, count)
                    await page.evaluate("document.getElementById('older').click()")
                await page.evaluate(LISTED, TASKS)
            async with looks.at("scrolling"):
                await page.evaluate(SCROLL, SECONDS)
            async with events(watched, running):
                async with looks.at("scrolling while events arrive"):
                    await page.evaluate(SCROLL, SECONDS)
                await page.evaluate("scrollTo(0, 0)")
                async with looks.at("at the top while events arrive"):
                    await page.wait_for_timeout(SECONDS * 1000)
            assert await page.locator("#list article").count() == TASKS
            assert await page.locator("#list [data-status=running] .now").last.text_content()
    assert [look for look in looks.seen if look["longest work"] > LONGEST_WORK_MILLISECONDS] == []
    assert [look for look in looks.seen if look["longest frame"] > LONGEST_FRAME_MILLISECONDS] == []
