"""A list that knows its size in a payload, so that keeping it within its budget is cheap."""

from __future__ import annotations

from typing import Generic, TypeVar

from pydantic import BaseModel

from comfyui_temporal.contracts.size_budget import json_bytes

Item = TypeVar("Item", bound=BaseModel)


class Measured(Generic[Item]):
    """`items` is a list in a run's state. Only this class changes it, and measures each item once."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self._sizes = [json_bytes(item) for item in items]
        self.total_bytes = sum(self._sizes)

    def append(self, item: Item) -> None:
        self.items.append(item)
        self._sizes.append(json_bytes(item))
        self.total_bytes += self._sizes[-1]

    def replace(self, place: int, item: Item) -> None:
        size = json_bytes(item)
        self.total_bytes += size - self._sizes[place]
        self.items[place], self._sizes[place] = item, size

    def remove(self, place: int) -> None:
        del self.items[place]
        self.total_bytes -= self._sizes.pop(place)

    def remove_first(self, count: int) -> None:
        del self.items[:count]
        self.total_bytes -= sum(self._sizes[:count])
        del self._sizes[:count]
