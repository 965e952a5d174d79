"""Models of trainings in the bridge's storage, `models/{tenant_id}/…`: each is its tenant's alone."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.lora_cache import too_large
from bridge.orders import StoredLora
from bridge.replies import Refused, Unanswered
from bridge.storage import STORAGE_ERRORS, Storage
from comfyui_temporal.contracts.comfyui import LoraFile


class TrainedModels:
    """What jobs may use of them. `limit_bytes`: what a server keeps at most."""

    def __init__(self, storage: Storage, *, limit_bytes: int) -> None:
        self._storage = storage
        self._limit_bytes = limit_bytes

    async def stored(self, loras: Sequence[LoraFile], tenant_id: str) -> list[StoredLora]:
        """The models that a request names. Raises Refused, in the same words for one that is missing and one that is
        another tenant's, and Unanswered."""
        found: list[StoredLora] = []
        problems: list[str] = []
        for number, lora in enumerate(loras):
            model = await self._found(lora, tenant_id)
            if model is None:
                problems.append(f"loras.{number}.model_path: is not the address of a model of this tenant")
            else:
                found.append(model)
        if not problems and (problem := too_large(found, self._limit_bytes)):
            problems.append(f"loras: {problem}")
        if problems:
            raise Refused("payload_invalid", fields=problems)
        return found

    async def _found(self, lora: LoraFile, tenant_id: str) -> StoredLora | None:
        path = self._storage.path_of(lora.model_path)
        if path is None or "%" in path or not path.startswith(_folder(tenant_id)):
            return None
        try:
            size = await self._storage.size_bytes(path)
        except FileNotFoundError:
            return None
        except STORAGE_ERRORS:
            raise Unanswered(503, "the storage of models cannot be read now") from None
        return StoredLora(path=path, sha256=lora.sha256, size_bytes=size)


def _folder(tenant_id: str) -> str:
    return f"models/{tenant_id}/"
