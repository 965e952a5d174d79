"""What a request may give for an extra of its template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.manifest import AspectRatioExtra, BooleanExtra, ChoiceExtra, Extra, FileExtra, NumberExtra, TextExtra
from bridge.task_files import problem_of
from comfyui_temporal.contracts.size_budget import MAX_ADDRESS_BYTES


def problem_of_extra(extra: Extra, value: Any) -> str | None:
    """What is wrong with the value of an extra, or None."""
    if isinstance(extra, BooleanExtra):
        return None if isinstance(value, bool) else "must be true or false"
    if isinstance(extra, NumberExtra):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and extra.minimum <= value <= extra.maximum
        if not fits or (extra.type == "integer" and not isinstance(value, int)):
            kind = "a whole number" if extra.type == "integer" else "a number"
            return f"must be {kind} from {extra.minimum:g} to {extra.maximum:g}"
        return None
    if isinstance(extra, ChoiceExtra | AspectRatioExtra):
        return None if value in extra.choices else f"must be one of {', '.join(extra.choices)}"
    if isinstance(extra, FileExtra):
        is_address = isinstance(value, str) and 0 < len(value) <= MAX_ADDRESS_BYTES
        return None if is_address else f"must be the address of a file of kind {extra.type}, or upload:UPLOAD_ID"
    return None if _is_short(extra, value) else f"must be a text of at most {extra.max_length} characters"


def _is_short(extra: TextExtra, value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= extra.max_length


def foreign_files_in(values: Mapping[str, Any], where: str = "") -> list[str]:
    """A sentence for each text that names a file of a task on a server: no request may."""
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return [f"{where}{name}: {problem}" for name, text in texts.items() if (problem := problem_of(text))]
