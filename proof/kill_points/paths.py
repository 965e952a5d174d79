"""The paths that lead a task to its point: what its job does, what happens to it, and how it continues afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, TaskStatus
from proof.kill_points.site import TENANT, USER, RoundSite
from proof.kill_points.stack import SIGNALS_UNTIL_CONTINUED
from proof.site.waiting import until

Act = Callable[[RoundSite, str], Awaitable[None]]
Look = Callable[[RoundSite, str], Awaitable[bool]]

LEAD_SECONDS: Final = 60.0
DEARER_POINTS: Final = 40
DEARER_HOURS: Final = 3.0


async def _nothing(site: RoundSite, task_id: str) -> None:
    return None


async def _resume(site: RoundSite, task_id: str) -> None:
    for run in await site.open_jobs(task_id):
        await site.admin.comfyui.act(run.run_id, "resume")


@dataclass(frozen=True)
class TaskPath:
    """What happens to a task. `before` is done before it is started, `lead` after; `parked` recognises a wait without a
    gate; `approach` is done `milliseconds` before the fault, `after` when everything is back."""

    name: str
    ends: TaskStatus = TaskStatus.COMPLETED
    """How it ends without any other fault."""
    jobs: int = 1
    before: Act = _nothing
    lead: Act = _nothing
    parked: Look | None = None
    approach: Act | None = None
    milliseconds: int = 0
    after: Act = _resume
    fields: dict[str, Any] = field(default_factory=dict)
    """Additional fields of the task's input."""


def task_of(site: RoundSite, scene: str, task_id: str, path: TaskPath) -> dict[str, Any]:
    """The task's input as JSON."""
    common = {"task_id": task_id, "tenant_id": TENANT, "user_id": USER}
    if scene == "image":
        return {**common, "template_id": "text-to-image", "prompt": "a lighthouse at dusk", **path.fields}
    return {
        **common,
        "template_id": "lora-train",
        "dataset": {"dataset_id": "faces", "source_uri": site.dataset().as_uri()},
        "hyperparameters": {"epochs": 2, "batch_size": 1, "learning_rate": 0.001},
        "max_credits": 2_000,
        **path.fields,
    }


# Job states that the simulator reports


async def _stall(site: RoundSite, task_id: str) -> None:
    await site.admin.comfyui.fault("job_stall", task_id=task_id, at=0.6)


async def _fail(site: RoundSite, task_id: str) -> None:
    await site.admin.comfyui.fault("job_fail", task_id=task_id, code="node_error", at=0.6)


async def _preempt(site: RoundSite, task_id: str) -> None:
    await site.admin.comfyui.fault("job_preempt", task_id=task_id, at=0.6)


async def _preempt_then_dearer(site: RoundSite, task_id: str) -> None:
    await _preempt(site, task_id)
    reply = {"estimated_cost": DEARER_POINTS}
    await site.admin.comfyui.fault("job_lie", task_id=task_id, route="submit_job", nth=2, reply=reply)


async def _withhold(site: RoundSite, task_id: str) -> None:
    await site.admin.comfyui.fault("callback_withhold", task_id=task_id, times=None)


# Where a task is


async def _works(site: RoundSite, task_id: str) -> bool:
    """Its credits are held and its stalled job is past its beginning."""
    row = await site.row(task_id)
    if row is None or row.stage not in ("processing", "training") or not row.credits.held:
        return False
    return await _is_quiet(site, task_id)


async def _is_quiet(site: RoundSite, task_id: str) -> bool:
    described = (await site.handle(task_id).describe()).raw_description
    return not described.pending_activities and not described.HasField("pending_workflow_task")


async def _asks(site: RoundSite, task_id: str) -> bool:
    row = await site.row(task_id)
    return row is not None and row.confirmation is not None and await _is_quiet(site, task_id)


async def _waits_for_retry(site: RoundSite, task_id: str) -> bool:
    return any((event.message or "").startswith("Attempt 1 ended") for event in await site.store.events(task_id))


async def until_works(site: RoundSite, task_id: str) -> None:
    await until(lambda: _works(site, task_id), f"{task_id} works", seconds=LEAD_SECONDS)


# What happens to it

_pending: Final[set[asyncio.Future[Any]]] = set()


async def ask_to_cancel(site: RoundSite, task_id: str) -> None:
    """By the update; its answer is not awaited, since no worker may be there to give it."""
    asking = asyncio.ensure_future(site.handle(task_id).execute_update("cancel_task", {"reason": "no longer wanted"}))
    _pending.add(asking)
    asking.add_done_callback(_forget)


def _forget(asking: asyncio.Future[Any]) -> None:
    _pending.discard(asking)
    if not asking.cancelled():
        asking.exception()


