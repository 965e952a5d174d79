"""A blank prompt is refused at every door. A run that an earlier release took with one is read to its end."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from comfyui_temporal.contracts.continuation import ImageRun
from comfyui_temporal.contracts.handed_on import read_tolerantly

BLANK = {"task_id": "t", "tenant_id": "a", "user_id": "u", "template_id": "upscale", "prompt": " "}


def test_a_blank_prompt_is_refused_from_a_caller_and_read_from_a_run_of_ours() -> None:
    with pytest.raises(ValidationError, match="must not be blank"):
        ImageRun.model_validate(BLANK)
    assert read_tolerantly(ImageRun, json.dumps(BLANK).encode()).prompt == " "
