"""Lists a tenant's datasets: the folders directly below its own dataset roots, and how many files each has.

Nothing is read of a file. Symbolic links that lead out of a root name no dataset and count as no file. Names that are
no plain part of an address are left out: no order could name them. A large store must not hold anything up, so number,
bytes and time are limited; what could not be counted in time is listed without a count.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import quote

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.dataset_source import message_of
from activities.datasets import MAX_FILES
from activities.object_folders import STORAGE_ERRORS, FolderAddress, FoundObject, ObjectFolder, is_inside, read_address
from comfyui_temporal.contracts.datasets import (
    MAX_DATASETS,
    MAX_LIST_BYTES,
    DatasetList,
    DatasetQuestion,
    DatasetView,
)
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import repaired, text_bytes
from comfyui_temporal.contracts.paths import is_plain
from comfyui_temporal.contracts.size_budget import MAX_ADDRESS_BYTES

LIST_SECONDS: Final = 2.0
COUNT_SECONDS: Final = 1.0
COUNTS_AT_ONCE: Final = 8
BATCH: Final = 500

_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ID_LENGTH: Final = 64
_OTHERS: Final = re.compile(r"[^A-Za-z0-9_-]+")
_DIGEST_LENGTH: Final = 12


class DatasetFolders:
    """What lies below the dataset roots. `roots` are prefixes with `{tenant_id}`; without any, nothing is listed."""

    def __init__(
        self, roots: Sequence[str], *, max_files: int = MAX_FILES, count_seconds: float = COUNT_SECONDS
    ) -> None:
        self._roots = tuple(roots)
        self._max_files = max_files
        self._count_seconds = count_seconds

    async def of(self, tenant_id: str) -> DatasetList:
        """Raises STORAGE_ERRORS if a root cannot be read, TimeoutError if that takes too long."""
        if not self._roots:
            return DatasetList()
        found: dict[str, DatasetView] = {}
        async with asyncio.timeout(LIST_SECONDS):
            for root in self._roots:
                found |= {each.source_uri: each for each in await _below(root.replace("{tenant_id}", tenant_id))}
        kept = list(_bounded(sorted(found.values(), key=lambda dataset: (dataset.name, dataset.source_uri))))
        await self._count(kept)
        return DatasetList(datasets=kept, is_whole=len(kept) == len(found))

    async def _count(self, datasets: list[DatasetView]) -> None:
        places = asyncio.Semaphore(COUNTS_AT_ONCE)

        async def counted(dataset: DatasetView) -> None:
            async with places:
                with suppress(*STORAGE_ERRORS):
                    await self._count_one(dataset)

        counting = [asyncio.create_task(counted(dataset)) for dataset in datasets]
        if not counting:
            return
        _, late = await asyncio.wait(counting, timeout=self._count_seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def _count_one(self, dataset: DatasetView) -> None:
        folder = ObjectFolder(read_address(dataset.source_uri))
        count, size, batch = 0, 0, list[FoundObject]()

        async def take() -> None:
            nonlocal count, size
            inside = await asyncio.to_thread(_inside, folder.address, batch)
            count, size = count + len(inside), size + sum(each.size_bytes for each in inside)
            batch.clear()

        async for each in folder.objects():
            batch.append(each)
            if len(batch) == BATCH:
                await take()
            if count > self._max_files:
                break
        await take()
        dataset.is_whole = count <= self._max_files
        dataset.file_count, dataset.total_bytes = min(count, self._max_files), size if dataset.is_whole else None


async def _below(root: str) -> list[DatasetView]:
    """The first folders directly below a root, one more than are listed. One that does not exist has none."""
    address = read_address(root)
    try:
        names = await ObjectFolder(address).folders()
    except FileNotFoundError:
        return []
    names = await asyncio.to_thread(sorted, names)
    found = list[DatasetView]()
    for first in range(0, len(names), BATCH):
        found += await asyncio.to_thread(_named, root, address, names[first : first + BATCH])
        if len(found) > MAX_DATASETS:
            break
    return found


def _named(root: str, address: FolderAddress, names: Sequence[str]) -> list[DatasetView]:
    """Those of the folders that an order can name. It resolves links, so it runs in a thread."""
    found = list[DatasetView]()
    for name in names:
        source_uri = f"{root}{quote(name)}/"
        is_long = len(source_uri.encode()) > MAX_ADDRESS_BYTES
        if is_long or not _is_nameable(name) or (address.local is not None and not is_inside(address.local, name)):
            continue
        found.append(DatasetView(dataset_id=dataset_id_of(name), source_uri=source_uri, name=name))
    return found


def dataset_id_of(name: str) -> str:
    """A folder's name as an id of contract §1. What is no id gets a digest, so that two names never become one id."""
    if _ID.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{_OTHERS.sub('-', name).strip('-')[: _ID_LENGTH - _DIGEST_LENGTH - 1]}-{digest}".lstrip("-")


def _is_nameable(name: str) -> bool:
    return is_plain(name) and "%" not in name and repaired(name) == name


def _inside(folder: FolderAddress, found: list[FoundObject]) -> list[FoundObject]:
    local = folder.local
    return found[:] if local is None else [each for each in found if is_inside(local, each.path)]


def _bounded(datasets: list[DatasetView]) -> Iterator[DatasetView]:
    left = MAX_LIST_BYTES
    for dataset in datasets[:MAX_DATASETS]:
        left -= text_bytes(dataset.name) + text_bytes(dataset.source_uri)
        if left < 0:
            return
        yield dataset


class DatasetListActivities:
    """A tenant's datasets as workflows see them."""

    def __init__(self, folders: DatasetFolders) -> None:
        self._folders = folders

    @activity.defn
    async def list_datasets(self, question: DatasetQuestion) -> DatasetList:
        """Raises ApplicationError `internal`: the storage cannot be read now."""
        try:
            return await self._folders.of(question.tenant_id)
        except (*STORAGE_ERRORS, TimeoutError) as error:
            sentence = f"The dataset roots cannot be listed: {message_of(error)}"
            raise ApplicationError(sentence, type=FailureCode.INTERNAL.value) from None