async def _cancel(site: RoundSite, task_id: str) -> None:
    await until_works(site, task_id)
    await ask_to_cancel(site, task_id)


async def _expire(site: RoundSite, task_id: str) -> None:
    await until_works(site, task_id)
    row = await site.row(task_id)
    assert row is not None
    for pre_deduct_id in row.credits.pre_deduct_ids:
        await site.end_hold(pre_deduct_id)
    await finish(site, task_id)


async def finish(site: RoundSite, task_id: str) -> None:
    """Deliver every open job of the task."""
    for run in await site.open_jobs(task_id):
        if run.phase != "idle":  # a training that was not started has nothing to deliver
            await site.admin.comfyui.act(run.run_id, "finish")


async def grow_dearer(site: RoundSite, task_id: str) -> None:
    for run in await site.open_jobs(task_id):
        await site.admin.comfyui.act(run.run_id, "gpu_hours", gpu_hours=DEARER_HOURS)


async def _work_then_dearer(site: RoundSite, task_id: str) -> None:
    await until_works(site, task_id)
    await grow_dearer(site, task_id)


async def _flood(site: RoundSite, task_id: str, first: int = 0, last: int = SIGNALS_UNTIL_CONTINUED) -> None:
    """Callbacks of an unknown job; all of them together make the run continue as new."""
    news = {"job_id": "unknown", "training_id": "unknown", "job_status": "queued", "training_status": "queued"}
    handle = site.handle(task_id)
    for sequence in range(first, last):
        await handle.signal(CALLBACK_SIGNAL, {**news, "sequence": sequence})


async def _is_continued(site: RoundSite, task_id: str) -> bool:
    info = (await site.handle(task_id).describe()).raw_description.workflow_execution_info
    return bool(info.first_run_id != info.execution.run_id)


async def _continue(site: RoundSite, task_id: str) -> None:
    await until_works(site, task_id)
    await _flood(site, task_id)
    await until(lambda: _is_continued(site, task_id), f"{task_id} is continued", seconds=LEAD_SECONDS)


async def _continue_then_deliver(site: RoundSite, task_id: str) -> None:
    await _continue(site, task_id)
    await finish(site, task_id)


async def _continue_then_cancel(site: RoundSite, task_id: str) -> None:
    await _continue(site, task_id)
    await ask_to_cancel(site, task_id)


async def _confirm(site: RoundSite, task_id: str) -> None:
    asking = asyncio.ensure_future(site.handle(task_id).execute_update("confirm_price", {"max_credits": 2_000}))
    _pending.add(asking)
    asking.add_done_callback(_forget)


async def _half_flood(site: RoundSite, task_id: str) -> None:
    await until_works(site, task_id)
    await _flood(site, task_id, last=SIGNALS_UNTIL_CONTINUED // 2)


async def _other_half(site: RoundSite, task_id: str) -> None:
    await _flood(site, task_id, first=SIGNALS_UNTIL_CONTINUED // 2)


PLAIN: Final = TaskPath("plain")
WAITING: Final = TaskPath("waiting", before=_stall, parked=_works)
POLLED: Final = TaskPath("polled", before=_withhold, fields={"options": {"poll_after_seconds": 0.5}})
CANCELLED: Final = TaskPath("cancelled", TaskStatus.CANCELLED, before=_stall, lead=_cancel)
FAILING: Final = TaskPath("failing", TaskStatus.FAILED, before=_fail)
RETRIED: Final = TaskPath("retried", jobs=2, before=_preempt)
TOPPED_UP: Final = TaskPath("topped up", jobs=2, before=_preempt_then_dearer)
RETRY_WAIT: Final = TaskPath("retried", jobs=2, before=_preempt, parked=_waits_for_retry)
EXPIRED: Final = TaskPath("expired", before=_stall, lead=_expire)
DEARER: Final = TaskPath("dearer", before=_stall, lead=_work_then_dearer)
CONFIRMING: Final = TaskPath("confirming", parked=_asks, after=_confirm, fields={"max_credits": None})
CONTINUED: Final = TaskPath("continued", before=_stall, lead=_continue, parked=_works)
CONTINUED_DELIVERED: Final = TaskPath("continued", before=_stall, lead=_continue_then_deliver)
CONTINUED_CANCELLED: Final = TaskPath("continued", TaskStatus.CANCELLED, before=_stall, lead=_continue_then_cancel)


def continuing(milliseconds: int) -> TaskPath:
    """The fault comes that long after the last of the messages that make it continue as new."""
    return TaskPath(
        "continuing",
        before=_stall,
        lead=_half_flood,
        parked=_works,
        approach=_other_half,
        milliseconds=milliseconds,
    )
