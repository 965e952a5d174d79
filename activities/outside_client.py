"""What both parties' clients share: one connection pool, a token for each call, replies validated by the contract."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

from pydantic import BaseModel, TypeAdapter

from activities.outside_http import CONNECT_SECONDS, POOL_SIZE, READ_SECONDS, OutsideHttp, Party, Route
from activities.replies import read_answer
from activities.tokens import TokenMaker
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.permissions import Scope
from runtime.http_transport import OwnsClient

Reply = TypeVar("Reply")


class OutsideClient(OwnsClient):
    """A party's service; an async context manager, opened once in each process.

    `url` is the service's address without a path of the contract. Durations in seconds. Raises ValueError for an
    unusable `url`. Every call returns an `Answer` or raises OutsideFailure.
    """

    _client: OutsideHttp

    party: ClassVar[Party]

    def __init__(
        self,
        url: str,
        tokens: TokenMaker,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        pool_size: int = POOL_SIZE,
    ) -> None:
        self._tokens = tokens
        self._client = OutsideHttp(
            self.party, url, connect_seconds=connect_seconds, read_seconds=read_seconds, pool_size=pool_size
        )

    @property
    def address(self) -> str:
        return self._client.address

    async def _call(
        self,
        route: Route,
        scope: Scope,
        call_for: CallFor,
        model: type[Reply] | TypeAdapter[Reply],
        *,
        ids: Mapping[str, str] | None = None,
        query: Mapping[str, str | int] | None = None,
        key: str | None = None,
        body: BaseModel | None = None,
        check: Callable[[Reply], str | None] = lambda _: None,
    ) -> Answer[Reply]:
        token = self._tokens(tenant_id=call_for.tenant_id, user_id=call_for.user_id, scope=scope)
        raw = await self._client.send(route, token=token, ids=ids, query=query, key=key, body=body)
        return read_answer(self._client, route, raw, model, check=check)


def same(name: str, expected: str, got: str) -> str | None:
    """The problem of a reply that is about another id than the request, or None."""
    return None if got == expected else f"{name} is {got!r}, expected {expected!r}"
