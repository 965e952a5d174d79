"""Checks a graph against a server's `/object_info`, to find what the server would refuse before anything is queued.

For each class, `/object_info` (ComfyUI 0.3.64 to 0.38) has `input.required` and `input.optional` (name → [type or list
of choices, options]) and `output` (a list of types). Newer servers write choices as ["COMBO", {"options": […]}].

Inputs of newer nodes may bring others along (`COMFY_DYNAMICCOMBO_V3`, `COMFY_AUTOGROW_V3`, …). In a graph these have
the outer input's name before theirs: `resize_type` and `resize_type.width`. `_flat` gives them all.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Final

from bridge.graphs import is_link, reachable
from bridge.orders import ModelChoice
from bridge.task_files import is_of_a_task

MODEL_INPUTS: Final = frozenset(
    {
        *("ckpt_name", "unet_name", "vae_name", "clip_name", "clip_name1", "clip_name2", "clip_name3", "lora_name"),
        *("control_net_name", "model_name", "style_model_name", "gligen_name", "upscale_model", "existing_lora"),
    }
)
"""Inputs whose choices are the server's model files."""
ANY_TYPE: Final = "*"
DYNAMIC: Final = "COMFY_"
"""Types of inputs that are not the type of a value, such as `COMFY_AUTOGROW_V3`."""


def graph_problems(
    graph: Mapping[str, Any],
    object_info: Mapping[str, Any],
    result_nodes: Iterable[str],
    *,
    uploads: Iterable[tuple[str, str]] = (),
) -> list[str]:
    """What this server would refuse: one message each, with node and input. `uploads` are filled in later."""
    problems: list[str] = []
    later, results = set(uploads), list(result_nodes)
    for node_id in sorted(reachable(graph, results)):
        node = graph[node_id]
        info = object_info.get(node["class_type"])
        where = f"node {node_id!r} ({node['class_type']})"
        if not isinstance(info, dict):
            problems.append(f"{where}: this server has no such node type; install the custom nodes that provide it")
            continue
        problems += _node_problems(graph, object_info, where, node_id, info, later)
    for node_id in dict.fromkeys(results):
        kind = graph[node_id]["class_type"]
        info = object_info.get(kind)
        if isinstance(info, dict) and info.get("output_node") is False:
            problems.append(f"node {node_id!r} ({kind}): gives no result, because it is no output node")
    return problems


def missing_node_types(
    graph: Mapping[str, Any], object_info: Mapping[str, Any], result_nodes: Iterable[str]
) -> list[str]:
    """The classes that this server does not have."""
    needed = {graph[node]["class_type"] for node in reachable(graph, result_nodes)}
    return sorted(kind for kind in needed if not isinstance(object_info.get(kind), dict))


def _node_problems(
    graph: Mapping[str, Any],
    object_info: Mapping[str, Any],
    where: str,
    node_id: str,
    info: Mapping[str, Any],
    later: set[tuple[str, str]],
) -> list[str]:
    problems = []
    inputs = graph[node_id]["inputs"]
    required, optional = _flat(_inputs_of(info, "required"), _inputs_of(info, "optional"), inputs)
    for name in required:
        if not _is_given(name, inputs):
            problems.append(f"{where}, input {name!r}: missing")
    for name, value in inputs.items():
        spec = required.get(name) or optional.get(name)
        if spec is None or (node_id, name) in later:
            continue
        problem = (
            _link_problem(graph, object_info, spec, value) if is_link(value) else _value_problem(name, spec, value)
        )
        if problem:
            problems.append(f"{where}, input {name!r}: {problem}")
    return problems


