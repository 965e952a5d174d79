"""The one place that decides whether a cancel stops the task (decision 8)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Literal, TypeVar

from temporalio import workflow

from comfyui_temporal.contracts.tasks import CancelTaskOutcome
from workflows.failures import TaskStopped

Result = TypeVar("Result")
ENDS_AS_ITS_TASK: Final = "run-ends-as-its-task-whatever-stopped-it"


class Stop:
    """A request to end the task early: the update `cancel_task` or a Temporal cancellation.

    The flow runs in an asyncio task of its own that no cancellation reaches. So calls, commits, undos and event writes
    need no shields (pitfalls 9 to 12, 16). The request takes effect where the flow waits, and only there.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.requested = False
        self.by_temporal = False
        self.outcome: Literal["accepted", "too_late"] | None = None
        self._is_overruled = False
        self._decided = asyncio.Event()

    def ask(self, reason: str, *, by_temporal: bool = False) -> None:
        """Record the first request; how the run ends depends on it."""
        if not self.requested and self.outcome is None:
            self.requested, self.reason, self.by_temporal = True, reason, by_temporal

    def raise_if_requested(self) -> None:
        """Raise TaskStopped if a stop was requested. Called where the flow waits, after its inbox was read."""
        if self.requested:
            self._decide("accepted")
            raise TaskStopped(self.reason)

    def close(self) -> None:
        """Make every later cancel `too_late`: the job has delivered, or the task ends for another reason."""
        if self.outcome is None:
            self._decide("too_late")

    def overrule(self) -> None:
        """Complete the task nevertheless: another caller has committed its hold, or an earlier life completed it."""
        self._is_overruled = True

    def _decide(self, outcome: Literal["accepted", "too_late"]) -> None:
        self.outcome = outcome
        self._decided.set()

    async def cancel_task(self, reason: str) -> CancelTaskOutcome:
        """The update. It answers once the outcome is decided.

        It waits for an asyncio.Event, not a wait condition. Conditions are evaluated in the order in which they were
        created, and an update that arrived while a local try outlived its workflow task is replayed earlier than it
        was handled (seen with temporalio 1.35).
        """
        self.ask(reason)
        await self._decided.wait()
        assert self.outcome is not None
        return CancelTaskOutcome(outcome=self.outcome)

    async def uninterrupted(self, flow: Coroutine[Any, Any, Result], writer: Coroutine[Any, Any, None]) -> Result:
        """Run the flow and, in parallel, the event writer; a Temporal cancellation becomes a request.

        Raises CancelledError at the end if a Temporal cancellation stopped the flow and was not overruled: only then
        may a run end Canceled (pitfall 17). A bug in either one is raised here (pitfall 23).
        """
        running = asyncio.create_task(flow)
        writing = asyncio.create_task(writer)
        while not running.done():
            try:
                await workflow.wait([running, writing], return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.ask(workflow.cancellation_reason() or "", by_temporal=True)
            if writing.done() and not running.done():
                writing.result()
        result = running.result()
        writing.cancel()
        stopped_it = self.by_temporal and self.outcome == "accepted"
        if stopped_it and not (self._is_overruled and workflow.patched(ENDS_AS_ITS_TASK)):
            raise asyncio.CancelledError(self.reason)
        return result
