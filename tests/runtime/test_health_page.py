"""Health pages, and the check that containers run against them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from local_stack.ports import any_free_port
from runtime.health_page import FirstAnswers, HealthPage
from runtime.required_settings import CannotStart

CHECK = Path(__file__).parent.parent.parent / "runtime" / "health_check.py"


@asynccontextmanager
async def party(status: int, *, port: int = 0) -> AsyncIterator[str]:
    """An outside service that answers everything with this status; its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} Told\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def checked(url: str) -> tuple[int | None, str]:
    """Exit code and output of the check, run as containers run it."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-IS", str(CHECK), url, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_a_page_says_what_is_missing_and_the_check_passes_it_on() -> None:
    missing = ["ComfyUI has not answered yet"]

    async def look() -> list[str]:
        return missing

    port = any_free_port()
    url = f"http://127.0.0.1:{port}"
    async with HealthPage({"/readyz": look}).served("127.0.0.1", port), httpx.AsyncClient(trust_env=False) as http:
        assert await checked(f"{url}/readyz") == (1, "ComfyUI has not answered yet\n")
        assert (await http.get(f"{url}/healthz")).text == "alive\n"
        missing = []
        assert await checked(f"{url}/readyz") == (0, "ready\n")
        assert (await http.get(f"{url}/other")).status_code == 404
        assert (await checked(f"{url}/other"))[0] == 1


async def test_the_check_is_red_where_nothing_listens() -> None:
    code, output = await checked(f"http://127.0.0.1:{any_free_port()}/readyz")
    assert code == 1
    assert "refused" in output


async def test_a_port_that_is_taken_is_named_with_its_setting() -> None:
    async with party(200) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(CannotStart, match=f"127.0.0.1:{port} .*COMFYUI_TEMPORAL_GPU_HEALTH_PORT"):
            async with HealthPage({}).served("127.0.0.1", port, setting="GPU_HEALTH_PORT"):
                pytest.fail("it was served")


async def test_parties_are_missing_until_each_has_answered_once() -> None:
    port = any_free_port()
    async with party(401) as there:
        answers = FirstAnswers({"ComfyUI": there, "the credits service": f"http://127.0.0.1:{port}"})
        [sentence] = await answers.missing()
        assert sentence == f"the credits service has not answered yet at http://127.0.0.1:{port} (ConnectError)"
        async with party(503, port=port):
            [sentence] = await answers.missing()
            assert sentence.endswith("(status 503)"), "a proxy in front of nothing"
        async with party(404, port=port):
            assert await answers.missing() == []
    assert await answers.missing() == [], "an outage makes no process unready"
