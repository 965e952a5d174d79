"""The wire format of a stream: Server-Sent Events or WebSocket, with the same JSON (contract §6).

Departures from the framework, each to save memory: measured with proof/benchmarks/stream_memory.py.
1. One asyncio task for each stream: the application waits for the client to leave, and the hub's reader writes. The
   usual pair of tasks, one that produces and one that waits for the disconnect, costs twice as much.
2. An event is turned into text once for all streams that send it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Protocol

from starlette.types import Receive, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from comfyui_temporal.contracts.task_events import EventType, Heartbeat, TaskEvent

RETRY_MILLISECONDS: Final = 2_000
ENDS: Final = frozenset({EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED})
"""The last events of a task's history."""


def _schema_ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


FRAME_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "title": "Frame",
    "description": "One frame of the stream.",
    "properties": {
        "id": {"type": "string", "description": "The cursor; heartbeats and streams of all tasks have none."},
        "event": {"type": "string", "enum": [kind.value for kind in EventType]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_schema_ref("TaskEvent"), _schema_ref("Heartbeat")]},
        },
        "retry": {"type": "integer", "description": "Milliseconds to wait before the stream is opened again."},
    },
}
"""A Server-Sent Event, for the OpenAPI document."""


class EndReason(StrEnum):
    """Why a stream ends. All but `over` can be resumed where they ended."""

    OVER = "over"
    """Every task in it has ended."""
    SLOW = "slow"
    """The client reads more slowly than its tasks produce events."""
    EXPIRED = "expired"
    """The token has expired."""
    DRAINING = "draining"
    """This process is shutting down."""
    UNAVAILABLE = "unavailable"
    """The history cannot be read now."""


_CLOSE_CODES: Final = {
    EndReason.OVER: 1000,
    EndReason.SLOW: 1013,
    EndReason.EXPIRED: 3000,
    EndReason.DRAINING: 1012,
    EndReason.UNAVAILABLE: 1013,
}
"""RFC 6455 and the IANA registry: normal, try again later, unauthorized, service restart."""

_LINE_ENDS: Final = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""JSON allows them and SSE treats them as text, but readers that split lines as Python does would break."""


def worded(event: TaskEvent, words: Mapping[str, str]) -> dict[str, Any]:
    """The event as JSON, with other words for ends where `words` has some."""
    document = event.model_dump(mode="json")
    return document | {"status": words.get(document["status"], document["status"])}


class SharedEvent:
    """An event and its texts, each made at most once. `words`: other words for ends."""

    def __init__(self, event: TaskEvent, words: Mapping[str, str] = MappingProxyType({})) -> None:
        self._words = words if event.status in words else None
        self.task_id = event.task_id
        self.seq = event.seq
        self.is_end = event.event in ENDS
        self._event = event

    @cached_property
    def _before_cursor(self) -> str:
        if self._words is None:
            text = self._event.model_dump_json(exclude={"cursor"})
        else:
            document = worded(self._event, self._words)
            del document["cursor"]
            text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        return text[:-1].translate(_LINE_ENDS)

    @cached_property
    def own_json(self) -> str:
        return self.json(self._event.cursor)

    @cached_property
    def own_sse(self) -> bytes:
        return self.sse(self._event.cursor)

    @cached_property
    def sse_without_id(self) -> bytes:
        return f"event: {self._event.event}\ndata: {self.own_json}\n\n".encode()

    def json(self, cursor: str) -> str:
        """The event as JSON, with the stream's cursor."""
        return f'{self._before_cursor},"cursor":"{cursor}"}}'

    def sse(self, cursor: str) -> bytes:
        return f"id: {cursor}\nevent: {self._event.event}\ndata: {self.json(cursor)}\n\n".encode()


class Wire(Protocol):
    """One client's connection, after it was accepted. Frames are `bytes` (SSE) or `str` (WebSocket)."""

    kind: str

    def frame(self, event: SharedEvent, cursor: str | None, *, is_own: bool) -> bytes | str:
        """`is_own`: the cursor is the event's own. `cursor` None: this stream cannot be resumed."""

    def heartbeat(self, cursor: str | None) -> bytes | str: ...

    async def write(self, frames: Sequence[bytes | str]) -> None: ...

    async def end(self, reason: EndReason, retry_milliseconds: int) -> None: ...

    async def until_gone(self) -> None:
        """Returns when the client has gone or the stream has ended."""


class SseWire:
    """Server-Sent Events over one ASGI response that has been started."""

    kind = "sse"
    __slots__ = ("_receive", "_send")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send

    def frame(self, event: SharedEvent, cursor: str | None, *, is_own: bool) -> bytes:
        if cursor is None:
            return event.sse_without_id
        return event.own_sse if is_own else event.sse(cursor)

    def heartbeat(self, cursor: str | None) -> bytes:
        return f"event: {EventType.HEARTBEAT}\ndata: {_heartbeat(cursor)}\n\n".encode()

    async def write(self, frames: Sequence[bytes | str]) -> None:
        body = b"".join(frame if isinstance(frame, bytes) else frame.encode() for frame in frames)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, reason: EndReason, retry_milliseconds: int) -> None:
        last_frame = f": {reason}\nretry: {retry_milliseconds}\n\n".encode()
        await self._send({"type": "http.response.body", "body": last_frame, "more_body": False})

    async def until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class WebSocketWire:
    """The same over an accepted WebSocket. What the client sends is ignored."""

    kind = "ws"
    __slots__ = ("_socket",)

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    def frame(self, event: SharedEvent, cursor: str | None, *, is_own: bool) -> str:
        return event.own_json if is_own or cursor is None else event.json(cursor)

    def heartbeat(self, cursor: str | None) -> str:
        return _heartbeat(cursor)

    async def name_unknown(self, task_ids: Sequence[str]) -> None:
        """A first frame that names the ids that are left out: a browser reads no header of the handshake."""
        first = Heartbeat(ts=datetime.now(UTC), unknown_tasks=list(task_ids))
        # The framework raises RuntimeError for a connection that was closed meanwhile: its reader notices that too.
        with suppress(OSError, RuntimeError, WebSocketDisconnect):
            await self.write([first.model_dump_json()])

    async def write(self, frames: Sequence[bytes | str]) -> None:
        for frame in frames:
            await self._socket.send_text(frame if isinstance(frame, str) else frame.decode())

    async def end(self, reason: EndReason, retry_milliseconds: int) -> None:
        await self._socket.close(_CLOSE_CODES[reason], f"{reason}; retry in {retry_milliseconds} ms")

    async def until_gone(self) -> None:
        while (await self._socket.receive())["type"] != "websocket.disconnect":
            pass


def _heartbeat(cursor: str | None) -> str:
    return Heartbeat(ts=datetime.now(UTC), cursor=cursor).model_dump_json(exclude={"unknown_tasks"})
