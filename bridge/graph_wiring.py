"""How a graph is wired: where an input's value stands, what takes it, and what a server says of an input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.graph_check import choices_of, spec_of
from bridge.graphs import is_link, reachable, shown_name
from bridge.orders import Graph

Place = tuple[str, str]
"""(node, input)."""


@dataclass(frozen=True)
class Held:
    """A value as it stands in the graph, and where."""

    place: Place
    value: Any

    @property
    def is_whole(self) -> bool:
        return isinstance(self.value, int) and not isinstance(self.value, bool)


class Wiring:
    """The part of a graph that its results need. `info`: a server's `/object_info`, if there is one to ask."""

    def __init__(self, graph: Graph, results: Iterable[str], info: Mapping[str, Any] | None = None) -> None:
        self.graph = graph
        self.info = info or {}
        self.results = list(results)
        needed = reachable(graph, self.results)
        self.needed = [node for node in graph if node in needed]

    def kind(self, node: str) -> str:
        kind: str = self.graph[node]["class_type"]
        return kind

    def inputs(self, node: str) -> dict[str, Any]:
        inputs: dict[str, Any] = self.graph[node]["inputs"]
        return inputs

    def shown(self, node: str) -> str:
        """A node as a sentence names it: its title or class, and its id."""
        name = shown_name(self.graph, node)
        return name if name.endswith(f"{node!r}") else f"{name} (node {node!r})"

    def source(self, node: str, name: str) -> Held | None:
        """Where an input's value stands: in the node itself, or in the constant that it takes. None: it is computed."""
        value = self.inputs(node).get(name)
        if not is_link(value):
            return None if value is None or isinstance(value, list | dict) else Held((node, name), value)
        above = self.inputs(value[0])
        is_constant = self.kind(value[0]).startswith("Primitive") or list(above) == ["value"]
        if not is_constant or "value" not in above or isinstance(above["value"], list | dict | None):
            return None
        return Held((value[0], "value"), above["value"])

    def takers(self, node: str) -> list[Place]:
        """Every needed input that takes an output of this node."""
        return [
            (taker, name)
            for taker in self.needed
            for name, value in self.inputs(taker).items()
            if is_link(value) and value[0] == node
        ]

    def serves_only(self, place: Place, names: Iterable[str]) -> bool:
        """Whether a value is for inputs of these names alone: a constant may be for others too."""
        wanted = set(names)
        return place[1] != "value" or all(name in wanted for _, name in self.takers(place[0]))

    def are_above(self, node: str) -> set[str]:
        """Every node that this one needs, and itself."""
        return reachable(self.graph, [node])

    def most(self, node: str, name: str) -> int | None:
        """The largest number that the server takes for an input; None if it does not say."""
        spec = spec_of(self.info, self.kind(node), name)
        options = spec[1] if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], Mapping) else {}
        most = options.get("max")
        return int(most) if isinstance(most, int | float) and not isinstance(most, bool) else None

    def is_list_of_files(self, node: str, name: str) -> bool | None:
        """Whether the server offers a list for an input; None if there is no server to ask, or it lacks the node."""
        if self.kind(node) not in self.info:
            return None
        return choices_of(self.info, self.kind(node), name) is not None
