"""Requests that are given up at any instant leave the pool whole, and a limit bounds a request as a whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import httpx
import pytest

from runtime.http_transport import LIMIT, PatientTransport
from tests.activities.loopback import Seen, always, http_bytes, serving

POOL = httpx.Limits(max_connections=5, max_keepalive_connections=5)


@asynccontextmanager
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=PatientTransport(limits=POOL), timeout=httpx.Timeout(6, connect=2, pool=2)
    ) as http:
        yield http


async def dawdle(random: Random, writer: asyncio.StreamWriter) -> None:
    raw = http_bytes(200, b"x" * random.choice([40, 200_000]))
    cut = random.randrange(len(raw))
    await asyncio.sleep(random.uniform(0, 0.02))
    writer.write(raw[:cut])
    await asyncio.sleep(random.uniform(0, 0.004))
    writer.write(raw[cut:])


@pytest.mark.parametrize("by", ["limit", "cancellation"])
async def test_requests_given_up_at_any_instant_leave_the_pool_whole(by: str) -> None:
    random = Random(7)
    given_up = 0

    async def slow(request: Seen, writer: asyncio.StreamWriter) -> None:
        await dawdle(random, writer)

    async def once(url: str, http: httpx.AsyncClient) -> None:
        nonlocal given_up
        seconds = random.uniform(0.002, 0.03)
        try:
            if by == "limit":
                await http.get(url, extensions={LIMIT: seconds})
            else:
                await asyncio.wait_for(http.get(url), seconds)
        except (httpx.TimeoutException, TimeoutError):
            given_up += 1

    async def repeatedly(url: str, http: httpx.AsyncClient) -> None:
        for _ in range(40):
            await once(url, http)

    async with serving(slow) as server, client() as http:
        await asyncio.gather(*(repeatedly(server.url, http) for _ in range(8)))
        server.answer = always(200, {})
        answers = await asyncio.gather(*(http.get(server.url, extensions={LIMIT: 5}) for _ in range(10)))
    assert given_up > 100
    assert [answer.status_code for answer in answers] == [200] * 10


async def test_a_cancelled_download_frees_its_connection() -> None:
    async def endless(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n" + b"x" * 1000)
        await asyncio.sleep(60)

    async def download(http: httpx.AsyncClient, url: str, begun: asyncio.Event) -> None:
        async with http.stream("GET", url) as response:
            async for _ in response.aiter_raw():
                begun.set()

    async with serving(endless) as server, client() as http:
        for _ in range(12):
            begun = asyncio.Event()
            task = asyncio.create_task(download(http, server.url, begun))
            await asyncio.wait_for(begun.wait(), 5)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        server.answer = always(200, {})
        assert (await http.get(server.url, extensions={LIMIT: 5})).status_code == 200


@pytest.mark.parametrize("where", ["head", "body"])
async def test_a_slow_trickle_of_bytes_does_not_outlast_the_limit(where: str) -> None:
    async def drip(request: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"content-length: 9999\r\n\r\n" if where == "body" else b""))
        while not writer.is_closing():
            writer.write(b"x" if where == "body" else b"a: b\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with serving(drip) as server, client() as http:
        began = time.monotonic()
        with pytest.raises(httpx.TimeoutException):
            await http.get(server.url, extensions={LIMIT: 0.15})
        assert time.monotonic() - began < 1


async def test_a_closed_client_opens_no_connection() -> None:
    """One that it opened would stay open: the pool was closed before."""
    async with serving(always(200, {})) as server:
        transport = PatientTransport(limits=POOL)
        request = httpx.Request("GET", server.url)
        await transport.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await transport.handle_async_request(request)
        assert server.connections == 0
