"""ComfyUI's WebSocket registry: one socket per client id, with the bug that cuts off a reconnected one."""

from __future__ import annotations

import contextlib
import json
import struct
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from tests.bridge.native.traps import Traps

PREVIEW_IMAGE = 1
PREVIEW_IMAGE_WITH_METADATA = 4
FEATURES = {
    "supports_preview_metadata": True,
    "max_upload_size": 100 * 1024 * 1024,
    "extension": {"manager": {"supports_v4": True}},
}


class Sockets:
    """Open sockets by client id."""

    def __init__(self, traps: Callable[[], Traps]) -> None:
        self._traps = traps
        self._sockets: dict[str, WebSocket] = {}
        self._features: dict[str, dict[str, Any]] = {}
        self.seen: list[dict[str, str | None]] = []
        """Each connection that was opened: `client_id` and `origin`."""

    async def serve(self, socket: WebSocket, status: Callable[[], Any], executing: Callable[[str], str | None]) -> None:
        """Serve one connection. `executing`: the node that runs for this client id, sent on reconnecting."""
        client_id = socket.query_params.get("clientId", "")
        self.seen.append({"client_id": client_id, "origin": socket.headers.get("origin")})
        await socket.accept()
        client_id = client_id or uuid.uuid4().hex
        self._sockets[client_id] = socket
        self._features[client_id] = {}
        try:
            await self.send("status", {"status": status(), "sid": client_id}, client_id)
            if node := executing(client_id):
                await self.send("executing", {"node": node}, client_id)
            await self._listen(socket, client_id)
        except WebSocketDisconnect:
            pass
        finally:
            # As in ComfyUI: by id, not by socket. So closing the old connection also unregisters the new one.
            self._sockets.pop(client_id, None)
            self._features.pop(client_id, None)

    async def _listen(self, socket: WebSocket, client_id: str) -> None:
        is_first = True
        while True:
            text = await socket.receive_text()
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(text)
                if is_first and message.get("type") == "feature_flags":
                    self._features[client_id] = message.get("data", {})
                    await self.send("feature_flags", FEATURES, client_id)
                is_first = False

    async def send(self, event: str, data: Any, client_id: str | None = None) -> None:
        """Send to one client id, or to everyone without one. Does nothing if the client has no socket."""
        if self._traps().silent_websocket:
            return
        await self._each(client_id, lambda socket: socket.send_json({"type": event, "data": data}))

    async def send_preview(self, image: bytes, metadata: dict[str, Any], client_id: str | None) -> None:
        """Send a PNG in the format that the client requested."""
        if self._traps().silent_websocket:
            return
        features = self._features.get(client_id or "", {})
        if features.get("supports_preview_metadata") is True:
            described = json.dumps(metadata | {"image_type": "image/png"}).encode()
            message = struct.pack(">II", PREVIEW_IMAGE_WITH_METADATA, len(described)) + described + image
        else:
            message = struct.pack(">II", PREVIEW_IMAGE, 2) + image
        await self._each(client_id, lambda socket: socket.send_bytes(message))

    async def _each(self, client_id: str | None, send: Callable[[WebSocket], Any]) -> None:
        if client_id is None:
            chosen = list(self._sockets.values())
        else:
            chosen = [self._sockets[client_id]] if client_id in self._sockets else []
        for socket in chosen:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await send(socket)
