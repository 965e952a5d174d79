"""Tasks over HTTP: for callers that have the gateway's address and a token, and no access to Temporal."""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import httpx
from httpx_sse import EventSource
from pydantic import BaseModel, ValidationError

from comfyui_temporal.client.errors import (
    AccessDenied,
    GatewayUnavailable,
    InvalidInput,
    Unavailable,
    UnexpectedReply,
    UnknownTask,
    checked,
)
from comfyui_temporal.client.gateway_errors import task_error, typed_transport_errors
from comfyui_temporal.client.interface import WAIT_SECONDS, CancelAnswer
from comfyui_temporal.client.models import StartedTask, TaskDetails, TaskOutcome, TaskSummary, TaskUpdate
from comfyui_temporal.client.uploading import upload, uploaded
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES, AnyTask
from comfyui_temporal.contracts.start_answer import MAX_WAIT_SECONDS, Reached, WaitFor
from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.tasks import (
    CancelTask,
    CancelTaskOutcome,
    ConfirmPrice,
    ConfirmPriceOutcome,
    TaskStatus,
    TrainingProgress,
)
from comfyui_temporal.contracts.tasks_api import TaskDetail, TaskList, TaskView
from comfyui_temporal.contracts.uploads import InputKind, UploadView

TASKS: Final = "/api/v1/tasks"
CONNECT_SECONDS: Final = 2.0
SILENCE_SECONDS: Final = 40.0
"""Heartbeats come every 15 s: a stream that is silent for this long is dead."""
PAUSES_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before each new try to open a stream. The last one repeats."""
UPLOAD_SECONDS: Final = 120.0
LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=20)
"""Each stream and each start that waits keeps a connection: with a limit, many of them leave none for a call."""
MAX_PAGE: Final = 200
APPLIED: Final = "preference-applied"
REPLAYED: Final = "idempotent-replayed"
ENDS: Final = frozenset({EventType.COMPLETED, EventType.FAILED, EventType.CANCELLED})
Model = TypeVar("Model", bound=BaseModel)
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+")


class HttpTasks:
    """Tasks of the token's tenant, over HTTP. Implements `Tasks`; every method raises TaskError.

    It keeps a pool of connections: use it as an async context manager, or call `aclose`.
    """

    def __init__(
        self,
        base_url: str,
        token: str | Callable[[], str],
        *,
        timeout_seconds: float = 15.0,
        patience_seconds: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`base_url`: the gateway's. `token`: the caller's JWT, or a function that returns a fresh one for each call.

        `patience_seconds`: how long `follow`, `wait` and `events` try to reopen a stream before they raise Unavailable;
        0: they raise it at the first interruption. Raises ValueError for an address that is not http or https.
        """
        url = httpx.URL(base_url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"{base_url!r} is not an http or https address")
        self._token = token
        self._patience_seconds = patience_seconds
        self._http = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS),
            limits=LIMITS,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def start(
        self, task: AnyTask, *, wait_for: WaitFor | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> StartedTask:
        """Start a task, as `Tasks.start` says. `tenant_id` and `user_id` must be the token's."""
        path = f"{TASKS}/{SCENES[task.scene].collection}"
        body = task.model_dump(mode="json", exclude_unset=True)
        seconds = 0 if wait_for is None else max(1, min(MAX_WAIT_SECONDS, math.ceil(wait_seconds)))
        response = await self._answered("POST", path, json=body, task_id=task.task_id, wait_seconds=seconds)
        view = _read(TaskView, response)
        started = StartedTask(
            task_id=view.task_id, workflow_id=view.workflow_id, is_new=response.status_code == httpx.codes.ACCEPTED
        )
        if APPLIED not in response.headers:  # also a gateway that does not know how to wait
            return started
        is_answered = response.status_code == httpx.codes.OK
        answered = {"reached": _reached(view), "credits": view.credits, "confirmation": view.confirmation}
        return started.model_copy(
            update={"is_new": REPLAYED not in response.headers, **(answered if is_answered else {})}
        )

    async def upload(self, file: bytes | str | os.PathLike[str], *, kind: InputKind | None = None) -> UploadView:
        """Send a picture, mask, video or sound, as bytes or by its path; a task names it by its `address`.

        `kind`: what it is said to be; another file is refused. A large one is sent in parts: after an interruption it
        goes on where it was, for `patience_seconds`. Raises InvalidInput for a file that no task takes, Unavailable,
        and OSError where the file cannot be read.
        """
        return await upload(self._sent, file, kind, patience_seconds=self._patience_seconds)

    async def uploaded(self, address: str) -> UploadView:
        """What is known of an upload, by its `address`. Raises InvalidInput where it is unknown or has expired."""
        return await uploaded(self._sent, address)

    async def follow(self, task_id: str, *, cursor: str | None = None) -> AsyncGenerator[TaskUpdate, None]:
        """Yield each change that the gateway publishes, until the task ends; after `cursor` if one is given.

        Raises UnknownTask, Unavailable.
        """
        newest: TaskUpdate | None = None
        async with aclosing(self.events(task_id, cursor=cursor)) as events:
            async for event in events:
                newest = await self._update_after(event, newest)
                yield newest
        if newest is None and cursor is None:  # it ended before it had an event: no worker had taken it
            yield TaskUpdate(**_progress(await self._view_patiently(task_id)).model_dump())

    async def events(self, task_id: str, *, cursor: str | None = None) -> AsyncGenerator[TaskEvent, None]:
        """The task's events (contract §6), each once: history, then live, until it ends. Reconnects automatically.

        `cursor`: of an event; yields only later ones. Raises UnknownTask, AccessDenied, Unavailable.
        """
        heard_at, tries = time.monotonic(), 0
        while True:
            try:
                async with aclosing(self._stream(task_id, cursor)) as stream:
                    async for event in stream:
                        heard_at, tries = time.monotonic(), 0
                        if event is None:
                            continue
                        cursor = event.cursor
                        yield event
                        heard_at = time.monotonic()  # what its reader did with it was no silence
                        if event.event in ENDS:
                            return
            except _AllSentBefore:
                return
            except Unavailable:
                if time.monotonic() - heard_at >= self._patience_seconds:
                    raise
            await asyncio.sleep(_pause_after(tries))
            tries += 1

    async def wait(self, task_id: str) -> TaskOutcome:
        """Wait until the task ends. Raises UnknownTask, Unavailable."""
        async with aclosing(self.events(task_id)) as events:
            async for _ in events:
                pass
        view = await self._view_patiently(task_id)
        if not view.status.is_end():
            raise UnexpectedReply(f"The stream of task {task_id!r} ended, but the task has not.")
        return _outcome(view)

    async def show(self, task_id: str) -> TaskDetails:
        """The task's current state. Raises UnknownTask."""
        view = await self._view(task_id)
        outcome = _outcome(view) if view.status.is_end() else None
        progress = None if outcome else _progress(view)
        return TaskDetails(
            task=_summary(view), progress=progress, credits=view.credits, outcome=outcome, delays=view.delays
        )

    async def list(
        self, *, status: TaskStatus | None = None, scene: Scene | None = None, limit: int = 20
    ) -> AsyncGenerator[TaskSummary, None]:
        """The tenant's tasks, newest first; at most `limit`."""
        query: dict[str, str] = {name: value for name, value in (("status", status), ("scene", scene)) if value}
        left = limit
        while left > 0:
            parameters = query | {"limit": str(min(left, MAX_PAGE))}
            page = _read(TaskList, await self._answered("GET", TASKS, params=parameters))
            for view in page.tasks[:left]:
                yield _summary(view)
            left -= len(page.tasks)
            if page.cursor is None:
                return
            query["cursor"] = page.cursor

    async def confirm(self, task_id: str, max_credits: int) -> int:
        """Confirm a training's price up to `max_credits` points. Returns the limit in force, in points.

        Raises UnknownTask, TaskOver; InvalidInput if the task rejects the value.
        """
        order = checked(ConfirmPrice, max_credits=max_credits)
        response = await self._posted(task_id, "confirm-price", order)
        return _read(ConfirmPriceOutcome, response).max_credits

    async def cancel(self, task_id: str, reason: str = "") -> CancelAnswer:
        """Cancel a task; `too_late` if it was delivered or ended first. Safe to repeat. Raises UnknownTask."""
        response = await self._posted(task_id, "cancel", checked(CancelTask, reason=reason))
        return _read(CancelTaskOutcome, response).outcome

    async def _posted(self, task_id: str, action: str, order: BaseModel) -> httpx.Response:
        path = f"{_path(task_id)}/{action}"
        return await self._answered("POST", path, json=order.model_dump(mode="json"), task_id=task_id)

    async def _view(self, task_id: str) -> TaskDetail:
        return _read(TaskDetail, await self._answered("GET", _path(task_id), task_id=task_id))

    async def _view_patiently(self, task_id: str) -> TaskDetail:
        """The task, read again during an outage as its stream would be opened again."""
        since, tries = time.monotonic(), 0
        while True:
            try:
                return await self._view(task_id)
            except Unavailable:
                if time.monotonic() - since >= self._patience_seconds:
                    raise
            await asyncio.sleep(_pause_after(tries))
            tries += 1

    async def _answered(
        self,
        method: str,
        path: str,
        *,
        task_id: str | None = None,
        params: Any = None,
        json: Any = None,
        wait_seconds: int = 0,
    ) -> httpx.Response:
        headers, timeout = self._headers(), self._http.timeout
        if wait_seconds:
            headers["prefer"] = f"wait={wait_seconds}"
            timeout = httpx.Timeout(**{**timeout.as_dict(), "read": (timeout.read or CONNECT_SECONDS) + wait_seconds})
        with typed_transport_errors(self._http.base_url):
            response = await self._http.request(
                method, path, params=params, json=json, headers=headers, timeout=timeout
            )
        if response.is_success:
            return response
        raise task_error(response, task_id)

    async def _sent(self, method: str, path: str, *, headers: Mapping[str, str], **more: Any) -> httpx.Response:
        """A request of an upload. The last one is answered once the whole file is in its place."""
        timeout = httpx.Timeout(UPLOAD_SECONDS, connect=CONNECT_SECONDS)
        with typed_transport_errors(self._http.base_url):
            response = await self._http.request(
                method, path, headers={**headers, **self._headers()}, timeout=timeout, **more
            )
        if response.is_success:
            return response
        raise task_error(response, None)

    def _headers(self, cursor: str | None = None) -> dict[str, str]:
        """Raises AccessDenied, InvalidInput, without a word of what cannot be sent."""
        token = (self._token if isinstance(self._token, str) else self._token()).strip()
        if not _HEADER_SAFE.fullmatch(token):
            raise AccessDenied("The token is empty or has characters that no token has: spaces, line ends or accents.")
        if cursor and not _HEADER_SAFE.fullmatch(cursor):
            raise InvalidInput("The cursor is not one of this gateway's.", code="cursor_invalid")
        return {"authorization": f"Bearer {token}", **({"last-event-id": cursor} if cursor else {})}

    async def _stream(self, task_id: str, cursor: str | None) -> AsyncGenerator[TaskEvent | None, None]:
        """One connection: events, and None for a heartbeat. Raises _AllSentBefore, TaskError."""
        headers, timeout = self._headers(cursor), httpx.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
        with typed_transport_errors(self._http.base_url):
            async with self._http.stream(
                "GET", f"{TASKS}/stream/sse", params={"task_id": task_id}, headers=headers, timeout=timeout
            ) as response:
                if response.status_code == httpx.codes.NO_CONTENT:
                    raise _AllSentBefore
                if not response.is_success:
                    await response.aread()
                    raise await self._refused(response, task_id)
                watch = _Watch(cursor)
                async for frame in EventSource(response).aiter_sse():
                    if frame.event == EventType.HEARTBEAT:
                        if watch.is_needed:
                            watch.see(await self._view_now(task_id))
                        yield None
                    elif frame.data:  # a frame may contain only `retry`
                        watch.is_needed = False
                        yield _read(TaskEvent, frame.data)

    async def _refused(self, response: httpx.Response, task_id: str) -> Exception:
        error = task_error(response, task_id)
        if isinstance(error, UnknownTask):
            # Raises UnknownTask too, unless the task's run has started and no worker has taken it.
            if (await self._view(task_id)).status.is_end():
                return _AllSentBefore()
            return GatewayUnavailable(f"No worker has taken task {task_id!r} yet: it has no events so far.")
        return error

    async def _view_now(self, task_id: str) -> TaskDetail | None:
        try:
            return await self._view(task_id)
        except Unavailable:
            return None

    async def _update_after(self, event: TaskEvent, newest: TaskUpdate | None) -> TaskUpdate:
        """The task after the event. Events lack `estimated_time`, so it is read with each new stage."""
        is_same_stage = newest is not None and (newest.stage, newest.attempts) == (event.stage, event.attempt)
        known = newest if is_same_stage else None
        progress = event.progress if event.progress is not None else known.progress if known else 0.0
        return TaskUpdate(
            task_id=event.task_id,
            status=event.status,
            stage=event.stage,
            progress=progress,
            next_eta=event.next_eta,
            estimated_time=known.estimated_time if known else await self._estimated_time(event.task_id),
            queue_position=event.queue_position,
            attempts=event.attempt,
            error_details=event.error,
            confirmation=event.confirmation,
            cursor=event.cursor,
        )

    async def _estimated_time(self, task_id: str) -> float | None:
        try:
            return (await self._view(task_id)).estimated_time
        except Unavailable:
            return None


class _AllSentBefore(Exception):
    """The task has ended, and its last event is before the cursor, or it never had one."""


class _Watch:
    """Of a connection without an event so far: it may be kept open although its task has ended (`ENDED_STREAMS`)."""

    def __init__(self, cursor: str | None) -> None:
        self.is_needed = True
        self._was_taken = cursor is not None
        self._has_ended = False

    def see(self, view: TaskDetail | None) -> None:
        """At a heartbeat. Raises _AllSentBefore once no event can come: one of the end would be here by the next."""
        if view is None:
            return
        has_ended = view.status.is_end()
        if has_ended and (self._has_ended or not view.last_seq):
            raise _AllSentBefore
        self._has_ended = has_ended
        self.is_needed = has_ended or not self._was_taken  # an open task that a worker took sends its own end


def _pause_after(tries: int) -> float:
    return PAUSES_SECONDS[min(tries, len(PAUSES_SECONDS) - 1)]


def _path(task_id: str) -> str:
    return f"{TASKS}/{quote(task_id, safe='')}"


def _read(model: type[Model], answer: httpx.Response | str) -> Model:
    try:
        return model.model_validate_json(answer if isinstance(answer, str) else answer.content)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, issue["loc"])) or "body" for issue in error.errors()[:5])
        raise UnexpectedReply(f"The gateway's answer is not a {model.__name__}: {places}.") from None


