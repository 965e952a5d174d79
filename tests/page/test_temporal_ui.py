"""Temporal's own UI shows encrypted runs by our codec server, to a browser that is signed in there."""

from __future__ import annotations

import json

import pytest
from playwright.async_api import Browser, expect
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.plugin import TasksPlugin
from local_stack.ports import any_free_port
from tests.conftest import temporal_binary
from tests.test_codec_server import MARK, NEW, SETTINGS, TOKEN, Echo, serving

pytestmark = pytest.mark.browser


@pytest.mark.slow
async def test_the_ui_decodes_for_a_browser_that_is_signed_in(browser: Browser) -> None:
    ui = f"http://127.0.0.1:{(ui_port := any_free_port())}"
    async with (
        await WorkflowEnvironment.start_local(
            ui=True, ui_port=ui_port, dev_server_existing_path=temporal_binary()
        ) as environment,
        serving({**SETTINGS, "CODEC_SERVER_ORIGINS": ui}) as codec,
    ):
        address = environment.client.service_client.config.target_host
        client = await Client.connect(address, plugins=[TasksPlugin(PayloadEncryption([NEW]))])
        async with Worker(client, task_queue="echo", workflows=[Echo]):
            await client.execute_workflow(Echo.run, MARK, id="echo", task_queue="echo")
        page = await (context := await browser.new_context()).new_page()
        run = f"{ui}/namespaces/default/workflows/echo"
        await page.goto(run)
        # What its dialog "Codec server" sets: the address, and "include cross-origin credentials".
        choice = {"endpoint": json.dumps(str(codec.base_url)), "includeCredentials": "true"}
        for name, value in {**choice, "overrideRemoteCodecConfiguration": "true"}.items():
            await page.evaluate("([name, value]) => localStorage.setItem(name, value)", [name, value])
        signing_in = codec.base_url.copy_with(username="me", password=TOKEN)
        await page.goto(str(signing_in))
        await expect(page.get_by_text("signed in")).to_be_visible()
        await page.goto(run)
        await expect(page.get_by_text(f"drawn: {MARK}").first).to_be_visible(timeout=30_000)
        await context.close()
