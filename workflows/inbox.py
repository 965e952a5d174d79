"""Messages that a run was sent and has not read yet, bounded by count and by bytes.

Nobody reads it while a call is out. Then a flood must not make the run too large to go on; what is left out is covered
by a poll.
"""

from __future__ import annotations

from temporalio import workflow

from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.size_budget import MAX_INBOX, MAX_INBOX_BYTES
from workflows.measured import Measured


class Inbox:
    """The newest message always stays; what makes room for it is the oldest that says least."""

    def __init__(self, state: WatchState) -> None:
        self._messages = Measured(state.inbox)

    def put(self, news: JobUpdate) -> None:
        messages = self._messages
        if len(messages.items) >= MAX_INBOX:
            messages.remove(next((i for i, message in enumerate(messages.items) if not message.is_final), 0))
        messages.append(news)
        while len(messages.items) > 1 and self._is_too_large():
            messages.remove(self._least())

    def take_all(self) -> list[JobUpdate]:
        """The messages in the order in which they came; the inbox is empty afterwards."""
        taken = list(self._messages.items)
        self._messages.remove_first(len(taken))
        return taken

    def _is_too_large(self) -> bool:
        # A patch, asked where it matters: what is left out decides which stages are told.
        return self._messages.total_bytes > MAX_INBOX_BYTES and workflow.patched("inbox-bounded-by-bytes")

    def _least(self) -> int:
        """The oldest tick that a later message of its job follows; else tick, end that is told again, message."""
        messages = self._messages.items
        last = len(messages) - 1
        newest_of = {message.job_id: i for i, message in enumerate(messages)}
        followed = [i for i in range(last) if newest_of[messages[i].job_id] > i]
        ticks = [i for i in range(last) if not messages[i].is_final]
        followed_ticks = [i for i in followed if not messages[i].is_final]
        return (followed_ticks or ticks or followed or [0])[0]
