"""Limits of a task whose mechanisms are tested one by one."""

from __future__ import annotations

from typing import Any

from comfyui_temporal.contracts.policy import Policy
from workflows.task_limits import TaskLimits


def limits_of(**policy: Any) -> TaskLimits:
    """Limits whose policy says `policy`, and else what an image's says by default."""
    defaults: dict[str, Any] = {
        "callback_url": "http://gateway.test/callbacks/comfyui/t1",
        "poll_after_seconds": 30.0,
        "poll_at_most_seconds": 120.0,
        "deadline_factor": 3.0,
        "cap_minutes": 1_440.0,
        "queue_sla_minutes": 8.0,
    }
    return TaskLimits(known=Policy(**defaults | policy))
