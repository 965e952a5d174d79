"""An entry of ComfyUI's `/history` → the prompt's result. Fields of an unexpected shape are ignored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from bridge.native.failures import execution_details, is_interrupted, is_servers_fault
from bridge.server import TEMPORARY, PromptResult, ResultFile
from comfyui_temporal.contracts.fields import repaired

TEXT_LIST: Final = "text"


def result_of(entry: Mapping[str, Any], result_nodes: Sequence[str]) -> PromptResult:
    """The outputs of these nodes, without temporary files, and the error if the prompt failed."""
    status = entry.get("status")
    messages = status.get("messages") if isinstance(status, Mapping) else None
    is_error = isinstance(status, Mapping) and status.get("status_str") == "error"
    outputs = _shown(entry)
    by_node = {node: (_kept_files(outputs, node), _texts(outputs, [node])) for node in result_nodes}
    return PromptResult(
        files=[file for files, _ in by_node.values() for file in files],
        texts=[text for _, texts in by_node.values() for text in texts],
        empty_nodes=[node for node, (files, texts) in by_node.items() if not files and not texts],
        error=execution_details(messages) if is_error else None,
        seconds=_run_seconds(messages),
        is_servers_fault=is_error and is_servers_fault(messages),
        is_interrupted=is_error and is_interrupted(messages),
    )


def files_of(entry: Mapping[str, Any]) -> list[ResultFile]:
    """The files of all nodes, temporary ones too."""
    outputs = _shown(entry)
    return _files(outputs, list(dict.fromkeys(node for node, _ in outputs)))


def _shown(entry: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(node of the graph, its outputs). A node that expands or loops has several: its nodes have ids of their own.

    Their `meta` says for which node of the graph they are shown.
    """
    outputs, meta = entry.get("outputs"), entry.get("meta")
    shown = []
    for node, lists in outputs.items() if isinstance(outputs, Mapping) else ():
        of_node = meta.get(node) if isinstance(meta, Mapping) else None
        display = of_node.get("display_node") if isinstance(of_node, Mapping) else None
        if isinstance(lists, Mapping):
            shown += [(name, lists) for name in dict.fromkeys([str(node), str(display or node)])]
    return shown


def _of_nodes(
    outputs: list[tuple[str, Mapping[str, Any]]], result_nodes: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for node in result_nodes:
        yield from ((name, lists) for name, lists in outputs if name == node)


def _kept_files(outputs: list[tuple[str, Mapping[str, Any]]], node: str) -> list[ResultFile]:
    return [file for file in _files(outputs, [node]) if file.type != TEMPORARY]


def _files(outputs: list[tuple[str, Mapping[str, Any]]], result_nodes: Sequence[str]) -> list[ResultFile]:
    files: list[ResultFile] = []
    for node, lists in _of_nodes(outputs, result_nodes):
        for kind, items in lists.items():
            for item in items if isinstance(items, list) else ():
                if isinstance(item, Mapping) and isinstance(item.get("filename"), str):
                    files.append(
                        ResultFile(
                            node=node,
                            kind=str(kind),
                            filename=item["filename"],
                            subfolder=str(item.get("subfolder") or ""),
                            type=str(item.get("type") or "output"),
                        )
                    )
    return files


def _texts(outputs: list[tuple[str, Mapping[str, Any]]], result_nodes: Sequence[str]) -> list[str]:
    texts: list[str] = []
    for _, lists in _of_nodes(outputs, result_nodes):
        found = lists.get(TEXT_LIST)
        texts += [repaired(text) for text in found if isinstance(text, str)] if isinstance(found, list) else []
    return texts


def _run_seconds(messages: Any) -> float:
    """The time between the first and the last message; 0 if they have no timestamps."""
    times: list[float] = []
    for message in messages if isinstance(messages, list) else ():
        data = message[1] if isinstance(message, list) and len(message) == 2 else None
        at = data.get("timestamp") if isinstance(data, Mapping) else None
        if isinstance(at, int | float) and not isinstance(at, bool):
            times.append(at / 1000)
    return max(0.0, max(times) - min(times)) if times else 0.0
