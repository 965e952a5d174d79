"""Validates a graph before it is queued: `execution.validate_prompt` and `validate_inputs` of ComfyUI 0.8.0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
NodeErrors = dict[str, Json]


@dataclass
class Verdict:
    """`error` is set if nothing can run. `node_errors` may have bad nodes although `outputs` can run."""

    outputs: list[str] = field(default_factory=list)
    error: Json | None = None
    node_errors: NodeErrors = field(default_factory=dict)


def validate(
    graph: Json,
    definition_of: Callable[[str], Json | None],
    has_file: Callable[[str], bool],
    only: list[str] | None = None,
) -> Verdict:
    """`has_file`: whether `LoadImage` would find this input file. `only`: `partial_execution_targets`."""
    outputs = []
    for node_id, node in graph.items():
        if not isinstance(node, dict) or "class_type" not in node:
            return Verdict(error=_invalid("a node is missing the class_type property.", node_id))
        definition = definition_of(node["class_type"])
        if definition is None:
            return Verdict(error=_invalid(f"node {node['class_type']} does not exist.", node_id))
        if definition["output_node"] and (only is None or node_id in only):
            outputs.append(node_id)
    if not outputs:
        return Verdict(error=_error("prompt_no_outputs", "Prompt has no outputs", ""))
    return _Validation(graph, definition_of, has_file).verdict(outputs)


def _error(kind: str, message: str, details: str, **extra: Any) -> Json:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def _invalid(reason: str, node_id: str) -> Json:
    return _error("invalid_prompt", f"Cannot execute because {reason}", f"Node ID '#{node_id}'")


class _Validation:
    """One pass over a graph. Each node is checked once."""

    def __init__(
        self, graph: Json, definition_of: Callable[[str], Json | None], has_file: Callable[[str], bool]
    ) -> None:
        self._graph = graph
        self._definition_of = definition_of
        self._has_file = has_file
        self._seen: dict[str, tuple[bool, list[Json]]] = {}

    def verdict(self, outputs: list[str]) -> Verdict:
        verdict = Verdict()
        failed: list[Json] = []
        for output in outputs:
            if self._check_node(output)[0]:
                verdict.outputs.append(output)
                continue
            failed += self._seen[output][1]
            for node_id, (is_valid, errors) in self._seen.items():
                if is_valid or not errors:
                    continue
                entry = verdict.node_errors.setdefault(
                    node_id,
                    {"errors": errors, "dependent_outputs": [], "class_type": self._graph[node_id]["class_type"]},
                )
                entry["dependent_outputs"].append(output)
        if not verdict.outputs:
            details = "\n".join(f"{error['message']}: {error['details']}" for error in failed)
            verdict.error = _error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
        return verdict

    def _check_node(self, node_id: str) -> tuple[bool, list[Json]]:
        if node_id in self._seen:
            return self._seen[node_id]
        try:
            found = self._inputs_of(node_id)
        except (KeyError, IndexError, TypeError) as problem:
            kind = {"exception_type": type(problem).__name__, "traceback": []}
            found = (
                False,
                [_error("exception_during_validation", "Exception when validating node", str(problem), **kind)],
            )
        self._seen[node_id] = found
        return found

    def _inputs_of(self, node_id: str) -> tuple[bool, list[Json]]:
        node = self._graph[node_id]
        inputs, definition = node["inputs"], self._definition_of(node["class_type"])
        assert definition is not None
        errors: list[Json] = []
        is_valid = True
        for group in ("required", "optional"):
            for name, given in _with_dynamic(definition["input"].get(group, {}), inputs).items():
                kind, config = given[0], given[1] if len(given) > 1 else {}
                if name not in inputs:
                    if group == "required":
                        errors.append(
                            _error("required_input_missing", "Required input is missing", name, input_name=name)
                        )
                    continue
                value = inputs[name]
                if isinstance(value, list):
                    wrong, upstream_valid = self._link(name, kind, config, value)
                    is_valid = is_valid and upstream_valid
                elif node["class_type"] in {"LoadImage", "LoadImageMask"} and name == "image":
                    wrong = None if self._has_file(str(value)) else _no_file(name, value)
                else:
                    wrong = _value(inputs, name, kind, config)
                errors += [wrong] if wrong else []
        return (is_valid and not errors, errors)

    def _link(self, name: str, kind: Any, config: Json, link: list[Any]) -> tuple[Json | None, bool]:
        """The error of a link, and whether everything upstream is valid."""
        if len(link) != 2:
            known = {"input_name": name, "input_config": [kind, config], "received_value": link}
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _error("bad_linked_input", message, name, **known), True
        above = self._definition_of(self._graph[link[0]]["class_type"])
        assert above is not None
        received = above["output"][link[1]]
        if not _fits(received, kind):
            details = f"{name}, received_type({received}) mismatch input_type({kind})"
            return (
                _error(
                    "return_type_mismatch",
                    "Return type mismatch between linked nodes",
                    details,
                    input_name=name,
                    input_config=[kind, config],
                    received_type=received,
                    linked_node=link,
                ),
                True,
            )
        return None, self._check_node(link[0])[0]


def _with_dynamic(specs: Json, inputs: Json) -> Json:
    """With the inputs that a dynamic one brings along, and without the outer one of a group that grows."""
    found: Json = {}
    for name, given in specs.items():
        if given[0] == "COMFY_DYNAMICCOMBO_V3":
            options = given[1]["options"]
            found[name] = ["COMBO", {"options": [option["key"] for option in options]}]
            chosen = next((option for option in options if option["key"] == inputs.get(name)), None)
            inner = chosen["inputs"]["required"] if chosen else {}
            found |= {f"{name}.{inner_name}": spec for inner_name, spec in inner.items()}
        elif given[0] == "COMFY_AUTOGROW_V3":
            found |= {f"{name}.image{number}": ["IMAGE", {}] for number in range(given[1]["template"]["min"])}
        else:
            found[name] = given
    return found


def _fits(received: Any, wanted: Any) -> bool:
    if received == wanted or "*" in (received, wanted):
        return True
    if any(isinstance(kind, str) and kind.startswith("COMFY_MATCHTYPE") for kind in (received, wanted)):
        return True
    if isinstance(received, list) and wanted == "COMBO":
        return True
    if not isinstance(received, str) or not isinstance(wanted, str):
        return False
    return bool({part.strip() for part in received.split(",")} & {part.strip() for part in wanted.split(",")})


def _no_file(name: str, value: Any) -> Json:
    details = f"{name} - Invalid image file: {value}"
    return _error("custom_validation_failed", "Custom validation failed for node", details, input_name=name)


def _value(inputs: Json, name: str, kind: Any, config: Json) -> Json | None:
    """The error of a plain value. The value is converted in place, as in ComfyUI."""
    known = {"input_name": name, "input_config": [kind, config], "received_value": inputs[name]}
    convert = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(kind if isinstance(kind, str) else "")
    if convert is not None:
        try:
            inputs[name] = convert(inputs[name])
        except (TypeError, ValueError) as problem:
            message = f"Failed to convert an input value to a {kind} value"
            details = f"{name}, {inputs[name]}, {problem}"
            return _error("invalid_input_type", message, details, **known, exception_message=str(problem))
    value = inputs[name]
    if kind in ("INT", "FLOAT"):
        if "min" in config and value < config["min"]:
            message = f"Value {value} smaller than min of {config['min']}"
            return _error("value_smaller_than_min", message, name, **known)
        if "max" in config and value > config["max"]:
            return _error("value_bigger_than_max", f"Value {value} bigger than max of {config['max']}", name, **known)
    choices = kind if isinstance(kind, list) else config.get("options", []) if kind == "COMBO" else None
    if choices is not None and value not in choices:
        is_long = len(choices) > 20
        shown = f"(list of length {len(choices)})" if is_long else str(choices)
        known["input_config"] = None if is_long else [kind, config]
        return _error("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {shown}", **known)
    return None
