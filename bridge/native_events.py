"""What a ComfyUI server tells about one prompt while it runs, by WebSocket: hints, never the truth.

Messages go only to the client id that submitted. A socket that is opened under a client id while an older one lives
is made deaf when the older one ends, so a broken socket is closed before the next is opened, and whoever listens here
polls as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException

OPEN_SECONDS: Final = 5.0
REOPEN_SECONDS: Final = 1.0
MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024
"""Previews come as binary messages; they are thrown away."""

log = structlog.get_logger(__name__)
Heard = Callable[[str, Mapping[str, Any]], None]


@asynccontextmanager
async def listening(ws_url: str, client_id: str, prompt_id: str, heard: Heard) -> AsyncIterator[None]:
    """Call `heard(type, data)` for each message about the prompt, from before the body runs until it ends.

    A socket that cannot be opened or breaks is opened again and again; the body never hears of it.
    """
    tried = asyncio.Event()
    running = asyncio.create_task(_listen(ws_url, client_id, prompt_id, heard, tried))
    try:
        waiting = asyncio.create_task(tried.wait())
        # Before the submit, or its first messages go to nobody.
        await asyncio.wait({running, waiting}, timeout=OPEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})


async def _listen(ws_url: str, client_id: str, prompt_id: str, heard: Heard, tried: asyncio.Event) -> None:
    address = f"{ws_url}?clientId={quote(client_id, safe='')}"
    while True:
        try:
            async with connect(
                address,
                open_timeout=OPEN_SECONDS,
                close_timeout=1,
                ping_timeout=60,
                max_size=MAX_MESSAGE_BYTES,
                proxy=None,
                user_agent_header="comfyui-temporal",
            ) as socket:
                tried.set()
                await _hear(socket, prompt_id, heard)
        except (OSError, TimeoutError, WebSocketException, InvalidHandshake, InvalidURI) as error:
            # Whoever waits for the socket goes on without: polling does as well.
            tried.set()
            log.info("comfyui_socket_broke", url=ws_url, reason=type(error).__name__)
        await asyncio.sleep(REOPEN_SECONDS)


async def _hear(socket: ClientConnection, prompt_id: str, heard: Heard) -> None:
    async for message in socket:
        if isinstance(message, bytes):
            continue
        try:
            body = json.loads(message)
        except (ValueError, RecursionError):
            continue
        data = body.get("data") if isinstance(body, dict) else None
        # Without an id it is about the server, or a socket without a client id's broadcast.
        if isinstance(data, dict) and data.get("prompt_id") == prompt_id and isinstance(body.get("type"), str):
            heard(body["type"], data)
