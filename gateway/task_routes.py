"""The routes of the tasks API (contract §6): access, input, output. tasks.py does the work.

Annotations are evaluated when this module runs: `task_routes` makes the dependencies that they name.
"""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

from fastapi import APIRouter, Body, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import HTTPConnection

from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.permissions import Operation
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.tasks import CancelTask, CancelTaskOutcome, ConfirmPrice, ConfirmPriceOutcome
from comfyui_temporal.contracts.tasks_api import TaskDetail, TaskList, TaskView
from gateway.access import Access
from gateway.problems import ProblemCode, problems
from gateway.request_limits import BODY_BYTES
from gateway.start_waits import APPLIED, REPLAYED, seconds_of
from gateway.streams_wires import FRAME_SCHEMA, worded
from gateway.task_bodies import (
    TASKS,
    EventsQuery,
    IdempotencyKey,
    ImageOrder,
    LogQuery,
    RollbackOrder,
    RollbackOutcome,
    TaskFilters,
    TrainingLog,
    TrainingOrder,
)
from gateway.tasks import StartedTask, Tasks
from gateway.tenant_limits import LEFT_HEADER, POLICY_HEADER
from runtime.caller_tokens import Caller

EVENT_STREAM: Final = "text/event-stream"

EventStream = Callable[[Request, Caller, str], Awaitable[Response]]
"""Opens the live stream of one task."""
RollBack = Callable[[Caller, str, RollbackOrder], Awaitable[RollbackOutcome]]

_READ: Final = (
    ProblemCode.UNAUTHENTICATED,
    ProblemCode.NOT_AUTHORIZED,
    ProblemCode.INPUT_INVALID,
    ProblemCode.STORE_UNAVAILABLE,
    ProblemCode.TEMPORAL_UNAVAILABLE,
    ProblemCode.TOKENS_UNVERIFIABLE,
)
_ONE: Final = (*_READ, ProblemCode.TASK_UNKNOWN)
_CHANGE: Final = (*_ONE, ProblemCode.TOO_LARGE, ProblemCode.TOO_SLOW, ProblemCode.WORKER_UNAVAILABLE)
_REFUSED: Final = (
    *(ProblemCode.INSUFFICIENT_BALANCE, ProblemCode.QUOTA_EXCEEDED, ProblemCode.PRICE_MISMATCH),
    ProblemCode.TASK_CONFLICT,
)
_START: Final = (
    *(*_READ, *_REFUSED, ProblemCode.TASK_EXISTS, ProblemCode.TOO_LARGE, ProblemCode.TOO_SLOW),
    ProblemCode.RATE_LIMITED,
)
_START_TRAINING: Final = (*_START, ProblemCode.DATASET_INVALID, ProblemCode.STORAGE_UNAVAILABLE)
_LOCATION: Final = {
    "Location": {"description": "The task's address.", "schema": {"type": "string"}},
    POLICY_HEADER: {"description": "The tenant's limits: `q` per `w` seconds.", "schema": {"type": "string"}},
    LEFT_HEADER: {"description": "What is left of them: `r`, more in `t` seconds.", "schema": {"type": "string"}},
    APPLIED: {"description": "How long the start waits at most: `wait=N`.", "schema": {"type": "string"}},
    REPLAYED: {"description": "`true`: a repeat, the same task.", "schema": {"type": "string"}},
}
_STARTED: Final[dict[int | str, dict[str, Any]]] = {
    202: {"description": "The task", "headers": _LOCATION},
    200: {
        "model": TaskView,
        "description": "A repeat: the same task. With `Prefer: wait=N`: credits are held, a price is to be confirmed, "
        "or the task has ended",
        "headers": _LOCATION,
    },
}

Key = Annotated[
    IdempotencyKey | None,
    Header(
        alias="X-Idempotency-Key",
        description="Makes the task id if the body has none: the same key and body is one task.",
    ),
]

Prefer = Annotated[
    str | None,
    Header(
        alias="Prefer",
        description="`wait=N`: answer once credits are held, after N seconds (60) at most; 402 if they are refused.",
    ),
]


