"""One loopback server and one client of each party for the whole session: opening a client loads certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest_asyncio

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from tests.activities.calls import Call, every_call, tokens
from tests.activities.loopback import Answer, Loopback, serving

Facing = Callable[[Answer], AbstractAsyncContextManager[tuple[Loopback, dict[str, Call]]]]
"""`async with facing(answer) as (server, calls)`: both clients before a server that answers everything so."""


@pytest_asyncio.fixture(scope="session")
async def facing() -> AsyncIterator[Facing]:
    async def unset(*_: object) -> None:
        raise AssertionError("a request outside of `facing`")

    async with (
        serving(unset) as server,
        ComfyUIClient(server.url, tokens()) as comfyui,
        CreditsClient(server.url, tokens()) as credits_client,
    ):
        calls = every_call(comfyui, credits_client)

        @asynccontextmanager
        async def facing(answer: Answer) -> AsyncIterator[tuple[Loopback, dict[str, Call]]]:
            server.answer, server.seen = answer, []
            yield server, calls
            server.answer = unset

        yield facing
