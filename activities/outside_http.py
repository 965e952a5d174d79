"""HTTP to one outside party: a pooled client that turns every error into one named failure.

    OutsideFailure (code, sentence, retry_after_seconds): retried
    ├── *_unavailable    no connection, no answer in time, a broken connection
    └── reply_invalid    an answer that is too large or not HTTP

A definite refusal is not a failure but an answer (activities/replies.py).

Deliberate departures from httpx's defaults:
1. No redirects: a token must not follow one, and a POST would become a GET.
2. Bodies are read raw, never decompressed, and limited to `max_reply_bytes`: a few bytes of gzip can be gigabytes.
3. One limit for the whole request, in addition to connect and read: the read limit never stops a server that sends a
   byte every 5 s.
4. A request is never cancelled from outside: the pool would lose its connection (runtime/http_transport.py).
5. Loopback addresses never go through a proxy, regardless of the environment.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, to_json

from comfyui_temporal.contracts import handed_on
from comfyui_temporal.contracts.errors import FailureCode, WireError
from comfyui_temporal.contracts.fields import repaired, shortened
from runtime.http_transport import LIMIT, OwnsClient, PatientClient
from runtime.trace_context import SpanKind, span, with_trace

CONNECT_SECONDS: Final = 2.0
READ_SECONDS: Final = 6.0
REQUEST_SECONDS: Final = 9.0
"""Limit of the whole request. Below an activity's `start_to_close` of 10 s, so that we always report how it ended."""
POOL_SIZE: Final = 100
MAX_REPLY_BYTES: Final = 1024 * 1024
SILENCE_SECONDS: Final = 5.0
"""After a request timed out, the party counts as hanging for this long (`only_if_answering`)."""

_HEADER_SAFE = re.compile(r"[\x21-\x7e]{1,255}")
_time_limit_seconds: ContextVar[float] = ContextVar("time_limit_seconds", default=REQUEST_SECONDS)
_only_if_answering: ContextVar[bool] = ContextVar("only_if_answering", default=False)


class OutsideFailure(Exception):
    """A call without an answer: `code` is stable, `sentence` says where, what was tried and what to do."""

    def __init__(
        self, code: FailureCode, sentence: str, *, retry_after_seconds: float | None = None, may_be_retried: bool = True
    ) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.retry_after_seconds = retry_after_seconds
        self.may_be_retried = may_be_retried


@dataclass(frozen=True)
class Party:
    """One outside service: the names of its failures and how its error bodies are read (contract §2, §4)."""

    name: str
    setting: str
    """The setting that holds its address, for messages."""
    unavailable: FailureCode
    errors: Mapping[str, WireError]
    """By message."""
    messages_by_number: Mapping[str, str]
    """Read if the message is not in `errors`."""


