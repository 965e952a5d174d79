"""The limits of one task: its policy, lowered by the caller's options."""

from __future__ import annotations

from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.tasks import ImageOptions


class TaskLimits:
    """Every mechanism reads its limits here. The claim brings the policy; a continued run has it from its start."""

    def __init__(self, options: ImageOptions | None = None, known: Policy | None = None) -> None:
        self._options = options or ImageOptions()
        self._policy = known

    @property
    def is_known(self) -> bool:
        return self._policy is not None

    @property
    def policy(self) -> Policy:
        """The policy. No mechanism needs it before the claim has answered."""
        assert self._policy is not None
        return self._policy

    def claimed(self, policy: Policy) -> None:
        """Take the policy that the claim answered with, once."""
        assert self._policy is None
        self._policy = policy

    # An option may lower what the policy sets, and never raise it (contract §8)

    @property
    def deadline_factor(self) -> float:
        return _lowered(self._options.deadline_factor, self.policy.deadline_factor)

    @property
    def poll_after_seconds(self) -> float:
        return _lowered(self._options.poll_after_seconds, self.policy.poll_after_seconds)

    @property
    def confirm_within_seconds(self) -> float:
        asked = getattr(self._options, "confirm_within_seconds", None)
        return _lowered(asked, self.policy.confirm_within_seconds)


def _lowered(option: float | None, limit: float) -> float:
    return limit if option is None else min(option, limit)
