"""Scene → scope and tenant → tenant (contract §7)."""

from __future__ import annotations

import asyncio

from comfyui_temporal.contracts.permissions import REQUIRED_SCOPES, Operation
from proof.conformance.cases import case
from proof.conformance.subject import ALL_SCOPES, Subject, demand, new_task, refused


@case("each job route needs its scope, and every other scope is not it", needs_scopes=True)
async def job_routes_need_their_scope(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task)
    for method, path, operation, is_ours in (
        ("POST", "/jobs", Operation.CREATE_JOB, False),
        ("GET", f"/jobs/{job.job_id}", Operation.READ_COMFYUI, False),
        ("POST", f"/jobs/{job.job_id}/cancel", Operation.CANCEL_JOB, True),
        ("GET", "/gpus", Operation.READ_COMFYUI, True),
    ):
        others = ALL_SCOPES - {REQUIRED_SCOPES[operation]}
        body, key = (subject.job_body(task), f"{task}:{operation}:1") if method == "POST" else (None, None)
        answer = await subject.send(method, path, body, key=key, scopes=others)
        refused(answer, "authorization_missing", is_ours=is_ours)
    state = await subject.ended_job(job.job_id)
    demand(state.has_succeeded(), f"a cancel without its scope took effect: {state.error_details}")


@case("each training route needs its scope, and every other scope is not it", needs_scopes=True, trains=True)
async def training_routes_need_their_scope(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    path = f"/training/{training.training_id}"
    for method, where, operation, is_ours in (
        ("POST", "/training", Operation.CREATE_TRAINING, False),
        ("GET", path, Operation.READ_COMFYUI, False),
        ("POST", f"{path}/start", Operation.START_TRAINING, True),
        ("POST", f"{path}/cancel", Operation.CANCEL_JOB, True),
    ):
        others = ALL_SCOPES - {REQUIRED_SCOPES[operation]}
        body, key = (subject.training_body(task), f"{task}:{operation}:1") if method == "POST" else (None, None)
        answer = await subject.send(method, where, body, key=key, scopes=others)
        refused(answer, "authorization_missing", is_ours=is_ours)
    demand(not (await subject.training(training.training_id)).has_ended(), "a cancel without its scope took effect")


@case("a stranger's job is an unknown job, and nothing reaches it", needs_scopes=True)
async def a_strangers_job_is_unknown(subject: Subject) -> None:
    task = new_task()
    job = await subject.submit(task)
    stranger = subject.stranger
    refused(await subject.get(f"/jobs/{job.job_id}", person=stranger), "job_not_found")
    answer = await subject.post(f"/jobs/{job.job_id}/cancel", {}, f"{task}:cancel:1", person=stranger)
    refused(answer, "job_not_found", is_ours=True)
    state = await subject.ended_job(job.job_id)
    demand(state.has_succeeded(), f"another tenant's cancel took effect: {state.error_details}")


@case("a stranger's training is an unknown training, and nothing reaches it", needs_scopes=True, trains=True)
async def a_strangers_training_is_unknown(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    path, stranger = f"/training/{training.training_id}", subject.stranger
    refused(await subject.get(path, person=stranger), "training_not_found")
    for step in ("start", "cancel"):
        answer = await subject.post(f"{path}/{step}", {}, f"{task}:{step}:1", person=stranger)
        refused(answer, "training_not_found", is_ours=True)
    demand(not (await subject.training(training.training_id)).has_ended(), "another tenant's cancel took effect")


@case("a body that names another tenant or user than the token is refused", needs_scopes=True)
async def a_body_names_the_tokens_person(subject: Subject) -> None:
    task = new_task()
    for number, change in enumerate(
        ({"tenant_id": subject.stranger.tenant_id}, {"user_id": subject.stranger.user_id}), start=1
    ):
        body = subject.job_body(task, **change)
        refused(await subject.post("/jobs", body, f"{task}:submit:{number}"), "authorization_missing")


@case("a training that names another tenant or user than the token is refused", needs_scopes=True, trains=True)
async def a_training_names_the_tokens_person(subject: Subject) -> None:
    task = new_task()
    for number, change in enumerate(
        ({"tenant_id": subject.stranger.tenant_id}, {"user_id": subject.stranger.user_id}), start=1
    ):
        body = subject.training_body(task, **change)
        refused(await subject.post("/training", body, f"{task}:submit:{number}"), "authorization_missing")


@case("a job is no training, and a training is no job", trains=True)
async def jobs_and_trainings_are_apart(subject: Subject) -> None:
    job, training = await asyncio.gather(subject.submit(new_task()), subject.create(new_task()))
    refused(await subject.get(f"/training/{job.job_id}"), "training_not_found")
    refused(await subject.get(f"/jobs/{training.training_id}"), "job_not_found")