def task_routes(
    tasks: Tasks,
    access: Access,
    *,
    roll_back: RollBack,
    event_stream: EventStream | None = None,
    status_words: Mapping[str, str] = MappingProxyType({}),
) -> APIRouter:
    """The routes. `event_stream` serves `…/events` to clients that accept an event stream.

    `status_words`: other words for ends in events.
    """
    router = APIRouter(prefix=TASKS, tags=["tasks"])
    Reader = Annotated[Caller, Depends(access.requires(Operation.READ_TASK))]

    async def reader_of_events(connection: HTTPConnection) -> Caller:
        if event_stream is not None and _wants_stream(connection):
            return await access.stream_caller(connection)
        return await access.caller(connection, Operation.READ_TASK)

    @router.post("/images", status_code=202, responses={**_STARTED, **problems(*_START)})
    async def start_image(
        caller: Annotated[Caller, Depends(access.requires(Operation.START_IMAGE_TASK))],
        order: ImageOrder,
        request: Request,
        response: Response,
        key: Key = None,
        prefer: Prefer = None,
    ) -> TaskView:
        """Start an image task: 202 the task, 200 a repeat, 409 another body with the same id or key."""
        seconds = seconds_of(prefer)
        started = await tasks.start(caller, order, key, size=_body_bytes(request), wait_seconds=seconds)
        return _task_response(response, started)

    @router.post("/trainings", status_code=202, responses={**_STARTED, **problems(*_START_TRAINING)})
    async def start_training(
        caller: Annotated[Caller, Depends(access.requires(Operation.START_TRAINING_TASK))],
        order: TrainingOrder,
        request: Request,
        response: Response,
        key: Key = None,
        prefer: Prefer = None,
    ) -> TaskView:
        """Start a training task: 202 the task, 200 a repeat, 409 another body with the same id or key."""
        seconds = seconds_of(prefer)
        started = await tasks.start(caller, order, key, size=_body_bytes(request), wait_seconds=seconds)
        return _task_response(response, started)

    @router.get("", responses=problems(*_READ, ProblemCode.CURSOR_INVALID))
    async def list_tasks(caller: Reader, filters: Annotated[TaskFilters, Query()]) -> TaskList:
        """The tenant's tasks, newest first."""
        return await tasks.page(caller, filters)

    @router.get("/{task_id}", responses=problems(*_ONE))
    async def read_task(caller: Reader, task_id: CallerId) -> TaskDetail:
        """The task's current state."""
        return await tasks.task(caller, task_id)

    @router.get(
        "/{task_id}/events",
        response_model=list[TaskEvent],
        responses={**_event_stream_response(), **problems(*_ONE, ProblemCode.CURSOR_INVALID, ProblemCode.RATE_LIMITED)},
        openapi_extra={"security": [{"bearer": []}, {"token": []}, {"cookie": []}]},
    )
    async def read_events(
        caller: Annotated[Caller, Depends(reader_of_events)],
        task_id: CallerId,
        query: Annotated[EventsQuery, Query()],
        request: Request,
    ) -> Response | list[TaskEvent]:
        """The task's history, in order; with `Accept: text/event-stream` the live stream."""
        if event_stream is not None and _wants_stream(request):
            return await event_stream(request, caller, task_id)
        history = await tasks.events(caller, task_id, query)
        return JSONResponse([worded(event, status_words) for event in history]) if status_words else history

    @router.get("/{task_id}/training-log", responses=problems(*_ONE))
    async def read_training_log(caller: Reader, task_id: CallerId, query: Annotated[LogQuery, Query()]) -> TrainingLog:
        """Lines and metrics of a training; none for an image."""
        return await tasks.training_log(caller, task_id, query)

    @router.post("/{task_id}/cancel", responses=problems(*_CHANGE))
    async def cancel_task(
        caller: Annotated[Caller, Depends(access.requires(Operation.CANCEL_TASK))],
        task_id: CallerId,
        order: Annotated[CancelTask | None, Body()] = None,
    ) -> CancelTaskOutcome:
        """Stop the task: `accepted`, or `too_late` if it was delivered or has ended; idempotent."""
        return await tasks.cancel(caller, task_id, order or CancelTask())

    @router.post("/{task_id}/confirm-price", responses=problems(*_CHANGE, ProblemCode.TASK_OVER))
    async def confirm_price(
        caller: Annotated[Caller, Depends(access.requires(Operation.CONFIRM_PRICE))],
        task_id: CallerId,
        order: ConfirmPrice,
    ) -> ConfirmPriceOutcome:
        """Confirm a training's price up to `max_credits`. It can only be raised. Returns the ceiling in force."""
        return await tasks.confirm_price(caller, task_id, order)

    @router.post(
        "/{task_id}/rollback",
        responses=problems(
            *_CHANGE, ProblemCode.ALREADY_CHARGED, ProblemCode.SETTLEMENT_UNKNOWN, ProblemCode.STILL_ENDING
        ),
    )
    async def roll_back_task(
        caller: Annotated[Caller, Depends(access.requires(Operation.ROLL_BACK))],
        task_id: CallerId,
        order: Annotated[RollbackOrder | None, Body()] = None,
    ) -> RollbackOutcome:
        """Give the task's hold and job back on request (contract §7). Charges are not refunded."""
        return await roll_back(caller, task_id, order or RollbackOrder())

    return router


def _task_response(response: Response, started: StartedTask) -> TaskView:
    is_open_question = started.is_new if started.is_answered is None else not started.is_answered
    response.status_code = 202 if is_open_question else 200
    response.headers.update(started.all_headers)
    return started.task


def _body_bytes(request: Request) -> int:
    return int(request.scope["state"].get(BODY_BYTES, 0))


def _wants_stream(connection: HTTPConnection) -> bool:
    return EVENT_STREAM in connection.headers.get("accept", "").lower()


def _event_stream_response() -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": "The history as an array, or the live stream",
            "content": {EVENT_STREAM: {"schema": FRAME_SCHEMA}},
        },
        204: {"description": "For the live stream: every event was sent before and the task has ended."},
    }