def _inputs_of(info: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found = (info.get("input") or {}).get(kind)
    return found if isinstance(found, dict) else {}


def _flat(
    required: Mapping[str, Any], optional: Mapping[str, Any], inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Required and optional inputs, with those that the chosen option of a dynamic input brings along."""
    all_required, all_optional = dict(required), dict(optional)
    for name, spec in {**optional, **required}.items():
        chosen = next((option for option in _options_of(spec) if option.get("key") == inputs.get(name)), None)
        if chosen is None:
            continue
        inner = [
            {
                f"{name}.{inner}": of_inner
                for inner, of_inner in _inputs_of({"input": chosen.get("inputs")}, kind).items()
            }
            for kind in ("required", "optional")
        ]
        more_required, more_optional = _flat(inner[0], inner[1], inputs)
        all_required |= more_required
        all_optional |= more_optional
    return all_required, all_optional


def _options_of(spec: Any) -> list[Mapping[str, Any]]:
    """The options of a dynamic choice; empty for any other input."""
    is_dynamic = isinstance(spec, list) and len(spec) > 1 and str(spec[0]).startswith(DYNAMIC)
    options = spec[1].get("options") if is_dynamic and isinstance(spec[1], Mapping) else None
    return [option for option in options if isinstance(option, Mapping)] if isinstance(options, list) else []


def _is_given(name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether an input, or one that it brings along, has a value."""
    return name in inputs or any(given.startswith(f"{name}.") for given in inputs)


def spec_of(object_info: Mapping[str, Any], class_type: str, name: str) -> Any:
    """How `/object_info` describes one input; None if it does not."""
    info = object_info.get(class_type)
    if not isinstance(info, dict):
        return None
    return _inputs_of(info, "required").get(name) or _inputs_of(info, "optional").get(name)


def choices_of(object_info: Mapping[str, Any], class_type: str, name: str) -> list[str] | None:
    """The choices of one input; None if it has none."""
    return _choices(spec_of(object_info, class_type, name))


def _choices(spec: Any) -> list[str] | None:
    if not isinstance(spec, list) or not spec:
        return None
    if isinstance(spec[0], list):
        return [str(choice) for choice in spec[0]]
    if dynamic := _options_of(spec):
        return [str(option.get("key")) for option in dynamic]
    options = spec[1].get("options") if len(spec) > 1 and isinstance(spec[1], dict) else None
    return [str(choice) for choice in options] if isinstance(options, list) else None


def _value_problem(name: str, spec: Any, value: Any) -> str | None:
    choices = _choices(spec)
    if choices is not None:
        if str(value) in choices:
            return None
        has = ", ".join([choice for choice in choices if not is_of_a_task(choice)][:8]) or "none"
        noun = "model file" if name in MODEL_INPUTS else "choice"
        return f"{value!r} is not a {noun} of this server; it has {has}"
    kind = spec[0] if isinstance(spec, list) and spec else None
    limits = spec[1] if isinstance(spec, list) and len(spec) > 1 and isinstance(spec[1], dict) else {}
    if kind in ("INT", "FLOAT"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"must be a number, not {type(value).__name__}"
        low, high = limits.get("min"), limits.get("max")
        if (low is not None and value < low) or (high is not None and value > high):
            return f"{value} is not between {low} and {high}"
    if kind == "STRING" and not isinstance(value, str):
        return f"must be a text, not {type(value).__name__}"
    if kind == "BOOLEAN" and not isinstance(value, bool):
        return f"must be true or false, not {type(value).__name__}"
    return None


def _link_problem(graph: Mapping[str, Any], object_info: Mapping[str, Any], spec: Any, link: Any) -> str | None:
    source = graph[link[0]]["class_type"]
    outputs = (object_info.get(source) or {}).get("output")
    if not isinstance(outputs, list):
        return None
    if not 0 <= link[1] < len(outputs):
        return f"node {link[0]!r} ({source}) has no output {link[1]}"
    gives, takes = outputs[link[1]], spec[0] if isinstance(spec, list) and spec else ANY_TYPE
    if not isinstance(gives, str) or not isinstance(takes, str):
        return None
    if ANY_TYPE in (gives, takes) or set(gives.split(",")) & set(takes.split(",")) or DYNAMIC in (gives[:6], takes[:6]):
        return None
    return f"takes {takes}, but node {link[0]!r} ({source}) gives {gives}"


def relink(graph: dict[str, Any], object_info: Mapping[str, Any]) -> None:
    """Correct each link to the output whose type its input takes: nodes reordered their outputs between versions."""
    for node in graph.values():
        info = object_info.get(node["class_type"])
        if not isinstance(info, dict):
            continue
        specs = _inputs_of(info, "optional") | _inputs_of(info, "required")
        for name, value in node["inputs"].items():
            if not is_link(value) or name not in specs or not isinstance(specs[name], list):
                continue
            outputs = (object_info.get(graph[value[0]]["class_type"]) or {}).get("output")
            takes = specs[name][0]
            if isinstance(outputs, list) and outputs.count(takes) == 1:
                node["inputs"][name] = [value[0], outputs.index(takes)]


class NoModel(Exception):
    """No installed model fits; the text lists the patterns and the installed models."""


def chosen_models(
    graph: Mapping[str, Any], object_info: Mapping[str, Any], choices: Iterable[ModelChoice], needed: Iterable[str]
) -> list[tuple[ModelChoice, str]]:
    """The best installed model for each choice of a needed node. Raises NoModel."""
    chosen = []
    needed_nodes = reachable(graph, needed)
    for choice in choices:
        if choice.node not in needed_nodes:
            continue
        offered = choices_of(object_info, graph[choice.node]["class_type"], choice.input) or []
        # What a tenant trained is among the server's models, and no other task's to use.
        installed = [name for name in offered if not is_of_a_task(name)]
        found = best_fit(installed, choice.prefer)
        if found is None:
            has = ", ".join(installed[:8]) or "none at all"
            raise NoModel(
                f"node {choice.node!r}, input {choice.input!r}: no installed model fits {', '.join(choice.prefer)}; "
                f"this server has {has}"
            )
        chosen.append((choice, found))
    return chosen


def best_fit(installed: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first name that fits the first fitting pattern, ignoring case; None if nothing fits."""
    names = list(installed)
    for pattern in patterns:
        for name in names:
            if fnmatch.fnmatchcase(name.lower(), pattern.lower()):
                return name
    return None