@dataclass(frozen=True)
class Route:
    """One row of the contract's route tables. `path` contains ids as `{job_id}`."""

    method: Literal["GET", "POST"]
    path: str
    is_ours: bool = False
    """Marked (ours): a server may lack it (contract §2, not offered)."""
    messages_by_number: Mapping[str, str] = field(default_factory=dict)
    """For numbers that mean another error on this route than elsewhere."""

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class RawReply:
    """The raw answer: at most `max_reply_bytes` of body, as sent."""

    status: int
    headers: httpx.Headers
    body: bytes


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Requests that start inside end within `seconds`, or within the usual limit if that is shorter."""
    token = _time_limit_seconds.set(min(seconds, REQUEST_SECONDS))
    try:
        yield
    finally:
        _time_limit_seconds.reset(token)


@contextmanager
def only_if_answering() -> Iterator[None]:
    """Requests that start inside fail immediately while the party hangs: for 5 s after a request timed out.

    For short tries that block other work: otherwise each would wait until its time limit.
    """
    token = _only_if_answering.set(True)
    try:
        yield
    finally:
        _only_if_answering.reset(token)


def current_time_limit_seconds() -> float:
    """The time limit of a request that starts here."""
    return _time_limit_seconds.get()


class OutsideHttp(OwnsClient):
    """One pooled connection to a party; an async context manager, opened once in each process.

    Raises ValueError for an address that is not http or https, or that contains credentials.
    """

    _client: PatientClient

    def __init__(
        self,
        party: Party,
        url: str,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        pool_size: int = POOL_SIZE,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        self.party = party
        self.address = _checked_address(url, party)
        self._max_reply_bytes = max_reply_bytes
        self._hangs_until = 0.0
        self._client = PatientClient(
            timeout=httpx.Timeout(read_seconds, connect=connect_seconds, pool=connect_seconds),
            limits=httpx.Limits(max_connections=pool_size, max_keepalive_connections=pool_size, keepalive_expiry=30),
            follow_redirects=False,
            headers={"accept": "application/json", "accept-encoding": "identity", "user-agent": "comfyui-temporal"},
            mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
        )

    async def send(
        self,
        route: Route,
        *,
        token: str,
        ids: Mapping[str, str] | None = None,
        query: Mapping[str, str | int] | None = None,
        key: str | None = None,
        body: BaseModel | None = None,
    ) -> RawReply:
        """Send one request and read its whole answer, with any status. Raises only OutsideFailure.

        A task that may be cancelled calls it through running_call.py: an interrupted request may have taken effect.
        """
        if _only_if_answering.get() and time.monotonic() < self._hangs_until:
            raise self.unavailable(route, "another request to it timed out a moment ago")
        address = urlsplit(self.address)
        names = {
            "http.request.method": route.method,
            "url.template": route.path,
            "server.address": address.hostname or "",
        }
        with span(str(route), SpanKind.CLIENT, names) as call:
            reply = await self._sent(route, token=token, ids=ids, query=query, key=key, body=body)
            call.set_attribute("http.response.status_code", reply.status)
            return reply

    async def _sent(
        self,
        route: Route,
        *,
        token: str,
        ids: Mapping[str, str] | None,
        query: Mapping[str, str | int] | None,
        key: str | None,
        body: BaseModel | None,
    ) -> RawReply:
        headers = with_trace({"authorization": f"Bearer {token}"})
        if key is not None:
            headers["x-idempotency-key"] = self._header_safe(key, route)
        content: bytes | None = None
        if body is not None:
            headers["content-type"] = "application/json"
            content = self._as_json(body, route)
        try:
            path = route.path.format_map({name: quote(value, safe="") for name, value in (ids or {}).items()})
            request = self._client.build_request(
                route.method, self.address + path, params=query, headers=headers, content=content
            )
        except (ValueError, httpx.InvalidURL) as error:
            raise self._named(error, route) from None
        return await self._within_limit(request, route)

    def unavailable(self, route: Route, reason: str, *, retry_after_seconds: float | None = None) -> OutsideFailure:
        """The party gave no usable answer. The sentence of this retried failure says where, why and what to do."""
        party = self.party
        sentence = (
            f"{party.name} at {self.address} did not answer {route}: {reason}. "
            f"It is retried; check that the service runs and that {party.setting} is its address."
        )
        return OutsideFailure(party.unavailable, sentence, retry_after_seconds=retry_after_seconds)

    def reply_invalid(self, route: Route, reason: str, *, retry_after_seconds: float | None = None) -> OutsideFailure:
        """The answer does not follow the contract: a retried failure."""
        party = self.party
        sentence = (
            f"{party.name} at {self.address} answered {route} in a way that the contract does not know: {reason}. "
            f"It is retried; check that {party.setting} is this service's address and that its version fits."
        )
        return OutsideFailure(FailureCode.REPLY_INVALID, sentence, retry_after_seconds=retry_after_seconds)

    async def _within_limit(self, request: httpx.Request, route: Route) -> RawReply:
        limit = current_time_limit_seconds()
        request.extensions[LIMIT] = limit
        ends_at = time.monotonic() + limit
        try:
            response = await self._client.send(request, stream=True)
            self._hangs_until = 0.0
            try:
                return RawReply(response.status_code, response.headers, await self._read(response, route))
            finally:
                await response.aclose()
        except OutsideFailure:
            raise
        except Exception as error:
            if isinstance(error, httpx.TimeoutException):
                now = time.monotonic()
                self._hangs_until = now + SILENCE_SECONDS
                if now >= ends_at:
                    raise self.unavailable(route, f"no whole answer within {limit:g} s") from None
            raise self._named(error, route) from None

    async def _read(self, response: httpx.Response, route: Route) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_reply_bytes:
                raise self.reply_invalid(
                    route, f"HTTP {response.status_code} with a body of more than {self._max_reply_bytes} bytes"
                )
        return bytes(body)

    def _named(self, error: Exception, route: Route) -> OutsideFailure:
        kind = next((base for base in type(error).__mro__ if base in CONNECTION_FAILURES), Exception)
        reason = CONNECTION_FAILURES[kind]
        message = shortened(repaired(str(error)), 300)
        if message and message not in reason:
            reason = f"{reason} ({message})"
        if isinstance(error, httpx.RemoteProtocolError) and not _ENDED_EARLY.search(message):
            return self.reply_invalid(route, reason)
        if kind in _NO_CONTRACT_ANSWER:
            return self.reply_invalid(route, reason)
        return self.unavailable(route, reason)

    def _header_safe(self, key: str, route: Route) -> str:
        if not _HEADER_SAFE.fullmatch(key):
            raise OutsideFailure(
                FailureCode.INPUT_INVALID,
                f"{route} was not sent: its idempotency key contains characters that HTTP headers do not allow; "
                "use a task_id of letters, digits, '_' and '-'.",
                may_be_retried=False,
            )
        return key

    def _as_json(self, body: BaseModel, route: Route) -> bytes:
        try:
            if not handed_on.has_unknown_fields(body):
                return body.model_dump_json(exclude_none=True).encode()
            # A newer worker may have sent this request before: the same key needs the same body.
            return to_json(handed_on.as_json(body, exclude_none=True))
        except (PydanticSerializationError, UnicodeEncodeError):
            raise OutsideFailure(
                FailureCode.INPUT_INVALID,
                f"{route} was not sent: its body contains a character that JSON cannot represent (a lone surrogate).",
                may_be_retried=False,
            ) from None


CONNECTION_FAILURES: Final[Mapping[type[Exception], str]] = {
    httpx.ConnectTimeout: "no connection in time",
    httpx.ReadTimeout: "it took the request and then sent nothing for too long",
    httpx.WriteTimeout: "it did not take the request in time",
    httpx.PoolTimeout: "all of our connections to it are in use",
    httpx.TimeoutException: "it was too slow",
    httpx.ConnectError: "no connection",
    httpx.ReadError: "the connection broke before the answer was complete",
    httpx.WriteError: "the connection broke while the request was sent",
    httpx.CloseError: "the connection broke while it was closed",
    httpx.NetworkError: "the connection broke",
    httpx.ProxyError: "the proxy in between refused or broke",
    httpx.UnsupportedProtocol: "the address is neither http nor https",
    httpx.LocalProtocolError: "our own request is not valid HTTP",
    httpx.RemoteProtocolError: "the answer ended early or is not HTTP",
    httpx.ProtocolError: "the answer is not HTTP",
    httpx.TransportError: "the connection failed",
    httpx.DecodingError: "its body cannot be decoded",
    httpx.TooManyRedirects: "it redirects, and redirects are not followed",
    httpx.RequestError: "the request failed",
    httpx.HTTPStatusError: "an unexpected HTTP status",
    httpx.HTTPError: "the request failed",
    httpx.InvalidURL: "the address is not a URL",
    httpx.CookieConflict: "its cookies contradict each other",
    httpx.StreamConsumed: "the answer was read twice",
    httpx.StreamClosed: "the answer was closed before it was read",
    httpx.ResponseNotRead: "the answer was not read",
    httpx.RequestNotRead: "the request was not read",
    httpx.StreamError: "the answer could not be read",
    Exception: "the request failed with an unexpected error",
}
"""Every exception of httpx → the reason in the sentence. A test checks that none is missing."""
_NO_CONTRACT_ANSWER: Final = frozenset(
    {
        httpx.DecodingError,
        httpx.TooManyRedirects,
        httpx.HTTPStatusError,
        httpx.CookieConflict,
        httpx.ProtocolError,
    }
)
_ENDED_EARLY = re.compile(r"disconnected|closed")


def _checked_address(url: str, party: Party) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise ValueError(f"{party.setting}: not a URL") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{party.setting}: must be an http:// or https:// address")
    if parsed.userinfo:
        raise ValueError(f"{party.setting}: must not contain credentials; calls use bearer tokens")
    # Also an empty one: the path of every call would be read as part of it.
    if "?" in url or "#" in url:
        raise ValueError(f"{party.setting}: must not contain a query or fragment")
    return str(parsed).rstrip("/")
