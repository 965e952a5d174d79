"""Live streams (contract §6): one task, several, or all of a tenant; Server-Sent Events and WebSocket.

Caller, tasks and position are checked as for an ordinary request. After that the hub serves the stream.
Annotations are evaluated when this module runs: `stream_routes` makes the dependency that they name.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response, WebSocket
from starlette.types import Receive, Scope, Send

from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.tasks_api import TaskView
from gateway.access import Access
from gateway.problems import Problem, ProblemCode, problems
from gateway.streams_cursors import positions_of
from gateway.streams_hub import EventHub
from gateway.streams_subscriber import Subscriber
from gateway.streams_wires import FRAME_SCHEMA, RETRY_MILLISECONDS, EndReason, SseWire, WebSocketWire
from gateway.temporal_calls import RunMissing
from gateway.tenant_limits import TenantDoor
from runtime.caller_tokens import Caller
from store import CursorInvalid, StoreFailure, TaskHead

MAX_TASKS: Final = 50
LOOKUPS_AT_ONCE: Final = 10
"""Tasks without a row that one process looks up at Temporal at the same time."""
LOOKUP_SECONDS: Final = 3.0
MAX_STREAMS: Final = 15_000
"""Limit of one process. A client beyond it is asked to come again and may reach another process."""
ALL_TASKS: Final = "*"
RETRY_BACKOFF_SECONDS: Final = (1, 2, 5, 10, 30)
EVENT_STREAM: Final = "text/event-stream"
_TASK_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEADERS: Final = {
    "Cache-Control": "no-store",
    # Buffering proxies would delay events.
    "X-Accel-Buffering": "no",
}


class StreamConfig(OwnModel):
    """The addresses of streams, a token that opens them and nothing else, and the pauses between retries."""

    ws_url: str
    sse_url: str
    token: str
    retry_backoff_seconds: list[int]


class StreamStart:
    """A stream that may start: its tasks, how far each has come, and the `seq` after which each begins."""

    def __init__(
        self,
        caller: Caller,
        heads: dict[str, TaskHead],
        positions: dict[str, int],
        *,
        unknown: Sequence[str] = (),
        keeps_ended: bool = False,
    ) -> None:
        """`unknown`: ids that were left out. `keeps_ended`: it stays open when every task has ended."""
        self.unknown = unknown
        self._keeps_ended = keeps_ended
        self.tenant_id = caller.tenant_id
        self._caller = caller
        self.heads = heads
        self._positions = positions
        self._open_tasks = [task_id for task_id, head in heads.items() if self._has_more(head)]

    def _has_more(self, head: TaskHead) -> bool:
        return not head.has_ended or self._positions[head.task_id] < head.last_seq

    @property
    def is_over(self) -> bool:
        """Everything was sent before, up to the end of every task, and the stream is not kept open."""
        return bool(self._positions) and not self._open_tasks and not self._keeps_ended

    def subscriber(self, wire: SseWire | WebSocketWire) -> Subscriber:
        return Subscriber(
            wire,
            tenant_id=self._caller.tenant_id,
            user_id=self._caller.user_id if self._caller.own_tasks_only else None,
            expires_at=self._caller.expires_at,
            positions=self._positions,
            open_tasks=self._open_tasks,
            keeps_ended=self._keeps_ended,
        )

    @property
    def first_line(self) -> bytes:
        """What an SSE stream begins with; the comment names the ids that were left out."""
        comment = f": unknown tasks are left out: {', '.join(self.unknown)}\n" if self.unknown else ""
        return f"{comment}retry: {RETRY_MILLISECONDS}\n\n".encode()


class EventStreamResponse(Response):
    """One SSE stream, for its whole life."""

    media_type = EVENT_STREAM

    def __init__(self, hub: EventHub, door: TenantDoor, start: StreamStart, limits: Mapping[str, str]) -> None:
        """The stream is counted already: its end is noted at `door`. `limits`: headers."""
        super().__init__(headers={**_HEADERS, **limits})
        del self.headers["content-length"]
        self._hub = hub
        self._door = door
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            wire = SseWire(receive, send)
            # A first line immediately: some browsers and proxies hold a response back until its body begins.
            await wire.write([self._start.first_line])
            await self._hub.serve(self._start.subscriber(wire), self._start.heads)
        finally:
            self._door.close_stream(self._start.tenant_id)


class WaitingTasks:
    """Tasks that were started and have no row yet: their run waits for a worker (runs_without_row.py)."""

    def __init__(self, view_of: Callable[[str], Awaitable[TaskView | None]]) -> None:
        """`view_of`: the task by its run, None if there is none. May raise Problem, RunMissing."""
        self._view_of = view_of
        self._turns = asyncio.Semaphore(LOOKUPS_AT_ONCE)

    async def heads(self, caller: Caller, task_ids: Sequence[str]) -> dict[str, TaskHead]:
        """How far those are that the caller sees: at no event. Raises Problem if none could be looked up."""
        found = await asyncio.gather(*map(self._head, task_ids), return_exceptions=True)
        for failure in found:
            if isinstance(failure, BaseException) and not isinstance(failure, (Problem, TimeoutError)):
                raise failure
        heads = [head for head in found if isinstance(head, TaskHead)]
        failed = next((each for each in found if isinstance(each, BaseException)), None)
        if failed is not None and not heads:
            if isinstance(failed, Problem):
                raise failed
            raise Problem(ProblemCode.TEMPORAL_UNAVAILABLE, "Temporal does not answer now: open the stream again.")
        return {head.task_id: head for head in heads if caller.sees(tenant_id=head.tenant_id, user_id=head.user_id)}

    async def _head(self, task_id: str) -> TaskHead | None:
        try:
            async with asyncio.timeout(LOOKUP_SECONDS), self._turns:
                view = await self._view_of(task_id)
        except RunMissing:
            return None
        if view is None:
            return None
        return TaskHead(
            task_id=task_id,
            tenant_id=view.tenant_id,
            user_id=view.user_id,
            scene=view.scene,
            created_at=view.created_at,
            last_seq=0,
            has_ended=view.ended_at is not None,
        )


async def checked_start(
    hub: EventHub,
    caller: Caller,
    task_ids: Sequence[str],
    *,
    cursor: str | None,
    all_tasks: bool = False,
    waiting: WaitingTasks | None = None,
) -> StreamStart:
    """Check the request for a stream. Raises Problem."""
    if hub.is_draining:
        raise Problem(ProblemCode.DRAINING, "This process is about to end: open the stream again.")
    if hub.open_streams.total() >= MAX_STREAMS:
        raise Problem(
            ProblemCode.RATE_LIMITED,
            f"This process already serves {MAX_STREAMS} streams: open the stream again later.",
            headers={"Retry-After": str(RETRY_BACKOFF_SECONDS[2])},
        )
    if all_tasks:
        return StreamStart(caller, {}, {})
    try:
        positions = positions_of(cursor, task_ids) if cursor else dict.fromkeys(task_ids, 0)
    except CursorInvalid as error:
        raise Problem(ProblemCode.CURSOR_INVALID, str(error)) from None
    try:
        heads = await hub.heads(task_ids)
    except StoreFailure:
        raise Problem(ProblemCode.STORE_UNAVAILABLE, "The task store cannot be read now: open it again.") from None
    # A task that the caller does not see must look like one that does not exist.
    seen = {
        task_id: head
        for task_id in task_ids
        if (head := heads.get(task_id)) and caller.sees(tenant_id=head.tenant_id, user_id=head.user_id)
    }
    if waiting is not None and (missing := [task_id for task_id in task_ids if task_id not in heads]):
        try:
            seen |= await waiting.heads(caller, missing)
        except Problem:
            if not seen:
                raise
    if not seen:
        raise Problem(ProblemCode.TASK_UNKNOWN, f"There is no task {', '.join(task_ids)} of this tenant.")
    return StreamStart(
        caller,
        seen,
        {task_id: _position_in(head, positions[task_id]) for task_id, head in seen.items()},
        unknown=[task_id for task_id in task_ids if task_id not in seen],
        keeps_ended=hub.keeps_ended,
    )


def _position_in(head: TaskHead, seq: int) -> int:
    """Where a stream of the task continues after `seq`.

    A restored store may have fewer events than were sent: then at the newest that it has, and at least with the end.
    A task that ended without a row has no event at all.
    """
    return seq if seq <= head.last_seq else max(0, head.last_seq - head.has_ended)


def requested_tasks(task_id: str | None, subscribe: str | None) -> tuple[list[str], bool]:
    """The ids in `task_id` and `subscribe`, or whether all tasks are requested. Raises Problem."""
    if subscribe is not None and subscribe.strip() == ALL_TASKS:
        if task_id:
            raise Problem(ProblemCode.INPUT_INVALID, "subscribe=* means all tasks: leave task_id out.")
        return [], True
    parts = [task_id or "", *(subscribe or "").split(",")]
    task_ids = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not task_ids:
        raise Problem(ProblemCode.INPUT_INVALID, "Name a task: ?task_id=A, ?subscribe=B,C or ?subscribe=*.")
    if len(task_ids) > MAX_TASKS:
        raise Problem(ProblemCode.INPUT_INVALID, f"One stream covers at most {MAX_TASKS} tasks: open several.")
    if not all(_TASK_ID.fullmatch(part) for part in task_ids):
        raise Problem(ProblemCode.INPUT_INVALID, "A task id has 1 to 64 letters, digits, '-' or '_'.")
    return task_ids, False


_TaskId = Annotated[str | None, Query(max_length=64, description="One task.", examples=["image-3f9c"])]
_Subscribe = Annotated[
    str | None,
    Query(max_length=4_096, description=f"Up to {MAX_TASKS} tasks, comma-separated; `*`: all that the caller sees."),
]
_Cursor = Annotated[str | None, Query(description="Where to continue: an event's `cursor`.")]
_LastEventId = Annotated[
    str | None,
    Header(description="As `cursor`, and preferred to it: browsers send it."),
]
_REFUSALS: Final = (
    ProblemCode.CURSOR_INVALID,
    ProblemCode.INPUT_INVALID,
    ProblemCode.UNAUTHENTICATED,
    ProblemCode.NOT_AUTHORIZED,
    ProblemCode.TASK_UNKNOWN,
    ProblemCode.RATE_LIMITED,
    ProblemCode.STORE_UNAVAILABLE,
    ProblemCode.TEMPORAL_UNAVAILABLE,
    ProblemCode.DRAINING,
    ProblemCode.TOKENS_UNVERIFIABLE,
)
_EXAMPLE: Final = "\n".join(
    (
        "id: ZQppbWFnZS0zZjljCjI",
        "event: task.running",
        'data: {"event_id":"image-3f9c:2","seq":2,"event":"task.running",…}',
        "",
        "",
    )
)
_STREAM_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Frames: `id` is the cursor, `event` the type, `data` one JSON object (TaskEvent).",
        "content": {EVENT_STREAM: {"schema": FRAME_SCHEMA, "example": _EXAMPLE}},
    },
    204: {
        "description": "Every event was sent before and every task has ended: do not reconnect. With the setting "
        "ENDED_STREAMS=keep there is no such answer: the stream stays open, with heartbeats."
    },
    **problems(*_REFUSALS),
}


def stream_routes(
    hub: EventHub,
    door: TenantDoor,
    access: Access,
    *,
    public_url: str | None = None,
    waiting: WaitingTasks | None = None,
) -> APIRouter:
    """`public_url`: the address under which clients reach the gateway; default: the address of their request.

    `waiting` finds tasks without a row.
    """
    router = APIRouter(prefix="/api/v1/tasks", tags=["streams"])
    watcher = access.requires_for_stream()

    @router.get(
        "/stream/sse",
        status_code=200,
        response_class=EventStreamResponse,
        responses=_STREAM_RESPONSES,
        summary="Live events by SSE",
    )
    async def stream_sse(
        caller: Annotated[Caller, Depends(watcher)],
        task_id: _TaskId = None,
        subscribe: _Subscribe = None,
        cursor: _Cursor = None,
        last_event_id: _LastEventId = None,
    ) -> Response:
        """History from the cursor on, then live, without a gap or a duplicate; ends after the last task's last event.

        An unknown id among several is left out, and named in a comment at the stream's beginning.

        `subscribe=*` begins now, has no `id` in its frames and cannot be resumed.

        `GET /api/v1/tasks/stream/ws` is the same over WebSocket: one JSON object in each message, with a `cursor` to
        resume from. Where ids are left out, the first is a heartbeat that names them in `unknown_tasks`. It closes with
        1000 after the last event, 1012 if the process ends, 1013 if it was cut, 3000 if the token has expired.
        """
        task_ids, all_tasks = requested_tasks(task_id, subscribe)
        start = await checked_start(
            hub, caller, task_ids, cursor=last_event_id or cursor, all_tasks=all_tasks, waiting=waiting
        )
        return await _answer(hub, door, start)

    @router.websocket("/stream/ws")
    async def stream_ws(
        socket: WebSocket,
        caller: Annotated[Caller, Depends(watcher)],
        task_id: _TaskId = None,
        subscribe: _Subscribe = None,
        cursor: _Cursor = None,
    ) -> None:
        task_ids, all_tasks = requested_tasks(task_id, subscribe)
        start = await checked_start(hub, caller, task_ids, cursor=cursor, all_tasks=all_tasks, waiting=waiting)
        headers = await door.open_stream(start.tenant_id)
        try:
            await socket.accept(headers=[(name.encode(), value.encode()) for name, value in headers.items()])
            wire = WebSocketWire(socket)
            if start.unknown:
                await wire.name_unknown(start.unknown)
            if start.is_over:
                await wire.end(EndReason.OVER, RETRY_MILLISECONDS)
                return
            await hub.serve(start.subscriber(wire), start.heads)
        finally:
            door.close_stream(start.tenant_id)

    @router.get(
        "/stream/config",
        responses=problems(ProblemCode.UNAUTHENTICATED, ProblemCode.NOT_AUTHORIZED, ProblemCode.TOKENS_UNVERIFIABLE),
        summary="The addresses of streams, and a token for them",
    )
    async def stream_config(request: Request, caller: Annotated[Caller, Depends(watcher)]) -> StreamConfig:
        """The token opens streams and nothing else, for at most ten minutes: it may be part of an address."""
        base = (public_url or str(request.base_url)).rstrip("/")
        return StreamConfig(
            ws_url=f"{'ws' + base.removeprefix('http')}/api/v1/tasks/stream/ws",
            sse_url=f"{base}/api/v1/tasks/stream/sse",
            token=access.stream_tokens.made_for(caller),
            retry_backoff_seconds=list(RETRY_BACKOFF_SECONDS),
        )

    return router


def task_event_stream(
    hub: EventHub, door: TenantDoor, waiting: WaitingTasks | None = None
) -> Callable[[Request, Caller, str], Awaitable[Response]]:
    """The live stream of one task, under the address of its history; resumed by `cursor`, `after` or Last-Event-ID."""

    async def stream(request: Request, caller: Caller, task_id: str) -> Response:
        last_event_id = request.headers.get("last-event-id")
        cursor = last_event_id or request.query_params.get("cursor") or request.query_params.get("after")
        task_ids, _ = requested_tasks(task_id, None)
        start = await checked_start(hub, caller, task_ids, cursor=cursor, waiting=waiting)
        return await _answer(hub, door, start)

    return stream


async def _answer(hub: EventHub, door: TenantDoor, start: StreamStart) -> Response:
    if start.is_over:
        return Response(status_code=204)
    return EventStreamResponse(hub, door, start, await door.open_stream(start.tenant_id))
