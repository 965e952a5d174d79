"""Who may do what (contract §7): FastAPI dependencies that return the caller or answer with a problem.

`access.requires(operation)` is for ordinary routes, by the bearer token alone. `access.requires_for_stream()` is for
streams, which browsers open without headers: there a stream token may come as `?token=`, and any token as a cookie.
Browsers send a cookie with requests from any page, so it counts only for allowed origins. Addresses end up in logs and
histories: a request with any other token in its address is refused, whatever else it brings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Final
from urllib.parse import urlsplit

from fastapi import Security
from fastapi.security import APIKeyCookie, APIKeyQuery, HTTPBearer
from starlette.requests import HTTPConnection

from comfyui_temporal.contracts.permissions import REQUIRED_SCOPES, Operation
from gateway.audit import note_caller, note_operation
from gateway.problems import Problem, ProblemCode
from gateway.tokens import StreamTokens
from runtime.caller_tokens import Caller, CallerTokens, TokenRefused, TokensUnverifiable

TOKEN_COOKIE: Final = "comfyui_temporal_token"
TOKEN_PARAMETER: Final = "token"
MISSING: Final = "A bearer token is needed: send it as `Authorization: Bearer …`."
MISSING_FOR_STREAM: Final = (
    f"A token is needed: as `Authorization: Bearer …`, in the cookie {TOKEN_COOKIE}, or a stream token as "
    f"`?{TOKEN_PARAMETER}=…`."
)
NOT_IN_ADDRESS: Final = (
    "The token in the address is no stream token, or has expired, or this is no stream. Addresses end up in logs: "
    "send the token as `Authorization: Bearer …`, or get a stream token from GET /api/v1/tasks/stream/config."
)

Dependency = Callable[..., Awaitable[Caller]]


class _Bearer(HTTPBearer):
    """For the OpenAPI document only. `Access` reads the header, for HTTP and WebSocket alike."""

    async def __call__(self, connection: HTTPConnection) -> None:
        return None


class _Query(APIKeyQuery):
    async def __call__(self, connection: HTTPConnection) -> None:
        return None


class _Cookie(APIKeyCookie):
    async def __call__(self, connection: HTTPConnection) -> None:
        return None


_BEARER: Final = _Bearer(bearerFormat="JWT", scheme_name="bearer", description="A JWT of the platform (contract §7).")
_QUERY: Final = _Query(
    name=TOKEN_PARAMETER, scheme_name="token", description="A stream token of `stream/config`. For streams only."
)
_COOKIE: Final = _Cookie(name=TOKEN_COOKIE, scheme_name="cookie", description="For streams only.")


class Access:
    """Authenticates callers and checks their scopes."""

    def __init__(
        self,
        callers: CallerTokens,
        streams: StreamTokens,
        *,
        allowed_origins: Collection[str] = (),
        own_tasks_only: bool = False,
    ) -> None:
        """`allowed_origins`: other origins whose pages may use the cookie, as in CORS; never `*`.

        `own_tasks_only`: users of one tenant do not see each other's tasks.
        """
        self._callers = callers
        self.stream_tokens = streams
        self._allowed_origins = frozenset(allowed_origins)
        self._own_tasks_only = own_tasks_only

    def requires(self, operation: Operation) -> Dependency:
        """The dependency of a route that does `operation`. Raises Problem 401, 403 or 503."""

        async def caller(connection: HTTPConnection, _bearer: Annotated[None, Security(_BEARER)]) -> Caller:
            return await self.caller(connection, operation)

        return caller

    def requires_for_stream(self) -> Dependency:
        """The dependency of a stream's route, HTTP or WebSocket. Raises Problem 401, 403 or 503.

        The stream must end at the caller's `expires_at`.
        """

        async def caller(
            connection: HTTPConnection,
            _bearer: Annotated[None, Security(_BEARER)],
            _query: Annotated[None, Security(_QUERY)],
            _cookie: Annotated[None, Security(_COOKIE)],
        ) -> Caller:
            return await self.stream_caller(connection)

        return caller

    async def caller(self, connection: HTTPConnection, operation: Operation) -> Caller:
        """The caller, by the bearer token alone. Raises Problem 401, 403 or 503."""
        note_operation(connection, operation)
        if _in_address(connection):
            raise _unauthenticated(NOT_IN_ADDRESS)
        token = _bearer_token(connection)
        if token is None:
            raise _unauthenticated(MISSING)
        if (streaming := self.stream_tokens.read(token)) is not None:
            self._known(connection, streaming)
            raise Problem(ProblemCode.NOT_AUTHORIZED, "This token opens streams and nothing else.")
        return _allowed(self._known(connection, await self._read(token)), operation)

    async def stream_caller(self, connection: HTTPConnection) -> Caller:
        """The caller of a stream, by header, address or cookie. Raises Problem 401, 403 or 503."""
        note_operation(connection, Operation.READ_TASK)
        in_address = _in_address(connection)
        if any(self.stream_tokens.read(token) is None for token in in_address):
            raise _unauthenticated(NOT_IN_ADDRESS, error="invalid_token")
        token = _bearer_token(connection) or (in_address[0] if in_address else self._cookie_token(connection))
        caller = self.stream_tokens.read(token) or await self._read(token)
        return _allowed(self._known(connection, caller), Operation.READ_TASK)

    async def tenant_of(self, connection: HTTPConnection) -> str | None:
        """The tenant of the request's token; None without a valid one.

        Empty where the keys cannot be read now, which its route answers.
        """
        token = _bearer_token(connection)
        if token is None:
            return None
        try:
            return (await self._callers.read(token)).tenant_id
        except TokenRefused:
            return None
        except TokensUnverifiable:
            return ""

    def _known(self, connection: HTTPConnection, caller: Caller) -> Caller:
        caller = caller.model_copy(update={"own_tasks_only": self._own_tasks_only})
        note_caller(connection, caller)
        return caller

    def _cookie_token(self, connection: HTTPConnection) -> str:
        token = connection.cookies.get(TOKEN_COOKIE)
        if not token:
            raise _unauthenticated(MISSING_FOR_STREAM)
        origin = connection.headers.get("origin")
        if origin is not None and origin not in self._allowed_origins and not _is_own(origin, connection):
            raise Problem(
                ProblemCode.NOT_AUTHORIZED,
                "Pages of this origin may not use the cookie: add it to COMFYUI_TEMPORAL_ALLOWED_ORIGINS.",
            )
        return token

    async def _read(self, token: str) -> Caller:
        try:
            return await self._callers.read(token)
        except TokenRefused as refused:
            raise _unauthenticated(f"The token is refused: {refused}.", error="invalid_token") from None
        except TokensUnverifiable as error:
            raise Problem(ProblemCode.TOKENS_UNVERIFIABLE, f"{error} Try again, or contact the operator.") from None


def _in_address(connection: HTTPConnection) -> list[str]:
    return [token for token in connection.query_params.getlist(TOKEN_PARAMETER) if token]


def _bearer_token(connection: HTTPConnection) -> str | None:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _allowed(caller: Caller, operation: Operation) -> Caller:
    if not caller.allows(operation):
        raise Problem(ProblemCode.NOT_AUTHORIZED, f"The token lacks the scope {REQUIRED_SCOPES[operation]}.")
    return caller


def _unauthenticated(detail: str, *, error: str | None = None) -> Problem:
    challenge = 'Bearer realm="comfyui-temporal"' + (f', error="{error}"' if error else "")
    return Problem(ProblemCode.UNAUTHENTICATED, detail, headers={"WWW-Authenticate": challenge})


def _is_own(origin: str, connection: HTTPConnection) -> bool:
    return urlsplit(origin).netloc == connection.headers.get("host")
