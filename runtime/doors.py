"""How every HTTP door of ours is served: uvicorn, and what a connection may cost before it says who it is.

    accepted ─▶ waits for a head ─▶ a request is answered ─▶ waits for a head ─▶ …
                10 s, 16 KiB         its route bounds the body    10 s, 16 KiB; what is left of a body: 1 MiB

An address has a limited number of connections. Where all places are taken, the connection that has waited longest for a
head makes room: whoever sends a request at once is served, however many others only sit there.

Departures from uvicorn
1. `limit_concurrency` is not used. It counts idle connections too, accepts any number of further ones and then answers
   503 to every request, health checks included: idle connections alone would close the door.
2. What a client sends over a WebSocket is dropped here. uvicorn writes a traceback for text that is not UTF-8.
3. What is refused is counted by reason and logged once a minute for each, not once for each request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

import httptools
import structlog
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from runtime.settings import Settings

log = structlog.get_logger(__name__)

HEAD_BYTES: Final = 16 * 1024
HEAD_SECONDS: Final = 10.0
REST_BYTES: Final = 1024 * 1024
"""What is read, and dropped, of a body after its answer: a client that is still sending can then read the answer."""
STALL_SECONDS: Final = 30.0
MAX_PIPELINED: Final = 16
LINGER_SECONDS: Final = 2.0
MAX_MESSAGE_BYTES: Final = 4 * 1024
"""Of a WebSocket message of a client; none of ours has to send any."""
MAX_UNREAD_BYTES: Final = 1024 * 1024
"""Of a WebSocket whose client sends pings and reads nothing."""
MAX_CONNECTIONS: Final = 20_000
OWN_FILES: Final = 256
"""Files that a process opens besides its connections."""
IPV6_NETWORK_BITS: Final = 64
"""One site has at least so many addresses."""
LOG_SECONDS: Final = 60.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refusal(StrEnum):
    """Why a connection was closed by the door itself."""

    HEAD_TOO_LARGE = "head_too_large"
    HEAD_TOO_SLOW = "head_too_slow"
    IDLE = "idle"
    """It sent nothing: a browser opens such connections in advance."""
    UNREADABLE = "unreadable"
    TOO_MANY_OF_ADDRESS = "too_many_of_address"
    TOO_MANY = "too_many"
    MADE_ROOM = "made_room"
    TOO_MANY_PIPELINED = "too_many_pipelined"
    BODY_AFTER_ANSWER = "body_after_answer"
    NOT_READ = "not_read"


_ANSWERS: Final = {
    Refusal.HEAD_TOO_LARGE: ("431 Request Header Fields Too Large", "The request's head is larger than 16 KiB."),
    Refusal.UNREADABLE: ("400 Bad Request", "This is no HTTP/1.1 request."),
    Refusal.TOO_MANY_OF_ADDRESS: ("429 Too Many Requests", "This address has too many connections open."),
    Refusal.TOO_MANY: ("503 Service Unavailable", "Too many connections are open: try again."),
}
_RETRY_AFTER: Final = {Refusal.TOO_MANY_OF_ADDRESS: 10, Refusal.TOO_MANY: 2}


def _answer_to(refusal: Refusal) -> bytes:
    status, sentence = _ANSWERS[refusal]
    retry = f"Retry-After: {_RETRY_AFTER[refusal]}\r\n" if refusal in _RETRY_AFTER else ""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(sentence)}\r\n"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{retry}Connection: close\r\n\r\n{sentence}"
    ).encode()


@dataclass(frozen=True)
class DoorLimits:
    """What connections may cost. `connections_per_address`: 0 is any number.

    `trusted_proxies`: addresses and networks whose `X-Forwarded-…` headers are believed, and which may open any number
    of connections: everybody comes through them. Raises ValueError if one is neither.
    """

    connections_per_address: int = 1_000
    trusted_proxies: Sequence[str] = ("127.0.0.1", "::1")
    connections: int = MAX_CONNECTIONS
    head_seconds: float = HEAD_SECONDS
    stall_seconds: float = STALL_SECONDS

    def __post_init__(self) -> None:
        for network in self.trusted_proxies:
            ipaddress.ip_network(network)


class Door:
    """What is open at one port, and what was refused there. `on_refused` is called for each."""

    def __init__(self, limits: DoorLimits, on_refused: Callable[[Refusal], None] | None = None) -> None:
        self.limits = limits
        self.on_refused = on_refused
        self._trusted = [ipaddress.ip_network(network) for network in limits.trusted_proxies]
        self._of_address: Counter[str] = Counter()
        self._waiting: dict[BoundedHttp, None] = {}
        """Those that wait for a head; the one that has waited longest first."""
        self._unlogged: Counter[Refusal] = Counter()
        self._logged_at: dict[Refusal, float] = {}
        self.open = 0

    def enter(self, address: str) -> Refusal | None:
        """Counts a new connection, also one that must be refused; `leave` takes it back."""
        self.open += 1
        group = _group(address)
        self._of_address[group] += 1
        most = self.limits.connections_per_address
        if most and self._of_address[group] > most and not _is_in(address, self._trusted):
            return Refusal.TOO_MANY_OF_ADDRESS
        if self.open > self.limits.connections and not self._make_room():
            return Refusal.TOO_MANY
        return None

    def enter_again(self, address: str) -> None:
        """Counts a connection that goes on by another protocol; it was let in before."""
        self.open += 1
        self._of_address[_group(address)] += 1

    def leave(self, address: str) -> None:
        self.open -= 1
        group = _group(address)
        self._of_address[group] -= 1
        if not self._of_address[group]:
            del self._of_address[group]

    def waits(self, connection: BoundedHttp) -> None:
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def waits_no_more(self, connection: BoundedHttp) -> None:
        self._waiting.pop(connection, None)

    def _make_room(self) -> bool:
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        oldest.drop(Refusal.MADE_ROOM)
        return True

    def refused(self, refusal: Refusal, address: str) -> None:
        """Counted, and logged at most once a minute."""
        if self.on_refused is not None:
            self.on_refused(refusal)
        if refusal is Refusal.IDLE:
            return
        self._unlogged[refusal] += 1
        now = time.monotonic()
        if now - self._logged_at.get(refusal, -LOG_SECONDS) < LOG_SECONDS:
            return
        self._logged_at[refusal] = now
        log.warning("connections_refused", reason=refusal.value, count=self._unlogged.pop(refusal), latest=address)


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
            transport.write(_answer_to(refusal))
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
        self._deadline = self.loop.call_later(self._door.limits.head_seconds, self._time_is_up)

    def _stop_waiting(self) -> None:
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
        self.transport.write(_answer_to(refusal))
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
        self.transport.write(b"".join(self.conn.data_to_send()) or _answer_to(Refusal.UNREADABLE))
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


def most_connections(wanted: int = MAX_CONNECTIONS) -> int:
    """As many as are wanted and as this process can open files for, besides its own."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - OWN_FILES))


@lru_cache(maxsize=4_096)
def _address_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


@lru_cache(maxsize=4_096)
def _group(address: str) -> str:
    """Whose connections are counted together: an IPv4 address, an IPv6 network."""
    found = _address_of(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, IPV6_NETWORK_BITS), strict=False))
    return str(found)


def _is_in(address: str, networks: Collection[Network]) -> bool:
    found = _address_of(address)
    return found is not None and any(found in network for network in networks)
