"""A run's history as the simulated server keeps it, and the part that remains when the run is reset."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from temporalio.api.common.v1 import Payload

from proof.simulation.calls import Call, Resolution
from proof.simulation.hosted_run import Activation, HostedRun, RunIdentity, TaskFailed
from proof.simulation.sdk import WorkflowActivationJob, WorkflowCommand, activation_api
from proof.simulation.timeline import Scheduled
from proof.simulation.trace import command_text, job_text

CLOSING: Final = frozenset(
    {
        "complete_workflow_execution",
        "fail_workflow_execution",
        "cancel_workflow_execution",
        "continue_as_new_workflow_execution",
    }
)
_REAPPLIED: Final = ("signal_workflow", "do_update", "cancel_workflow")
"""Messages that arrived after the point of the reset are sent to the run again."""


@dataclass
class Recorded:
    """One activation in the history, and what was answered to it. `begins_task`: the first one of its workflow task."""

    activation: Activation
    answered: list[WorkflowCommand]
    prints: list[bytes] = field(default_factory=list)
    begins_task: bool = True


@dataclass
class OpenTask:
    """A workflow task that a worker has taken up and not yet answered."""

    jobs: list[WorkflowActivationJob]
    busy: set[str] = field(default_factory=set)
    recorded: list[Recorded] = field(default_factory=list)
    commands: list[WorkflowCommand] = field(default_factory=list)
    unsent: list[Call] = field(default_factory=list)
    """Activities that the run scheduled and called off in this task."""
    heartbeat: Scheduled | None = None

    @property
    def is_closing(self) -> bool:
        return any(command.WhichOneof("variant") in CLOSING for command in self.commands)


@dataclass
class Closed:
    """How the last run ended: completed, failed, cancelled; with its result or failure."""

    how: str
    result: Payload | None = None
    failure: Any = None


@dataclass
class PastRun:
    """A run of the task that is over, or is being reset. `called`: its activities, by their number."""

    identity: RunIdentity
    history: list[Recorded]
    called: dict[int, Call]
    flags: set[int]
    unrecorded: list[WorkflowActivationJob] = field(default_factory=list)
    """Messages that had been sent to it and were not in its history yet."""

    def cuts(self) -> list[int]:
        """Where it can be reset to: before each of its workflow tasks."""
        return [index for index, recorded in enumerate(self.history) if recorded.begins_task]

    def cut(self, index: int) -> PastRun:
        """The run as it was when that workflow task began, and the messages that were sent since."""
        kept, begun, later = self.history[:index], self.history[index], self.history[index + 1 :]
        since = [job for recorded in later for job in recorded.activation.jobs] + self.unrecorded
        again = [job for job in since if job.WhichOneof("variant") in _REAPPLIED]
        scheduled = {seq for recorded in kept for seq in _scheduled(recorded.answered)}
        called = {seq: call for seq, call in self.called.items() if seq in scheduled}
        # A local activity's result is recorded with its task, and this task is discarded.
        brought = [job for job in begun.activation.jobs if not (_is_resolved(job) and job.resolve_activity.is_local)]
        return PastRun(self.identity, kept, called, self.flags, [*brought, *again])

    def open_calls(self) -> list[WorkflowCommand]:
        """The activities that it waits for, in the order in which they were scheduled."""
        ended = {job.resolve_activity.seq for job in self._jobs() if job.HasField("resolve_activity")}
        return [
            command
            for command in self._commands()
            if command.HasField("schedule_activity") and command.schedule_activity.seq not in ended
        ]

    def cancelled_calls(self) -> set[int]:
        """Those whose cancellation it has requested."""
        return {c.request_cancel_activity.seq for c in self._commands() if c.HasField("request_cancel_activity")}

    def open_timers(self) -> list[tuple[float, WorkflowCommand]]:
        """The timers that it waits for, and when each was started."""
        ended = {job.fire_timer.seq for job in self._jobs() if job.HasField("fire_timer")}
        ended |= {command.cancel_timer.seq for command in self._commands() if command.HasField("cancel_timer")}
        return [
            (recorded.activation.at, command)
            for recorded in self.history
            for command in recorded.answered
            if command.HasField("start_timer") and command.start_timer.seq not in ended
        ]

    def search_attributes(self) -> dict[str, bytes]:
        stated: dict[str, bytes] = {}
        for command in self._commands():
            if command.HasField("upsert_workflow_search_attributes"):
                fields = command.upsert_workflow_search_attributes.search_attributes.indexed_fields
                stated.update({name: payload.data for name, payload in fields.items()})
        return stated

    def _commands(self) -> list[WorkflowCommand]:
        return [command for recorded in self.history for command in recorded.answered]

    def _jobs(self) -> list[WorkflowActivationJob]:
        return [job for recorded in self.history for job in recorded.activation.jobs] + self.unrecorded


def _is_resolved(job: WorkflowActivationJob) -> bool:
    return job.HasField("resolve_activity")


def _scheduled(commands: list[WorkflowCommand]) -> list[int]:
    both = (
        (command.schedule_activity if command.HasField("schedule_activity") else command.schedule_local_activity)
        for command in commands
        if command.HasField("schedule_activity") or command.HasField("schedule_local_activity")
    )
    return [scheduled.seq for scheduled in both]


def in_order(jobs: list[WorkflowActivationJob]) -> list[WorkflowActivationJob]:
    """As the core orders them: the start, signals and updates, then everything else; each in order of arrival."""

    def rank(job: WorkflowActivationJob) -> int:
        if job.HasField("initialize_workflow"):
            return 0
        return 1 if job.HasField("signal_workflow") or job.HasField("do_update") else 2

    return sorted(jobs, key=rank)


def resolved(call: Call, resolution: Resolution) -> WorkflowActivationJob:
    return WorkflowActivationJob(
        resolve_activity=activation_api.ResolveActivity(seq=call.seq, result=resolution, is_local=call.is_local)
    )


def with_patches(recorded: Recorded) -> Activation:
    """The same activation, with the patches whose markers its answer wrote into the history."""
    markers = [c.set_patch_marker.patch_id for c in recorded.answered if c.HasField("set_patch_marker")]
    notices = [WorkflowActivationJob(notify_has_patch=activation_api.NotifyHasPatch(patch_id=name)) for name in markers]
    return replace(recorded.activation, jobs=(*notices, *recorded.activation.jobs))


def fingerprint(command: WorkflowCommand) -> bytes:
    return command.SerializeToString(deterministic=True)


def replayed(history: list[Recorded], hosted: HostedRun, flags: set[int]) -> list[WorkflowCommand]:
    """Bring a run back into memory; its local activities that have no result. Raises TaskFailed where it differs."""
    unresolved: dict[int, WorkflowCommand] = {}
    for recorded in history:
        for job in recorded.activation.jobs:
            if job.HasField("resolve_activity") and job.resolve_activity.is_local:
                unresolved.pop(job.resolve_activity.seq, None)
        commands = hosted.activate(with_patches(recorded), flags=sorted(flags), is_replaying=True)
        if [fingerprint(command) for command in commands] != recorded.prints:
            raise TaskFailed(
                f"nondeterministic: {[command_text(c) for c in commands]} instead of "
                f"{[command_text(c) for c in recorded.answered]} to "
                f"{[job_text(job) for job in recorded.activation.jobs]}"
            )
        for command in commands:
            if command.HasField("schedule_local_activity"):
                unresolved[command.schedule_local_activity.seq] = command
    return list(unresolved.values())
