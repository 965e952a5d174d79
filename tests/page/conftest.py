"""The live page in a real browser, against a running platform: Debian's Chromium, no download of another."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright
from temporalio.testing import WorkflowEnvironment

from activities.file_lists import FileLists
from activities.upload_files import UploadFiles
from gateway.access import Access
from gateway.app import create_app
from gateway.draining import Draining
from gateway.page import PageSettings
from gateway.tokens import StreamTokens
from gateway.uploads import UploadSettings
from proof.simulators.serving import TEST_CALLBACK_SECRET
from runtime.caller_tokens import CallerTokens, SharedSecret
from store import TaskStore
from tests.cable import Cable
from tests.served_app import served_app
from tests.workflows.platform import CALLERS, Platform, running_platform

PAYER = ("tenant-demo", "user-demo")
UI_URL = "http://127.0.0.1:8233"


@dataclass
class Watched:
    """The platform, its gateway, and the connection to it that a test can cut."""

    platform: Platform
    cable: Cable

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.cable.port}/"

    @property
    def token(self) -> str:
        return CALLERS.made_for(*PAYER)


@asynccontextmanager
async def _served(platform: Platform) -> AsyncIterator[int]:
    """The port of a gateway with everything."""
    callers = CallerTokens(SharedSecret(CALLERS.secret), issuer=CALLERS.issuer, audience=CALLERS.audience)
    draining = Draining()
    app = create_app(
        temporal=platform.client,
        store=platform.store,
        lists=FileLists.at((platform.folder / "objects").as_uri()),
        callback_secrets=[TEST_CALLBACK_SECRET],
        access=Access(callers, StreamTokens(CALLERS.secret)),
        task_queue=platform.task_queue,
        draining=draining,
        page=PageSettings(temporal_ui_url=UI_URL),
        upload_settings=UploadSettings(UploadFiles.at((platform.folder / "uploads").as_uri())),
    )
    async with served_app(app) as port:
        yield port
        draining.begin()


@pytest_asyncio.fixture(scope="session")
async def watched(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Watched]:
    folder = tmp_path_factory.mktemp("page")
    async with (
        running_platform(temporal_env, task_store, folder, speed=300) as platform,
        platform.worker(),
        _served(platform) as port,
        Cable(lambda: asyncio.open_connection("127.0.0.1", port)).laid() as cable,
    ):
        yield Watched(platform, cable)


@pytest_asyncio.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    path = shutil.which("chromium")
    assert path, "these tests need Chromium (Debian package chromium); `make test` leaves them out where it is missing"
    async with async_playwright() as playwright:
        # No sandbox: CI runs as root in a container.
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


@dataclass
class Seen:
    """A page, and the errors that it logged."""

    page: Page
    complaints: list[str] = field(default_factory=list)


@asynccontextmanager
async def opened(
    browser: Browser, watched: Watched, *, fragment: str | None = None, **options: object
) -> AsyncIterator[Seen]:
    """The live page in a browser of its own. `options`: Playwright's, of a new context."""
    context = await browser.new_context(**options)  # type: ignore[arg-type]
    page = await context.new_page()
    seen = Seen(page)
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    await page.goto(watched.url + (f"#token={watched.token}" if fragment is None else fragment))
    try:
        yield seen
    finally:
        await context.close()
    assert seen.complaints == []
