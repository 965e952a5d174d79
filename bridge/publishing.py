"""Publishes a run's states. Each is a callback, which Temporal retries until it is accepted.

Numbers (`sequence`) rise with every change. A run on a server reserves `TICKS` of them for its whole percents, which
the GPU worker publishes without the workflow.
"""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import FailureError

from bridge.calls import SEND_CALLBACK, TICKS
from bridge.orders import Callback

PUBLISHED_WITHIN: Final = timedelta(hours=25)
"""A day of repeats (contract §2), and time for the last one."""
_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(hours=1))


class Publishing:
    """One run's callbacks. `run_id`: the job's or training's id."""

    def __init__(self, run_id: str, url: str, priority: Priority) -> None:
        self._run_id = run_id
        self._url = url
        self._priority = priority
        self._reserved = 0
        self._sending: set[asyncio.Future[Any]] = set()
        self.sequence = 0
        self.tick_base: int | None = None

    def number(self) -> int:
        """The number of a change that is not published."""
        self.sequence = max(self.sequence, self._reserved) + 1
        return self.sequence

    def publish(self, fields: dict[str, Any], what: str) -> int:
        """Number a change and publish it. Returns the number."""
        sequence = self.number()
        body = {**fields, "sequence": sequence, "occurred_at": workflow.now().isoformat(timespec="milliseconds")}
        callback = Callback(url=self._url, webhook_id=f"msg_{self._run_id}_{sequence}", body=json.dumps(body))
        sending = asyncio.ensure_future(self._sent(callback, what))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        return sequence

    def run_begins(self) -> int:
        """Reserve numbers for a run's ticks. Returns the number that they count from."""
        self.tick_base = self.sequence
        self._reserved = self.sequence + TICKS
        return self.sequence

    def run_ended(self) -> None:
        """End the reservation. Later numbers are above every tick that the run may have published."""
        if self.tick_base is not None:
            self.tick_base = None
            self.number()

    async def all_published(self) -> None:
        await workflow.wait_condition(lambda: not self._sending)

    async def _sent(self, callback: Callback, what: str) -> None:
        try:
            await workflow.execute_activity(
                SEND_CALLBACK,
                callback,
                schedule_to_close_timeout=PUBLISHED_WITHIN,
                start_to_close_timeout=timedelta(seconds=20),
                retry_policy=_RETRY,
                priority=self._priority,
                summary=f"publish {what}",
            )
        except FailureError as error:
            # After a day without an answer the caller must poll.
            workflow.logger.warning("callback given up: %s", error)
