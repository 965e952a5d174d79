"""Passes a speed on: to the simulators, and to the limits that assume the real pace."""

from __future__ import annotations

from typing import Final

DEMO_SPEED: Final = 100.0
"""Contract seconds in one real second: an accelerated image in 2 s, a standard one in 5 s, a training in 12 to 27 s."""
REAL_SPEED: Final = 1.0
SLOWEST_DEADLINE_SPEED: Final = 10.0


def paced_settings(speed: float) -> dict[str, str]:
    """Settings (without prefix) for a speed.

    A deadline is a multiple of what ComfyUI announces, and that shrinks with the speed: at 100 an image has 2 s, and
    on a busy machine a hiccup can take three times that. Silence, renewals and retries shrink as well; otherwise a lost
    callback would cost more time than the work.
    """
    if speed <= SLOWEST_DEADLINE_SPEED:
        return {}
    return {
        "DEADLINE_FACTOR": str(3 * speed / SLOWEST_DEADLINE_SPEED),
        "IMAGE_POLL_AFTER_SECONDS": "3",
        "IMAGE_POLL_AT_MOST_SECONDS": "12",
        "TRAINING_POLL_AFTER_SECONDS": "6",
        "TRAINING_POLL_AT_MOST_SECONDS": "24",
        "RETRY_AFTER_SECONDS": "3,6,12",
        "RECONCILE_EVERY_SECONDS": "15",
        "RECONCILE_PAUSE_SECONDS": "5",
    }
