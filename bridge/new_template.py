"""`python -m bridge template new`: a template from a graph that was exported from ComfyUI.

It is read, understood and checked as the bridge loads it before anything is written. What is refused raises
TemplateProblem, with what to do.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from bridge.fitness import problems_of
from bridge.graph_roles import roles_of
from bridge.graph_wiring import Wiring
from bridge.graphs import TEXT_PREVIEWS, GraphProblem, by_name, checked_graph, gives_no_result, is_link, shown_name
from bridge.manifest import Manifest
from bridge.manifest_text import AmbiguousName, ManifestText, one_line
from bridge.orders import MOST_REASONS, Graph
from bridge.task_files import is_of_a_task
from bridge.template_library import SHIPPED, load_library
from bridge.templates import MAX_GRAPH_BYTES, Template, TemplateProblem
from comfyui_temporal.contracts.errors import sentences_of

MAX_FILE_BYTES: Final = 4 * MAX_GRAPH_BYTES
"""Of an exported graph: it is indented."""
TEMPLATE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
WRITES_NO_LISTED_FILE: Final = frozenset(
    {
        *("SaveImageWebsocket", "SaveLoRA", "LoraSave", "CheckpointSave", "ModelSave", "VAESave", "CLIPSave"),
        *("SaveTrainingDataset", "SaveImageDataSetToFolder", "SaveImageTextDataSetToFolder"),
    }
)
"""Node types that save, but whose files ComfyUI does not name: a job could not fetch them."""
TRAINING: Final = "TrainLoraNode"
TRAINS: Final = "this graph trains: copy bridge/templates/lora-train, and put your graph in the place of that one's"


@dataclass(frozen=True)
class NewTemplate:
    """A checked template that is not written yet. `decisions`: what its manifest leaves to decide, a sentence each."""

    template: Template
    manifest: str
    decisions: list[str]

    @property
    def template_id(self) -> str:
        return self.template.template_id

    @property
    def replaces_a_shipped_one(self) -> bool:
        return self.template_id in {shipped.template_id for shipped in load_library(SHIPPED)}

    def refused_by(self, info: Mapping[str, Any]) -> list[str]:
        """What a server with these node types would refuse, one sentence each."""
        return [one_line(problem) for problem in problems_of(self.template, info)]


def read_exported(path: Path) -> Graph:
    """The graph in a file. Raises TemplateProblem."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TemplateProblem(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise TemplateProblem(f"{path} is larger than {MAX_FILE_BYTES} bytes, which no graph of a job may be")
    try:
        graph = checked_graph(json.loads(content.decode("utf-8-sig"), parse_constant=_no_number))
        size = len(json.dumps(graph, ensure_ascii=False).encode())
    except GraphProblem as problem:
        raise TemplateProblem(f"{path}: {one_line(str(problem)).removesuffix('.')}") from None
    except (ValueError, RecursionError) as error:
        raise TemplateProblem(
            f"{path} is no JSON of ComfyUI's ({type(error).__name__}): save the graph by Workflow → Export (API) there"
        ) from None
    if size > MAX_GRAPH_BYTES:
        raise TemplateProblem(f"{path}: the graph has {size} bytes, and one of a job may have {MAX_GRAPH_BYTES}")
    return graph


def _no_number(text: str) -> float:
    raise ValueError(text)


def template_from(
    graph: Graph,
    made_from: str,
    *,
    template_id: str | None = None,
    results: Sequence[str] = (),
    info: Mapping[str, Any] | None = None,
) -> NewTemplate:
    """`made_from`: the file's name. `results`: nodes by title or id; default: all that save. `info`: a server's node
    types. Raises TemplateProblem."""
    own_id = _id_from(made_from) if template_id is None else template_id
    if not TEMPLATE_ID.fullmatch(own_id):
        raise TemplateProblem(f"{own_id!r} is no template_id: 1 to 64 letters, digits, '-' and '_'")
    nodes = [_named(graph, name) for name in results] or _savers(graph, info or {})
    wiring = Wiring(graph, nodes, info)
    _refuse_what_is_no_template(wiring, nodes)
    roles = roles_of(wiring)
    for node in _other_ends(graph, nodes, info or {}):
        roles.ask("results", f"{wiring.shown(node)} may give a result too. Name it under `results` if it does.")
    try:
        text = ManifestText(graph, nodes, roles).written(own_id, one_line(made_from))
        template = Template(Manifest.model_validate(tomllib.loads(text)), graph)
    except (AmbiguousName, tomllib.TOMLDecodeError) as error:
        raise TemplateProblem(one_line(str(error))) from None
    except ValidationError as error:
        raise TemplateProblem(one_line("; ".join(sentences_of(error)))) from None
    decisions = [one_line(question) for asked in roles.questions.values() for question in asked]
    return NewTemplate(template, text, decisions)


