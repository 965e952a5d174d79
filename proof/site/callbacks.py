"""Signed callbacks as ComfyUI sends them, and a connection that is cheap enough to flood a gateway."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import Any, Self

from standardwebhooks import Webhook


def signed_headers(
    raw: bytes, secret: str, *, webhook_id: str | None = None, at: datetime | None = None
) -> dict[str, str]:
    """Headers of one callback with this body. `secret`: `whsec_…`."""
    webhook_id = webhook_id or f"msg-{uuid.uuid4()}"
    at = at or datetime.now(UTC)
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(webhook_id, at, raw.decode("utf-8", "replace")),
        "content-type": "application/json",
    }


def signed_request(task_id: str, body: dict[str, Any], secret: str) -> bytes:
    """A whole HTTP request with one signed callback."""
    raw = json.dumps({"task_id": task_id, **body}).encode()
    headers = {**signed_headers(raw, secret), "host": "gateway", "content-length": str(len(raw))}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /callbacks/comfyui/{task_id} HTTP/1.1\r\n{head}\r\n".encode() + raw


class Wire:
    """One keep-alive connection that sends ready-made requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    @classmethod
    async def to(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        async with self._turn:
            self._writer.write(request)
            head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            return int(head.split(b" ")[1]), await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()
