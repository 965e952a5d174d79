"""As much of S3 as a snapshot needs, over plain HTTP on loopback: one bucket, its list, uploads whole and in parts.

moto would be the library for it, but cannot be installed beside DBOS (benchmarks): they need different python-dateutil.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import pytest

from tests.activities.loopback import Seen, http_bytes, serving

BUCKET = "bucket"


@asynccontextmanager
async def s3(patch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, bytes]]:
    """The bucket's objects by key; the environment names this server as an operator's would."""
    objects: dict[str, bytes] = {}
    parts: dict[int, bytes] = {}

    async def answer(request: Seen, writer: asyncio.StreamWriter) -> None:
        target = urlsplit(request.target)
        key = unquote(target.path).removeprefix(f"/{BUCKET}").lstrip("/")
        if request.method == "GET" and "list-type" in target.query:
            prefix = parse_qs(target.query).get("prefix", [""])[0]
            writer.write(http_bytes(200, listing(objects, prefix), {"content-type": "application/xml"}))
        elif request.method == "POST" and "uploads" in target.query:
            parts.clear()
            writer.write(http_bytes(200, b"<R><UploadId>1</UploadId></R>", {"content-type": "application/xml"}))
        elif request.method == "PUT" and "partNumber" in target.query:
            parts[int(parse_qs(target.query)["partNumber"][0])] = request.body
            writer.write(http_bytes(200, b"", {"etag": '"1"'}))
        elif request.method == "POST" and "delete" in target.query:
            gone = re.findall(r"<Key>.*?</Key>", request.body.decode())
            for named in gone:
                objects.pop(unescape(named.removeprefix("<Key>").removesuffix("</Key>")), None)
            told = "".join(f"<Deleted>{named}</Deleted>" for named in gone)
            writer.write(http_bytes(200, f"<R>{told}</R>".encode(), {"content-type": "application/xml"}))
        elif request.method == "POST":
            objects[key] = b"".join(parts[number] for number in sorted(parts))
            writer.write(http_bytes(200, b'<R><ETag>"1"</ETag></R>', {"content-type": "application/xml"}))
        elif request.method == "PUT":
            objects[key] = request.body
            writer.write(http_bytes(200, b"", {"etag": '"1"'}))
        elif key in objects:
            stamps = {"etag": '"1"', "last-modified": "Thu, 26 Nov 2026 12:00:00 GMT"}
            writer.write(http_bytes(200, objects[key], stamps))
        else:
            writer.write(http_bytes(404, b"<Error><Code>NoSuchKey</Code></Error>"))

    async with serving(answer) as server:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield objects


def listing(objects: dict[str, bytes], prefix: str) -> bytes:
    found = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-26T12:00:00.000Z</LastModified>"
        f'<ETag>"1"</ETag><Size>{len(content)}</Size></Contents>'
        for key, content in sorted(objects.items())
        if key.startswith(prefix)
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
