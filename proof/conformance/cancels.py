"""Cancelling jobs (contract §2): idempotent, that job only, and an ended job does not change."""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.comfyui import JobState, JobStatus
from comfyui_temporal.contracts.errors import FailureCode
from proof.conformance.cases import case
from proof.conformance.subject import Broken, Subject, demand, new_task

_TRIES: Final = 20
"""A job may be over before the cancel reaches it: then another is tried."""


def demand_cancelled(state: JobState) -> None:
    code = state.error_details.code if state.error_details else None
    demand(code == FailureCode.CANCELLED, f"{state.job_id} ended with {code!r} instead of cancelled")
    demand(state.job_status is not JobStatus.DELIVERY, f"{state.job_id} is cancelled and delivered")
    demand(state.result_urls == [], f"{state.job_id} is cancelled and hands out results")


@case("a cancelled job ends as cancelled, whether it was queued or running, and stays so")
async def a_cancelled_job_ends(subject: Subject) -> None:
    for _ in range(_TRIES):
        task = new_task()
        job = await subject.submit(task)
        await subject.cancel_job(task, job.job_id)
        state = await subject.ended_job(job.job_id)
        if not state.has_succeeded():
            demand_cancelled(state)
            demand_cancelled(await subject.cancel_job(task, job.job_id, 2))
            demand(await subject.job(job.job_id) == state, "the state changed after the end")
            return
    raise Broken(f"none of {_TRIES} jobs could be cancelled before it was delivered")


@case("a running job is cancelled, and its neighbour is not")
async def only_the_named_job_is_cancelled(subject: Subject) -> None:
    for _ in range(_TRIES):
        task, other_task = new_task(), new_task()
        job, other = await subject.submit(task), await subject.submit(other_task)

        def is_beyond_the_queue(state: JobState) -> bool:
            return state.job_status is not JobStatus.QUEUED

        await subject.until(lambda job=job: subject.job(job.job_id), is_beyond_the_queue, "processing")  # type: ignore[misc]
        await subject.cancel_job(task, job.job_id)
        state = await subject.ended_job(job.job_id)
        neighbour = await subject.ended_job(other.job_id)
        demand(neighbour.has_succeeded(), f"the neighbour {other.job_id} ended as {neighbour.error_details}")
        if not state.has_succeeded():
            demand_cancelled(state)
            return
    raise Broken(f"none of {_TRIES} jobs could be cancelled while it was running")


@case("a delivered job stays delivered when it is cancelled")
async def a_delivered_job_stays(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task)
    before = await subject.ended_job(job.job_id)
    demand(before.has_succeeded(), f"job {job.job_id} ended as {before.error_details}")
    for n in (1, 2):
        after = await subject.cancel_job(task, job.job_id, n)
        demand(after.has_succeeded() and after == before, f"the cancel changed it to {after}")
