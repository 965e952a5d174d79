"""The dataset's own folder, as a snapshot reads it. Each of its errors is `dataset_invalid`."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Self

from obstore.exceptions import GenericError, JoinError
from pydantic_core import to_json

from activities.object_folders import STORAGE_ERRORS, FoundObject, ObjectFolder, OutsideFolder
from activities.outside_http import OutsideFailure
from comfyui_temporal.contracts.comfyui import DatasetFile
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import repaired, shortened
from comfyui_temporal.contracts.size_budget import MAX_SENT_LIST_BYTES

FILE_BYTES: Final = 120
"""Bytes of JSON for one file in a training request, without its path."""
SIZES_AT_ONCE: Final = 16


class DatasetSource:
    """The files of one dataset. Raises OutsideFailure: `dataset_invalid`, or `internal` if the error may pass."""

    def __init__(self, folder: ObjectFolder, named_files: list[str] | None) -> None:
        self._named_files = named_files
        self._folder = folder

    async def files(self, max_files: int, max_bytes: int) -> list[FoundObject]:
        """The files to copy, by path. Raises OutsideFailure `dataset_invalid`."""
        named = self._named_files
        found = await (self._listed(max_files) if named is None else self._looked_up(sorted(set(named)), max_files))
        if not found:
            raise invalid(f"{self._folder.address.text} contains no files: a training needs at least one.")
        total = sum(item.size_bytes for item in found)
        if total > max_bytes:
            raise invalid(f"The dataset has {total} bytes, the limit is {max_bytes}.")
        list_bytes = sum(len(to_json(item.path)) + FILE_BYTES for item in found)
        if list_bytes > MAX_SENT_LIST_BYTES:
            raise invalid(
                f"The list of the dataset's {len(found)} files takes {list_bytes} bytes, at most {MAX_SENT_LIST_BYTES} "
                "are taken. Use shorter paths or pack files together."
            )
        return sorted(found, key=lambda item: item.path)

    async def read(self, path: str) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._folder.read(path):
                yield chunk
        except STORAGE_ERRORS as error:
            raise self._named(error, path) from None

    async def _listed(self, max_files: int) -> list[FoundObject]:
        found: list[FoundObject] = []
        try:
            async for item in self._folder.objects():
                await self._folder.check_inside(item.path)
                found.append(item)
                if len(found) > max_files:
                    raise _too_many(max_files)
        except STORAGE_ERRORS as error:
            raise self._named(error, "the folder") from None
        return found

    async def _looked_up(self, paths: list[str], max_files: int) -> list[FoundObject]:
        if len(paths) > max_files:
            raise _too_many(max_files)
        found: list[FoundObject] = []
        for start in range(0, len(paths), SIZES_AT_ONCE):
            found += await asyncio.gather(*(self._found(path) for path in paths[start : start + SIZES_AT_ONCE]))
        return found

    async def _found(self, path: str) -> FoundObject:
        try:
            await self._folder.check_inside(path)
            return FoundObject(path, await self._folder.size_bytes(path))
        except STORAGE_ERRORS as error:
            raise self._named(error, path) from None

    def _named(self, error: Exception, path: str) -> OutsideFailure:
        return folder_failure(self._folder, error, path)


@dataclass
class HashedChunks:
    """Passes chunks through, counts their bytes and hashes them. `failure` is what ended them early."""

    chunks: AsyncIterator[bytes]
    size_bytes: int = 0
    failure: OutsideFailure | None = None

    def __post_init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self.chunks)
        except OutsideFailure as failure:
            self.failure = failure
            raise
        self.size_bytes += len(chunk)
        self._sha256.update(chunk)
        return chunk

    def as_file(self, path: str) -> DatasetFile:
        return DatasetFile(path=path, size_bytes=self.size_bytes, sha256=self._sha256.hexdigest())


def folder_failure(folder: ObjectFolder, error: Exception, path: str) -> OutsideFailure:
    """Maps an error of a caller's own folder: `dataset_invalid`, or `internal` if it may be temporary."""
    where = folder.address.text
    if isinstance(error, OutsideFolder):
        return invalid(f"{str(error)!r} points outside {where}. Symbolic links must stay inside the dataset.")
    if isinstance(error, FileNotFoundError):
        return invalid(f"{path!r} is not in {where}. Check dataset.files and source_uri.")
    if folder.address.local is None and _is_passing(error):
        return OutsideFailure(
            FailureCode.INTERNAL, f"{where} did not answer for {path!r}: {message_of(error)}. It is retried."
        )
    return invalid(f"{path!r} in {where} cannot be read: {message_of(error)}. Give the worker the right to read it.")


def _is_passing(error: Exception) -> bool:
    """Whether an error of a remote store may be temporary: obstore raises network errors as its fallback type."""
    return isinstance(error, GenericError | JoinError)


def _too_many(max_files: int) -> OutsideFailure:
    return invalid(f"The dataset has more than {max_files} files, which is the limit.")


def invalid(sentence: str) -> OutsideFailure:
    return OutsideFailure(FailureCode.DATASET_INVALID, sentence, may_be_retried=False)


def message_of(error: Exception) -> str:
    lines = repaired(str(error)).splitlines()
    return shortened(lines[0] if lines else type(error).__name__, 300)
