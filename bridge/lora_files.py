"""Where the LoRAs of a job come from, in the bridge's storage.

    models/{tenant_id}/…                             what its tenant trained
    fetched-models/{tenant_id}/{week}/{sha256}…      what lies at an address of an allowed host

Each is its tenant's alone. A fetched one is found again by its checksum in the same week; after that it is fetched
anew, so that a purge of old ones takes none that a job waits for.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from bridge.allowed_hosts import AllowedHosts, FileRefused
from bridge.lora_cache import too_large
from bridge.orders import StoredLora
from bridge.replies import Refused, Unanswered
from bridge.storage import STORAGE_ERRORS, Storage
from comfyui_temporal.contracts.comfyui import LoraFile

FETCHED_MODELS: Final = "fetched-models"
REDIRECTS: Final = 3
"""Public stores of models lead to the host that has the bytes. It must be allowed as well."""
_LENGTH_BYTES: Final = 8
_MOST_HEADER_BYTES: Final = 100_000_000
"""As the format's own library takes."""


class LoraFiles:
    """What jobs may use. `hosts`: those of models by address. `limit_bytes`: what a server keeps at most."""

    def __init__(self, storage: Storage, hosts: AllowedHosts, *, limit_bytes: int) -> None:
        self._storage = storage
        self._hosts = hosts
        self._limit_bytes = limit_bytes

    async def stored(self, loras: Sequence[LoraFile], tenant_id: str) -> list[StoredLora]:
        """Where the models of a request lie, or will once they are fetched.

        Raises Refused, in the same words for one that is missing and one that is another tenant's, and Unanswered.
        """
        found: list[StoredLora] = []
        problems: list[str] = []
        for number, lora in enumerate(loras):
            try:
                found.append(await self._found(lora, tenant_id))
            except FileRefused as refused:
                problems.append(f"loras.{number}.{refused}")
        if not problems and (problem := too_large(found, self._limit_bytes)):
            problems.append(f"loras: {problem}")
        if problems:
            raise Refused("payload_invalid", fields=problems)
        return found

    async def fetch(self, lora: StoredLora, *, on_chunk: Callable[[], object] = lambda: None) -> None:
        """Copy a model from its address to storage, unless it is there. One with another checksum is not kept.

        Raises FileRefused, FileUnreachable, STORAGE_ERRORS.
        """
        assert lora.address is not None
        try:
            await self._storage.size_bytes(lora.path)
            return
        except FileNotFoundError:
            pass
        await self._storage.write(lora.path, self._verified(lora, lora.address, on_chunk))

    async def _verified(self, lora: StoredLora, address: str, on_chunk: Callable[[], object]) -> AsyncIterator[bytes]:
        digest = hashlib.sha256()
        head = b""
        async with aclosing(self._hosts.download(address, self._limit_bytes)) as chunks:
            async for chunk in chunks:
                is_begun = len(head) > _LENGTH_BYTES
                head += b"" if is_begun else chunk[: _LENGTH_BYTES + 1]
                if not is_begun and len(head) > _LENGTH_BYTES and not _is_safetensors(head):
                    raise FileRefused("it is not a safetensors file")
                digest.update(chunk)
                on_chunk()
                yield chunk
        if len(head) <= _LENGTH_BYTES:
            raise FileRefused("it is not a safetensors file")
        if digest.hexdigest() != lora.sha256:
            raise FileRefused("its checksum is another one than the task names")

    async def _found(self, lora: LoraFile, tenant_id: str) -> StoredLora:
        """Raises FileRefused with the field, Unanswered."""
        if lora.model_path.startswith("https://"):
            return self._fetched_later(lora, tenant_id)
        unknown = FileRefused("model_path: is not the address of a model of this tenant")
        path = self._storage.path_of(lora.model_path)
        if path is None or "%" in path or not path.startswith(f"models/{tenant_id}/"):
            raise unknown
        try:
            size = await self._storage.size_bytes(path)
        except FileNotFoundError:
            raise unknown from None
        except STORAGE_ERRORS:
            raise Unanswered(503, "the storage of models cannot be read now") from None
        return StoredLora(path=path, sha256=lora.sha256, size_bytes=size)

    def _fetched_later(self, lora: LoraFile, tenant_id: str) -> StoredLora:
        if problem := self._hosts.problem(lora.model_path):
            raise FileRefused(f"model_path: {problem}")
        if lora.sha256 is None:
            raise FileRefused("sha256: is needed for a model at an https:// address")
        path = f"{FETCHED_MODELS}/{tenant_id}/{datetime.now(UTC):%G-W%V}/{lora.sha256}.safetensors"
        return StoredLora(path=path, sha256=lora.sha256, size_bytes=0, address=lora.model_path)


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON object and its brace. A pickled checkpoint does not."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return length <= _MOST_HEADER_BYTES and head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"
