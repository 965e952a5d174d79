"""Messages that have arrived and are not read yet, bounded by count and by bytes.

They are not read while a call is in flight. A flood must not make the run too large to continue; a poll replaces what
is dropped.
"""

from __future__ import annotations

from temporalio import workflow

from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.size_budget import MAX_INBOX, MAX_INBOX_BYTES
from workflows.measured import Measured


class Inbox:
    """Keeps the newest message. What is dropped for it is the oldest message with the least information."""

    def __init__(self, state: WatchState) -> None:
        self._messages = Measured(state.inbox)

    def put(self, update: JobUpdate) -> None:
        messages = self._messages
        if len(messages.items) >= MAX_INBOX:
            messages.remove(next((i for i, message in enumerate(messages.items) if not message.is_final), 0))
        messages.append(update)
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
        """The oldest tick with a later message of its job; else any tick, a repeated end, any message."""
        messages = self._messages.items
        last = len(messages) - 1
        newest_of = {message.job_id: i for i, message in enumerate(messages)}
        followed = [i for i in range(last) if newest_of[messages[i].job_id] > i]
        ticks = [i for i in range(last) if not messages[i].is_final]
        followed_ticks = [i for i in followed if not messages[i].is_final]
        return (followed_ticks or ticks or followed or [0])[0]
