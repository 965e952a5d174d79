"""Image jobs from submission to delivery (contract §2)."""

from __future__ import annotations

import asyncio
import itertools
from typing import Final

from comfyui_temporal.contracts.comfyui import JobState, JobStatus
from proof.conformance.cases import case
from proof.conformance.subject import GLANCE_SECONDS, Broken, Subject, demand, new_task

ORDER: Final = (JobStatus.QUEUED, JobStatus.PROCESSING, JobStatus.DELIVERY)


@case("a submitted job is accepted as queued, with its id, minutes, slots and points")
async def a_job_is_accepted(subject: Subject) -> None:
    job = await subject.submit(new_task())
    demand(job.job_status in (JobStatus.QUEUED, JobStatus.PROCESSING), f"accepted as {job.job_status}")
    demand(job.estimated_time is not None and job.estimated_time > 0, f"estimated_time is {job.estimated_time}")
    demand(job.gpu_slots is not None and job.gpu_slots >= 1, f"gpu_slots is {job.gpu_slots}")
    known = await subject.job(job.job_id)
    demand(known.job_id == job.job_id, f"GET of {job.job_id} answers {known.job_id}")


@case("a larger picture and an accelerated job cost more")
async def prices_rise(subject: Subject) -> None:
    plain, larger, faster = await asyncio.gather(
        subject.submit(new_task(), resolution="sd"),
        subject.submit(new_task(), resolution="hd"),
        subject.submit(new_task(), resolution="sd", priority="accelerated"),
    )
    demand(0 < plain.estimated_cost < larger.estimated_cost, f"sd {plain.estimated_cost}, hd {larger.estimated_cost}")
    demand(plain.estimated_cost < faster.estimated_cost, f"accelerated costs {faster.estimated_cost}")


@case("a job goes forward from queued to delivery and never back, its sequence rising with every change")
async def a_job_goes_forward(subject: Subject) -> None:
    job_id = (await subject.submit(new_task())).job_id
    seen = [await subject.job(job_id)]
    async with asyncio.timeout(subject.profile.patience_seconds):
        while not seen[-1].has_ended():
            await asyncio.sleep(GLANCE_SECONDS)
            seen.append(await subject.job(job_id))
    demand(seen[-1].has_succeeded(), f"job {job_id} ended as {seen[-1].error_details}")
    for before, after in itertools.pairwise(seen):
        _demand_forward(before, after)


def _demand_forward(before: JobState, after: JobState) -> None:
    went_back = ORDER.index(after.job_status) < ORDER.index(before.job_status)
    demand(not went_back, f"{after.job_id} went from {before.job_status} back to {after.job_status}")
    if after.job_status == before.job_status:
        fell = (after.stage_progress or 0) < (before.stage_progress or 0)
        demand(not fell, f"{after.job_id}: progress fell from {before.stage_progress} to {after.stage_progress}")
    shown_before, shown_after = (state.model_dump(exclude={"sequence"}) for state in (before, after))
    if shown_before != shown_after:
        demand(after.sequence > before.sequence, f"{after.job_id} changed and its sequence stayed {after.sequence}")
    else:
        demand(after.sequence >= before.sequence, f"{after.job_id}: sequence fell to {after.sequence}")


@case("a delivered job hands out pictures that can be fetched, and stays as it is")
async def a_delivered_job_has_pictures(subject: Subject) -> None:
    job = await subject.submit(new_task())
    state = await subject.ended_job(job.job_id)
    demand(state.has_succeeded(), f"job {job.job_id} ended as {state.error_details}")
    demand(state.actual_cost is None or state.actual_cost >= 0, f"actual_cost is {state.actual_cost}")
    demand(await subject.job(job.job_id) == state, "the state changed after the end")
    for url in state.result_urls:
        kind, size = await subject.fetched(url)
        demand(kind.startswith("image/"), f"{url} is {kind or 'of no type'}")
        demand(size > 0, f"{url} is empty")


@case("no result url and no cost is shown before delivery")
async def nothing_is_handed_out_early(subject: Subject) -> None:
    job = await subject.submit(new_task())
    state = await subject.job(job.job_id)
    if state.job_status is not JobStatus.DELIVERY:
        demand(state.result_urls == [], f"{job.job_id} shows results while it is {state.job_status}")


@case("a queued job says about how many are ahead, or null")
async def queue_position_is_a_count(subject: Subject) -> None:
    jobs = await asyncio.gather(*(subject.submit(new_task()) for _ in range(3)))
    for state in await asyncio.gather(*(subject.job(job.job_id) for job in jobs)):
        position = state.queue_position
        demand(position is None or position >= 0, f"queue_position is {position}")
        if state.job_status is not JobStatus.QUEUED and position is not None:
            raise Broken(f"{state.job_id} is {state.job_status} and still has queue_position {position}")
