"""The stack as the soak sees it: its clients, its parts, and the tasks that are open."""

from __future__ import annotations

from typing import Any

from proof.site.parts import SupervisedParts
from proof.site.site import Site


class SoakSite(Site):
    """A site whose parts the local stack watches over."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.parts = SupervisedParts(self)
        self.open_tasks: dict[str, int] = {}
        """Task id → its number, while it is open."""
