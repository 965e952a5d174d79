"""Trainings (contract §3): queued until they are started, stages in order, checkpoints that can be resumed."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from comfyui_temporal.contracts.comfyui import TrainingCallback, TrainingStage, TrainingState, TrainingStatus
from comfyui_temporal.contracts.errors import FailureCode, sentences_of
from proof.conformance.callbacks import demand_genuine
from proof.conformance.cases import case
from proof.conformance.subject import Broken, Subject, demand, new_task, refused

if TYPE_CHECKING:
    from proof.conformance.receiver import Arrival

_STAGES: Final = list(TrainingStage)
_TRIES: Final = 10


@case("a training is accepted as queued, and stays so until it is started", trains=True)
async def a_training_waits_for_its_start(subject: Subject) -> None:
    training = await subject.create(new_task())
    demand(training.training_status is TrainingStatus.QUEUED, f"accepted as {training.training_status}")
    demand(training.gpu_hours > 0, f"gpu_hours is {training.gpu_hours}")
    demand(training.estimated_time is not None and training.estimated_time > 0, "it has no estimated_time")
    await asyncio.sleep(subject.profile.quiet_seconds)
    state = await subject.training(training.training_id)
    demand(state.training_status is TrainingStatus.QUEUED, f"it was not started, and it is {state.training_status}")
    demand(not state.gpu_hours_used, f"it was not started, and it has used {state.gpu_hours_used} GPU hours")


@case("a started training goes through its stages in order and ends with a model", trains=True)
async def a_training_is_trained(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    await subject.start(task, training.training_id)
    state = await subject.ended_training(training.training_id)
    demand(state.has_succeeded(), f"training {training.training_id} ended as {state.failure()}")
    received = await _received(subject, task)
    stages = [one.training_stage for one in received if one.training_stage is not None]
    demand(list(dict.fromkeys(stages)) == _STAGES, f"reported stages: {list(dict.fromkeys(stages))}")
    order = [_STAGES.index(stage) for stage in stages]
    demand(order == sorted(order), f"a stage went back: {stages}")
    for before, after in itertools.pairwise(received):
        demand((after.gpu_hours_used or 0) >= (before.gpu_hours_used or 0), "gpu_hours_used fell")
        if after.training_stage == before.training_stage:
            demand((after.stage_progress or 0) >= (before.stage_progress or 0), "progress fell within a stage")
    demand((state.gpu_hours_used or 0) > 0, f"gpu_hours_used is {state.gpu_hours_used}")


@case("callbacks report its checkpoints and its log", trains=True)
async def checkpoints_and_log_are_told(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    await subject.start(task, training.training_id)
    await subject.ended_training(training.training_id)
    received = await _received(subject, task)
    epochs = [one.checkpoint.epoch or 0 for one in received if one.checkpoint is not None]
    demand(epochs and epochs == sorted(epochs), f"checkpoints of epochs {epochs}")
    lines = [line for one in received for line in one.log]
    demand(lines, "no callback has a log line")
    checkpointing = [one for one in received if one.training_status is TrainingStatus.CHECKPOINTING]
    demand(checkpointing, "no callback says that it is checkpointing")


@case("a training that is started twice is trained once", trains=True)
async def a_training_is_started_once(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    for n in (1, 1, 2):
        await subject.start(task, training.training_id, n)
    state = await subject.ended_training(training.training_id)
    demand(state.has_succeeded(), f"training {training.training_id} ended as {state.failure()}")
    again = await subject.start(task, training.training_id, 3)
    demand(again.has_succeeded(), f"a start after the end made it {again.training_status}")


@case("a training that is cancelled before its start ends as cancelled, and no start revives it", trains=True)
async def an_idle_training_is_cancelled(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    await subject.cancel_training(task, training.training_id)
    _demand_cancelled(await subject.ended_training(training.training_id))
    _demand_cancelled(await subject.start(task, training.training_id))


@case("a running training is cancelled", trains=True)
async def a_running_training_is_cancelled(subject: Subject) -> None:
    for _ in range(_TRIES):
        task = new_task()
        training = await subject.create(task, hyperparameters={"epochs": 50, "batch_size": 1, "learning_rate": 0.001})
        await subject.start(task, training.training_id)
        await subject.until(
            lambda training=training: subject.training(training.training_id),  # type: ignore[misc]
            lambda state: state.training_status is not TrainingStatus.QUEUED,
            "running",
        )
        await subject.cancel_training(task, training.training_id)
        state = await subject.ended_training(training.training_id)
        if not state.has_succeeded():
            _demand_cancelled(state)
            return
    raise Broken(f"none of {_TRIES} trainings could be cancelled while it was running")


@case("a training is resumed from a checkpoint of its own tenant, and of no other", needs_scopes=True, trains=True)
async def a_training_is_resumed(subject: Subject) -> None:
    task = new_task()
    training = await subject.create(task)
    await subject.start(task, training.training_id)
    checkpoint = (await subject.ended_training(training.training_id)).checkpoint
    if checkpoint is None:
        raise Broken("a completed training shows no checkpoint")
    person = subject.stranger
    other = new_task()
    theirs = subject.training_body(
        other, resume_from=checkpoint.uri, tenant_id=person.tenant_id, user_id=person.user_id
    )
    refused(await subject.post("/training", theirs, f"{other}:submit:1", person=person), "payload_invalid")
    epochs = subject.profile.epochs + 1
    more = {"epochs": epochs, "batch_size": 1, "learning_rate": 0.0001}
    again = new_task()
    resumed = await subject.create(again, resume_from=checkpoint.uri, hyperparameters=more)
    await subject.start(again, resumed.training_id)
    state = await subject.ended_training(resumed.training_id)
    demand(state.has_succeeded(), f"the resumed training ended as {state.failure()}")
    last = state.checkpoint.epoch if state.checkpoint else None
    demand(last == epochs, f"resumed up to epoch {last} instead of {epochs}")


def _demand_cancelled(state: TrainingState) -> None:
    code = state.error_details.code if state.error_details else None
    demand(code == FailureCode.CANCELLED, f"{state.training_id} ended with {code!r} instead of cancelled")
    demand(state.training_status is TrainingStatus.FAILED, f"{state.training_id} is {state.training_status}")


async def _received(subject: Subject, task: str) -> list[TrainingCallback]:
    """The arrivals up to the end, by their sequence."""

    async def look() -> list[Arrival]:
        return list(subject.receiver.of(task))

    def is_over(arrivals: list[Arrival]) -> bool:
        return any(arrival.body.get("training_status") == TrainingStatus.COMPLETED for arrival in arrivals)

    arrivals = await subject.until(look, is_over, "the callback that tells the end")
    demand_genuine(task, arrivals)
    try:
        received = [TrainingCallback.model_validate(arrival.body) for arrival in arrivals]
    except ValidationError as error:
        raise Broken(f"a callback is not the contract's: {'; '.join(sentences_of(error))}") from None
    return sorted(received, key=lambda one: one.sequence)
