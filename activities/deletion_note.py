"""What the deletion of a dataset's copy leaves for a while: when it was ordered, so that a late copy removes itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from activities.object_folders import FolderAddress, ObjectFolder

KEPT_FOR: Final = timedelta(days=2)
"""Longer than any attempt at a copy may take."""


class DeletionNote:
    """The note of one snapshot, apart from its folder. Every method raises STORAGE_ERRORS."""

    def __init__(self, root: FolderAddress, task_id: str, dataset_id: str) -> None:
        self._folder = ObjectFolder(root, "deleted", is_ours=True)
        self._name = f"{task_id}.{dataset_id}"

    async def ordered_at(self) -> datetime | None:
        """When the last deletion was ordered; None where there was none."""
        try:
            return datetime.fromisoformat((await self._folder.read_whole(self._name)).decode())
        except FileNotFoundError:
            return None

    async def leave(self, ordered_at: datetime) -> None:
        """Note a deletion; the note of one that was ordered later stays."""
        known = await self.ordered_at()
        if known is None or known < ordered_at:
            await self._folder.write(self._name, ordered_at.isoformat().encode())

    async def forget_old(self) -> None:
        """Remove every task's note that no copy can be left to look for."""
        oldest = datetime.now(UTC) - KEPT_FOR
        old = [item.path async for item in self._folder.objects() if item.changed_at and item.changed_at < oldest]
        await self._folder.delete(old)
