"""Where LoRAs go in a graph: a chain of loaders between the outputs of one model and all that takes them.

checkpoint ─→ lora-0 ─→ lora-1 ─→ sampler, prompts
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bridge.graphs import is_link
from bridge.orders import Graph

LORA_FILE: Final = "lora_name"
"""The loaders' input that names the file."""
CHECKPOINT_LOADERS: Final = frozenset({"CheckpointLoaderSimple", "CheckpointLoader"})
"""Node types whose outputs are model, text encoder and VAE."""

Output = tuple[str, int]


@dataclass(frozen=True)
class LoraChain:
    """The outputs that LoRAs change. Without `clip` they change the model alone."""

    model: Output
    clip: Output | None

    @classmethod
    def of_checkpoint(cls, graph: Graph) -> LoraChain | None:
        """The outputs of the only checkpoint loader; None if there is not exactly one, or nothing takes its model."""
        loaders = [node for node, described in graph.items() if described["class_type"] in CHECKPOINT_LOADERS]
        chain = cls((loaders[0], 0), (loaders[0], 1)) if len(loaders) == 1 else None
        return chain if chain is not None and chain.is_used(graph) else None

    def is_used(self, graph: Graph) -> bool:
        return any(True for _ in _takers(graph, self.model))

    def insert(self, graph: Graph, strengths: Sequence[float]) -> list[str]:
        """Insert a loader for each strength, and have all that took the outputs take the last one's. Returns the
        loaders' ids."""
        model, clip = self.model, self.clip
        takers = [(inputs, name, 0) for inputs, name in _takers(graph, model)]
        takers += [(inputs, name, 1) for inputs, name in _takers(graph, clip)] if clip else []
        nodes: list[str] = []
        for number, strength in enumerate(strengths):
            node = _free_id(graph, f"lora-{number}")
            inputs: dict[str, Any] = {"model": list(model), LORA_FILE: "", "strength_model": strength}
            if clip:
                inputs |= {"clip": list(clip), "strength_clip": strength}
            graph[node] = {"class_type": "LoraLoader" if clip else "LoraLoaderModelOnly", "inputs": inputs}
            model, clip = (node, 0), (node, 1) if clip else None
            nodes.append(node)
        for taken, name, number in takers if nodes else []:
            taken[name] = [nodes[-1], number]
        return nodes


def _takers(graph: Graph, output: Output) -> Iterator[tuple[dict[str, Any], str]]:
    """(inputs of a node, name) of what takes this output."""
    for described in graph.values():
        inputs = described["inputs"]
        yield from ((inputs, name) for name, value in inputs.items() if is_link(value) and tuple(value) == output)


def _free_id(taken: Iterable[str], wanted: str) -> str:
    while wanted in taken:
        wanted += "-"
    return wanted
