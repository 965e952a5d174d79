"""How far a run is: nodes that its results need less those that were cached, weighted by their steps.

ComfyUI's own `progress_state` leaves pending nodes out and would show 100 % from the first node on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bridge.graphs import is_link

STEP_INPUTS: Final = ("steps",)
MOST_STEPS: Final = 1e12
MOST_WHILE_RUNNING: Final = 99
"""100 is said when the result is there."""


class RunProgress:
    """Fed with the server's messages of one prompt. `percent` is whole and never goes back."""

    def __init__(self, graph: Mapping[str, Any], result_nodes: Iterable[str], first_percent: int = 0) -> None:
        self._graph = graph
        self._results = list(result_nodes)
        self._cached: set[str] = set()
        self._weights = self._weigh()
        self._shares: dict[str, float] = {}
        self._current: str | None = None
        self._percent = first_percent

    @property
    def percent(self) -> int:
        total = sum(self._weights.values())
        done = sum(self._weights[node] * share for node, share in self._shares.items() if node in self._weights)
        now = int(100 * done / total + 1e-6) if total else 0
        self._percent = max(self._percent, min(now, MOST_WHILE_RUNNING))
        return self._percent

    def heard(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take one message of this prompt; what is not understood changes nothing."""
        if kind == "execution_cached":
            nodes = data.get("nodes")
            self._cached = {str(node) for node in nodes} if isinstance(nodes, list) else set()
            self._weights = self._weigh()
        elif kind == "executing":
            self._executing(data.get("node"))
        elif kind == "progress":
            self._reached(data.get("node"), data.get("value"), data.get("max"))
        elif kind == "progress_state":
            self._states(data.get("nodes"))
        elif kind == "executed":
            self._finished(data.get("node"))

    def _executing(self, node: Any) -> None:
        if self._current is not None and self._current != node:
            self._finished(self._current)
        self._current = node if isinstance(node, str) else None

    def _states(self, nodes: Any) -> None:
        for node, state in nodes.items() if isinstance(nodes, Mapping) else ():
            if not isinstance(state, Mapping):
                continue
            if state.get("state") == "finished":
                self._finished(node)
            else:
                self._reached(node, state.get("value"), state.get("max"))

    def _reached(self, node: Any, value: Any, most: Any) -> None:
        if isinstance(node, str) and _is_count(value) and _is_count(most) and most > 0:
            share = min(1.0, max(0.0, value / most))
            self._shares[node] = max(self._shares.get(node, 0.0), share)

    def _finished(self, node: Any) -> None:
        if isinstance(node, str):
            self._shares[node] = 1.0

    def _weigh(self) -> dict[str, float]:
        """Node → weight of those that will run: a cached node needs nothing of what lies behind it."""
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


def _is_count(number: Any) -> bool:
    """Whether it can be reckoned with: no NaN, and nothing whose quotient no float holds."""
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < MOST_STEPS


def _steps(value: Any) -> float:
    return float(value) if _is_count(value) else 0.0
