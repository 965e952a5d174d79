"""Copies what a run made from its server to object storage."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from temporalio.exceptions import ApplicationError

from bridge.calls import STORAGE_AWAY, RunFailureType
from bridge.file_types import type_of
from bridge.orders import CopyOrder, FailedRun, StoredResult
from bridge.result_files import BUNDLE, Bundle, kept, own_names, pieces, scratch_file, single_count
from bridge.server import ResultFile, Server, ServerError
from bridge.storage import Storage, safe_name
from bridge.storage_health import StorageAway, StorageHealth

SILENT_SECONDS: Final = 900.0
"""So long a copy waits for a server that does not answer: its run is paid for with GPU time."""


class ResultCopies:
    """Results one by one, or in a zip where there are too many; models and checkpoints as they are, with a checksum."""

    def __init__(self, server: Server, storage: Storage, storage_health: StorageHealth, server_name: str) -> None:
        self._server = server
        self._storage = storage
        self._storage_health = storage_health
        self._server_name = server_name
        self._silent_since: dict[str, float] = {}
        """Job → when its server was first found silent while it was copied."""

    async def copied(self, order: CopyOrder) -> list[StoredResult]:
        """Copy a run's files. Raises ApplicationError: `prompt_lost` if one is gone or empty, else retried."""
        try:
            async with self._storage_health.used(keeps=True):
                stored = await self._stored(order)
            self._silent_since.pop(order.job_id, None)
            return stored
        except FileNotFoundError as error:
            raise ApplicationError(
                f"{self._server_name} no longer has the file {error}.",
                # It did run: a graph whose files are always empty is not tried for ever.
                FailedRun(was_sent=True).model_dump(mode="json"),
                type=RunFailureType.LOST.value,
                non_retryable=True,
            ) from None
        except ServerError as error:
            raise self._silent(order, error) from None
        except StorageAway as away:
            self._silent_since.pop(order.job_id, None)
            raise ApplicationError(str(away), type=STORAGE_AWAY) from None

    async def _stored(self, order: CopyOrder) -> list[StoredResult]:
        if order.folder:
            return [await self._store_as_is(order, file) for file in order.files]
        return await self._store_results(order)

    def _silent(self, order: CopyOrder, error: ServerError) -> ApplicationError:
        """The failure of a copy whose server does not answer. The job moves on only where that lasts."""
        now = time.monotonic()
        silent = now - self._silent_since.setdefault(order.job_id, now)
        if is_gone := silent > SILENT_SECONDS:
            del self._silent_since[order.job_id]
        return ApplicationError(str(error), type=RunFailureType.GONE.value, non_retryable=is_gone)

    async def _store_as_is(self, order: CopyOrder, file: ResultFile) -> StoredResult:
        path = f"{order.folder}/{safe_name(file.filename)}"
        digest = hashlib.sha256()
        async with self._server.fetch(file) as (content_type, chunks):
            content_type = type_of(file.filename, content_type)
            size = await self._storage.write(path, _hashed(await _whole(chunks, file), digest), content_type)
        return StoredResult(path=path, content_type=content_type, size_bytes=size, sha256=digest.hexdigest())

    async def _store_results(self, order: CopyOrder) -> list[StoredResult]:
        """Store the first results one by one, and what a job cannot name one by one in a zip."""
        sources: list[ResultFile | str] = [*order.files, *order.texts]
        named = list(zip(sources, own_names(order.files, len(order.texts), order.job_id), strict=True))
        singles = single_count(len(named))
        stored: list[StoredResult] = []
        for source, name in named[:singles]:
            path = f"results/{order.job_id}/{name}"
            async with self._content(order, source) as (content_type, content):
                size = await self._storage.write(path, content, content_type)
            stored.append(StoredResult(path=path, content_type=content_type, size_bytes=size))
        if rest := named[singles:]:
            stored.append(await self._store_bundle(order, rest))
        return stored

    async def _store_bundle(self, order: CopyOrder, named: list[tuple[ResultFile | str, str]]) -> StoredResult:
        path = f"results/{order.job_id}/{BUNDLE}"
        with scratch_file() as file:
            bundle = Bundle(file)
            for source, name in named:
                async with self._content(order, source) as (_, content):
                    await bundle.add(name, content)
            bundle.close()
            size = await self._storage.write(path, pieces(file, is_stripped=False), "application/zip")
        return StoredResult(path=path, content_type="application/zip", size_bytes=size)

    @asynccontextmanager
    async def _content(
        self, order: CopyOrder, source: ResultFile | str
    ) -> AsyncIterator[tuple[str, AsyncIterator[bytes]]]:
        """A result's content type and bytes, without its metadata unless the template keeps them."""
        with scratch_file() as file:
            if isinstance(source, str):
                file.write(source.encode("utf-8", "replace"))
                yield "text/plain; charset=utf-8", pieces(file, is_stripped=False)
                return
            async with self._server.fetch(source) as (content_type, chunks):
                await kept(await _whole(chunks, source), file)
            yield type_of(source.filename, content_type), pieces(file, is_stripped=not order.keep_metadata)


async def _whole(chunks: AsyncIterator[bytes], file: ResultFile) -> AsyncIterator[bytes]:
    """A file's bytes. Raises FileNotFoundError for an empty one: a file that was erased is left empty (`Server.erase`).

    A run that was reset copies again what was delivered and erased; the stored file must not be replaced by nothing.
    """
    async for first in chunks:
        if first:
            return _after(first, chunks)
    raise FileNotFoundError(file.filename)


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk


async def _hashed(chunks: AsyncIterator[bytes], digest: hashlib._Hash) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        digest.update(chunk)
        yield chunk
