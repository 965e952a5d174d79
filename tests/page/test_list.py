"""The list: what needs somebody on top, search, filters, pages, and cards that stay where they are."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
from playwright.async_api import Browser, Route, expect

from comfyui_temporal.contracts.task_store import PriceToConfirm
from store import StoredInput
from tests.conftest import unique
from tests.page.conftest import Watched, opened
from tests.page.test_cards import token_of
from tests.page.test_page import card, is_live
from tests.store.facts import NOON, claim_of, end, fact, write_of
from tests.workflows.platform import task_id_of

pytestmark = pytest.mark.browser


async def stored_tasks(watched: Watched, tenant: str, count: int) -> list[str]:
    """Tasks in the store alone, oldest first, each with a prompt of its own."""
    ids = []
    for number in range(count):
        ids.append(unique("image"))
        given = StoredInput(document={"prompt": f"picture number {number:03}"})
        at = NOON + timedelta(seconds=number)
        await watched.platform.store.claim(claim_of(ids[-1], tenant_id=tenant, at=at), given=given)
    return ids


@pytest.mark.slow
async def test_a_price_that_waits_stands_on_top_until_it_is_confirmed(browser: Browser, watched: Watched) -> None:
    handle = await watched.platform.start_training(max_credits=None)
    task_id = task_id_of(handle)
    later = await watched.platform.start_image()
    await later.result()
    async with opened(browser, watched) as seen:
        page = seen.page
        needs = page.get_by_role("region", name="Needs you")
        waiting = needs.get_by_role("article", name=task_id)
        await expect(waiting.locator(".money")).to_have_text("120 points, not confirmed yet", timeout=10_000)
        await expect(waiting.locator(".now")).to_have_text("Waiting for your confirmation")
        await waiting.get_by_role("button", name=f"Confirm the price of {task_id}").click()
        listed = page.locator("#list").get_by_role("article", name=task_id)
        await expect(listed).to_be_visible(timeout=15_000)
        await expect(waiting).to_be_hidden()
        # It is older than the image, and goes back to its place behind it.
        names = await page.locator("#list article").evaluate_all("all => all.map(one => one.ariaLabel)")
        assert names.index(task_id) > names.index(task_id_of(later))
        await expect(listed.locator(".status")).to_have_text("completed", timeout=25_000)


async def test_a_price_that_rose_while_it_runs_is_wanted_before_the_next_checkpoint(
    browser: Browser, watched: Watched
) -> None:
    tenant = unique("tenant")
    [task_id] = await stored_tasks(watched, tenant, 1)
    wanted = PriceToConfirm(estimated_cost=360, confirm_by=datetime.now(UTC) + timedelta(hours=1), is_running=True)
    await watched.platform.store.write(write_of(task_id, version=2, stage="training", confirmation=wanted))
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        card = seen.page.get_by_role("region", name="Needs you").get_by_role("article", name=task_id)
        sentence = (
            "The price has risen to 360 points. Unless you confirm it, the training stops at its next checkpoint."
        )
        await expect(card.locator(".confirm p")).to_have_text(sentence, timeout=10_000)
        await expect(card.locator(".now")).not_to_contain_text("Waiting for your confirmation")


async def test_tasks_are_searched_filtered_and_paged(browser: Browser, watched: Watched) -> None:
    tenant = unique("tenant")
    ids = await stored_tasks(watched, tenant, 45)
    await watched.platform.store.write(write_of(ids[3], end(), version=2, status="completed"))
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        articles = page.locator("#list article")
        await expect(articles).to_have_count(30, timeout=10_000)
        await page.get_by_role("button", name="Older tasks").click()
        await expect(articles).to_have_count(45)
        await expect(page.get_by_role("button", name="Older tasks")).to_be_hidden()
        await page.get_by_role("searchbox").fill("NUMBER 007")
        await expect(articles).to_have_count(1)
        await expect(card(page, ids[7])).to_be_visible()
        await page.get_by_role("searchbox").fill(ids[9][-8:])
        await expect(card(page, ids[9])).to_be_visible()
        await page.get_by_role("searchbox").fill("no such picture")
        await expect(page.get_by_text("No task matches.")).to_be_visible()
        await page.get_by_role("searchbox").fill("")
        await page.get_by_label("Show", exact=True).select_option("completed")
        await expect(articles).to_have_count(1)
        await page.get_by_label("Images or trainings").select_option("model.train")
        await expect(articles).to_have_count(0)


@pytest.mark.parametrize("address", ["https://h/100%.safetensors", "https://h:99999/a%20model", "no address"])
async def test_a_task_with_an_odd_model_address_is_shown_among_the_others(
    browser: Browser, watched: Watched, address: str
) -> None:
    tenant = unique("tenant")
    ids = await stored_tasks(watched, tenant, 2)
    odd = StoredInput(document={"prompt": "odd", "loras": [{"model_url": address, "sha256": "0" * 64}]})
    await watched.platform.store.claim(claim_of(task_id := unique("image"), tenant_id=tenant), given=odd)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        await expect(page.locator("#list article")).to_have_count(3, timeout=10_000)
        await expect(card(page, ids[0])).to_be_visible()
        name = address.rpartition("/")[2].replace("%20", " ")
        await expect(card(page, task_id)).to_contain_text(f"{name} at 1")
        await expect(page.locator("#problem")).to_be_hidden()


async def test_a_task_that_cannot_be_shown_hides_no_other(browser: Browser, watched: Watched) -> None:
    tenant = unique("tenant")
    ids = await stored_tasks(watched, tenant, 3)

    async def broken(route: Route) -> None:
        """As a newer gateway may answer, with what this page does not know."""
        given = await (await route.fetch()).json()
        for task in given["tasks"]:
            if task["task_id"] == ids[1]:
                task["credits"] = None
        await route.fulfill(json=given)

    async with opened(browser, watched, fragment="") as seen:
        page = seen.page
        await page.route(re.compile(r"/api/v1/tasks\?"), broken)
        await page.get_by_label("Token", exact=True).fill(token_of(tenant))
        await page.get_by_role("button", name="Connect").click()
        await expect(page.locator("#problem")).to_contain_text("The page cannot show something", timeout=10_000)
        for task_id in (ids[0], ids[2]):
            await expect(card(page, task_id)).to_be_visible()


async def test_cards_stay_where_they_are_while_others_arrive(browser: Browser, watched: Watched) -> None:
    tenant = unique("tenant")
    ids = await stored_tasks(watched, tenant, 20)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        await is_live(page)
        watched_card = card(page, ids[5])
        await watched_card.scroll_into_view_if_needed()
        await page.mouse.wheel(0, 40)
        await page.wait_for_timeout(200)
        before = await watched_card.bounding_box()
        new = unique("image")
        await watched.platform.store.claim(claim_of(new, tenant_id=tenant, at=NOON + timedelta(hours=1)))
        arrived = page.get_by_role("button", name="1 new task")
        await expect(arrived).to_be_visible(timeout=10_000)
        assert await watched_card.bounding_box() == before
        await arrived.click()
        await expect(page.locator("#list article").first).to_have_attribute("aria-label", new)
        await expect(arrived).to_be_hidden()


async def test_the_header_tells_whose_tasks_these_are_and_what_runs(browser: Browser, watched: Watched) -> None:
    tenant = unique("tenant")
    ids = await stored_tasks(watched, tenant, 3)
    await watched.platform.store.write(write_of(ids[0], fact("held", balance_after=99_976), version=2))
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        await expect(seen.page.locator("#tenant")).to_have_text(
            f"{tenant}99,976 points1 running2 queued", timeout=10_000
        )
        await watched.platform.store.write(write_of(ids[1], end(), version=2, status="completed"))
        await expect(seen.page.locator("#tenant")).to_have_text(re.compile("1 running1 queued$"), timeout=10_000)


async def test_five_hundred_tasks_do_not_make_it_stutter(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        longest = await seen.page.evaluate(
            """async () => {
                const { Card } = await import("/page/card.js");
                const list = document.getElementById("list");
                const actions = { may: () => true };
                const cards = [];
                const began = performance.now();
                for (let n = 0; n < 500; n++) {
                    const task = {
                        task_id: `t-${n}`, scene: "image.generate", template_id: "t", resolution: "hd", last_seq: 1,
                        priority: "standard", status: "running", stage: "processing", progress: 1, attempts: 1,
                        credits: { estimated: 24, held: 24, charged: 0, returned: 0, settlement: "open" },
                        created_at: new Date().toISOString(), input: { prompt: "a lighthouse" },
                    };
                    cards.push(new Card(task, actions, {}));
                    list.append(cards.at(-1).item);
                }
                list.getBoundingClientRect();
                const built = performance.now() - began;
                let longest = 0;
                for (let seq = 2; seq < 6; seq++) {
                    for (const card of cards) {
                        const began = performance.now();
                        card.apply({ seq, event: "task.running", status: "running", attempt: 1, progress: 10 * seq,
                            stage: "processing", next_eta: null, queue_position: null });
                        longest = Math.max(longest, performance.now() - began);
                    }
                    await new Promise(requestAnimationFrame);
                }
                const second = performance.now();
                cards.forEach((card) => card.showTime());
                return { built, longest, second: performance.now() - second };
            }"""
        )
        # Far above what it takes, for a busy machine: 500 cards that each lay out the rest again would take seconds.
        assert longest["built"] < 5_000 and longest["longest"] < 250 and longest["second"] < 250, longest


async def test_a_tasks_own_page_shows_its_newest_events_and_says_what_is_left_out(
    browser: Browser, watched: Watched
) -> None:
    tenant = unique("tenant")
    [task_id] = await stored_tasks(watched, tenant, 1)
    for number in range(1, 9):
        facts = [fact(unique("fact"), message=f"said {number}-{n}") for n in range(300)]
        await watched.platform.store.write(write_of(task_id, *facts, version=number))
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}&task={task_id}") as seen:
        events = seen.page.locator("#detail .events > li")
        await expect(events).to_have_count(2_000, timeout=20_000)
        await expect(events.last).to_contain_text("said 8-299")
        await expect(seen.page.get_by_text("401 older ones are left out.")).to_be_visible()
