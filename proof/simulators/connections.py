"""Connections that a fault can cut: an HTTP server always answers, a network does not."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

_open: dict[tuple[Any, Any], asyncio.Transport] = {}


class CuttableProtocol(H11Protocol):
    """uvicorn's own HTTP/1.1, remembered by both ends' addresses so that `cut` finds a request's connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _open[(self.server, self.client)] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        _open.pop((self.server, self.client), None)
        super().connection_lost(exc)


def cut(request: Request) -> None:
    """Close the request's connection at once, nothing answered."""
    transport = _open.get((request.scope["server"], request.scope["client"]))
    if transport is not None:
        transport.abort()
