"""The datasets of trainings on one server: each file verified, and below a folder of its training."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
from collections.abc import Sequence

from temporalio.exceptions import ApplicationError

from bridge.calls import RunFailureType
from bridge.datasets import CorruptPicture, Placed, named, plan_of, read_picture
from bridge.orders import DatasetOrder, long_list
from bridge.server import PromptRefused, ResultFile, Server, ServerError
from bridge.storage import STORAGE_ERRORS, Storage
from bridge.task_files import FOLDER
from comfyui_temporal.contracts.comfyui import DatasetFile, DatasetSnapshot
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode


class DatasetCopies:
    """Remembers what it has put there: every chunk of a training wants its dataset."""

    def __init__(self, server: Server, storage: Storage) -> None:
        self._server = server
        self._storage = storage
        self._ingested: set[str] = set()

    async def files(self, order: DatasetOrder) -> list[ResultFile]:
        """A dataset's files on this server."""
        places = [_place_of(order, placed.target) for placed in plan_of(await self._files_of(order)).placed]
        return [_file_at(folder, name) for folder, name in places]

    def forget(self, order: DatasetOrder) -> None:
        """The server has its files no longer."""
        self._ingested.discard(order.training_id)

    async def ingest(self, order: DatasetOrder) -> int:
        """Put a dataset on the server, again only where it has lost it. Returns the number of files.

        Raises ApplicationError: `workflow_invalid`, a `RunFailureType`, or retried.
        """
        try:
            wanted = plan_of(await self._files_of(order)).placed
            if order.training_id in self._ingested:
                if await self._is_there(order, wanted):
                    return len(wanted)
                self.forget(order)
            corrupt = [placed.file.path for placed in wanted if not await self._ingest_file(order, placed)]
            if corrupt:
                raise _dataset_refused(f"{named(corrupt)} cannot be read: no pictures, or broken off")
        except PromptRefused as refused:
            raise ApplicationError(refused.details.message, type=refused.details.code, non_retryable=True) from None
        except FileNotFoundError as error:
            raise ApplicationError(
                f"A file of the dataset's snapshot is missing: {error}.",
                type=FailureCode.WORKFLOW_INVALID.value,
                non_retryable=True,
            ) from None
        except ServerError as error:
            raise ApplicationError(str(error), type=RunFailureType.GONE.value, non_retryable=True) from None
        except STORAGE_ERRORS as error:
            raise ApplicationError(
                f"The dataset's snapshot at {order.snapshot.snapshot_uri} cannot be read: {type(error).__name__}.",
                type=FailureCode.INTERNAL.value,
            ) from None
        self._ingested.add(order.training_id)
        return len(wanted)

    async def _is_there(self, order: DatasetOrder, wanted: Sequence[Placed]) -> bool:
        """Whether the server still has it: a restarted one may have lost its files, and an erased file is an empty one.

        The first file, a picture, stands for all. Raises ServerError.
        """
        try:
            async with self._server.fetch(_file_at(*_place_of(order, wanted[0].target))) as (_, chunks):
                return bool(await anext(chunks, b""))
        except FileNotFoundError:
            return False

    async def _ingest_file(self, order: DatasetOrder, placed: Placed) -> bool:
        """Upload a verified file. Returns whether it can be read. Raises PromptRefused, ServerError, STORAGE_ERRORS."""
        file, snapshot = placed.file, Storage(order.snapshot.snapshot_uri)
        has_size = await snapshot.size_bytes(file.path) == file.size_bytes
        content = await snapshot.read_whole(file.path) if has_size else b""
        if not has_size or hashlib.sha256(content).hexdigest() != file.sha256:
            raise _dataset_refused(f"{file.path!r} does not match its size and sha256")
        folder, name = _place_of(order, placed.target)
        if not name.lower().endswith(".txt"):
            try:
                content = await asyncio.to_thread(read_picture, content, as_png=placed.is_converted)
            except CorruptPicture:
                return False
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        await self._server.upload(name, content, content_type=kind, folder=folder)
        return True

    async def _files_of(self, order: DatasetOrder) -> list[DatasetFile]:
        """The files to train on. Raises STORAGE_ERRORS, PromptRefused."""
        if order.list_sha256 is None:
            return order.snapshot.files
        raw = await self._storage.read_whole(long_list(order.training_id, order.list_sha256))
        if hashlib.sha256(raw).hexdigest() != order.list_sha256:
            message = "dataset.files: the stored list does not match its sha256."
            raise PromptRefused(ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message))
        return DatasetSnapshot.model_validate_json(raw).files


def _place_of(order: DatasetOrder, path: str) -> tuple[str, str]:
    """(folder, name) of a dataset's file below the server's input folder."""
    folder, _, name = path.rpartition("/")
    return "/".join(part for part in (FOLDER, order.training_id, folder) if part), name


def _file_at(folder: str, name: str) -> ResultFile:
    return ResultFile(node="", kind="", filename=name, subfolder=folder, type="input")


def _dataset_refused(problem: str) -> PromptRefused:
    return PromptRefused(ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=f"dataset.files: {problem}."))
