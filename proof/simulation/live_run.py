"""One run as server and worker execute it: its workflow tasks, timers and calls.

1. What arrives while a workflow task is open waits for the next one.
2. A task stays open while local activities run, for 2.4 s at most; then its commands are recorded, and the next begins.
3. A task's commands count once the server has recorded them. A worker that is killed before leaves only the effects of
   its local activities: the task is repeated, with what has arrived since.
4. A run does not close while messages wait: that task is discarded, and repeated with them.
5. A run that is not in memory is replayed; it must give the same commands.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from temporalio.api.common.v1 import Payload

from comfyui_temporal.contracts.size_budget import SERVER_PAYLOAD_BYTES
from proof.simulation.calls import Call, Calls, Resolution, cancelled
from proof.simulation.fault_schedule import FaultSchedule
from proof.simulation.history import (
    OpenTask,
    PastRun,
    Recorded,
    fingerprint,
    in_order,
    replayed,
    resolved,
)
from proof.simulation.hosted_run import Activation, HostedRun, RunIdentity, TaskFailed
from proof.simulation.parties import Parties
from proof.simulation.sdk import WorkflowActivationJob, WorkflowCommand, activation_api
from proof.simulation.timeline import Timeline
from proof.simulation.timers import Timers
from proof.simulation.trace import Trace, command_text, job_text
from proof.simulation.witness import Witness

TASK_SECONDS: Final = 3.0
OPEN_AT_MOST_SECONDS: Final = 0.8 * TASK_SECONDS
_EVENTS_OF_JOB: Final = {"resolve_activity": 2, "do_update": 2}


@dataclass
class Environment:
    """What all runs of a task share."""

    timeline: Timeline
    faults: FaultSchedule
    rng: random.Random
    parties: Parties
    trace: Trace
    witness: Witness = field(default_factory=Witness)
    worker_up_at: float = 0.0
    paused_until: float = 0.0
    tasks: int = 0
    """Workflow tasks that a worker took up; `discarded` are those whose outcome did not count."""
    discarded: int = 0
    replays: int = 0
    on_recorded: Callable[[list[WorkflowActivationJob], set[str]], None] = lambda _jobs, _busy: None
    """Called with every task that counts: its jobs, and the names of the calls that were open when it began."""
    on_scheduled: Callable[[Call], None] = lambda _call: None
    """Called with every visible activity that is scheduled."""


class LiveRun:
    """The run that is open. `apply` takes the commands that concern the workflow id rather than this run."""

    def __init__(
        self, environment: Environment, identity: RunIdentity, apply: Callable[[WorkflowCommand, str], None]
    ) -> None:
        self._environment = environment
        self._timeline, self._trace, self._parties = environment.timeline, environment.trace, environment.parties
        self.identity = identity
        self._apply = apply
        self.is_over = False
        """Closed, continued as new, or reset: nothing reaches it any more."""
        self._calls = Calls(
            environment.timeline,
            environment.faults,
            environment.rng,
            environment.parties,
            environment.trace,
            self._call_resolved,
            identity.run_id,
        )
        self._calls.worker_up_at = environment.worker_up_at
        self._hosted: HostedRun | None = None
        self._history: list[Recorded] = []
        self._flags: set[int] = set()
        self._events = 1
        self._timers = Timers(environment.timeline, self.receive)
        self._called: dict[int, Call] = {}
        self._locals: dict[int, Call] = {}
        self._task: OpenTask | None = None
        self._is_task_due = False
        self._cancel_requested = False
        self._waiting = [identity.first_job()]
        self._due()

    def restore(self, kept: PastRun) -> None:
        """Continue from the remaining part of a run that was reset: what it waited for then is begun again."""
        self._history, self._called, self._waiting = kept.history, kept.called, kept.unrecorded
        self._flags |= kept.flags
        self._events = 1 + sum(len(recorded.answered) + 3 for recorded in kept.history)
        self._cancel_requested = any(job.HasField("cancel_workflow") for job in kept.unrecorded)
        for began_at, command in kept.open_timers():
            self._timers.start(command.start_timer, began_at)
        cancelled_seqs = kept.cancelled_calls()
        for command in kept.open_calls():
            call = self._calls.schedule(command.schedule_activity, command.schedule_activity.arguments)
            self._called[call.seq] = call
            self._environment.witness.scheduled(call, call.scheduled_at)
            if call.seq in cancelled_seqs:
                self._calls.request_cancel(call.seq)

    def as_past(self) -> PastRun:
        sent = (self._task.jobs if self._task is not None else []) + self._waiting
        return PastRun(self.identity, self._history, self._called, self._flags, sent)

    # What is sent to it

    def receive(self, job: WorkflowActivationJob) -> None:
        if not self.is_over:
            self._waiting.append(job)
            self._due()

    def request_cancel(self, reason: str) -> None:
        """As a client requests it; a run receives it once."""
        if not self._cancel_requested:
            self._cancel_requested = True
            self.receive(WorkflowActivationJob(cancel_workflow=activation_api.CancelWorkflow(reason=reason)))

    def query(self, name: str) -> Payload | None:
        """The answer of a run in memory that is not at work; None: it would have to be replayed first."""
        if self._hosted is None or self._task is not None or self.is_over:
            return None
        job = WorkflowActivationJob(query_workflow=activation_api.QueryWorkflow(query_id="query", query_type=name))
        [command] = self._hosted.activate(
            Activation((job,), self._timeline.now, self._events), flags=sorted(self._flags)
        )
        if not command.respond_to_query.HasField("succeeded"):
            raise TaskFailed(f"the query {name} failed: {command.respond_to_query.failed.message}")
        return command.respond_to_query.succeeded.response

    # Faults

    def worker_killed(self) -> None:
        """Everything in memory is lost."""
        self._calls.worker_killed(self._environment.worker_up_at)
        self._lose_task()

    def evict(self) -> None:
        """The worker's cache is full: a run that is not at work is dropped from memory."""
        if self._task is None and self._hosted is not None:
            self._trace("evicted")
            self._drop()

    def stop(self) -> None:
        """It ends; calls in flight still act, and their outcomes are ignored."""
        self.is_over = True
        self._calls.forget_all()
        self._timers.cancel_all()
        if self._task is not None and self._task.heartbeat is not None:
            self._task.heartbeat.cancel()
        self._drop()

    def _lose_task(self) -> None:
        """The open task's completion never reaches the server, and the worker forgets the run."""
        for call in list(self._locals.values()):
            self._calls.forget(call)
        self._locals.clear()
        self._drop()
        if self._task is not None:
            self._environment.discarded += 1
            if self._task.heartbeat is not None:
                self._task.heartbeat.cancel()
            self._waiting = self._task.jobs + self._waiting
            self._task = None
            self._due()

    def _drop(self) -> None:
        if self._hosted is not None:
            hosted, self._hosted = self._hosted, None
            hosted.evict(self._timeline.now)

    # Workflow tasks

    def _due(self) -> None:
        if not self._is_task_due and self._task is None and not self.is_over:
            self._is_task_due = True
            delay = self._environment.faults.task_delay()
            begin = max(self._timeline.now + delay, self._environment.worker_up_at, self._environment.paused_until)
            self._timeline.at(begin, self._take_up_if_due)

    def _take_up_if_due(self) -> None:
        if self.is_over:
            return
        self._is_task_due = False
        if self._task is not None:
            return
        if self._timeline.now < max(self._environment.worker_up_at, self._environment.paused_until):
            self._due()
            return
        self._take_up()

    def _take_up(self) -> None:
        if self._hosted is None:
            self._replay()
        jobs, self._waiting = self._waiting, []
        self._environment.tasks += 1
        self._events += 2 + sum(_EVENTS_OF_JOB.get(str(job.WhichOneof("variant")), 1) for job in jobs)
        self._task = OpenTask(jobs, self._calls.names() | self._resolved_by(jobs))
        self._trace("TASK %d: %s", self._environment.tasks, lambda: ", ".join(map(job_text, jobs)) or "nothing")
        if self._locals:
            self._task.heartbeat = self._timeline.after(OPEN_AT_MOST_SECONDS, self._heartbeat)
        if jobs:
            self._activate(in_order(jobs))

    def _activate(self, jobs: list[WorkflowActivationJob]) -> None:
        assert self._hosted is not None
        assert self._task is not None
        activation = Activation(tuple(jobs), self._timeline.now, self._events)
        commands = self._hosted.activate(activation, flags=sorted(self._flags))
        self._task.recorded.append(Recorded(activation, commands))
        self._task.commands.extend(commands)
        for command in commands:
            self._trace("    -> %s", partial(command_text, command))
        self._start_locals(commands)
        unsent = self._cancelled_unsent(commands)
        if self._task.is_closing or (not self._locals and not unsent):
            self._answer()
        elif unsent:
            self._activate(unsent)
        elif self._task.heartbeat is None:
            self._task.heartbeat = self._timeline.after(OPEN_AT_MOST_SECONDS, self._heartbeat)

    def _start_locals(self, commands: list[WorkflowCommand]) -> None:
        for command in commands:
            if command.HasField("schedule_local_activity"):
                self._begin_local(command)
            elif command.HasField("request_cancel_local_activity"):
                self._calls.request_cancel(command.request_cancel_local_activity.seq)

    def _begin_local(self, command: WorkflowCommand) -> None:
        local = command.schedule_local_activity
        self._called[local.seq] = self._locals[local.seq] = self._calls.schedule(local, local.arguments)

    def _cancelled_unsent(self, commands: list[WorkflowCommand]) -> list[WorkflowActivationJob]:
        """An activity cancelled in the task that scheduled it is never sent; the same task reports it cancelled."""
        assert self._task is not None
        cancelled_seqs = {c.request_cancel_activity.seq for c in commands if c.HasField("request_cancel_activity")}
        unsent = [
            c.schedule_activity
            for c in self._task.commands
            if c.HasField("schedule_activity") and c.schedule_activity.seq in cancelled_seqs
        ]
        seqs = {scheduled.seq for scheduled in unsent}
        self._task.commands = [
            c
            for c in self._task.commands
            if not (c.HasField("schedule_activity") and c.schedule_activity.seq in seqs)
            and not (c.HasField("request_cancel_activity") and c.request_cancel_activity.seq in seqs)
        ]
        never = [
            Call.of(s, self._parties.argument_of(s.activity_type, s.arguments), self._timeline.now) for s in unsent
        ]
        for call in never:
            self._called[call.seq] = call
            call.scheduled_at = self._timeline.now
        self._task.unsent += never
        return [resolved(call, cancelled(call)) for call in never]

    def _heartbeat(self) -> None:
        """The task has been open for long: record its commands so far, and take what has arrived."""
        self._record()
        self._take_up()

    def _answer(self) -> None:
        assert self._task is not None
        if self._environment.faults.loses_task():
            self._trace("the task's outcome is lost")
            self._lose_task()
        elif self._task.is_closing and self._waiting:
            self._trace("the run would close over what has come: the task comes again")
            self._lose_task()
        else:
            self._record()
            if self._waiting:
                self._due()

    def _record(self) -> None:
        assert self._task is not None
        assert self._hosted is not None
        task, self._task = self._task, None
        if task.heartbeat is not None:
            task.heartbeat.cancel()
        self._flags |= self._hosted.flags
        for recorded in task.recorded:
            self._tell_witness(recorded.activation, task.unsent)
        self._environment.on_recorded(task.jobs, task.busy)
        rejected = {
            c.update_response.protocol_instance_id
            for c in task.commands
            if c.HasField("update_response") and c.update_response.HasField("rejected")
        }
        length = len(self._history)
        for recorded in task.recorded:
            self._keep(recorded, rejected, begins_task=len(self._history) == length)
        self._events += 1
        answered_at = {id(command): r.activation.at for r in task.recorded for command in r.answered}
        for command in task.commands:
            self._execute(command, answered_at[id(command)])

    def _tell_witness(self, activation: Activation, unsent: list[Call]) -> None:
        for job in activation.jobs:
            call = self._called[job.resolve_activity.seq] if job.HasField("resolve_activity") else None
            if call is None:
                self._environment.witness.received(job, activation.at)
                continue
            if call.is_local or call in unsent:
                self._environment.witness.scheduled(call, call.scheduled_at)
            if call in unsent:
                self._environment.on_scheduled(call)
            self._environment.witness.resolved(call, activation.at)

    def _keep(self, recorded: Recorded, rejected: set[str], *, begins_task: bool) -> None:
        """A rejected update leaves nothing in the history, neither itself nor what was answered to it."""
        activation = recorded.activation
        jobs = tuple(job for job in activation.jobs if not (job.HasField("do_update") and job.do_update.id in rejected))
        answered = [
            command
            for command in recorded.answered
            if not (command.HasField("update_response") and command.update_response.protocol_instance_id in rejected)
        ]
        if jobs:
            prints = [fingerprint(command) for command in answered]
            if any(len(each) > SERVER_PAYLOAD_BYTES for each in prints):
                raise TaskFailed(f"PayloadsTooLarge: {max(map(len, prints))} bytes")
            self._history.append(Recorded(replace(activation, jobs=jobs), answered, prints, begins_task))
        elif answered:
            raise TaskFailed(f"a rejected update had an effect: {[command_text(command) for command in answered]}")

    def _replay(self) -> None:
        """Bring the run back into memory: it must answer as it did. Local activities without a result run again."""
        self._hosted = hosted = HostedRun(self.identity)
        hosted.flags |= self._flags
        if not self._history:
            return
        self._environment.replays += 1
        self._trace("REPLAY of %d activations", len(self._history))
        for command in replayed(self._history, hosted, self._flags):
            self._begin_local(command)

    # What the run requested

    def _execute(self, command: WorkflowCommand, at: float) -> None:
        kind = command.WhichOneof("variant")
        self._events += kind not in ("update_response", None)
        if kind == "schedule_activity":
            call = self._calls.schedule(command.schedule_activity, command.schedule_activity.arguments)
            self._called[call.seq] = call
            self._environment.witness.scheduled(call, at)
            self._environment.on_scheduled(call)
        elif kind == "request_cancel_activity":
            self._calls.request_cancel(command.request_cancel_activity.seq)
        elif kind == "start_timer":
            self._timers.start(command.start_timer, self._timeline.now)
        elif kind == "cancel_timer":
            seq = command.cancel_timer.seq
            self._timers.cancel(seq)
            self._waiting = [job for job in self._waiting if not _fires(job, seq)]
        elif kind is not None:
            self._apply(command, kind)

    def _resolved_by(self, jobs: list[WorkflowActivationJob]) -> set[str]:
        return {self._called[job.resolve_activity.seq].name for job in jobs if job.HasField("resolve_activity")}

    def _call_resolved(self, call: Call, resolution: Resolution) -> None:
        if self.is_over:
            return
        if call.is_local:
            self._local_resolved(call, resolution)
        else:
            self.receive(resolved(call, resolution))

    def _local_resolved(self, call: Call, resolution: Resolution) -> None:
        """The outcome arrives within the open task."""
        self._locals.pop(call.seq, None)
        assert self._task is not None, "local activities run while a task is open"
        self._trace("  local result: %s", call.name)
        self._activate([resolved(call, resolution)])


def _fires(job: WorkflowActivationJob, seq: int) -> bool:
    return job.HasField("fire_timer") and job.fire_timer.seq == seq
