"""The calls that `TemporalTasks` and `HttpTasks` share, for code that takes either."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Final, Literal, Protocol, Self

from comfyui_temporal.client.models import StartedTask, TaskDetails, TaskOutcome, TaskSummary, TaskUpdate
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import AnyTask
from comfyui_temporal.contracts.start_answer import WaitFor
from comfyui_temporal.contracts.tasks import TaskStatus

WAIT_SECONDS: Final = 30.0

CancelAnswer = Literal["accepted", "too_late"]
"""`accepted`: the task ends cancelled. `too_late`: it was delivered or ended first."""


class Tasks(Protocol):
    """Every method raises TaskError (comfyui_temporal.client.errors), over either connection."""

    async def start(
        self, task: AnyTask, *, wait_for: WaitFor | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> StartedTask:
        """Start a task. The same input with the same task id is one task. Raises TaskExists for another input.

        `wait_for="held"`: return once credits are held, a price is to be confirmed, the task has ended, or after
        `wait_seconds` (60 at most). Then it also raises CreditsRefused, and InvalidInput, of a task that ended so.
        """

    def follow(self, task_id: str, *, cursor: str | None = None) -> AsyncGenerator[TaskUpdate, None]:
        """Yield each change until the task ends. The last update has its final status. Raises UnknownTask."""

    async def wait(self, task_id: str) -> TaskOutcome:
        """Wait until the task ends. Raises UnknownTask."""

    async def show(self, task_id: str) -> TaskDetails:
        """The task's current state. Raises UnknownTask."""

    def list(
        self, *, status: TaskStatus | None = None, scene: Scene | None = None, limit: int = 20
    ) -> AsyncGenerator[TaskSummary, None]:
        """Tasks, newest first; at most `limit`."""

    async def confirm(self, task_id: str, max_credits: int) -> int:
        """Confirm a training's price up to `max_credits` points, which can only be raised. Returns the limit in force.

        Raises UnknownTask, TaskOver; InvalidInput if the task rejects the value.
        """

    async def cancel(self, task_id: str, reason: str = "") -> CancelAnswer:
        """Cancel a task; its credits are given back. Safe to repeat. Raises UnknownTask."""

    async def aclose(self) -> None:
        """Close what this object has opened itself."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
