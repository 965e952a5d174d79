"""A bucket of an S3 server of this process (moto), over plain HTTP on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import obstore
import pytest
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from obstore.store import S3Store

BUCKET = "bucket"
IMPORT_SECONDS = 30.0
"""moto imports S3 in the first request for it: some seconds on a busy machine."""


class Bucket:
    """The bucket's objects, read and written past the code under test."""

    def __init__(self) -> None:
        self._store = S3Store(BUCKET)

    async def put(self, objects: dict[str, bytes]) -> None:
        for key, content in objects.items():
            await obstore.put_async(self._store, key, content)

    async def objects(self) -> dict[str, bytes]:
        """Key → content."""
        pages = [page async for page in self._store.list()]
        keys = [entry["path"] for page in pages for entry in page]
        return {key: bytes(await (await obstore.get_async(self._store, key)).bytes_async()) for key in keys}


@asynccontextmanager
async def s3(patch: pytest.MonkeyPatch) -> AsyncIterator[Bucket]:
    """An empty bucket; the environment names its server as an operator's would."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ALLOW_HTTP", "true")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    try:
        async with httpx.AsyncClient(base_url=url, timeout=IMPORT_SECONDS) as http:
            (await http.post("/moto-api/reset")).raise_for_status()  # moto keeps one state in each process
            (await http.put(f"/{BUCKET}")).raise_for_status()
        yield Bucket()
    finally:
        server.stop()
