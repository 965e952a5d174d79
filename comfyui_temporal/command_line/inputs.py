"""Command line arguments → a task's input. All mistakes are reported together, by field, before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.contracts.size_budget import MAX_FILE_LIST_BYTES, MAX_START_BYTES, json_bytes
from comfyui_temporal.contracts.tasks import TrainingTask

Model = TypeVar("Model", bound=BaseModel)
MAX_FILE_BYTES: Final = MAX_FILE_LIST_BYTES
_SHOWN_CHARACTERS: Final = 60
_ID_PATTERN: Final = "{1,64}$"


def read_model(model: type[Model], values: Mapping[str, Any], hints: Mapping[str, str] | None = None) -> Model:
    """The values as a model. Raises BadInput with one line for each field; `hints`: what to do where one is missing."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fields: dict[str, str] = {}
        for issue in error.errors(include_url=False):
            name = ".".join(str(part) for part in issue["loc"]) or "input"
            hint = (hints or {}).get(name) if issue["type"] == "missing" else None
            fields.setdefault(name, f"is missing: {hint}" if hint else _explained(issue))
        noun = "field is" if len(fields) == 1 else "fields are"
        raise BadInput(f"Nothing was done: {len(fields)} {noun} wrong.", fields) from None


def _explained(issue: ErrorDetails) -> str:
    """What is allowed, and the given value if it is short. A prompt is never repeated."""
    match issue["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "is not a field of this task"
        case "string_pattern_mismatch" if _ID_PATTERN in issue["msg"]:
            allowed = "must be 1 to 64 of the characters A-Z a-z 0-9 _ -"
        case _:
            allowed = re.sub(r"^Value error, ", "", issue["msg"])
            allowed = re.sub(r"^Input should be", "must be", allowed)
            allowed = re.sub(r"^(\w+) should", lambda found: f"{found[1].lower()} should", allowed)
    given = issue["input"]
    is_short = isinstance(given, str | int | float | bool) and len(str(given)) <= _SHOWN_CHARACTERS
    return f"{allowed} (given: {given!r})" if is_short and issue["loc"] != ("prompt",) else allowed


def read_file(path: str | None) -> dict[str, Any]:
    """The JSON object in a file, `-` for standard input; empty without a path. Raises BadInput."""
    if path is None:
        return {}
    try:
        with sys.stdin.buffer if path == "-" else Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise BadInput(f"{path} is larger than {MAX_FILE_BYTES} bytes.")
        value = json.loads(raw)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must contain one JSON object, the task's input (docs/schemas shows its fields).")
    return value


def given(**values: Any) -> dict[str, Any]:
    """Only the given values. Others keep the file's value or the model's default."""
    return {name: value for name, value in values.items() if value is not None}


def check_list_fits(task: TrainingTask) -> None:
    """Raises BadInput if the list of files makes the input too large for Temporal."""
    size = json_bytes(task)
    if size > MAX_START_BYTES:
        raise BadInput(
            f"Nothing was done: the input has {size} bytes, and Temporal accepts {MAX_START_BYTES}. Store the list of "
            "files as a JSON array in object storage, under the tenant's prefix, and give its address with --manifest."
        )


def manifest(address: str, sha256: str | None) -> dict[str, str]:
    """A caller's own list of files. A local file is hashed; for an address the checksum must be given."""
    if "://" in address:
        return {"uri": address, **given(sha256=sha256)}
    try:
        raw = Path(address).read_bytes()
    except OSError as error:
        raise BadInput(f"{address} cannot be read: {error.strerror}.") from None
    return {"uri": Path(address).resolve().as_uri(), "sha256": sha256 or hashlib.sha256(raw).hexdigest()}


def named_values(field: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs. A value is parsed as JSON if possible; a name alone is true. Raises BadInput."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not name:
            raise BadInput("Nothing was done: 1 field is wrong.", {field: f"must be name or name=value: {pair!r}"})
        values[name] = _json_or_text(text) if separator else True
    return values


def named_files(pairs: Sequence[str]) -> dict[str, str]:
    """`name=path` pairs. Raises BadInput."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not name or not path:
            raise BadInput("Nothing was done: 1 field is wrong.", {"file": f"must be name=path: {pair!r}"})
        found[name] = path
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def controls(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Control images, each `URL` or `URL,strength`; a path may stand for the URL.

    A comma without a number after it belongs to the URL.
    """
    found: list[dict[str, Any]] = []
    for text in texts:
        url, _, strength = text.rpartition(",")
        try:
            found.append({"image_url": url, "strength": float(strength)} if url else {"image_url": text})
        except ValueError:
            found.append({"image_url": text})
    return found


def loras(texts: Sequence[str]) -> list[dict[str, Any]]:
    """LoRAs, each `TASK_ID[:STRENGTH]` or `https://…,SHA256[,STRENGTH]`. Raises BadInput."""
    found: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        try:
            found.append(_lora_at_address(text) if "://" in text else _trained_lora(text))
        except ValueError:
            field = {f"loras.{number}": f"must be TASK_ID[:STRENGTH] or URL,SHA256[,STRENGTH]: {text!r}"}
            raise BadInput("Nothing was done: 1 field is wrong.", field) from None
    return found


def _trained_lora(text: str) -> dict[str, Any]:
    model_id, separator, strength = text.partition(":")
    return {"model_id": model_id, **({"strength": float(strength)} if separator else {})}


def _lora_at_address(text: str) -> dict[str, Any]:
    # An address may contain commas: the checksum is the last part that is one.
    matched = re.fullmatch(r"(.+),([0-9a-f]{64})(?:,([^,]+))?", text)
    if matched is None:
        raise ValueError("no checksum")
    url, sha256, strength = matched.groups()
    return {"model_url": url, "sha256": sha256, **({} if strength is None else {"strength": float(strength)})}


def new_task_id(kind: str) -> str:
    """A new task id: `image-3f9c…`."""
    return f"{kind}-{secrets.token_hex(6)}"


def dataset_address(text: str) -> str:
    """A dataset as an address: a local path becomes `file://…`, an address is unchanged."""
    return text if "://" in text else Path(text).resolve().as_uri() + "/"


def dataset_name(address: str) -> str:
    """A `dataset_id` made from the last part of the dataset's address."""
    last = address.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", last).strip("-")[:64] or "dataset"


def one_of(name: str, value: str | None, allowed: Iterable[str]) -> None:
    """Raises BadInput for a value that is not one of these."""
    if value is not None and value not in set(allowed):
        raise BadInput("Nothing was listed.", {name: f"must be one of {', '.join(allowed)} (given: {value!r})"})


def checked(annotation: Any, name: str, value: object) -> Any:
    """One value, validated as a type of the contract. Raises BadInput."""
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise BadInput("Nothing was done: 1 field is wrong.", {name: _explained(error.errors()[0])}) from None
