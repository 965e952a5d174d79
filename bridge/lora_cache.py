"""Trained models that images use, on one server: kept there within a limit of bytes, so that they are sent once.

    output/loras/comfyui-temporal/tenant-{tenant_id}/{sha256}.safetensors     on the server
    lora-caches/{…}.json                                                      in the bridge's storage: what is there

A name holds the tenant and the checksum, and only this module makes one. What was used least recently goes first, and
never what a running job uses. The list outlives the worker, because ComfyUI tells no file's size.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Final

from pydantic import TypeAdapter, ValidationError

from bridge.orders import StoredLora
from bridge.server import FileParts, FileUse, PromptRefused, ResultFile, Server
from bridge.storage import Storage
from bridge.task_files import FOLDER
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.fields import OwnModel

LORA_CACHE_BYTES: Final = 8 * 1024**3


class CachedLora(OwnModel):
    """One model on the server. `path`: where it is in the bridge's storage."""

    tenant_id: str
    sha256: str
    size_bytes: int
    path: str
    is_whole: bool = False
    """It was sent to its end. A server that is killed meanwhile may keep the beginning of a file."""

    @property
    def folder(self) -> str:
        return f"{FOLDER}/tenant-{self.tenant_id}"

    @property
    def filename(self) -> str:
        return f"{self.sha256}.safetensors"

    @property
    def name(self) -> str:
        """Below the server's folder of trained LoRAs."""
        return f"{self.folder}/{self.filename}"

    @property
    def file(self) -> ResultFile:
        return ResultFile(node="", kind="", filename=self.filename, subfolder=f"loras/{self.folder}")


_LIST: Final = TypeAdapter(list[CachedLora])


class LoraCache:
    """The models on one server. `server_name` tells the servers' lists apart."""

    def __init__(self, server: Server, storage: Storage, server_name: str, *, limit_bytes: int) -> None:
        self._server = server
        self._storage = storage
        self._list_path = f"lora-caches/{hashlib.sha256(server_name.encode()).hexdigest()[:40]}.json"
        self._limit_bytes = limit_bytes
        self._cached: dict[str, CachedLora] | None = None
        self._used_by: dict[str, set[str]] = {}
        self._changing = asyncio.Lock()

    async def take(self, job_id: str, tenant_id: str, loras: Sequence[StoredLora]) -> list[str]:
        """Put a job's models on the server, which keeps them until `release`. Returns their names there.

        Raises PromptRefused, ServerError, STORAGE_ERRORS.
        """
        if problem := too_large(loras, self._limit_bytes):
            raise _refused(problem)
        async with self._changing:
            return [await self._take(job_id, tenant_id, lora) for lora in loras]

    def release(self, job_id: str) -> None:
        """The job's run is over: its models may go."""
        self._used_by.pop(job_id, None)

    async def _take(self, job_id: str, tenant_id: str, lora: StoredLora) -> str:
        cached = await self._listed()
        sha256 = lora.sha256 or await self._sha256_of(lora)
        wanted = CachedLora(tenant_id=tenant_id, sha256=sha256, size_bytes=lora.size_bytes, path=lora.path)
        self._used_by.setdefault(job_id, set()).add(wanted.name)
        known = cached.get(wanted.name)
        if known is not None and known.is_whole and await self._is_there(wanted):
            # The newest place in storage: a fetched model's earlier one is purged first.
            del cached[wanted.name]
            cached[wanted.name] = known.model_copy(update={"path": wanted.path})
            await self._keep_list()
            return wanted.name
        if lora.sha256 is not None and await self._sha256_of(lora) != sha256:
            raise _refused("a model does not match the checksum of its training")
        wanted.size_bytes = await self._storage.size_bytes(lora.path)
        await self._send(wanted)
        return wanted.name

    async def _send(self, wanted: CachedLora) -> None:
        await self._make_room(wanted)
        # Listed before it is sent: what a worker that is killed meanwhile has sent counts too.
        cached = await self._listed()
        cached[wanted.name] = wanted
        await self._keep_list()
        await self._server.upload(
            wanted.filename,
            FileParts(wanted.size_bytes, self._storage.read(wanted.path)),
            content_type="application/octet-stream",
            folder=wanted.folder,
            use=FileUse.LORA,
        )
        wanted.is_whole = True
        await self._keep_list()

    async def _sha256_of(self, lora: StoredLora) -> str:
        digest = hashlib.sha256()
        try:
            async for part in self._storage.read(lora.path):
                await asyncio.to_thread(digest.update, part)
        except FileNotFoundError:
            raise _refused("a model is no longer in storage") from None
        return digest.hexdigest()

    async def _is_there(self, lora: CachedLora) -> bool:
        """Whether the server still has it: it may be another machine by now, and an erased file is an empty one."""
        try:
            async with self._server.fetch(lora.file) as (_, chunks):
                return bool(await anext(chunks, b""))
        except FileNotFoundError:
            return False

    async def _make_room(self, wanted: CachedLora) -> None:
        cached = await self._listed()
        cached.pop(wanted.name, None)
        in_use = set().union(*self._used_by.values())
        for name, lora in list(cached.items()):
            is_full = sum(kept.size_bytes for kept in cached.values()) + wanted.size_bytes > self._limit_bytes
            if name not in in_use and (is_full or not await self._is_kept(lora)):
                await self._server.erase(lora.file)
                del cached[name]
        if sum(kept.size_bytes for kept in cached.values()) + wanted.size_bytes > self._limit_bytes:
            raise _refused("other jobs' models leave no room on the server")

    async def _is_kept(self, lora: CachedLora) -> bool:
        """Whether the model was not deleted meanwhile, with its tenant."""
        try:
            await self._storage.size_bytes(lora.path)
        except FileNotFoundError:
            return False
        return True

    async def _listed(self) -> dict[str, CachedLora]:
        """Name → model, the least recently used one first."""
        if self._cached is None:
            try:
                listed = _LIST.validate_json(await self._storage.read_whole(self._list_path))
            except (FileNotFoundError, ValidationError):
                listed = []
            self._cached = {lora.name: lora for lora in listed}
        return self._cached

    async def _keep_list(self) -> None:
        cached = await self._listed()
        await self._storage.write(self._list_path, _LIST.dump_json(list(cached.values())))


def too_large(loras: Sequence[StoredLora], limit_bytes: int) -> str | None:
    """Why a server cannot keep these models at once, or None."""
    needed = sum({lora.path: lora.size_bytes for lora in loras}.values())
    return f"the models have {needed} bytes, and a server keeps at most {limit_bytes}" if needed > limit_bytes else None


def _refused(problem: str) -> PromptRefused:
    return PromptRefused(ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=f"loras: {problem}."))
