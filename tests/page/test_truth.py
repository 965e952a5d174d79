"""What the page says about itself: token, rights, connection; each a sentence and a way on."""

from __future__ import annotations

import asyncio
import re

import asyncpg
import pytest
from playwright.async_api import Browser, Route, expect

from comfyui_temporal import TemporalTasks
from tests.conftest import unique
from tests.page.conftest import PAYER, Watched, opened
from tests.page.test_cards import token_of
from tests.page.test_list import stored_tasks
from tests.page.test_page import card, is_live
from tests.store.facts import fact, write_of
from tests.waiting import until
from tests.workflows.platform import CALLERS, task_id_of

pytestmark = pytest.mark.browser


async def test_what_delays_a_task_is_there_when_the_page_is_opened(browser: Browser, watched: Watched) -> None:
    admin = watched.platform.simulators.admin.credits
    fault = await admin.fault("error", route="pre_deduct", task_id=(task_id := unique("delayed")), times=None)
    handle = await watched.platform.start_image(task_id=task_id)
    tasks = TemporalTasks(watched.platform.client, task_queue=watched.platform.task_queue)

    async def delayed() -> bool:
        return any(delay.tries > 1 for delay in (await tasks.show(task_id)).delays)

    await until(delayed)
    async with opened(browser, watched) as seen:
        await is_live(seen.page)
        await expect(card(seen.page, task_id).locator(".error")).to_contain_text("pre_deduct failed", timeout=5_000)
    await admin.remove_fault(fault)
    await handle.cancel()


@pytest.mark.slow
async def test_an_expired_token_is_named_and_another_goes_on(browser: Browser, watched: Watched) -> None:
    token = CALLERS.made_for(*PAYER, valid_seconds=6)
    async with opened(browser, watched, fragment=f"#token={token}") as seen:
        page = seen.page
        await is_live(page)
        await expect(page.get_by_role("alert")).to_have_text(re.compile("^The token has expired"), timeout=20_000)
        await expect(page.locator("#connection")).to_have_text("not connected")
        await page.get_by_label("Token", exact=True).fill(watched.token)
        await page.get_by_role("button", name="Connect").click()
        await is_live(page)
        await expect(page.get_by_role("alert")).to_be_hidden()


async def test_a_token_that_only_reads_is_offered_nothing_else(browser: Browser, watched: Watched) -> None:
    await watched.platform.simulators.admin.comfyui.fault("job_stall", route="submit_job")
    handle = await watched.platform.start_waiting_image()
    token = CALLERS.made_for(*PAYER, ["task.read"])
    async with opened(browser, watched, fragment=f"#token={token}") as seen:
        page = seen.page
        await is_live(page)
        shown = card(page, task_id_of(handle))
        await expect(shown.get_by_role("button", name=re.compile("^Copy the prompt"))).to_be_visible(timeout=10_000)
        await expect(page.get_by_text("This token can only read")).to_be_visible()
        await expect(page.get_by_text("Start a task")).to_be_hidden()
        for name in ("Cancel", "again"):
            await expect(shown.get_by_role("button", name=re.compile(name))).to_have_count(0)
    await watched.platform.cancel(handle)


async def test_a_token_that_may_not_read_is_told_which_scope_it_lacks(browser: Browser, watched: Watched) -> None:
    token = CALLERS.made_for(*PAYER, ["task.cancel"])
    async with opened(browser, watched, fragment=f"#token={token}") as seen:
        await expect(seen.page.get_by_role("alert")).to_have_text(re.compile("scope task.read"), timeout=10_000)
        await expect(seen.page.get_by_label("Token", exact=True)).to_be_visible()


async def test_a_gateway_that_is_gone_is_said_to_be_gone_until_it_is_back(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched) as seen:
        page = seen.page
        await is_live(page)
        watched.cable.pull()
        try:
            await expect(page.locator("#away")).to_have_text(re.compile("cannot be reached"), timeout=10_000)
            await expect(page.locator("#connection")).to_have_text(re.compile("retrying|connecting"))
        finally:
            watched.cable.plug_in()
        await is_live(page)
        await expect(page.locator("#away")).to_be_hidden()


