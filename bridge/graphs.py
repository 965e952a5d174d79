"""Graphs in ComfyUI's API format: node id → `class_type` and `inputs`, where a link is `[node id, output]`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeGuard

from bridge.orders import Graph

MOST_STEPS: Final = 1e12
PREVIEWS: Final = frozenset({"MaskPreview", "MaskPreview+", "LossGraphNode", "ImageCompare", "easy previewImage"})
"""Node types that write to ComfyUI's folder for temporary files, beside those whose names begin with `Preview`."""
TEXT_PREVIEWS: Final = frozenset({"PreviewAny"})
"""These give a text, which is a result."""


class GraphProblem(ValueError):
    """Not a graph that ComfyUI accepts; the text names node and input."""


def read_graph(path: Path) -> Graph:
    """Read a graph in API format. Raises GraphProblem, also for a graph in the editor's format."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphProblem(f"{path} cannot be read: {error}") from None
    return checked_graph(graph)


def checked_graph(graph: Any) -> Graph:
    """The graph itself. Raises GraphProblem if it is not in API format or a link has no target."""
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise GraphProblem(
            "the graph is in the editor's format (nodes and links). Open it in ComfyUI and save it by Workflow → "
            "Export (API) in its menu; older versions have Save (API Format), once Dev mode is on in their settings."
        )
    if not isinstance(graph, dict) or not graph:
        raise GraphProblem("the graph must be an object of nodes in API format")
    for node_id, node in graph.items():
        is_node = (
            isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        )
        if not is_node or not isinstance(node.get("_meta") or {}, dict):
            raise GraphProblem(f"node {node_id!r} has no class_type or no inputs, or a _meta that is no object")
    for node_id, node in graph.items():
        for name, value in node["inputs"].items():
            if is_link(value) and value[0] not in graph:
                raise GraphProblem(f"node {node_id!r}, input {name!r} links to {value[0]!r}, which is not in the graph")
    return graph


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input's value is the output of another node: `[id, number]`."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def is_count(number: Any) -> bool:
    """Whether steps can be calculated with this value: no NaN, and no quotient that overflows a float."""
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < MOST_STEPS


def reachable(graph: Mapping[str, Any], from_nodes: Iterable[str]) -> set[str]:
    """The nodes that these need, including themselves."""
    seen: set[str] = set()
    open_nodes = [node for node in from_nodes if node in graph]
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        links = (value[0] for value in graph[node]["inputs"].values() if is_link(value))
        open_nodes.extend(link for link in links if link in graph)
    return seen


def needed_part(graph: dict[str, Any], results: Iterable[str]) -> dict[str, Any]:
    """The graph without the nodes that no result needs. Otherwise their output nodes run, and are waited for."""
    needed = reachable(graph, results)
    return {node: described for node, described in graph.items() if node in needed}


def shown_name(graph: Mapping[str, Any], node: str) -> str:
    """A node as people know it: its title, or class and id."""
    described = graph.get(node) or {}
    title = (described.get("_meta") or {}).get("title")
    return repr(title) if isinstance(title, str) and title else f"{described.get('class_type', 'node')} {node!r}"


def file_names(graph: Mapping[str, Any], nodes: Sequence[str]) -> dict[str, str]:
    """Node → the beginning of its files' names: its title in plain letters, or its id where two would be the same."""
    titles = {node: _slug((graph[node].get("_meta") or {}).get("title")) or _slug(node) or "result" for node in nodes}
    counted = Counter(titles.values())
    return {node: title if counted[title] == 1 else f"{title}-{_slug(node)}" for node, title in titles.items()}


def _slug(text: Any) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()) if isinstance(text, str) else ""
    return words.strip("-")[:40].strip("-")


def gives_no_result(node: Mapping[str, Any]) -> str | None:
    """Why a node's files are never a result, or None: ComfyUI deletes temporary ones at its next start."""
    kind, inputs = node["class_type"], node["inputs"]
    if kind in PREVIEWS or (kind.startswith("Preview") and kind not in TEXT_PREVIEWS):
        return f"{kind} only shows a preview and saves nothing"
    if inputs.get("save_output") is False:
        return f"its input 'save_output' is false, so that {kind} saves nothing"
    return None


def by_name(graph: Graph) -> dict[str, list[str]]:
    """Id or title → ids. An id wins over an equal title."""
    names: dict[str, list[str]] = {}
    for node_id, node in graph.items():
        title = (node.get("_meta") or {}).get("title")
        if isinstance(title, str):
            names.setdefault(title, []).append(node_id)
    names.update({node_id: [node_id] for node_id in graph})
    return names