def _id_from(file_name: str) -> str:
    found = re.sub(r"[^a-z0-9_]+", "-", Path(file_name).stem.lower()).strip("-")[:64].strip("-")
    if not found:
        raise TemplateProblem(f"no template_id can be made of {file_name!r}: give one with --id")
    return found


def _named(graph: Graph, name: str) -> str:
    found = by_name(graph).get(name, [])
    if len(found) != 1:
        reason = "is the title of several nodes: use an id" if found else "is not in the graph"
        raise TemplateProblem(f"--result: node {name!r} {reason}")
    if why := _no_result(graph[found[0]]):
        raise TemplateProblem(f"--result: node {name!r} gives no result: {why}")
    return found[0]


def _no_result(node: Mapping[str, Any]) -> str | None:
    """Why a node gives no result of a job, or None."""
    if node["class_type"] in WRITES_NO_LISTED_FILE:
        return f"ComfyUI does not say what {node['class_type']} saves, so that no job can fetch it"
    return gives_no_result(node)


def _savers(graph: Graph, info: Mapping[str, Any]) -> list[str]:
    """The nodes whose files are the result. Raises TemplateProblem."""
    savers = [node for node in graph if _saves(graph[node], info) and _no_result(graph[node]) is None]
    found = savers or [node for node in graph if graph[node]["class_type"] in TEXT_PREVIEWS]
    if found:
        return found
    if any(node["class_type"] == TRAINING for node in graph.values()):
        raise TemplateProblem(TRAINS)
    found = [f"{shown_name(graph, node)}: {reason}" for node in graph if (reason := _no_result(graph[node]))]
    reasons = list(dict.fromkeys(found))[:MOST_REASONS]
    ends = [shown_name(graph, node) for node in _other_ends(graph, [], info)]
    advice = "Add a node that saves, such as SaveImage, and export the graph again"
    if ends:
        advice += f"; or, if one of these gives a result, name it: --result NODE ({', '.join(ends)})"
    raise TemplateProblem(one_line(f"no node of this graph saves a result. {'; '.join([*reasons, advice])}"))


def _saves(node: Mapping[str, Any], info: Mapping[str, Any]) -> bool:
    kind = node["class_type"]
    looks_like_it = kind.startswith("Save") or "filename_prefix" in node["inputs"]
    return looks_like_it and _is_output(kind, info) is not False


def _is_output(kind: str, info: Mapping[str, Any]) -> bool | None:
    """Whether the server calls it an output node; None if it does not say."""
    described = info.get(kind)
    found = described.get("output_node") if isinstance(described, Mapping) else None
    return found if isinstance(found, bool) else None


def _other_ends(graph: Graph, results: Sequence[str], info: Mapping[str, Any]) -> list[str]:
    """Nodes that may give a result besides: output nodes, or where no server says so, those that no node takes from."""
    taken = {value[0] for node in graph.values() for value in node["inputs"].values() if is_link(value)}
    ends = []
    for node, described in graph.items():
        is_output = _is_output(described["class_type"], info)
        is_end = node not in taken if is_output is None else is_output
        if is_end and node not in results and _no_result(described) is None:
            ends.append(node)
    return ends


def _refuse_what_is_no_template(wiring: Wiring, results: Sequence[str]) -> None:
    for node in wiring.needed:
        if wiring.kind(node) == TRAINING:
            raise TemplateProblem(TRAINS)
        for name, value in wiring.inputs(node).items():
            if isinstance(value, str) and is_of_a_task(value) and not (node in results and name == "filename_prefix"):
                raise TemplateProblem(
                    f"{one_line(wiring.shown(node))}, input {name!r} names a file of a task, which is one tenant's "
                    "alone: choose another file in ComfyUI, and export the graph again"
                )


def write(new: NewTemplate, out: Path) -> Path:
    """Write the template's folder below `out`. Nothing that exists is overwritten. Raises TemplateProblem."""
    folder = out / new.template_id
    if (other := _same_id_in(out, new.template_id)) is not None:
        raise TemplateProblem(f"{other} has the template_id {new.template_id!r} already: give another with --id")
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        raise TemplateProblem(f"{folder} exists already: give another --id or --out, or remove it first") from None
    except OSError as error:
        raise TemplateProblem(f"{folder} cannot be made: {error.strerror}") from None
    try:
        graph = json.dumps(new.template.graph, indent=2, ensure_ascii=False) + "\n"
        (folder / "graph.json").write_text(graph, encoding="utf-8")
        # The last: a folder without a manifest is no template, however long a running bridge looks at it.
        (folder / "manifest.toml").write_text(new.manifest, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise TemplateProblem(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def _same_id_in(out: Path, template_id: str) -> Path | None:
    """Another folder with this template_id: with two of them no bridge would start."""
    for path in sorted(out.glob("*/manifest.toml")):
        if path.parent.name == template_id:
            continue
        with suppress(OSError, ValueError):
            if tomllib.loads(path.read_text(encoding="utf-8")).get("template_id") == template_id:
                return path.parent
    return None
