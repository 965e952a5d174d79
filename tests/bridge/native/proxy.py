"""A reverse proxy before the stand-in: all is below a path and needs one header (traps `proxy_path`, `proxy_header`).

The administration of the stand-in does not go through it.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from tests.bridge.native.traps import Traps


class Proxy:
    """Refuses as a proxy does: 404 outside the path, 401 without the header, for requests and sockets alike."""

    def __init__(self, app: ASGIApp, traps: Callable[[], Traps]) -> None:
        self._app = app
        self._traps = traps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"].startswith("/admin"):
            await self._app(scope, receive, send)
            return
        traps = self._traps()
        refusal = _refusal(scope, traps)
        if refusal is None:
            path = scope["path"].removeprefix(traps.proxy_path)
            await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": refusal, "headers": []})
            await send({"type": "http.response.body", "body": b"<html>no</html>"})


def _refusal(scope: Scope, traps: Traps) -> int | None:
    if not scope["path"].startswith(f"{traps.proxy_path}/"):
        return 404
    name, _, value = traps.proxy_header.partition(": ")
    sent = [given.decode() for header, given in scope["headers"] if header.decode().lower() == name.lower()]
    return None if not name or sent == [value] else 401
