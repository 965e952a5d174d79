"""Activities of a job that need no GPU: fetch files and models, sign result addresses, publish models, clean up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError

from bridge.allowed_hosts import FileRefused, FileUnreachable
from bridge.calls import CLEAR_UP, FETCH_CONTROLS, FETCH_MODELS, PUBLISH_MODEL, SIGN_RESULTS, STORAGE_AWAY
from bridge.control_images import ControlImages, address_of
from bridge.lora_files import LoraFiles
from bridge.manifest import MAX_FILES
from bridge.orders import ControlFile, ControlsOrder, ModelsOrder, PublishOrder, StoredResult
from bridge.storage import RESULT_SECONDS, STORAGE_ERRORS, SignedAddresses, Storage
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.size_budget import MAX_ADDRESS_BYTES, MAX_RESULT_URLS
from comfyui_temporal.contracts.uploads import HEAD_BYTES, InputKind, file_type

MAX_CONTROLS: Final = 16
log = structlog.get_logger(__name__)


class JobActivities:
    """Activities of the bridge's own queue. All files are in `storage`.

    `signs_itself`: results have the bridge's addresses, also where the store signs.
    """

    def __init__(
        self,
        storage: Storage,
        images: ControlImages,
        loras: LoraFiles,
        signed: SignedAddresses,
        *,
        signs_itself: bool = False,
    ) -> None:
        self._storage = storage
        self._signs_itself = signs_itself
        self._images = images
        self._loras = loras
        self._signed = signed

    @activity.defn(name=FETCH_CONTROLS)
    async def fetch_controls(self, order: ControlsOrder) -> list[ControlFile]:
        """Copy a job's control images and other files to storage, in this order.

        Raises ApplicationError: `workflow_invalid`, or retried.
        """
        named = [
            (f"control image {number}", address_of(control), InputKind.IMAGE)
            for number, control in enumerate(order.controls)
        ]
        named += [(f"file of extras.{file.name}", file.address, file.kind) for file in order.files]
        fetched: list[ControlFile] = []
        for number, (what, address, kind) in enumerate(named):
            path = control_path(order.job_id, number)
            with self._typed_failures(what, type_="image_unreachable"):
                if activity.info().attempt > 1 and (kept := await self._kept(path)) is not None:
                    fetched.append(kept)
                    continue
                async with self._images.opened(address, order.tenant_id, kind) as file:
                    size = await self._storage.write(path, _with_heartbeats(file.chunks), file.content_type)
            fetched.append(ControlFile(path=path, content_type=file.content_type, size_bytes=size))
        return fetched

    @contextmanager
    def _typed_failures(self, what: str, *, type_: str) -> Iterator[None]:
        """Raises ApplicationError for a file that cannot be fetched. `type_`: where a later try may succeed."""
        try:
            yield
        except FileRefused as refused:
            raise ApplicationError(
                f"The {what} cannot be used: {refused}.", type=FailureCode.WORKFLOW_INVALID.value, non_retryable=True
            ) from None
        except FileUnreachable as failure:
            raise ApplicationError(f"The {what}: {failure}.", type=type_) from None
        except STORAGE_ERRORS as error:
            raise self._storage_failed(error) from None

    async def _kept(self, path: str) -> ControlFile | None:
        """What an earlier try fetched: a file is stored whole or not at all. Raises STORAGE_ERRORS."""
        try:
            size = await self._storage.size_bytes(path)
        except FileNotFoundError:
            return None
        head = b"".join([part async for part in self._storage.read_part(path, 0, min(size, HEAD_BYTES))])
        found = file_type(head)
        return None if found is None else ControlFile(path=path, content_type=found.content_type, size_bytes=size)

    @activity.defn(name=FETCH_MODELS)
    async def fetch_models(self, order: ModelsOrder) -> None:
        """Copy the models of a job that lie elsewhere to storage. Raises ApplicationError: `workflow_invalid`, or
        retried."""
        for number, lora in enumerate(order.loras):
            if lora.address is None:
                continue
            with self._typed_failures(f"model of loras.{number}", type_="model_unreachable"):
                await self._loras.fetch(lora, on_chunk=activity.heartbeat)

    @activity.defn(name=SIGN_RESULTS)
    async def sign_results(self, stored: list[StoredResult]) -> list[str]:
        """An expiring address for each result. Raises ApplicationError: `workflow_invalid`, or retried.

        Some stores sign with addresses of any length: where one is too long for a job, the bridge serves that result.
        """
        urls: list[str] = []
        if len(stored) > MAX_RESULT_URLS:
            raise _undeliverable(f"{len(stored)} results; a job delivers at most {MAX_RESULT_URLS}")
        for result in stored:
            by_store = None
            if not self._signs_itself:
                try:
                    by_store = await self._storage.signed_by_store(result.path, RESULT_SECONDS)
                except STORAGE_ERRORS as error:
                    raise self._storage_failed(error) from None
            if by_store is not None and len(by_store.encode()) <= MAX_ADDRESS_BYTES:
                urls.append(by_store)
                continue
            url = self._signed.address(result.path, expires=int(time.time()) + RESULT_SECONDS)
            if len(url.encode()) > MAX_ADDRESS_BYTES:
                raise _undeliverable(f"a result whose address has more than {MAX_ADDRESS_BYTES} bytes")
            urls.append(url)
        return urls

    @activity.defn(name=PUBLISH_MODEL)
    async def publish_model(self, order: PublishOrder) -> str:
        """Copy a checkpoint to the folder of models. Returns its address. Idempotent."""
        try:
            await self._storage.write(order.target, _with_heartbeats(self._storage.read(order.source)))
        except STORAGE_ERRORS as error:
            raise self._storage_failed(error) from None
        return self._storage.address(order.target)

    @activity.defn(name=CLEAR_UP)
    async def clear_up(self, job_id: str) -> None:
        """Delete a job's control images and other files. Idempotent."""
        places = [control_path(job_id, number) for number in range(MAX_CONTROLS + MAX_FILES)]
        try:
            await asyncio.gather(*(self._storage.delete(place) for place in places))
        except STORAGE_ERRORS as error:
            raise self._storage_failed(error) from None

    def _storage_failed(self, error: Exception) -> ApplicationError:
        return ApplicationError(
            f"Object storage at {self._storage.url} cannot be used: {type(error).__name__}. It is retried; check "
            "COMFYUI_TEMPORAL_BRIDGE_STORE_URL, its credentials and its free space.",
            type=STORAGE_AWAY,
        )


async def _with_heartbeats(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        activity.heartbeat()
        yield chunk


def _undeliverable(what: str) -> ApplicationError:
    return ApplicationError(f"The run made {what}.", type=FailureCode.WORKFLOW_INVALID.value, non_retryable=True)


def control_path(job_id: str, number: int) -> str:
    return f"controls/{job_id}/{number}"
