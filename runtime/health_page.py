"""A process's health pages over plain HTTP, for processes that serve nothing else, and what they look at.

/healthz    the process is alive
the others  200, or 503 with a sentence for each thing that is missing
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

import httpx
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.client import Client
from temporalio.service import RPCError

from runtime.http_transport import trusted_certificates
from runtime.pollers import pollers_of
from runtime.required_settings import CannotStart

LOOK_SECONDS: Final = 3.0
PARTY_SECONDS: Final = 2.0

Look = Callable[[], Awaitable[list[str]]]
"""What is missing, a sentence each; empty: ready."""


class HealthPage:
    """`pages`: path → what it looks at."""

    def __init__(self, pages: Mapping[str, Look]) -> None:
        self._pages = dict(pages)

    @asynccontextmanager
    async def served(self, host: str, port: int | None, *, setting: str = "HEALTH_PORT") -> AsyncIterator[None]:
        """Nothing is served without a port. Raises CannotStart if it is taken; `setting` names it there."""
        if port is None:
            yield
            return
        try:
            server = await asyncio.start_server(self._answer, host, port, limit=8 * 1024)
        except OSError as error:
            raise CannotStart(
                f"The health page cannot listen at {host}:{port} ({error.strerror}): "
                f"set COMFYUI_TEMPORAL_{setting} to a free port."
            ) from None
        try:
            yield
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LOOK_SECONDS)
            target = b"".join(head.split(b" ", 2)[1:2]).split(b"?")[0]
            status, text = await self._page(target.decode(errors="replace"))
            body = f"{text}\n".encode()
            head_lines = (f"HTTP/1.1 {status}", "Content-Type: text/plain", f"Content-Length: {len(body)}")
            writer.write("\r\n".join([*head_lines, "Connection: close", "", ""]).encode() + body)
            await writer.drain()
        writer.close()

    async def _page(self, target: str) -> tuple[str, str]:
        if target == "/healthz":
            return "200 OK", "alive"
        if target not in self._pages:
            return "404 Not Found", f"there is {' and '.join(['/healthz', *self._pages])}"
        missing = await self._pages[target]()
        return ("503 Service Unavailable", "\n".join(missing)) if missing else ("200 OK", "ready")


async def is_polling(
    client: Client,
    task_queue: str,
    identity: str,
    kind: TaskQueueType.ValueType = TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
) -> bool:
    """Whether Temporal sees a worker of this identity poll the queue. False if it does not answer."""
    try:
        pollers = await pollers_of(client, task_queue, kind, within=timedelta(seconds=LOOK_SECONDS))
    except RPCError:
        return False
    return any(poller.identity == identity for poller in pollers)


class FirstAnswers:
    """Whether outside parties have each answered once, below status 500, since this process began.

    A wrong address never answers. A party that answered and is away now is an outage, which calls outlast by retrying:
    it makes no process unready.
    """

    def __init__(self, addresses: Mapping[str, str]) -> None:
        """`addresses`: name of the party → its base URL."""
        self._awaited = dict(addresses)

    async def missing(self) -> list[str]:
        """A sentence for each that has not answered yet; asks those again."""
        if not self._awaited:
            return []
        # No token is sent, and no redirect followed: any answer will do.
        async with httpx.AsyncClient(
            timeout=PARTY_SECONDS, follow_redirects=False, verify=trusted_certificates()
        ) as http:
            sentences = await asyncio.gather(*(self._asked(http, *party) for party in list(self._awaited.items())))
        return [sentence for sentence in sentences if sentence]

    async def _asked(self, http: httpx.AsyncClient, name: str, address: str) -> str | None:
        try:
            async with asyncio.timeout(PARTY_SECONDS), http.stream("GET", address) as answer:
                # A proxy in front of nothing answers too.
                reason = f"status {answer.status_code}" if answer.is_server_error else None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError) as error:
            reason = type(error).__name__
        if reason:
            return f"{name} has not answered yet at {address} ({reason})"
        self._awaited.pop(name, None)
        return None
