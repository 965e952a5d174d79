"""Callbacks (contract §2): signed, in rising sequence, with what GET shows, repeated until they are taken."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from comfyui_temporal.contracts.comfyui import JobCallback, JobState, JobStatus
from comfyui_temporal.contracts.errors import FailureCode, sentences_of
from proof.conformance.cases import case
from proof.conformance.subject import Subject, demand, new_task

if TYPE_CHECKING:
    from proof.conformance.receiver import Arrival

_CLOCK_SKEW_SECONDS: Final = 300


def demand_genuine(task: str, arrivals: list[Arrival]) -> None:
    """Each is signed by Standard Webhooks with the present time, and names its task."""
    for arrival in arrivals:
        demand(not arrival.flaw, f"a callback is not genuine: {arrival.flaw}")
        demand(abs(int(arrival.timestamp) - time.time()) < _CLOCK_SKEW_SECONDS, f"stamped {arrival.timestamp}")
        demand(arrival.body.get("task_id") == task, f"a callback names task {arrival.body.get('task_id')!r}")


def _read(arrival: Arrival) -> JobCallback:
    try:
        return JobCallback.model_validate(arrival.body)
    except ValidationError as error:
        demand(False, f"a callback is not the contract's: {'; '.join(sentences_of(error))}")
        raise


async def _received(subject: Subject, task: str, status: JobStatus) -> list[Arrival]:
    """Every arrival, once one of them has this status."""

    async def look() -> list[Arrival]:
        return list(subject.receiver.of(task))

    def has(arrivals: list[Arrival]) -> bool:
        return any(arrival.body.get("job_status") == status for arrival in arrivals)

    return await subject.until(look, has, f"the callback {status}")


@case("a signed callback reports every state, as GET shows it, in rising sequence")
async def states_are_told(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task)
    arrivals = await _received(subject, task, JobStatus.DELIVERY)
    demand_genuine(task, arrivals)
    received = [_read(arrival) for arrival in arrivals]
    demand({callback.job_id for callback in received} == {job.job_id}, "a callback is about another job")
    demand(any(one.job_status is JobStatus.PROCESSING for one in received), "no callback says that it is processed")
    demand(all(one.occurred_at for one in received), "a callback lacks occurred_at")
    by_id = {arrival.webhook_id: callback for arrival, callback in zip(arrivals, received, strict=True)}
    sequences = sorted(callback.sequence for callback in by_id.values())
    demand(len(set(sequences)) == len(sequences), f"two callbacks share a sequence: {sequences}")
    last = max(received, key=lambda callback: callback.sequence)
    state = await subject.job(job.job_id)
    demand(JobState.model_validate(last.model_dump()) == state, f"the last callback says {last}, GET shows {state}")


@case("reported states only go forward with the sequence")
async def told_states_go_forward(subject: Subject) -> None:
    task = new_task()
    await subject.submit(task)
    arrivals = await _received(subject, task, JobStatus.DELIVERY)
    received = sorted((_read(arrival) for arrival in arrivals), key=lambda callback: callback.sequence)
    order = list(JobStatus)
    for before, after in itertools.pairwise(received):
        is_forward = order.index(after.job_status) >= order.index(before.job_status)
        demand(is_forward, f"sequence {after.sequence} tells {after.job_status} after {before.job_status}")


@case("a callback reports a cancel")
async def a_cancel_is_told(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task)
    state = await subject.cancel_job(task, job.job_id)
    if state.has_succeeded() or (await subject.ended_job(job.job_id)).has_succeeded():
        return

    async def look() -> list[Arrival]:
        return list(subject.receiver.of(task))

    def has(arrivals: list[Arrival]) -> bool:
        return any((a.body.get("error_details") or {}).get("code") == FailureCode.CANCELLED for a in arrivals)

    demand_genuine(task, await subject.until(look, has, "the callback that tells the cancel"))


@case("a callback that is answered 503 comes again, under its id with a new signature")
async def a_callback_is_repeated(subject: Subject) -> None:
    task = new_task()
    subject.receiver.answers[task] = [503]
    await subject.submit(task)

    async def look() -> list[Arrival]:
        arrivals = subject.receiver.of(task)
        return [one for one in arrivals if arrivals and one.webhook_id == arrivals[0].webhook_id]

    first, second = (await subject.until(look, lambda same: len(same) >= 2, "the repeat"))[:2]
    demand(first.raw == second.raw, "the repeat says something else")
    demand_genuine(task, [first, second])


@case("a callback that is answered 401, 404 or 413 does not come again")
async def a_refused_callback_is_not_repeated(subject: Subject) -> None:
    task = new_task()
    statuses = [401, 404, 413]
    subject.receiver.answers[task] = statuses * 20
    await subject.submit(task)
    await _received(subject, task, JobStatus.DELIVERY)
    await asyncio.sleep(subject.profile.quiet_seconds)
    ids = [arrival.webhook_id for arrival in subject.receiver.of(task)]
    demand(len(set(ids)) == len(ids), "a callback that was refused for good came again")


@case("a task whose callbacks are never taken harms no other, and is delivered")
async def refused_callbacks_harm_nobody(subject: Subject) -> None:
    lost, task = new_task(), new_task()
    subject.receiver.answers[lost] = [500] * 1000
    job = await subject.submit(lost)
    await subject.submit(task)
    await _received(subject, task, JobStatus.DELIVERY)
    state = await subject.ended_job(job.job_id)
    demand(state.has_succeeded(), f"job {job.job_id} ended as {state.error_details}")
