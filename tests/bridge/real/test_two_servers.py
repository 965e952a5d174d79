"""Two real servers that differ, through the whole system: `make test-comfyui COMFYUI=… COMFYUI_2=…`.

The second one needs another folder than the first (`--base-directory`), and must not have its checkpoint.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpx
import pytest
import pytest_asyncio

from comfyui_temporal.contracts.task_events import EventType
from tests.bridge.real.own_templates import SLOW, TINY, write_templates
from tests.bridge.real.sick_proxy import SickProxy
from tests.bridge.real.test_jobs import new_seed
from tests.bridge.real.whole_stack import Json, WholeStack, whole_stack
from tests.waiting import until

LIMIT_SECONDS = 120.0
SECOND, KILL, START = (os.environ.get(name, "").rstrip("/") for name in ("COMFYUI_2", "KILL_2", "START_2"))
needs_a_command = pytest.mark.skipif(
    not (KILL and START), reason="needs two commands: make test-comfyui COMFYUI=… COMFYUI_2=… KILL_2='…' START_2='…'"
)
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not SECOND, reason="needs a second server: make test-comfyui COMFYUI=… COMFYUI_2=…"),
]
PRICE = 18 + 6
"""An image in hd."""
BLUR, CHECKPOINT = "blur-0", "checkpoint"
"""Nodes that only graphs of `SLOW` have, and only those of `TINY`."""
MOST_REFUSED = 12
"""Three submits of a job, and then test patterns, less and less often."""


@dataclass(frozen=True)
class Fleet:
    """Both servers, each behind a proxy, and the stack that uses them."""

    stack: WholeStack
    first: SickProxy
    second: SickProxy

    async def start_slow(self, number: int) -> list[str]:
        return [await self.stack.start(SLOW, resolution="hd", extras={"seed": new_seed()}) for _ in range(number)]

    async def both_run(self) -> None:
        """Wait until each server runs a prompt."""

        async def look() -> bool:
            queues = [
                (await self.stack.http.get(f"{proxy.server}/queue")).json() for proxy in (self.first, self.second)
            ]
            return all(queue["queue_running"] for queue in queues)

        await until(look, "both servers run a prompt", within_seconds=LIMIT_SECONDS)

    async def has(self, template_id: str, **servers: int) -> None:
        """Wait until the bridge says so of the template's servers."""

        async def look() -> bool:
            return await self.stack.servers_of(template_id) == servers

        await until(look, f"{template_id}: {servers}", within_seconds=LIMIT_SECONDS)

    async def each_is_delivered_once(self, task_ids: Sequence[str]) -> None:
        """Each task has its picture and one charge, and nothing else remains of what was held."""
        for task_id in task_ids:
            outcome = await self.stack.completed(task_id)
            assert len(outcome.result_urls) == 1
            picture = await self.stack.http.get(outcome.result_urls[0])
            assert picture.content.startswith(b"\x89PNG")
            assert outcome.credits is not None
            assert (outcome.credits.charged, outcome.credits.shortfall) == (PRICE, 0)
            entries = await self.stack.ledger(task_id)
            assert sum(change for _, change in entries) == -PRICE, entries
            assert [kind for kind, _ in entries].count("commit") == 1, entries
            events = [event.event async for event in self.stack.tasks.events(task_id)]
            assert events.count(EventType.COMPLETED) == 1


@pytest_asyncio.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, comfyui_url: str) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    write_templates(folder / "templates")
    async with httpx.AsyncClient(timeout=30) as http:
        has_models = [(await http.get(f"{url}/models/checkpoints")).json() != [] for url in (comfyui_url, SECOND)]
    if has_models != [True, False]:
        pytest.skip("COMFYUI needs a checkpoint (tests/bridge/real/tiny_checkpoint.py makes one), COMFYUI_2 none")
    async with AsyncExitStack() as opened:
        first, second = [await opened.enter_async_context(SickProxy(url)) for url in (comfyui_url, SECOND)]
        servers = [first.url, second.url]
        stack = await opened.enter_async_context(whole_stack(folder, servers, [SLOW, TINY], {"steps": 0}))
        fleet = Fleet(stack, first, second)
        await fleet.has(SLOW, total=2, fit=2, well=2)
        yield fleet


def of_template(proxy: SickProxy, node: str) -> list[Json]:
    """The graphs with this node that a server was given."""
    return [body["prompt"] for body in proxy.submitted if node in body["prompt"]]


async def test_jobs_go_only_to_the_server_that_has_the_model(fleet: Fleet) -> None:
    await fleet.has(TINY, total=2, fit=1, well=1)
    before = len(of_template(fleet.first, CHECKPOINT))
    tiny = [await fleet.stack.start(TINY, resolution="hd", extras={"seed": new_seed()}) for _ in range(3)]
    slow = await fleet.start_slow(2)
    await fleet.each_is_delivered_once([*tiny, *slow])
    assert len(of_template(fleet.first, CHECKPOINT)) - before == 3
    assert of_template(fleet.second, CHECKPOINT) == []
    assert of_template(fleet.second, BLUR) != [], "it is a server like any other for what it can run"


async def test_a_server_that_refuses_submits_is_left_and_comes_back(fleet: Fleet) -> None:
    fleet.second.refuses_prompts = True
    given = len(fleet.second.submitted)
    await fleet.each_is_delivered_once(await fleet.start_slow(3))
    await fleet.has(SLOW, total=2, fit=2, well=1)
    assert len(fleet.second.submitted) == given
    assert 1 <= fleet.second.refused <= MOST_REFUSED
    fleet.second.refuses_prompts = False
    await is_used_again(fleet)


async def test_a_server_that_falls_silent_during_a_run_is_left_and_comes_back(fleet: Fleet) -> None:
    tasks = await fleet.start_slow(2)
    await fleet.both_run()
    fleet.second.silence()
    try:
        tasks += await fleet.start_slow(1)
        await fleet.each_is_delivered_once(tasks)
    finally:
        fleet.second.speak()
    await is_used_again(fleet)


@needs_a_command
async def test_a_server_that_is_killed_during_a_run_loses_nothing(fleet: Fleet) -> None:
    tasks = await fleet.start_slow(2)
    await fleet.both_run()
    given = len(of_template(fleet.first, BLUR))
    try:
        await shell(KILL)
        with pytest.raises(httpx.TransportError):
            await fleet.stack.http.get(f"{SECOND}/queue")
        tasks += await fleet.start_slow(1)
        await fleet.each_is_delivered_once(tasks)
        assert len(of_template(fleet.first, BLUR)) - given == 2, "the killed server's job, and the one after it"
    finally:
        await shell(START)
    await is_used_again(fleet)


async def is_used_again(fleet: Fleet) -> None:
    """The second server is well and runs jobs, without anybody's help."""
    await fleet.has(SLOW, total=2, fit=2, well=2)

    async def look() -> bool:
        given = len(of_template(fleet.second, BLUR))
        await fleet.each_is_delivered_once(await fleet.start_slow(2))
        return len(of_template(fleet.second, BLUR)) > given

    await until(look, "the second server runs jobs again", within_seconds=LIMIT_SECONDS)


async def shell(command: str) -> None:
    process = await asyncio.create_subprocess_shell(command)
    assert await process.wait() == 0
