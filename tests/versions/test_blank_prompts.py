"""Blank prompts and names with NUL are refused at every door. A run that an earlier release took is read to its end."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from comfyui_temporal.contracts.continuation import ImageRun
from comfyui_temporal.contracts.handed_on import read_tolerantly
from comfyui_temporal.contracts.tasks import Hyperparameters

BLANK = {"task_id": "t", "tenant_id": "a", "user_id": "u", "template_id": "upscale", "prompt": " "}


def test_a_blank_prompt_is_refused_from_a_caller_and_read_from_a_run_of_ours() -> None:
    with pytest.raises(ValidationError, match="must not be blank"):
        ImageRun.model_validate(BLANK)
    assert read_tolerantly(ImageRun, json.dumps(BLANK).encode()).prompt == " "


def test_a_name_with_nul_is_refused_from_a_caller_and_read_from_a_run_of_ours() -> None:
    given = {"epochs": 1, "batch_size": 1, "learning_rate": 0.1, "a\0b": 1}
    with pytest.raises(ValidationError, match="must not contain NUL"):
        Hyperparameters.model_validate(given)
    assert read_tolerantly(Hyperparameters, json.dumps(given).encode()).model_dump() == given
