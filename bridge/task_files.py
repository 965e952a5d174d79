"""Files of tasks on ComfyUI servers, and what a tenant is told of servers and of others' files.

    input/comfyui-temporal/{job_id}/…                  control images, datasets
    output/comfyui-temporal/{job_id}/…                 results; `again-…/` there: of a run after the first
    output/loras/comfyui-temporal/{training_id}/…      what is trained
    output/loras/comfyui-temporal/tenant-{tenant_id}/… models that images use (lora_cache.py)

All tenants' tasks share the servers, and ComfyUI offers every file to every graph. So a graph names files of its own
task and of no other, whoever wrote the name; and no text for a tenant shows an address, or a file of another task.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from bridge.server import TEMPORARY, ResultFile
from comfyui_temporal.contracts.errors import ErrorDetails

FOLDER: Final = "comfyui-temporal"
_OWN_FOLDER: Final = re.compile(rf"{FOLDER}\s*[/\\]+\s*([^/\\\s'\"\],)>:]*)", re.IGNORECASE)
_WHOLE_FOLDER: Final = re.compile(rf"(?:^|[/\\]){FOLDER}[/\\]*\s*$", re.IGNORECASE)
_OTHER_FOLDER: Final = re.compile(r"\[(output|temp)\]\s*$", re.IGNORECASE)
"""`name.png [output]`: ComfyUI's way to name a file of its folders for results and for temporary files."""
_FILE: Final = re.compile(rf"[^\s'\"\[\],(]*{FOLDER}[/\\]+[^\s'\"\],)]*", re.IGNORECASE)
_ADDRESS: Final = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>,;)\]]+", re.IGNORECASE)
_HOST: Final = re.compile(
    r"\b(?:\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?|localhost(?::\d{1,5})?|(?:[a-z0-9-]+\.)+[a-z0-9-]+:\d{4,5})\b"
    r"|\[[0-9a-f:]*:[0-9a-f:.]*\](?::\d{1,5})?",
    re.IGNORECASE,
)


AGAIN: Final = re.compile(r"again-[0-9a-f]{8}")
"""A folder of a job's own folder: the results of one later run of it."""


def saved_apart(inputs: Mapping[str, Any], run_id: str, run_name: str) -> dict[str, Any]:
    """A node's inputs, so that what it saves for this run of a job is not what it saved for an earlier one.

    ComfyUI does not run a node again whose inputs it has seen: it names the old file, which may be erased by now.
    """
    prefix, own = inputs.get("filename_prefix"), f"{FOLDER}/{run_id}/"
    if not isinstance(prefix, str) or not prefix.startswith(own):
        return dict(inputs)
    folder = f"again-{hashlib.sha256(run_name.encode()).hexdigest()[:8]}"
    return {**inputs, "filename_prefix": f"{own}{folder}/{prefix.removeprefix(own)}"}


def is_of_a_task(name: str) -> bool:
    """Whether this file on a server is of some task."""
    return _OWN_FOLDER.search(name) is not None or _WHOLE_FOLDER.search(name) is not None


def problem_of(text: str) -> str | None:
    """Why a request may not put this text into a graph, or None."""
    if is_of_a_task(text):
        return f"must not name a file in {FOLDER!r}: files of tasks are their own"
    if _OTHER_FOLDER.search(text):
        return "must not name a file among the server's results or temporary files"
    return None


def foreign_files(graph: Mapping[str, Any], run_id: str) -> Iterator[tuple[str, str]]:
    """(node, input) of what names a file of another task than this job or training."""
    for node, described in graph.items():
        for name, value in described["inputs"].items():
            if any(_is_foreign(text, run_id) for text in _texts(value)):
                yield node, name


def is_left_by(file: ResultFile, run_id: str) -> bool:
    """Whether a file that a prompt shows is this run's alone: a node may also show one that was there before."""
    is_own = is_of_a_task(f"{file.subfolder}/") and run_id in file.subfolder.replace("\\", "/").split("/")
    return is_own or file.type == TEMPORARY


def _is_foreign(text: str, run_id: str) -> bool:
    """It may name one file of this task, and no way up from there."""
    is_own = _OWN_FOLDER.findall(text) == [run_id] and ".." not in re.split(r"[/\\]", text)
    return is_of_a_task(text) and not is_own


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def for_tenant(text: str, run_id: str = "", *, places: tuple[str, ...] = ()) -> str:
    """The text without addresses of machines and without files of other tasks.

    `places`: what this server is called, which is left out as well.
    """
    for place in sorted(filter(None, places), key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w-])", "the server", text)
    text = _ADDRESS.sub("(an address)", text)
    text = _FILE.sub(lambda found: _own_name(found[0], run_id), text)
    return _HOST.sub("(an address)", text)


def _own_name(path: str, run_id: str) -> str:
    owner = _OWN_FOLDER.search(path)
    if run_id and owner is not None and owner[1] == run_id:
        return re.split(r"[/\\]", path)[-1]
    return "(a file of another task)"


def shown(details: ErrorDetails, run_id: str, *, places: tuple[str, ...] = ()) -> ErrorDetails:
    """An error as its tenant may read it."""
    return details.model_copy(update={"message": for_tenant(details.message, run_id, places=places)})
