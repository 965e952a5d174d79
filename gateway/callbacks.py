"""`POST /callbacks/comfyui/{task_id}` (contract §2): bytes in, one of the contract's answers out.

    202 taken or coalesced   200 task already over   401 forged, or another task's   404 unknown task
    413 too large            503 with Retry-After: cannot be taken now, the sender repeats

Departures from the plain reading of the contract
1. Signed, but not a readable callback: 202 and counted as `unreadable`. After an error the sender would repeat the
   same bytes for a day; 401 and 404 would be wrong. Polling brings the state that the callback was to report.
2. A body that takes longer than 10 s to arrive is answered with 408: the sender repeats, and the connection is free.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from enum import StrEnum
from typing import Any, Final

import structlog
from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from comfyui_temporal.contracts.comfyui import TrainingCallback
from comfyui_temporal.contracts.fields import OwnModel
from comfyui_temporal.contracts.scenes import SCENES, Callback
from comfyui_temporal.contracts.task_store import TrainingLogWrite
from gateway.callback_body import (
    MAX_BYTES_WITH_LOG,
    BodyTooLarge,
    ForeignTask,
    UnreadableCallback,
    read_callback,
)
from gateway.callback_relay import CallbackRelay, Relayed
from gateway.metrics import Metrics
from gateway.request_log import CALLBACK_OUTCOME
from gateway.signatures import CallbackSignatures, SeenCallbacks
from gateway.tick_writer import Ticked, TickWriter
from gateway.training_log_writer import Logged, TrainingLogWriter
from runtime.stated_size import is_stated_above

log = structlog.get_logger(__name__)

BODY_SECONDS: Final = 10.0
RETRY_AFTER_SECONDS: Final = 5


class CallbackOutcome(StrEnum):
    """What became of a callback. `CallbackReceiver.outcomes` counts them."""

    SIGNALLED = "signalled"
    STORED = "stored"
    COALESCED = "coalesced"
    REPLAYED = "replayed"
    UNREADABLE = "unreadable"
    TASK_OVER = "task_over"
    FORGED = "forged"
    FOREIGN_TASK = "foreign_task"
    TASK_UNKNOWN = "task_unknown"
    TOO_SLOW = "too_slow"
    TOO_LARGE = "too_large"
    UNAVAILABLE = "unavailable"


_STATUS: Final = {
    CallbackOutcome.SIGNALLED: 202,
    CallbackOutcome.STORED: 202,
    CallbackOutcome.COALESCED: 202,
    CallbackOutcome.REPLAYED: 202,
    CallbackOutcome.UNREADABLE: 202,
    CallbackOutcome.TASK_OVER: 200,
    CallbackOutcome.FORGED: 401,
    CallbackOutcome.FOREIGN_TASK: 401,
    CallbackOutcome.TASK_UNKNOWN: 404,
    CallbackOutcome.TOO_SLOW: 408,
    CallbackOutcome.TOO_LARGE: 413,
    CallbackOutcome.UNAVAILABLE: 503,
}
_DETAIL: Final = {
    CallbackOutcome.FORGED: "No valid Standard Webhooks signature with a known secret within 5 minutes of now.",
    CallbackOutcome.FOREIGN_TASK: "The body's task_id is not the one in the path.",
    CallbackOutcome.TASK_UNKNOWN: "A task with this id was never started here.",
    CallbackOutcome.TOO_SLOW: "The body did not arrive within 10 seconds; send the callback again.",
    CallbackOutcome.TOO_LARGE: "A callback has at most 64 KiB, with a training's log lines 256 KiB.",
    CallbackOutcome.UNAVAILABLE: "The callback cannot be taken now; send it again.",
}
_OF_RELAYED: Final = {
    Relayed.SIGNALLED: CallbackOutcome.SIGNALLED,
    Relayed.COALESCED: CallbackOutcome.COALESCED,
    Relayed.TASK_OVER: CallbackOutcome.TASK_OVER,
    Relayed.TASK_UNKNOWN: CallbackOutcome.TASK_UNKNOWN,
    Relayed.UNAVAILABLE: CallbackOutcome.UNAVAILABLE,
}

_OF_TICKED: Final = {
    Ticked.STORED: CallbackOutcome.STORED,
    Ticked.COALESCED: CallbackOutcome.COALESCED,
    Ticked.TASK_OVER: CallbackOutcome.TASK_OVER,
}


class CallbackReceiver:
    """Takes callbacks; one in each process."""

    def __init__(
        self,
        signatures: CallbackSignatures,
        relay: CallbackRelay,
        log_writer: TrainingLogWriter,
        metrics: Metrics,
        ticks: TickWriter | None = None,
    ) -> None:
        """Without `ticks` every callback is a signal."""
        self._ticks = ticks
        self._metrics = metrics
        self._signatures = signatures
        self._relay = relay
        self._log_writer = log_writer
        self._seen = SeenCallbacks()
        self.outcomes: Counter[CallbackOutcome] = Counter()

    async def receive(self, task_id: str, request: Request) -> Response:
        """One of contract §2's answers."""
        outcome = await self._outcome(task_id, request)
        self.outcomes[outcome] += 1
        self._metrics.callbacks.labels(outcome.value).inc()
        setattr(request.state, CALLBACK_OUTCOME, outcome.value)
        status = _STATUS[outcome]
        if status < 300:
            return JSONResponse({"outcome": outcome.value}, status)
        log.warning("callback_not_taken", task_id=_shown(task_id), outcome=outcome.value, status=status)
        return JSONResponse(
            {
                "title": outcome.value,
                "status": status,
                "detail": _DETAIL[outcome],
                "code": outcome.value,
                "message": _DETAIL[outcome],
            },
            status,
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None,
            media_type="application/problem+json",
        )

    async def _outcome(self, task_id: str, request: Request) -> CallbackOutcome:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                raw = await _body(request)
        except (TimeoutError, ClientDisconnect):
            return CallbackOutcome.TOO_SLOW
        except BodyTooLarge:
            return CallbackOutcome.TOO_LARGE
        signer = self._signatures.signer_of(raw, request.headers)
        if signer is None:
            return CallbackOutcome.FORGED
        self._metrics.callbacks_signed.labels(signer).inc()
        try:
            callback = read_callback(raw, task_id)
        except BodyTooLarge:
            return CallbackOutcome.TOO_LARGE
        except ForeignTask:
            return CallbackOutcome.FOREIGN_TASK
        except UnreadableCallback as error:
            log.warning("callback_unreadable", task_id=_shown(task_id), reason=str(error))
            return CallbackOutcome.UNREADABLE
        webhook_id = request.headers["webhook-id"]
        if self._seen.knows(task_id, webhook_id):
            return CallbackOutcome.REPLAYED
        outcome = await self._take(task_id, callback)
        if _STATUS[outcome] < 300:
            self._seen.remember(task_id, webhook_id)
        return outcome

    async def _take(self, task_id: str, callback: Callback) -> CallbackOutcome:
        """Report and log lines run in parallel, so that an outage of one party does not block the other."""
        lines = _log_write(task_id, callback)
        if lines is None:
            return await self._report(task_id, callback)
        reported, logged = await asyncio.gather(self._report(task_id, callback), self._log_writer.take(lines))
        return CallbackOutcome.UNAVAILABLE if logged is Logged.UNAVAILABLE else reported

    async def _report(self, task_id: str, callback: Callback) -> CallbackOutcome:
        """A tick is stored, everything else is signalled (decision 4)."""
        if self._ticks is not None:
            ticked = await self._ticks.take(task_id, callback)
            if ticked is not Ticked.LONG_WAY:
                return _OF_TICKED[ticked]
        return _OF_RELAYED[await self._relay.take(task_id, callback)]


