"""Progress of a run: the nodes that its results need, without cached ones, weighted by their steps.

ComfyUI's own `progress_state` leaves out pending nodes, and would show 100 % from the first node on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bridge.graphs import is_count, is_link
from bridge.server import PromptUpdate

STEP_INPUTS: Final = ("steps",)
MOST_WHILE_RUNNING: Final = 99
"""100 is published with the result."""


class RunProgress:
    """Counts the updates of one prompt. `percent` is a whole number and never falls."""

    def __init__(self, graph: Mapping[str, Any], result_nodes: Iterable[str], first_percent: int = 0) -> None:
        self._graph = graph
        self._results = list(result_nodes)
        self._cached: frozenset[str] = frozenset()
        self._weights = self._weigh()
        self._shares: dict[str, float] = {}
        self._percent = first_percent

    @property
    def percent(self) -> int:
        total = sum(self._weights.values())
        done = sum(self._weights[node] * share for node, share in self._shares.items() if node in self._weights)
        now = int(100 * done / total + 1e-6) if total else 0
        self._percent = max(self._percent, min(now, MOST_WHILE_RUNNING))
        return self._percent

    def add(self, update: PromptUpdate) -> None:
        if update.cached is not None:
            self._cached = update.cached
            self._weights = self._weigh()
        for node, share in update.shares.items():
            self._shares[node] = max(self._shares.get(node, 0.0), share)

    def _weigh(self) -> dict[str, float]:
        """Node → weight, of nodes that will run. What only a cached node needs does not run."""
        weights: dict[str, float] = {}
        open_nodes = [node for node in self._results if node in self._graph]
        while open_nodes:
            node = open_nodes.pop()
            if node in weights or node in self._cached:
                continue
            inputs = self._graph[node].get("inputs", {})
            weights[node] = max([1.0, *(_steps(inputs.get(name)) for name in STEP_INPUTS)])
            open_nodes.extend(value[0] for value in inputs.values() if is_link(value) and value[0] in self._graph)
        return weights


def _steps(value: Any) -> float:
    return float(value) if is_count(value) else 0.0
