"""One workflow run in a worker's memory: temporalio's own runner, with activations from us instead of from its core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.common import MetricMeter, Priority, TypedSearchAttributes
from temporalio.worker import UnsandboxedWorkflowRunner

from comfyui_temporal.contracts.tasks import TASK_QUEUE
from comfyui_temporal.plugin import DATA_CONVERTER
from proof.simulation.sdk import (
    WorkflowActivation,
    WorkflowActivationJob,
    WorkflowCommand,
    WorkflowInstance,
    WorkflowInstanceDetails,
    activation_api,
    payload_converter_factory,
    workflow_definition,
)
from workflows.image_generation import ImageGenerationWorkflow
from workflows.training import TrainingWorkflow

CONVERTER: Final = DATA_CONVERTER.payload_converter
DEFINITIONS: Final = {
    definition.name: definition for definition in map(workflow_definition, (ImageGenerationWorkflow, TrainingWorkflow))
}
_EXTERN_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "__temporal_assert_local_activity_valid": lambda _name: None,
    "__temporal_get_metric_meter": lambda: MetricMeter.noop,
}
_RUNNER: Final = UnsandboxedWorkflowRunner()
_OUTER_LOOP: Final = asyncio.new_event_loop()
"""This loop never runs: an instance only reads which loop it is created under."""


class TaskFailed(Exception):
    """A workflow task failed: on a real server the run would be stuck, failing again and again."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run's first event fixes."""

    workflow_type: str
    workflow_id: str
    run_id: str
    first_run_id: str
    continued_run_id: str | None
    arguments: tuple[Payload, ...]
    started_at: float
    randomness_seed: int

    def first_job(self) -> WorkflowActivationJob:
        return WorkflowActivationJob(
            initialize_workflow=activation_api.InitializeWorkflow(
                workflow_type=self.workflow_type,
                workflow_id=self.workflow_id,
                arguments=self.arguments,
                randomness_seed=self.randomness_seed,
                attempt=1,
            )
        )


@dataclass(frozen=True)
class Activation:
    """Jobs that the run is activated with at one time."""

    jobs: tuple[WorkflowActivationJob, ...]
    at: float
    history_length: int


class HostedRun:
    """A run in memory. `activate` raises TaskFailed; `evict` must follow before it is dropped."""

    def __init__(self, identity: RunIdentity) -> None:
        self._run_id = identity.run_id
        self.flags: set[int] = set()
        self._instance = _made(_details(identity))

    def activate(
        self, activation: Activation, *, flags: Sequence[int], is_replaying: bool = False
    ) -> list[WorkflowCommand]:
        """The commands that the run answers with."""
        message = WorkflowActivation(
            run_id=self._run_id,
            is_replaying=is_replaying,
            history_length=activation.history_length,
            available_internal_flags=flags,
            jobs=activation.jobs,
        )
        message.timestamp.FromNanoseconds(int(activation.at * 1e9))
        completion = self._instance.activate(message)
        if completion.HasField("failed"):
            raise TaskFailed(_failure_text(completion.failed.failure))
        self.flags.update(completion.successful.used_internal_flags)
        return list(completion.successful.commands)

    def evict(self, at: float) -> None:
        """End every coroutine. Raises TaskFailed where one cannot be ended (pitfall 36)."""
        message = WorkflowActivation(run_id=self._run_id, is_replaying=True)
        message.jobs.add().remove_from_cache.SetInParent()
        message.timestamp.FromNanoseconds(int(at * 1e9))
        try:
            self._instance.activate(message)
        except RuntimeError as error:
            raise TaskFailed(f"the run could not be evicted: {str(error).splitlines()[0]}") from error


def payload_of(value: Any) -> Payload:
    [payload] = CONVERTER.to_payloads([value])
    return payload


def _made(details: WorkflowInstanceDetails) -> WorkflowInstance:
    asyncio._set_running_loop(_OUTER_LOOP)
    try:
        return _RUNNER.create_instance(details)
    finally:
        asyncio._set_running_loop(None)


def _details(identity: RunIdentity) -> WorkflowInstanceDetails:
    return WorkflowInstanceDetails(
        payload_converter_factory=payload_converter_factory(DATA_CONVERTER),
        failure_converter_class=DATA_CONVERTER.failure_converter_class,
        interceptor_classes=[],
        defn=DEFINITIONS[identity.workflow_type],
        info=_info(identity),
        randomness_seed=identity.randomness_seed,
        extern_functions=_EXTERN_FUNCTIONS,
        disable_eager_activity_execution=True,
        worker_level_failure_exception_types=[],
        patch_activation_callback=None,
        last_completion_result=Payloads(),
        last_failure=None,
    )


def _info(identity: RunIdentity) -> workflow.Info:
    started = datetime.fromtimestamp(identity.started_at, UTC)
    return workflow.Info(
        attempt=1,
        continued_run_id=identity.continued_run_id,
        cron_schedule=None,
        execution_timeout=None,
        first_execution_run_id=identity.first_run_id,
        headers={},
        namespace="default",
        original_execution_run_id=identity.run_id,
        parent=None,
        root=None,
        priority=Priority(),
        raw_memo={},
        retry_policy=None,
        run_id=identity.run_id,
        run_timeout=None,
        search_attributes={},
        start_time=started,
        task_queue=TASK_QUEUE,
        task_timeout=timedelta(seconds=3),
        typed_search_attributes=TypedSearchAttributes([]),  # the run changes it in place
        workflow_id=identity.workflow_id,
        workflow_start_time=started,
        workflow_type=identity.workflow_type,
    )


def _failure_text(failure: Any) -> str:
    """A failure with its causes and where it was raised."""
    parts = []
    while failure.ByteSize():
        where = failure.stack_trace.strip().splitlines()
        parts.append(f"{failure.message} {' | '.join(line.strip() for line in where[-4:])}")
        failure = failure.cause
    return " <- ".join(parts)
