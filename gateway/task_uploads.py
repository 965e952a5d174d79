"""The files that an order names or holds, checked before its task starts (contract §8).

The bridge checks again when it fetches them: a task may be started past the gateway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, NamedTuple

from comfyui_temporal.contracts.tasks import TaskInput
from comfyui_temporal.contracts.templates import TemplateExtra
from comfyui_temporal.contracts.uploads import (
    HEAD_BYTES,
    KIND_NAMES,
    FileKind,
    InputKind,
    file_type,
    upload_id_of,
)
from gateway.inline_files import InlineFile
from gateway.problems import FieldProblem, Problem, ProblemCode
from gateway.template_routes import Templates
from gateway.uploads import Uploads
from runtime.caller_tokens import Caller
from store import StoredUpload

LIST_SECONDS: Final = 2.0
"""How long a start waits for the list of templates, which says what kind of file an extra takes. Then the bridge
decides."""
EXTRAS: Final = "extras."
FILE_KINDS: Final = frozenset(kind.value for kind in InputKind)


class Named(NamedTuple):
    """A file that a task names: where, and by which address."""

    field: str
    address: str


class TaskUploads:
    """Every method raises Problem."""

    def __init__(self, uploads: Uploads, templates: Templates) -> None:
        self._uploads = uploads
        self._templates = templates

    async def check(self, caller: Caller, task: TaskInput, inline: Sequence[InlineFile]) -> None:
        """Each named upload exists, is whole, the caller's, not expired and of a fitting kind. Raises Problem 422."""
        named = [Named(field, address) for field, address in task.uploads.items()]
        if not named:
            return
        extras = await self._extras(caller, task) if any(each.field.startswith(EXTRAS) for each in named) else {}
        given = {each.field: each for each in inline}
        ids = [found for each in named if each.field not in given and (found := upload_id_of(each.address))]
        # Nothing to look up where nothing can be uploaded: then each is unknown.
        seen = await self._uploads.named(caller, ids) if self._uploads.settings.files is not None else {}
        problems = [
            FieldProblem(field=each.field, message=problem)
            for each in named
            if (problem := self._problem(each, given.get(each.field), seen, _wanted(each.field, extras)))
        ]
        size, most = sum(len(each.content) for each in inline), self._uploads.settings.inline_bytes
        if size > most:
            message = f"the files within the order have {size} bytes, and may have {most}: upload them first"
            problems.append(FieldProblem(field=inline[0].field, message=message))
        if problems:
            raise Problem(
                ProblemCode.INPUT_INVALID, "Nothing was done: a file cannot be used; see `fields`.", fields=problems
            )

    async def keep(self, caller: Caller, inline: Sequence[InlineFile]) -> None:
        """Store the files of an order."""
        for each in inline:
            await self._uploads.keep(caller, each.upload_id, each.content, None)

    def _problem(
        self, named: Named, inline: InlineFile | None, seen: Mapping[str, StoredUpload], wanted: str | None
    ) -> str | None:
        if wanted is not None and wanted not in FILE_KINDS:
            return None if inline is None else "takes no file"
        if self._uploads.settings.files is None:
            return "is an upload, and none can be made here: give an https:// or object storage address"
        if inline is not None:
            found = file_type(inline.content[:HEAD_BYTES])
            if found is None:
                return f"is none of these: {', '.join(KIND_NAMES.values())}"
            return _misfit(found.kind, wanted)
        upload_id = upload_id_of(named.address)
        if upload_id is None:
            return "must be upload:UPLOAD_ID"
        upload = seen.get(upload_id)
        if upload is None:
            return f"there is no upload {upload_id} of this tenant"
        if upload.expires_at <= datetime.now(UTC):
            return f"upload {upload_id} has expired: send the file again"
        if upload.whole_at is None or upload.kind is None:
            return f"upload {upload_id} is not complete: {upload.received_bytes} of {upload.size_bytes} bytes are there"
        return _misfit(upload.kind, wanted)

    async def _extras(self, caller: Caller, task: TaskInput) -> dict[str, TemplateExtra]:
        with suppress(Problem, TimeoutError):
            async with asyncio.timeout(LIST_SECONDS):
                listed = await self._templates.of(caller)
            return next((each.extras for each in listed if each.template_id == task.template_id), {})
        return {}


def _wanted(field: str, extras: dict[str, TemplateExtra]) -> str | None:
    """What the field takes; None where nobody said so."""
    if not field.startswith(EXTRAS):
        return InputKind.IMAGE
    extra = extras.get(field.removeprefix(EXTRAS))
    return None if extra is None else extra.type


def _misfit(kind: FileKind, wanted: str | None) -> str | None:
    if wanted is None or InputKind(wanted).file is kind:
        return None
    return f"is {KIND_NAMES[kind]}; {KIND_NAMES[InputKind(wanted).file]} is needed"