async def test_a_gateway_that_does_not_answer_is_said_to_be_frozen(browser: Browser, watched: Watched) -> None:
    frozen = asyncio.Event()

    async def silent(_route: Route) -> None:
        frozen.set()

    async with opened(browser, watched, fragment="#") as seen:
        page = seen.page
        await page.clock.install()
        await page.route("**/stream/config", silent)
        await page.get_by_label("Token", exact=True).fill(watched.token)
        await page.get_by_role("button", name="Connect").click()
        await asyncio.wait_for(frozen.wait(), 10)
        await page.clock.fast_forward(21_000)
        await expect(page.locator("#away")).to_have_text(re.compile("does not answer"))
        await page.unroute("**/stream/config")
        await page.clock.fast_forward(10_000)
        await is_live(page)
        await expect(page.locator("#away")).to_be_hidden()


async def test_it_is_live_only_while_heartbeats_come(browser: Browser, watched: Watched) -> None:
    async with opened(browser, watched, fragment="#") as seen:
        page = seen.page
        await page.clock.install()
        await page.get_by_label("Token", exact=True).fill(watched.token)
        await page.get_by_role("button", name="Connect").click()
        await is_live(page)
        await page.clock.fast_forward(25_000)
        await expect(page.locator("#connection")).to_have_text(re.compile(r"^no news for 2\d s$"))
        handle = await watched.platform.start_image()
        await is_live(page)
        await handle.result()


@pytest.mark.parametrize("by", ["form", "address"])
async def test_nothing_of_a_tenant_stays_when_another_tenants_token_is_given(
    browser: Browser, watched: Watched, by: str
) -> None:
    one, other = unique("tenant"), unique("tenant")
    old, new = await stored_tasks(watched, one, 2), await stored_tasks(watched, other, 1)
    token = CALLERS.made_for(one, "user-a", valid_seconds=6 if by == "form" else 600)
    async with opened(browser, watched, fragment=f"#token={token}") as seen:
        page = seen.page
        await expect(card(page, old[0])).to_be_visible(timeout=10_000)
        if by == "form":
            await expect(page.get_by_role("alert")).to_have_text(re.compile("^The token has expired"), timeout=20_000)
            await page.get_by_label("Token", exact=True).fill(token_of(other))
            await page.get_by_role("button", name="Connect").click()
        else:
            await page.evaluate("token => { location.hash = `token=${token}`; }", token_of(other))
        await expect(card(page, new[0])).to_be_visible(timeout=10_000)
        await expect(page.locator("#list article")).to_have_count(1)
        await expect(page.locator("#tenant")).to_contain_text(other)


async def test_a_restored_store_is_shown_as_it_is_once_the_stream_is_open_again(
    browser: Browser, watched: Watched, postgres_dsn: str
) -> None:
    tenant = unique("tenant")
    [task_id] = await stored_tasks(watched, tenant, 1)
    async with opened(browser, watched, fragment=f"#token={token_of(tenant)}") as seen:
        page = seen.page
        await is_live(page)
        for number in range(1, 6):
            write = write_of(task_id, fact(unique("fact"), progress=90.0), version=number, progress=90.0)
            await watched.platform.store.write(write)
        shown = card(page, task_id).locator(".status")
        await expect(shown).to_have_text("running", timeout=10_000)
        connection = await asyncpg.connect(postgres_dsn)
        async with connection.transaction():
            await connection.execute("DELETE FROM task_events WHERE task_id = $1 AND seq > 1", task_id)
            await connection.execute(
                "UPDATE tasks SET last_seq = 1, version = 0, status = 'queued' WHERE task_id = $1", task_id
            )
        await connection.close()
        await expect(shown).to_have_text("queued", timeout=15_000)
