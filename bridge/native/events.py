"""ComfyUI's WebSocket messages about one prompt: hints only, the truth is in `/queue` and `/history`.

ComfyUI sends a prompt's messages only to the client id that submitted it. If a second socket opens under the same
client id, it stops receiving when the first one closes. So a broken socket is closed before the next one is opened,
and the caller polls as well.
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

from bridge.graphs import is_count
from bridge.server import PromptUpdate
from comfyui_temporal.contracts.fields import repaired, shortened

OPEN_SECONDS: Final = 5.0
REOPEN_SECONDS: Final = 1.0
MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024
"""Previews are binary messages. They are discarded."""
END_MESSAGES: Final = frozenset({"execution_success", "execution_error", "execution_interrupted"})

log = structlog.get_logger(__name__)
OnUpdate = Callable[[PromptUpdate], None]


class MessageReader:
    """Translates the messages of one prompt, in the order in which they arrive."""

    def __init__(self) -> None:
        self._current: str | None = None

    def read(self, kind: str, data: Mapping[str, Any]) -> PromptUpdate:
        """An empty update for a message of an unknown kind or an unexpected shape."""
        if kind == "execution_cached":
            nodes = data.get("nodes")
            return PromptUpdate(
                cached=frozenset(str(node) for node in nodes) if isinstance(nodes, list) else frozenset()
            )
        if kind == "execution_blocked" or data.get("exception_type") == "ExecutionBlocked":
            # The run goes on without what depends on the node; the history calls it a success.
            return PromptUpdate(blocked=shortened(repaired(str(data.get("exception_message") or kind)), 500))
        if kind == "executing":
            # A node that expands runs nodes that are not in the graph, for it.
            return self._executing(data.get("display_node") or data.get("node"))
        if kind == "progress":
            return PromptUpdate(shares=_share(data.get("node"), data.get("value"), data.get("max")))
        if kind == "progress_state":
            return PromptUpdate(shares=_shares(data.get("nodes")))
        if kind == "executed":
            return PromptUpdate(shares=_finished(data.get("node")))
        return PromptUpdate(is_end=kind in END_MESSAGES)

    def _executing(self, node: Any) -> PromptUpdate:
        """The node before this one has finished. No node: the prompt has ended."""
        shares = _finished(self._current) if self._current != node else {}
        self._current = node if isinstance(node, str) else None
        return PromptUpdate(shares=shares, is_end=node is None)


def _shares(nodes: Any) -> dict[str, float]:
    shares: dict[str, float] = {}
    for node, state in nodes.items() if isinstance(nodes, Mapping) else ():
        if isinstance(state, Mapping):
            is_finished = state.get("state") == "finished"
            shares |= _finished(node) if is_finished else _share(node, state.get("value"), state.get("max"))
    return shares


def _share(node: Any, value: Any, most: Any) -> dict[str, float]:
    if isinstance(node, str) and is_count(value) and is_count(most) and most > 0:
        return {node: min(1.0, max(0.0, value / most))}
    return {}


def _finished(node: Any) -> dict[str, float]:
    return {node: 1.0} if isinstance(node, str) else {}


@asynccontextmanager
async def followed(
    ws_url: str, client_id: str, prompt_id: str, on_update: OnUpdate, headers: Mapping[str, str]
) -> AsyncIterator[None]:
    """Call `on_update` for each message about the prompt while the body runs.

    A socket that breaks or cannot be opened is opened again; the body does not notice.
    """
    tried = asyncio.Event()
    listening = asyncio.create_task(_listen(ws_url, client_id, prompt_id, on_update, headers, tried))
    try:
        waiting = asyncio.create_task(tried.wait())
        # The socket must be open before the submit, or ComfyUI drops the first messages.
        await asyncio.wait({listening, waiting}, timeout=OPEN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        yield
    finally:
        listening.cancel()
        await asyncio.wait({listening})


async def _listen(
    ws_url: str,
    client_id: str,
    prompt_id: str,
    on_update: OnUpdate,
    headers: Mapping[str, str],
    tried: asyncio.Event,
) -> None:
    address = f"{ws_url}?clientId={quote(client_id, safe='')}"
    reader = MessageReader()
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
                additional_headers=headers,
            ) as socket:
                tried.set()
                await _receive(socket, prompt_id, reader, on_update)
        except (OSError, TimeoutError, WebSocketException, InvalidHandshake, InvalidURI) as error:
            # The caller continues without a socket: it polls.
            tried.set()
            on_update(PromptUpdate(is_deaf=True))
            log.info("comfyui_socket_broke", url=ws_url, reason=type(error).__name__)
        await asyncio.sleep(REOPEN_SECONDS)


async def _receive(socket: ClientConnection, prompt_id: str, reader: MessageReader, on_update: OnUpdate) -> None:
    async for message in socket:
        if isinstance(message, bytes):
            continue
        try:
            body = json.loads(message)
        except (ValueError, RecursionError):
            continue
        data = body.get("data") if isinstance(body, dict) else None
        # A message without a prompt id is about the server, or was broadcast by a client without a client id.
        if isinstance(data, dict) and data.get("prompt_id") == prompt_id and isinstance(body.get("type"), str):
            on_update(reader.read(body["type"], data))