class CallbackTaken(OwnModel):
    """What became of a callback that need not be repeated."""

    outcome: CallbackOutcome


class CallbackNotTaken(OwnModel):
    """Why a callback was not taken, as `application/problem+json`."""

    title: CallbackOutcome
    status: int
    detail: str


def _documented() -> dict[int | str, dict[str, Any]]:
    """Contract §2's answers, for the OpenAPI document."""
    taken: dict[int | str, dict[str, Any]] = {200: {"model": CallbackTaken, "description": "The task is over"}}
    refusal = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/CallbackNotTaken"}}}
    refused: dict[int | str, dict[str, Any]] = {
        _STATUS[outcome]: {"model": CallbackNotTaken, "description": detail, "content": refusal, "headers": {}}
        for outcome, detail in _DETAIL.items()
    }
    refused[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
    return {**taken, **refused}


def _documented_body() -> dict[str, Any]:
    """The body is read as bytes: it is verified before it is parsed."""
    forms = [spec.callback.model_json_schema(ref_template="{model}") for spec in SCENES.values()]
    described = [{"type": "object", "title": form["title"], "required": form["required"]} for form in forms]
    return {"required": True, "content": {"application/json": {"schema": {"anyOf": described}}}}


def _documented_headers() -> list[dict[str, Any]]:
    """The headers of the Standard Webhooks scheme (https://www.standardwebhooks.com)."""
    meanings = {
        "webhook-id": "The message's id, the same in every repeat.",
        "webhook-timestamp": "When this try was signed, in seconds since the epoch.",
        "webhook-signature": "`v1,` and the base64 HMAC-SHA256 of id, timestamp and body; blanks between several.",
    }
    return [
        {
            "name": name,
            "in": "header",
            "required": True,
            "description": meaning,
            "schema": {"type": "string", "minLength": 1},
        }
        for name, meaning in meanings.items()
    ]


def callback_routes(receiver: CallbackReceiver) -> APIRouter:
    router = APIRouter(tags=["callbacks"])

    @router.post(
        "/callbacks/comfyui/{task_id}",
        status_code=202,
        response_model=CallbackTaken,
        responses=_documented(),
        openapi_extra={"requestBody": _documented_body(), "parameters": _documented_headers()},
    )
    async def comfyui_callback(task_id: str, request: Request) -> Response:
        """ComfyUI reports a change of the task's job or training. Signed by the Standard Webhooks scheme."""
        return await receiver.receive(task_id, request)

    return router


async def _body(request: Request) -> bytes:
    """The whole body, counted while it is read. Raises BodyTooLarge, without reading where that length is stated."""
    if is_stated_above(request.headers.get("content-length"), MAX_BYTES_WITH_LOG):
        raise BodyTooLarge
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES_WITH_LOG:
            raise BodyTooLarge
        parts.append(part)
    return b"".join(parts)


def _log_write(task_id: str, callback: Callback) -> TrainingLogWrite | None:
    """The part for the training log; None if there is none."""
    if not isinstance(callback, TrainingCallback):
        return None
    metrics = _metrics(callback)
    if not callback.log and not metrics:
        return None
    return TrainingLogWrite(
        task_id=task_id,
        training_id=callback.training_id,
        sequence=callback.sequence,
        lines=callback.log,
        metrics=metrics,
    )


def _metrics(callback: TrainingCallback) -> dict[str, float]:
    return {} if callback.output is None or callback.output.metrics is None else callback.output.metrics


def _shown(task_id: str) -> str:
    """Shortened for logs: a path may hold any text."""
    return task_id[:64]
