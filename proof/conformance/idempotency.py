"""Idempotency keys of POSTs (contract §2, §4): the first answer again for the same key and body."""

from __future__ import annotations

import asyncio

from comfyui_temporal.contracts.comfyui import JobAccepted, JobState, TrainingAccepted
from proof.conformance.cases import case
from proof.conformance.subject import Subject, accepted, answered, demand, new_task, read, refused


@case("the same key and body, fields in another order, gives the first answer again")
async def a_repeat_gives_the_first_answer(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task)
    first = answered(await subject.post("/jobs", body, f"{task}:submit:1"), 202)
    await subject.ended_job(first["job_id"])
    again = answered(await subject.post("/jobs", dict(reversed(body.items())), f"{task}:submit:1"), 202)
    demand(again == first, f"the first answer was {first}, the repeat's {again}")


@case("the same key and body many times at once makes one job")
async def repeats_at_once_make_one_job(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task)
    answers = await asyncio.gather(*(subject.post("/jobs", body, f"{task}:submit:1") for _ in range(5)))
    ids = {accepted(answer, JobAccepted).job_id for answer in answers}
    demand(len(ids) == 1, f"one key made {len(ids)} jobs")


@case("the same key with another body is a conflict, and the first job stays")
async def another_body_is_a_conflict(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task, prompt="one")
    answer = await subject.post("/jobs", subject.job_body(task, prompt="another"), f"{task}:submit:1")
    refused(answer, "idempotency_conflict")
    demand((await subject.job(job.job_id)).job_id == job.job_id, "the first job is gone")


@case("the next attempt's key makes the next job of the same task")
async def another_key_makes_another_job(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task)
    answers = [await subject.post("/jobs", body, f"{task}:submit:{attempt}") for attempt in (1, 2)]
    ids = {accepted(answer, JobAccepted).job_id for answer in answers}
    demand(len(ids) == 2, "two keys made one job")


@case("keys belong to their tenant", needs_scopes=True)
async def keys_belong_to_their_tenant(subject: Subject) -> None:
    task = new_task()
    mine = await subject.submit(task)
    stranger = subject.stranger
    body = subject.job_body(task, tenant_id=stranger.tenant_id, user_id=stranger.user_id)
    answer = await subject.post("/jobs", body, f"{task}:submit:1", person=stranger)
    demand(accepted(answer, JobAccepted).job_id != mine.job_id, "two tenants' same key made one job")


@case("a definite refusal is kept under its key")
async def a_refusal_is_kept(subject: Subject) -> None:
    task = new_task()
    bad = subject.job_body(task, template_id="no-such-template")
    for _ in range(2):
        refused(await subject.post("/jobs", bad, f"{task}:submit:1"), "template_not_found")
    refused(await subject.post("/jobs", subject.job_body(task), f"{task}:submit:1"), "idempotency_conflict")
    accepted(await subject.post("/jobs", subject.job_body(task), f"{task}:submit:2"), JobAccepted)


@case("a request without a token leaves the key free")
async def a_missing_token_frees_the_key(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task)
    answer = await subject.post("/jobs", body, f"{task}:submit:1", authorization="Bearer x.y.z")
    demand(answer.status_code in (401, 403), f"expected 401 or 403, got {answer.status_code}")
    accepted(await subject.post("/jobs", body, f"{task}:submit:1"), JobAccepted)


@case("one key cancels one job, not two")
async def one_key_cancels_one_job(subject: Subject) -> None:
    task = new_task()
    body = subject.job_body(task)
    answers = [await subject.post("/jobs", body, f"{task}:submit:{attempt}") for attempt in (1, 2)]
    first, second = (accepted(answer, JobAccepted).job_id for answer in answers)
    key = f"{task}:cancel:1"
    read(await subject.post(f"/jobs/{first}/cancel", {}, key), JobState, is_ours=True)
    refused(await subject.post(f"/jobs/{second}/cancel", {}, key), "idempotency_conflict")


@case("a training that is created twice under one key is one training", trains=True)
async def a_training_is_created_once(subject: Subject) -> None:
    task = new_task()
    body = subject.training_body(task)
    answers = [await subject.post("/training", body, f"{task}:submit:1") for _ in range(2)]
    ids = {accepted(answer, TrainingAccepted).training_id for answer in answers}
    demand(len(ids) == 1, f"one key made {len(ids)} trainings")
    other = subject.training_body(task, priority="accelerated")
    refused(await subject.post("/training", other, f"{task}:submit:1"), "idempotency_conflict")
