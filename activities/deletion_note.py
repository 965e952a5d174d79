"""The note that a deletion of a dataset's copy leaves: when it was ordered. A late copy then removes itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from activities.object_folders import FolderAddress, ObjectFolder

KEPT_FOR: Final = timedelta(days=2)
"""Longer than any attempt at a copy."""


class DeletionNote:
    """The note of one snapshot, outside its folder. Every method raises STORAGE_ERRORS."""

    def __init__(self, root: FolderAddress, task_id: str, dataset_id: str) -> None:
        self._folder = ObjectFolder(root, "deleted", is_ours=True)
        self._name = f"{task_id}.{dataset_id}"

    async def ordered_at(self) -> datetime | None:
        """When the last deletion was ordered; None if there was none."""
        try:
            return datetime.fromisoformat((await self._folder.read_whole(self._name)).decode())
        except FileNotFoundError:
            return None

    async def leave(self, ordered_at: datetime) -> None:
        """Record a deletion. The note of a deletion that was ordered later is kept."""
        known = await self.ordered_at()
        if known is None or known < ordered_at:
            await self._folder.write(self._name, ordered_at.isoformat().encode())

    async def forget_old(self) -> None:
        """Remove all notes that are too old for any running copy to need them."""
        oldest = datetime.now(UTC) - KEPT_FOR
        old = [item.path async for item in self._folder.objects() if item.changed_at and item.changed_at < oldest]
        await self._folder.delete(old)
