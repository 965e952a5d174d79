"""The body of `/upload/image`: a multipart form whose file is sent as it is read.

httpx sends only files that are on disk in parts, and a GPU worker has hardly any disk of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping

from bridge.server import Content


class FileForm:
    """Fields and one file, `image`, of stated size."""

    def __init__(self, fields: Mapping[str, str], name: str, content: Content, content_type: str) -> None:
        boundary = secrets.token_hex(16)
        before = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'
            for field, value in fields.items()
        )
        # As browsers write names: quotes and line ends in percent encoding (HTML, multipart/form-data).
        filename = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        before += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{filename}"\r\n'
            f"Content-Type: {content_type}\r\n\r\n"
        )
        self._before = before.encode()
        self._content = content
        self._after = f"\r\n--{boundary}--\r\n".encode()
        size = len(content) if isinstance(content, bytes) else content.size_bytes
        self.headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(len(self._before) + size + len(self._after)),
        }

    async def body(self) -> AsyncIterator[bytes]:
        """To be sent once."""
        yield self._before
        if isinstance(self._content, bytes):
            yield self._content
        else:
            async for part in self._content.parts:
                yield part
        yield self._after
