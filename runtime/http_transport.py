"""httpx's transport, with requests that are never cancelled from outside.

httpx 0.28 loses a pooled connection for good in two cases: the task that waits for a request is cancelled, or a request
waits for a free connection and times out just as it gets one. 8 callers that gave up after 2 to 30 ms emptied a pool of
5 within a second. So:

1. `limit_seconds` bounds the whole exchange, including its body. It shortens the time limit of each read, write and
   connect, so that the exchange ends by its own `TimeoutException`.
2. A cancelled caller leaves immediately. Its exchange continues in its own task, and its connection is closed, so that
   it ends soon. `aclose` waits for these tasks.
3. Requests wait for a free connection here, before the pool sees them.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpcore
import httpx
from httpcore._backends.auto import AutoBackend

LIMIT: Final = "limit_seconds"
"""Key of a request's `extensions`: seconds for the whole exchange; no limit if it is absent."""
DEFAULT_LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=20)
_SHORTEST_SECONDS: Final = 0.001
T = TypeVar("T")


class Exchange:
    """One request and its answer: its deadline, and the connection that it uses now."""

    def __init__(self, limit_seconds: float | None) -> None:
        self._ends_at = None if limit_seconds is None else time.monotonic() + limit_seconds
        self.stream: httpcore.AsyncNetworkStream | None = None

    def within(self, seconds: float | None) -> float | None:
        """The time limit of one operation whose own limit is `seconds`."""
        if self._ends_at is None:
            return seconds
        rest = max(self._ends_at - time.monotonic(), _SHORTEST_SECONDS)
        return rest if seconds is None else min(seconds, rest)


_exchange: ContextVar[Exchange] = ContextVar("exchange")


@cache
def trusted_certificates() -> ssl.SSLContext:
    """What this process trusts, read once: each reading blocks the event loop for 50 ms."""
    return httpx.create_ssl_context()


class PatientTransport(httpx.AsyncHTTPTransport):
    """As `httpx.AsyncHTTPTransport`. Requests take `extensions={"limit_seconds": 9.0}`."""

    def __init__(
        self, *, limits: httpx.Limits = DEFAULT_LIMITS, verify: ssl.SSLContext | bool = True, **options: Any
    ) -> None:
        super().__init__(limits=limits, verify=trusted_certificates() if verify is True else verify, **options)
        # httpx has no parameter for the backend of its pool. The tests fail if this one is not used.
        self._pool._network_backend = _Backend()
        self._free = asyncio.Semaphore(limits.max_connections) if limits.max_connections else None
        self._left_alone: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = Exchange(request.extensions.get(LIMIT))
        timeouts = request.extensions.get("timeout", {})
        await self._wait_for_connection(exchange.within(timeouts.get("pool")))
        if self._is_closed:
            self._release()
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        request.extensions["timeout"] = {**timeouts, "pool": None}
        asking = asyncio.create_task(_in(exchange, super().handle_async_request(request)))
        try:
            await asyncio.wait({asking})
        except asyncio.CancelledError:
            self._leave(_closed_late(exchange, asking))
            raise
        if asking.exception() is not None:
            self._release()
        response = asking.result()
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Body(self, exchange, response.stream)
        return response

    async def _wait_for_connection(self, seconds: float | None) -> None:
        if self._free is not None:
            try:
                async with asyncio.timeout(seconds):
                    await self._free.acquire()
            except TimeoutError:
                raise httpx.PoolTimeout("no connection became free in time") from None

    def _release(self) -> None:
        if self._free is not None:
            self._free.release()

    def _leave(self, ending: Coroutine[Any, Any, None]) -> None:
        """Let an exchange end in the background. Its connection is free after that."""
        task = asyncio.create_task(ending)
        self._left_alone.add(task)
        task.add_done_callback(self._left_alone.discard)
        task.add_done_callback(lambda _: self._release())

    async def _all_ended(self) -> None:
        self._is_closed = True
        while self._left_alone:
            await asyncio.wait(self._left_alone)

    async def aclose(self) -> None:
        await self._all_ended()
        await super().aclose()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._all_ended()
        await super().__aexit__(exc_type, exc_value, traceback)


class OwnsClient:
    """A class with one HTTP client, which opens and closes with it."""

    _client: AbstractAsyncContextManager[Any]

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)


class PatientClient(httpx.AsyncClient):
    """`httpx.AsyncClient` with this transport, also for proxies from the environment."""

    def _init_transport(self, *arguments: Any, **options: Any) -> httpx.AsyncBaseTransport:
        given: httpx.AsyncBaseTransport | None = options.pop("transport", None)
        return given if given is not None else PatientTransport(**options)

    def _init_proxy_transport(self, proxy: httpx.Proxy, *arguments: Any, **options: Any) -> httpx.AsyncBaseTransport:
        return PatientTransport(proxy=proxy, **options)


class _Body(httpx.AsyncByteStream):
    """A body whose reads end by themselves. Its connection is free when it is closed."""

    def __init__(self, transport: PatientTransport, exchange: Exchange, body: httpx.AsyncByteStream) -> None:
        self._transport = transport
        self._exchange = exchange
        self._body = body
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._body)
        while True:
            reading = asyncio.create_task(_in(self._exchange, _next(chunks)))
            try:
                await asyncio.wait({reading})
            except asyncio.CancelledError:
                self._close_in_background(reading)
                raise
            chunk = reading.result()
            if chunk is None:
                return
            yield chunk

    async def aclose(self) -> None:
        if not self._is_closed:
            closing = self._close_in_background(None)
            await asyncio.wait({closing})

    def _close_in_background(self, reading: asyncio.Task[bytes | None] | None) -> asyncio.Task[None]:
        self._is_closed = True
        closing = asyncio.create_task(_in(self._exchange, _closed(self._exchange, reading, self._body)))
        self._transport._leave(_waited(closing))
        return closing


async def _in(exchange: Exchange, work: Coroutine[Any, Any, T]) -> T:
    _exchange.set(exchange)
    return await work


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)


async def _waited(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as retrieved: its caller has left


async def _closed_late(exchange: Exchange, asking: asyncio.Task[httpx.Response]) -> None:
    """End a request whose caller has left: close its connection, or its answer when it arrives."""
    if exchange.stream is not None:
        await exchange.stream.aclose()
    await asyncio.wait({asking})
    if not asking.cancelled() and asking.exception() is None:
        await asking.result().aclose()


async def _closed(exchange: Exchange, reading: asyncio.Task[bytes | None] | None, body: httpx.AsyncByteStream) -> None:
    if reading is not None:
        if exchange.stream is not None:
            await exchange.stream.aclose()
        await asyncio.wait({reading})
        if not reading.cancelled():
            reading.exception()
    await body.aclose()


class _Backend(httpcore.AsyncNetworkBackend):
    """httpcore's own backend, with connections that know the exchange that uses them."""

    def __init__(self) -> None:
        self._backend = AutoBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        seconds = _exchange.get().within(timeout)
        return _Stream(await self._backend.connect_tcp(host, port, seconds, local_address, socket_options))

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, self._within(timeout))

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, self._within(timeout))

    async def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, self._within(timeout)))

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _within(self, timeout: float | None) -> float | None:
        exchange = _exchange.get()
        exchange.stream = self
        return exchange.within(timeout)
