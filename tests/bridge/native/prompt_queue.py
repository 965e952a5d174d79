"""The queue and history of ComfyUI's `execution.PromptQueue`: a heap, the running prompts and a bounded history."""

from __future__ import annotations

import asyncio
import copy
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Item = tuple[float, str, Json, Json, list[str]]
"""number, prompt id, graph, extra data, ids of the output nodes to execute."""


@dataclass
class PromptQueue:
    """`changed` is called whenever the number of prompts changes. It sends `status` to everyone."""

    changed: Callable[[], None]
    pending: list[Item] = field(default_factory=list)
    running: dict[int, Item] = field(default_factory=dict)
    history: dict[str, Json] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: int = 0

    def put(self, item: Item) -> None:
        heapq.heappush(self.pending, item)
        self.arrived.set()
        self.changed()

    def take(self) -> tuple[int, Item] | None:
        """Move the next prompt to `running`."""
        if not self.pending:
            self.arrived.clear()
            return None
        number, item = self._taken, heapq.heappop(self.pending)
        self._taken += 1
        self.running[number] = copy.deepcopy(item)
        self.changed()
        return number, item

    def done(self, number: int, result: Json, status: Json, limit: int) -> None:
        """Move from `running` to the history in one step, as ComfyUI does under its lock."""
        item = self.running.pop(number)
        if len(self.history) > limit:
            self.history.pop(next(iter(self.history)))
        self.history[item[1]] = {"prompt": list(item), "outputs": {}, "status": status} | result
        self.changed()

    def delete(self, prompt_id: str) -> bool:
        """Remove one pending prompt, without a trace."""
        for place, item in enumerate(self.pending):
            if item[1] == prompt_id:
                self.pending.pop(place)
                heapq.heapify(self.pending)
                self.changed()
                return True
        return False

    def wipe(self) -> None:
        self.pending.clear()
        self.changed()

    def is_running(self, prompt_id: str) -> bool:
        return any(item[1] == prompt_id for item in self.running.values())

    @property
    def remaining(self) -> int:
        return len(self.pending) + len(self.running)
