"""Temporal's server, as far as a task can see it: the runs of one workflow id, and everything that is sent to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from temporalio.api.common.v1 import Payload

from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.requests import (
    RequestedJob,
    RequestOutcome,
    is_unsent,
    not_known,
    refuses_charge,
)
from proof.simulation.history import Closed, PastRun
from proof.simulation.hosted_run import RunIdentity
from proof.simulation.live_run import Environment, LiveRun
from proof.simulation.sdk import WorkflowActivationJob, WorkflowCommand, activation_api
from proof.simulation.witness import SUBMITS, Witness, number_of


class Server:
    """One workflow id: its present run, those before it, and its end."""

    def __init__(self, environment: Environment, identity: RunIdentity) -> None:
        self.environment = environment
        self._rng, self._trace = environment.rng, environment.trace
        self.closed: Closed | None = None
        self.runs = self.resets = 0
        self.updates: dict[str, str] = {}
        """Update → rejected, accepted, or its result as JSON."""
        self.search_attributes: dict[str, bytes] = {}
        self.hand_on: Callable[[Payload], Payload] = lambda argument: argument
        """Changes the argument of a continued run."""
        self._past: list[PastRun] = []
        """The runs that continued as the present one, oldest first."""
        self._replaced: list[PastRun] = []
        """The runs that a reset has replaced."""
        self._open(identity)

    def _open(self, identity: RunIdentity) -> None:
        self.runs += 1
        self._run = LiveRun(self.environment, identity, self._apply)

    @property
    def argument(self) -> Payload:
        """What the present run was started with; a reset may have gone back to an earlier one's."""
        return self._run.identity.arguments[0]

    @property
    def now(self) -> float:
        return self.environment.timeline.now

    @property
    def witness(self) -> Witness:
        return self.environment.witness

    def is_current(self, run_id: str) -> bool:
        return self.closed is None and self._run.identity.run_id == run_id

    # What is sent to the task

    def signal(self, name: str, *payloads: Payload) -> None:
        signal = activation_api.SignalWorkflow(signal_name=name, input=payloads)
        self._run.receive(WorkflowActivationJob(signal_workflow=signal))

    def request_cancel(self, reason: str) -> None:
        self._run.request_cancel(reason)

    def update(self, update_id: str, name: str, *payloads: Payload) -> None:
        self.updates[update_id] = "sent"
        update = activation_api.DoUpdate(
            id=update_id, protocol_instance_id=update_id, name=name, input=payloads, run_validator=True
        )
        self._run.receive(WorkflowActivationJob(do_update=update))

    def query(self, name: str) -> Payload | None:
        """The answer; None: the run would have to be replayed first."""
        return self._run.query(name)

    # Faults

    def kill_worker(self, seconds_away: float) -> None:
        """SIGKILL; another worker is there after `seconds_away`."""
        self._trace("KILL worker, back after %g s", seconds_away)
        self.environment.worker_up_at = self.now + seconds_away
        self._run.worker_killed()

    def pause(self, seconds: float) -> None:
        """An operator pauses the run: until it is unpaused no worker takes up a workflow task of it."""
        self._trace("PAUSE for %g s", seconds)
        self.environment.paused_until = self.now + seconds

    def evict(self) -> None:
        self._run.evict()

    def reset(self) -> None:
        """An operator resets a run of the task to a workflow task of it, any of them."""
        runs = [*self._past, self._run.as_past()]
        which = self._rng.randrange(len(runs))
        if not runs[which].cuts():  # its first task has not been recorded yet
            return
        kept = runs[which].cut(self._rng.choice(runs[which].cuts()))
        self.resets += 1
        self._trace("RESET of %s to its %d. activation", kept.identity.run_id, len(kept.history))
        self._run.stop()
        self._past = self._past[:which]
        self._replaced += runs[which:]
        self.closed = None
        self._open(replace(kept.identity, run_id=f"reset-{self.resets}"))
        self.search_attributes = kept.search_attributes()
        self._run.restore(kept)

    def unanswered_jobs(self) -> EarlierJobs:
        """What replaced runs requested of ComfyUI, without an answer in their histories, and their charges."""
        sent: list[tuple[Any, RequestedJob]] = []
        for call in (call for run in self._replaced for _, call in sorted(run.called.items()) if call.name in SUBMITS):
            post = call.argument
            at = datetime.fromtimestamp(call.scheduled_at, UTC)
            job = next((job for body, job in sent if (job.key, body) == (post.key, post.body)), None)
            if job is None:
                job = RequestedJob(attempt=number_of(post.key), key=post.key, request=post.body, asked_at=at)
                sent.append((post.body, job))
            if call.resolved_at is not None and isinstance(call.outcome, Answer):
                job.answered(call.outcome)
        jobs = [job for _, job in sent]
        unanswered = [job for job in jobs if job.outcome is RequestOutcome.UNKNOWN]
        made = [job for job in jobs if job.job_id]
        return EarlierJobs(
            jobs=not_known(unanswered, made), charges=self._charges_sent(), price=self._price_requested()
        )

    def _price_requested(self) -> int | None:
        settling = [call for run in self._replaced for call in run.called.values() if call.name in ("commit", "charge")]
        in_order = sorted(settling, key=lambda call: call.scheduled_at)
        return next((call.argument.price for call in reversed(in_order) if call.argument.price is not None), None)

    def _charges_sent(self) -> int:
        charges = [call for run in self._replaced for call in run.called.values() if call.name == "charge"]
        sent = [
            number_of(call.argument.key)
            for call in charges
            if call.resolved_at is None
            or not isinstance(call.outcome, Answer)
            or not (refuses_charge(call.outcome) or is_unsent(call.outcome))
        ]
        return max(sent, default=0)

    def end(self) -> None:
        """Leave nothing behind in memory."""
        self._run.stop()

    # What the run requested

    def _apply(self, command: WorkflowCommand, kind: str) -> None:
        """A command that concerns the workflow id: an update's answer, search attributes, the end."""
        if kind == "update_response":
            response = command.update_response
            if response.HasField("completed"):
                self.updates[response.protocol_instance_id] = response.completed.data.decode()
            else:
                is_rejected = response.HasField("rejected")
                self.updates[response.protocol_instance_id] = "rejected" if is_rejected else "accepted"
        elif kind == "upsert_workflow_search_attributes":
            upserted = command.upsert_workflow_search_attributes.search_attributes
            self.search_attributes.update({name: payload.data for name, payload in upserted.indexed_fields.items()})
        elif kind == "continue_as_new_workflow_execution":
            self._continue(command)
        elif kind == "complete_workflow_execution":
            self._close(Closed("completed", result=command.complete_workflow_execution.result))
        elif kind == "fail_workflow_execution":
            self._close(Closed("failed", failure=command.fail_workflow_execution.failure))
        elif kind == "cancel_workflow_execution":
            self._close(Closed("cancelled"))

    def _close(self, closed: Closed) -> None:
        self._run.stop()
        self.closed = closed

    def _continue(self, command: WorkflowCommand) -> None:
        """A message that arrived meanwhile would have kept it open; the outcomes of its calls are ignored."""
        self._run.stop()
        self.environment.witness.continued_at.add(self.now)
        [argument] = command.continue_as_new_workflow_execution.arguments
        identity = replace(
            self._run.identity,
            run_id=f"run-{self.runs + 1}",
            continued_run_id=self._run.identity.run_id,
            arguments=(self.hand_on(argument),),
            started_at=self.now,
        )
        self._past.append(self._run.as_past())
        self._open(identity)
