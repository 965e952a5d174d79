"""One open stream: what it has sent, what waits to be written, and when it ends.

    history ──catch up──▶ ┐
                          ├─▶ queue (bounded) ─▶ one writer ─▶ wire
    hub ─────deliver────▶ ┘

A task is caught up from the store until the stream has all events that the hub has given to others. From that moment,
with nothing awaited in between, it takes the hub's events too. `seq` is gapless, so each event is sent once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from starlette.websockets import WebSocketDisconnect

from gateway.streams_cursors import cursor_of
from gateway.streams_wires import RETRY_MILLISECONDS, EndReason, SharedEvent, Wire

MAX_QUEUE: Final = 256
"""Events that may wait for a slow client. One more cuts the stream; the client can resume it at its own pace."""
MAX_QUEUE_BYTES: Final = 1024 * 1024
WRITE_SECONDS: Final = 30.0
"""A client that reads nothing for this long counts as gone, even if its connection is open."""
SPREAD_MILLISECONDS: Final = 3_000
"""When all clients are sent away together, they reconnect spread over this time."""


class Subscriber:
    """One stream. Its tasks are `positions`; a stream of a whole tenant has none and cannot be resumed."""

    __slots__ = (
        "__weakref__",
        "_is_catching_up",
        "_owner",
        "_queue",
        "_queued_bytes",
        "_writer",
        "ending",
        "expires_at",
        "is_aborted",
        "keeps_ended",
        "open_tasks",
        "positions",
        "tenant_id",
        "user_id",
        "wire",
    )

    def __init__(
        self,
        wire: Wire,
        *,
        tenant_id: str,
        user_id: str | None = None,
        expires_at: float,
        positions: Mapping[str, int],
        open_tasks: Iterable[str],
        keeps_ended: bool = False,
    ) -> None:
        """`positions`: the `seq` after which each task begins. `open_tasks`: those whose end was not sent yet.

        `user_id`: a stream of a whole tenant takes this user's tasks only. `keeps_ended`: it stays open when every
        task has ended.
        """
        self.keeps_ended = keeps_ended
        self.wire = wire
        self.tenant_id = tenant_id
        self.user_id = user_id
        self.expires_at = expires_at
        self.positions = dict(positions)
        self.open_tasks = set(open_tasks)
        self.ending: EndReason | None = None
        self.is_aborted = False
        """The client no longer reads, and the task that waits for it to leave was cancelled."""
        self._is_catching_up: set[str] = set(self.open_tasks)
        self._queue: deque[bytes | str] | None = None
        self._queued_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._owner = asyncio.current_task()

    @property
    def is_of_tenant(self) -> bool:
        return not self.positions

    @property
    def behind(self) -> dict[str, int]:
        """Tasks that are still caught up, with the `seq` sent so far."""
        return {task_id: self.positions[task_id] for task_id in self._is_catching_up}

    def deliver(self, event: SharedEvent) -> None:
        """Take a new event from the hub."""
        if self.ending is not None or event.task_id in self._is_catching_up:
            return
        if self.is_of_tenant:
            self._enqueue(self.wire.frame(event, None, is_own=False))
        elif event.seq > self.positions.get(event.task_id, event.seq):
            self._enqueue(self._frame_of(event))
        self._cut_if_slow()
        self._end_if_over()

    def catch_up(self, events: Iterable[SharedEvent]) -> None:
        """Take a page of history of tasks that are behind. Await `written` before the next page."""
        for event in events:
            if event.seq > self.positions[event.task_id]:
                self._enqueue(self._frame_of(event))
        self._end_if_over()

    def mark_caught_up(self, task_id: str) -> None:
        """The stream has all that the hub has given to others: from now on it takes the hub's events of the task."""
        self._is_catching_up.discard(task_id)

    async def written(self) -> None:
        """Wait until the connection has taken all that waits, or the stream ends."""
        while self.ending is None and self._writer is not None:
            await asyncio.wait({self._writer})

    def beat(self) -> None:
        if self.ending is None and self._writer is None:
            self._enqueue(self.wire.heartbeat(None if self.is_of_tenant else cursor_of(self.positions)))

    def end(self, reason: EndReason) -> None:
        """End it after what waits is written; a slow one immediately."""
        if self.ending is not None:
            return
        self.ending = reason
        if reason is EndReason.SLOW:
            self._queue = None
        self._wake_writer()

    async def closed(self) -> None:
        """Wait for the writer. Nothing is written afterwards."""
        self._owner = None
        self.ending = self.ending or EndReason.OVER
        if self._writer is not None:
            await asyncio.wait({self._writer})

    def _frame_of(self, event: SharedEvent) -> bytes | str:
        self.positions[event.task_id] = event.seq
        if event.is_end:
            self.open_tasks.discard(event.task_id)
            self._is_catching_up.discard(event.task_id)
        is_own = len(self.positions) == 1
        return self.wire.frame(event, "" if is_own else cursor_of(self.positions), is_own=is_own)

    def _end_if_over(self) -> None:
        if not self.open_tasks and not self.is_of_tenant and not self.keeps_ended:
            self.end(EndReason.OVER)

    def _enqueue(self, frame: bytes | str) -> None:
        if self.ending is not None:
            return
        if self._queue is None:
            self._queue = deque()
            self._queued_bytes = 0
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        self._wake_writer()

    def _cut_if_slow(self) -> None:
        if self._queue is not None and (len(self._queue) > MAX_QUEUE or self._queued_bytes > MAX_QUEUE_BYTES):
            self.end(EndReason.SLOW)

    def _wake_writer(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def _write(self) -> None:
        try:
            while self._queue or self.ending is not None:
                frames, self._queue = self._queue, None
                async with asyncio.timeout(WRITE_SECONDS):
                    if frames:
                        await self.wire.write(frames)
                    else:
                        await self.wire.end(self.ending or EndReason.OVER, _retry_milliseconds(self.ending))
                        return
        except (TimeoutError, OSError, RuntimeError, WebSocketDisconnect):
            # RuntimeError: the framework raises it for a connection that was closed meanwhile.
            self._queue = None
            self.ending = self.ending or EndReason.SLOW
            if self._owner is not None:
                self.is_aborted = self._owner.cancel()
        finally:
            if self.ending is None:
                self._writer = None


def _retry_milliseconds(reason: EndReason | None) -> int:
    if reason is not EndReason.DRAINING:
        return RETRY_MILLISECONDS
    return RETRY_MILLISECONDS // 2 + secrets.randbelow(SPREAD_MILLISECONDS)
