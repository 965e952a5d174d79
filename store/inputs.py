"""What was asked for with each task: a document, or its ciphertext where the worker encrypts.

It is kept apart from the task's row, which every write of the task rewrites. It is deleted with that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import JsonValue
from sqlalchemy import ColumnElement, Text, any_, bindparam, exists, or_, select
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import OwnModel
from store.tables import task_inputs, tasks

_INSERT: Final = insert(task_inputs).on_conflict_do_nothing()
_OF_TASKS: Final = select(task_inputs).where(task_inputs.c.task_id == any_(bindparam("ids", type_=ARRAY(Text))))
_ESCAPE: Final = "\\"


class StoredInput(OwnModel):
    """Exactly one is set. `sealed`: the document as JSON, encrypted (comfyui_temporal/encryption.py)."""

    document: dict[str, JsonValue] | None = None
    sealed: bytes | None = None


async def keep(connection: AsyncConnection, task_id: str, given: StoredInput) -> None:
    await connection.execute(_INSERT, {"task_id": task_id, **given.model_dump()})


async def of_tasks(connection: AsyncConnection, task_ids: Sequence[str]) -> dict[str, StoredInput]:
    """Task → its input. Tasks without a stored input are left out."""
    rows = await connection.execute(_OF_TASKS, {"ids": list(task_ids)})
    return {row.task_id: StoredInput(document=row.document, sealed=row.sealed) for row in rows}


def has_text(wanted: str) -> ColumnElement[bool]:
    """Whether a task's id or stored prompt holds this text, in any case. An encrypted prompt is not searched."""
    pattern = f"%{_escaped(wanted)}%"
    prompt: ColumnElement[Any] = task_inputs.c.document["prompt"].astext
    in_prompt = exists().where(task_inputs.c.task_id == tasks.c.task_id, prompt.ilike(pattern, escape=_ESCAPE))
    return or_(tasks.c.task_id.ilike(pattern, escape=_ESCAPE), in_prompt)


def _escaped(text: str) -> str:
    for special in (_ESCAPE, "%", "_"):
        text = text.replace(special, _ESCAPE + special)
    return text