def _reached(view: TaskView) -> Reached:
    if view.status.is_end():
        return Reached.ENDED
    is_waiting = view.confirmation is not None and view.confirmation.confirm_by is not None
    return Reached.CONFIRMATION if is_waiting else Reached.HELD


def _summary(view: TaskView) -> TaskSummary:
    return TaskSummary(
        task_id=view.task_id,
        scene=view.scene.value,
        status=view.status.value,
        stage=view.stage,
        tenant_id=view.tenant_id,
        user_id=view.user_id,
        template_id=view.template_id,
        priority=view.priority.value,
        started_at=view.created_at,
        ended_at=view.ended_at,
        workflow_id=view.workflow_id,
    )


def _progress(view: TaskView) -> TrainingProgress:
    return TrainingProgress(**view.model_dump(), error_details=view.error)


def _outcome(view: TaskView) -> TaskOutcome:
    spec = SCENES[view.scene]
    values = view.model_dump() | {"error_details": view.error, spec.job_id_field: view.job_id}
    result = spec.result.model_validate(values)
    failed = view.error if view.status is TaskStatus.FAILED else None
    return TaskOutcome(
        task_id=view.task_id,
        workflow_id=view.workflow_id,
        status=view.status,
        code=failed.code if failed else None,
        sentence=view.error.message if view.error else None,
        result=result,
    )
