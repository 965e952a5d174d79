"""How every HTTP door of ours is served: uvicorn, and what a connection may cost before it says who it is.

    accepted ─▶ waits for a head ─▶ a request is answered ─▶ waits for the next ─▶ …
                10 s, 16 KiB         its route bounds the body    75 s for its first byte, then as before;
                                                                  what is left of a body: 10 s, 8 MiB

Who may have how many connections open is the door's (door_limits.py).

Departures from uvicorn
1. `limit_concurrency` is not used. It counts idle connections too, accepts any number of further ones and then answers
   503 to every request, health checks included: idle connections alone would close the door.
2. What a client sends over a WebSocket is dropped here. uvicorn writes a traceback for text that is not UTF-8.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any, Final

import httptools
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from runtime.door_limits import Door, DoorLimits, Refusal, answer_to, most_connections
from runtime.settings import Settings

HEAD_BYTES: Final = 16 * 1024
REST_BYTES: Final = 8 * 1024 * 1024
"""What is read, and dropped, of a body after its answer: a client that is still sending can then read the answer."""
MAX_PIPELINED: Final = 16
LINGER_SECONDS: Final = 2.0
MAX_MESSAGE_BYTES: Final = 4 * 1024
"""Of a WebSocket message of a client; none of ours has to send any."""
MAX_UNREAD_BYTES: Final = 1024 * 1024
"""Of a WebSocket whose client sends pings and reads nothing."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 within the limits of its door."""

    config: DoorConfig

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._door = self.config.door
        self._address = ""
        self._is_counted = False
        self._active: RequestResponseCycle | None = None
        """The request that is being answered; those behind it are in `pipeline`."""
        self._is_reading_head = True
        self._steps = 0
        """How often a head, a part of a body or a message was complete."""
        self._head_bytes = 0
        self._incomplete_bytes = 0
        self._rest_bytes = 0
        self._has_sent = False
        self._is_kept = False
        """Whether it was answered and has sent nothing since."""
        self._refusal: Refusal | None = None
        self._fault = Refusal.UNREADABLE
        """What it is that the parser is made to stop for."""
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._is_counted = True
        refusal = self._door.enter(self._address)
        if refusal is not None:
            self._refusal = refusal
            self._door.refused(refusal, self._address)
            transport.write(answer_to(refusal))
            transport.close()
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_stall()
        self._leave()
        super().connection_lost(exc)

    def _leave(self) -> None:
        if self._is_counted:
            self._is_counted = False
            self._door.leave(self._address)

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        self._stop_stall()
        self._leave()

    def drop(self, refusal: Refusal) -> None:
        """End the connection at once, nothing answered."""
        self._stop_waiting()
        self._door.refused(refusal, self._address)
        self.transport.abort()

    # Time

    def _wait_for_head(self) -> None:
        self._door.waits(self)
        self._unsent_bytes = self.transport.get_write_buffer_size()
        limits = self._door.limits
        # uvicorn closes a kept connection in time; this deadline stands behind it.
        seconds = limits.head_seconds + (limits.kept_seconds if self._is_kept else 0)
        self._deadline = self.loop.call_later(seconds, self._time_is_up)

    def _stop_waiting(self) -> None:
        self._is_kept = False
        self._door.waits_no_more(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _time_is_up(self) -> None:
        self._deadline = None
        unsent = self.transport.get_write_buffer_size()
        if 0 < unsent < self._unsent_bytes:
            # It is still reading its last answer, and has got on with it.
            self._wait_for_head()
        elif unsent:
            self.drop(Refusal.NOT_READ)
        elif not self._is_reading_head:
            self.drop(Refusal.BODY_AFTER_ANSWER)
        else:
            self.drop(Refusal.HEAD_TOO_SLOW if self._has_sent else Refusal.IDLE)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        self._stop_stall()
        super().resume_writing()

    def _watch_stall(self) -> None:
        unsent = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < unsent:
                self._watch_stall()
            else:
                self.drop(Refusal.NOT_READ)

        self._stall = self.loop.call_later(self._door.limits.stall_seconds, look)

    def _stop_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # What arrives

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._refusal is not None or self._is_rest_of_body:
            self._drop_bytes(len(data))
        if self._refusal is not None or self.transport.is_closing():
            return
        if self._is_kept:
            self._stop_waiting()
            self._wait_for_head()
        steps, self._has_sent = self._steps, True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            return
        except httptools.HttpParserError:
            self._refuse(self._fault)
            return
        # Complete names and values are counted below. This counts the rest, such as one value without an end.
        self._incomplete_bytes = self._incomplete_bytes + len(data) if self._steps == steps else 0
        if self._incomplete_bytes > HEAD_BYTES:
            self._refuse(Refusal.HEAD_TOO_LARGE)

    @property
    def _is_rest_of_body(self) -> bool:
        """Whether the request was answered before its body was complete."""
        return not self._is_reading_head and self._active is not None and self._active.response_complete

    def _drop_bytes(self, count: int) -> None:
        self._rest_bytes += count
        if self._rest_bytes > REST_BYTES:
            if self._refusal is None:
                self._door.refused(Refusal.BODY_AFTER_ANSWER, self._address)
            self.transport.abort()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, unless a request before this one is still being answered; then end the connection."""
        self._refusal = refusal
        self._door.refused(refusal, self._address)
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        active, seconds = self._active, self._door.limits.head_seconds
        if active is None or active.response_complete:
            self._answer(refusal)
            seconds = LINGER_SECONDS
        elif active.more_body and not active.response_started:
            # What cannot be read is the body of this very request.
            active.disconnected = True
            active.waiting_for_100_continue = False
            active.message_event.set()
            self._answer(refusal)
            seconds = LINGER_SECONDS
        else:
            active.keep_alive = False
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _answer(self, refusal: Refusal) -> None:
        """A socket that is closed with unread bytes resets the connection, and its client reads no answer.

        So only this end is closed; what still comes is dropped for a moment.
        """
        self.transport.write(answer_to(refusal))
        self.transport.write_eof()

    # The parser's calls. It turns what they raise into HttpParserError.

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > HEAD_BYTES:
            self._fault = Refusal.HEAD_TOO_LARGE
            raise ValueError(self._fault)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fault = Refusal.TOO_MANY_PIPELINED
            raise ValueError(self._fault)
        self._is_reading_head = False
        self._steps += 1
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._steps += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_reading_head = True
        self._steps += 1
        super().on_message_complete()

    # What is answered

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._is_counted and self._refusal is None:
            self._rest_bytes = 0
            self._has_sent = not self._is_reading_head
            self._stop_waiting()
            self._is_kept = self._is_reading_head and not self.transport.get_write_buffer_size()
            self._wait_for_head()


class DeafWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket for doors whose clients only listen."""

    config: DoorConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        # It takes the place of the connection that brought the handshake, which leaves now.
        self.config.door.enter_again(self._address)

    def connection_lost(self, exc: Exception | None) -> None:
        self.config.door.leave(self._address)
        super().connection_lost(exc)

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            # uvicorn takes a refused handshake for one that was forgotten, and logs each as an error.
            self.handshake_complete = True

    def send_receive_event_to_app(self) -> None:
        self.frames = []

    def handle_ping(self) -> None:
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.config.door.refused(Refusal.NOT_READ, self._address)
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.handshake_initiated or self.conn.handshake_exc is None:
            return
        # The WebSocket library takes fewer and shorter headers than HTTP. uvicorn neither sends its answer nor closes.
        self.config.door.refused(Refusal.HEAD_TOO_LARGE, self._address)
        self.handshake_complete = self.close_sent = True
        self.transport.write(b"".join(self.conn.data_to_send()) or answer_to(Refusal.UNREADABLE))
        self.transport.close()

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is not None:
            super().handle_parser_exception()
            return
        # Before the handshake is answered there is no close frame, which uvicorn asserts.
        self.config.door.refused(Refusal.UNREADABLE, self._address)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
        self.handshake_complete = self.close_sent = True
        self.transport.close()


def _without_tracebacks_of_leaving(app: ASGIApp) -> ASGIApp:
    """A client that leaves while its body is read, or while it is sent something, is nobody's error."""

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect, WebSocketDisconnect):
            await app(scope, receive, send)

    return quiet


class DoorConfig(uvicorn.Config):
    """uvicorn's configuration of a door. Raises ValueError for limits that make no sense."""

    def __init__(
        self, app: ASGIApp, door: Door, *, host: str, port: int, websockets: bool = False, **more: Any
    ) -> None:
        super().__init__(
            _without_tracebacks_of_leaving(app),
            host=host,
            port=port,
            http=BoundedHttp,
            ws=DeafWebSocket if websockets else "none",
            ws_max_size=MAX_MESSAGE_BYTES,
            forwarded_allow_ips=list(door.limits.trusted_proxies),
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=math.ceil(door.limits.kept_seconds),
            **more,
        )
        self.door = door


def door_limits_by(settings: Settings) -> DoorLimits:
    """What connections to a port of ours may cost."""
    return DoorLimits(
        connections_per_address=settings.connections_per_address,
        trusted_proxies=settings.trusted_proxies,
        connections=most_connections(),
    )
