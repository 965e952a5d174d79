"""What was asked for with stored tasks, decrypted."""

from __future__ import annotations

import json
from collections.abc import Sequence

import structlog
from pydantic import JsonValue

from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionError
from store import StoredInput, TaskStore

log = structlog.get_logger(__name__)

Document = dict[str, JsonValue]


class StoredInputs:
    """The inputs of tasks, as callers see them."""

    def __init__(self, store: TaskStore, encryption: PayloadEncryption) -> None:
        self._store = store
        self._encryption = encryption
        self._said: set[str] = set()
        """Why inputs are not shown: a sentence for each key."""

    async def of_task(self, task_id: str) -> Document | None:
        """The whole input; None where none is stored or no key here opens it. Raises StoreUnavailable."""
        return (await self._of([task_id])).get(task_id)

    async def of_tasks(self, task_ids: Sequence[str]) -> dict[str, Document]:
        """Task → its input without a dataset's list of files, which may be long. Raises StoreUnavailable."""
        return {task_id: _without_files(document) for task_id, document in (await self._of(task_ids)).items()}

    async def _of(self, task_ids: Sequence[str]) -> dict[str, Document]:
        found = await self._store.inputs(task_ids) if task_ids else {}
        read = {task_id: self._read(task_id, stored) for task_id, stored in found.items()}
        return {task_id: document for task_id, document in read.items() if document is not None}

    def _read(self, task_id: str, stored: StoredInput) -> Document | None:
        if stored.sealed is None:
            return stored.document
        try:
            opened: Document = json.loads(self._encryption.opened(stored.sealed))
        except EncryptionError as error:
            # Once: after a key was removed too early each list that anybody reads has many of them.
            if (reason := str(error)) not in self._said:
                self._said.add(reason)
                log.warning("inputs_not_shown", task_id=task_id, code=error.code, detail=reason)
            return None
        return opened


def _without_files(document: Document) -> Document:
    dataset = document.get("dataset")
    if not isinstance(dataset, dict) or "files" not in dataset:
        return document
    return document | {"dataset": {name: value for name, value in dataset.items() if name != "files"}}
