"""Messages that have arrived and are not read yet, bounded by count and by bytes.

They are not read while a call is in flight. A flood must not make the run too large to continue. Figures are dropped
first: a later message has newer ones. A stage, a checkpoint and an end that no later message shows are kept.
"""

from __future__ import annotations

from typing import Final

from temporalio import workflow

from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.size_budget import MAX_INBOX, MAX_INBOX_BYTES
from workflows.measured import Measured

KEEPS_STAGES: Final = "inbox-keeps-stages"
"""What is dropped decides which stages are published: older histories replay without this order."""


class Inbox:
    """Keeps the newest message. What is dropped for it is the oldest message with the least information."""

    def __init__(self, state: WatchState) -> None:
        self._messages = Measured(state.inbox)

    def put(self, update: JobUpdate) -> None:
        messages = self._messages
        if len(messages.items) >= MAX_INBOX and not workflow.patched(KEEPS_STAGES):
            messages.remove(next((i for i, message in enumerate(messages.items) if not message.is_final), 0))
        messages.append(update)
        while len(messages.items) > MAX_INBOX:
            messages.remove(self._least())
        while len(messages.items) > 1 and self._is_too_large():
            messages.remove(self._least())

    def take_all(self) -> list[JobUpdate]:
        """The messages in order of arrival; the inbox is empty afterwards."""
        taken = list(self._messages.items)
        self._messages.remove_first(len(taken))
        return taken

    def _is_too_large(self) -> bool:
        # What is dropped decides which stages are published, so older histories replay without this limit.
        return self._messages.total_bytes > MAX_INBOX_BYTES and workflow.patched("inbox-bounded-by-bytes")

    def _least(self) -> int:
        """The oldest tick that a later message repeats but for its figures; else one whose stage a later one shows.

        Without those: one with a later one of its job, any tick, a repeated end, any message, never the newest.
        """
        messages = self._messages.items
        last = len(messages) - 1
        ticks = [i for i in range(last) if not messages[i].is_final]
        if workflow.patched(KEEPS_STAGES):
            for shown in (_but_for_figures, _stage):
                newest_like = {shown(message): i for i, message in enumerate(messages)}
                repeated = next((i for i in ticks if newest_like[shown(messages[i])] > i), None)
                if repeated is not None:
                    return repeated
        newest_of = {message.job_id: i for i, message in enumerate(messages)}
        followed = [i for i in range(last) if newest_of[messages[i].job_id] > i]
        followed_ticks = [i for i in followed if not messages[i].is_final]
        return (followed_ticks or ticks or followed or [0])[0]


def _stage(update: JobUpdate) -> tuple[str, ...]:
    return update.job_id, update.status.value, update.stage or ""


def _but_for_figures(update: JobUpdate) -> tuple[str, ...]:
    """What a run publishes of a message besides its figures."""
    return *_stage(update), update.checkpoint.uri if update.checkpoint else ""
