"""A task's progress as the gateway's event stream tells it, read as any client would."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import httpx2
from pydantic import ValidationError

from comfyui_temporal.contracts.tasks import EventType, TaskEvent, TrainingProgress

CONNECT_SECONDS: Final = 2.0
SILENCE_SECONDS: Final = 40.0
"""Heartbeats come every 15 s: a connection that says nothing for so long is dead."""
NOT_NOW: Final = (404, 408, 429)
"""404: a run that has just been started has not claimed its id yet."""
ENDS: Final = (EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED)


class StreamRefused(Exception):
    """This stream will not be opened: there is no right to it."""


class StreamCut(Exception):
    """The stream is not to be had now; it can be taken up again where it was."""


@dataclass(frozen=True)
class GatewayAccess:
    """Where the gateway is, and with which token each tenant's tasks are followed there."""

    url: str
    token: str | None = field(default=None, repr=False)
    """For every tenant; else that of `tokens`."""
    tokens: dict[str, str] = field(default_factory=dict, repr=False)

    def stream_of(self, task_id: str, tenant_id: str | None) -> GatewayStream | None:
        """The task's stream; None where there is no token for its tenant."""
        token = self.token or self.tokens.get(tenant_id or "")
        return GatewayStream(self.url, token, task_id) if token else None


class GatewayStream:
    """One task's stream, over as many connections as it takes."""

    def __init__(self, url: str, token: str, task_id: str) -> None:
        self._url = f"{url.rstrip('/')}/api/v1/tasks"
        self._headers = {"authorization": f"Bearer {token}"}
        self._task_id = task_id
        self._cursor: str | None = None
        self._newest: TrainingProgress | None = None
        self.is_over = False
        """The task's last event was told."""

    async def changes(self) -> AsyncIterator[TrainingProgress]:
        """What happens from where the last connection was cut, until the task ends. Raises StreamRefused, StreamCut."""
        timeout = httpx2.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
        try:
            async with httpx2.AsyncClient(headers=self._headers, timeout=timeout) as http:
                async for event in self._events(http):
                    progress = await self._after(http, event)
                    self._cursor = event.cursor
                    self.is_over = event.event in ENDS
                    yield progress
        except (httpx2.HTTPError, ValidationError) as error:
            raise StreamCut(type(error).__name__) from None

    async def _events(self, http: httpx2.AsyncClient) -> AsyncIterator[TaskEvent]:
        headers = {"last-event-id": self._cursor} if self._cursor else {}
        query = {"task_id": self._task_id}
        async with http.stream("GET", f"{self._url}/stream/sse", params=query, headers=headers) as response:
            if response.status_code == httpx2.codes.NO_CONTENT:
                self.is_over = True
                return
            if response.is_client_error and response.status_code not in NOT_NOW:
                raise StreamRefused(f"The gateway answered {response.status_code}.")
            response.raise_for_status()
            async for frame in httpx2.EventSource(response):
                if frame.data and frame.event != EventType.HEARTBEAT:  # a frame may say nothing but `retry`
                    yield TaskEvent.model_validate_json(frame.data)

    async def _after(self, http: httpx2.AsyncClient, event: TaskEvent) -> TrainingProgress:
        """The task as it stands after the event. How long it is said to take stands in no event: the task is read for
        it whenever its stage changes."""
        before = self._newest
        is_same_stage = before is not None and (before.stage, before.attempts) == (event.stage, event.attempt)
        known = before if before is not None and is_same_stage else None
        progress = event.progress if event.progress is not None else known.progress if known else 0.0
        self._newest = TrainingProgress(
            task_id=event.task_id,
            status=event.status,
            stage=event.stage,
            progress=progress,
            next_eta=event.next_eta,
            estimated_time=known.estimated_time if known else await self._estimated_time(http),
            queue_position=event.queue_position,
            attempts=event.attempt,
            error_details=event.error,
            confirmation=event.confirmation,
        )
        return self._newest

    async def _estimated_time(self, http: httpx2.AsyncClient) -> float | None:
        answer = await http.get(f"{self._url}/{self._task_id}")
        minutes = answer.json().get("estimated_time") if answer.is_success else None
        return float(minutes) if isinstance(minutes, int | float) else None
