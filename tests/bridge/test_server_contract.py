"""What the bridge relies on of any kind of server: ComfyUI's own API and a server in memory obey the same tests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from bridge.native import NativeServer as NativeClient
from bridge.probe import PATTERN, Probe
from bridge.server import Prompt, PromptState, PromptUpdate, ResultFile, Server
from tests.bridge.memory_server import MemoryServer
from tests.bridge.native import NativeServer
from tests.waiting import until

GRAPH: dict[str, Any] = {
    "ground": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 3}},
    "save": {"class_type": "SaveImage", "inputs": {"images": ["ground", 0], "filename_prefix": "contract"}},
}


@pytest_asyncio.fixture(params=["native", "memory"])
async def server(request: pytest.FixtureRequest, native: NativeServer) -> AsyncIterator[Server]:
    if request.param == "memory":
        yield MemoryServer()
        return
    await native.admin.set(node_seconds=0.3)
    async with NativeClient(native.url, read_seconds=2.0) as client:
        yield client


def new_id() -> str:
    return str(uuid.uuid4())


async def ended(server: Server, prompt_id: str) -> Prompt:
    async def look() -> Prompt | None:
        found = await server.look_up(prompt_id, ["save"])
        return found if found.state is PromptState.ENDED else None

    return await until(look)


async def test_a_submitted_prompt_is_known_runs_once_and_leaves_its_files(server: Server) -> None:
    assert (await server.describe()).gpu_type
    assert isinstance(await server.node_types(), dict)
    assert (await server.queue()).is_empty
    prompt_id = new_id()
    assert (await server.look_up(prompt_id, ["save"])).state is PromptState.UNKNOWN
    await server.submit(GRAPH, prompt_id)
    assert (await server.look_up(prompt_id, ["save"])).state in (PromptState.PENDING, PromptState.RUNNING)
    result = (await ended(server, prompt_id)).result
    assert result is not None
    assert result.error is None
    [file] = result.files
    assert file.node == "save"
    async with server.fetch(file) as (content_type, chunks):
        content = b"".join([chunk async for chunk in chunks])
    assert (content_type, bool(content)) == ("image/png", True)
    assert (await server.queue()).is_empty


async def test_a_follower_hears_of_the_end(server: Server) -> None:
    prompt_id, heard = new_id(), list[PromptUpdate]()
    async with server.follow(prompt_id, heard.append):
        await server.submit(GRAPH, prompt_id)
        await ended(server, prompt_id)

        async def is_told() -> bool:
            return any(update.is_end for update in heard)

        await until(is_told)
    assert any(update.shares for update in heard)


async def test_a_cancel_stops_one_prompt_and_says_where_it_was(server: Server) -> None:
    assert await server.cancel(new_id()) is PromptState.UNKNOWN
    prompt_id = new_id()
    await server.submit(GRAPH, prompt_id)

    async def is_running() -> bool:
        return prompt_id in (await server.queue()).running

    await until(is_running)
    assert await server.cancel(prompt_id) is PromptState.RUNNING
    result = (await ended(server, prompt_id)).result
    assert result is not None
    assert result.is_interrupted
    assert await server.cancel(prompt_id) is PromptState.ENDED
    assert (await server.queue()).is_empty


async def test_a_file_that_is_gone_is_said_to_be(server: Server) -> None:
    with pytest.raises(FileNotFoundError):
        async with server.fetch(ResultFile(node="save", kind="images", filename="never.png")):
            pass


async def test_an_upload_is_named_as_graphs_name_it(server: Server) -> None:
    name = await server.upload("a.png", b"a picture", content_type="image/png", folder="contract/one")
    assert name == "contract/one/a.png"


async def test_a_well_server_runs_the_test_pattern_and_is_free_afterwards(server: Server) -> None:
    assert set(PATTERN) == {"ground", "blurred", "shown"}
    assert await Probe(within_seconds=10.0, poll_seconds=0.05).problem(server) is None
    assert (await server.queue()).is_empty
