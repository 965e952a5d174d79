"""One seed, from start to end: steps until the task has ended and everything late has arrived."""

from __future__ import annotations

import json
import random
import traceback
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from temporalio.api.common.v1 import Payload

from comfyui_temporal.contracts.comfyui import GpuPool
from comfyui_temporal.contracts.credits import EstimateRequest
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, workflow_id_of
from proof.simulation.clients import Clients
from proof.simulation.comfyui_model import Work
from proof.simulation.credits_model import CreditsModel
from proof.simulation.fault_schedule import Party
from proof.simulation.gateway_model import GatewayModel
from proof.simulation.hosted_run import RunIdentity, TaskFailed, payload_of
from proof.simulation.image_jobs import ImageJobs
from proof.simulation.invariants import InvariantViolated
from proof.simulation.life_gate import LifeGate
from proof.simulation.live_run import Environment
from proof.simulation.oracle import Oracle
from proof.simulation.parties import Objects, Parties
from proof.simulation.scenario import RUN_ID, Action, Scenario, drawn
from proof.simulation.server import Server
from proof.simulation.store_model import OTHER_RUN, StoreModel
from proof.simulation.timeline import Timeline
from proof.simulation.trace import Trace
from proof.simulation.trainings import Trainings
from proof.simulation.versions import Release, handed_on, keeps_unknown

STEPS_AT_MOST: Final = 40_000


@dataclass
class Outcome:
    """The outcome of a seed; `problem` is None where every invariant held."""

    seed: int
    kind: str
    end: str = "never"
    problem: str | None = None
    steps: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    trace: list[str] = field(default_factory=list)

    def command(self, profile: str, resets: float, *, short_way: bool = True, troubles: bool = True) -> str:
        """What plays this seed again."""
        given = f" --profile {profile} --resets {resets:g}" + ("" if short_way else " --signals")
        given += "" if troubles else " --without-troubles"
        return f"python -m proof.simulation --kind {self.kind} --seed {self.seed}{given}"


RESETS: Final = 0.1
"""How likely a task's run is reset, once or more."""


def play(
    seed: int,
    kind: str,
    *,
    profile: str = "contract",
    resets: float = RESETS,
    short_way: bool = True,
    troubles: bool = True,
    is_traced: bool = False,
) -> Outcome:
    """Run one schedule to its end. Without `short_way` each callback is a signal; `troubles`: see `drawn`."""
    schedule = Schedule(
        seed, kind, profile=profile, resets=resets, short_way=short_way, troubles=troubles, is_traced=is_traced
    )
    outcome = Outcome(seed, kind)
    try:
        with warnings.catch_warnings(action="ignore"):  # the oracle sees what temporalio warns about
            outcome.end = schedule.run()
    except (InvariantViolated, TaskFailed) as problem:
        outcome.problem = f"{type(problem).__name__}: {problem}"
        schedule.trace("%s", outcome.problem)
    except Exception as problem:  # one seed that the simulation cannot play hides no other
        place = traceback.extract_tb(problem.__traceback__)[-1]
        outcome.problem = f"SimulationFailed: {problem!r} at {Path(place.filename).name}:{place.lineno}"
        schedule.trace("%s", outcome.problem)
    finally:
        outcome.steps = schedule.timeline.steps
        outcome.counts = schedule.counts()
        outcome.trace = schedule.trace.lines
        schedule.tear_down()
    return outcome


class Schedule:
    """The world of one seed."""

    def __init__(
        self,
        seed: int,
        kind: str,
        *,
        profile: str,
        resets: float,
        short_way: bool,
        troubles: bool,
        is_traced: bool,
    ) -> None:
        self.rng = rng = random.Random(f"{kind} {seed}")  # noqa: S311 - a seed that repeats the schedule is wanted
        self.timeline = timeline = Timeline(rng)
        self.trace = Trace(timeline, is_wanted=is_traced)
        more = random.Random(f"{kind} {seed} more")  # noqa: S311
        newest = random.Random(f"{kind} {seed} newest")  # noqa: S311
        self.scenario = scenario = drawn(
            rng, more, newest, timeline, kind, profile=profile, resets=resets, troubles=troubles
        )
        scenario.policy.short_way = short_way
        self.trace("%s", scenario)
        self.parties = self._parties(scenario)
        identity = RunIdentity(
            workflow_type=scenario.workflow_type,
            workflow_id=workflow_id_of(scenario.task.task_id),
            run_id=RUN_ID,
            first_run_id=RUN_ID,
            continued_run_id=None,
            arguments=(payload_of(scenario.task),),
            started_at=timeline.now,
            randomness_seed=seed,
        )
        environment = Environment(timeline, scenario.faults, rng, self.parties, self.trace)
        self.server = Server(environment, identity)
        self.parties.store.is_current = self.server.is_current
        self.parties.unanswered_jobs = self.server.unanswered_jobs
        self.server.hand_on = self._hand_on
        apart = random.Random(f"{kind} {seed} gateway")  # noqa: S311
        losses = random.Random(f"{kind} {seed} gateway's losses") if troubles else None  # noqa: S311
        self.gateway = GatewayModel(timeline, apart, losses, scenario.faults, self.parties.store, is_on=short_way)
        self.oracle = Oracle(scenario, self.server, self.parties)
        self.clients = Clients(rng, timeline, self.server, self.oracle, self.parties, self.trace)

    def _parties(self, scenario: Scenario) -> Parties:
        timeline, rng = self.timeline, self.rng
        jobs = ImageJobs(timeline, rng, scenario.comfyui, self._call_back)
        jobs.price_of = lambda _request: self._job_price(len(jobs.works))
        trainings = Trainings(timeline, rng, scenario.comfyui, self._call_back)
        trainings.gpu_hours = scenario.gpu_hours
        trainings.tells_resumed_from = scenario.tells_resumed_from
        trainings.checkpoints = scenario.checkpoints
        if scenario.has_no_gpu:
            trainings.gpus = (GpuPool(gpu_type="a100", total=0, available=0),)
        store = StoreModel(timeline, scenario.policy, held_by=OTHER_RUN if scenario.is_id_taken else None)
        return Parties(
            credits=CreditsModel(timeline, scenario.credits, self._estimate),
            jobs=jobs,
            trainings=trainings,
            store=store,
            objects=Objects(timeline, is_invalid=scenario.is_dataset_invalid),
            gate=LifeGate(store, lambda: scenario.faults.is_away(Party.STORE)),
        )

    def _job_price(self, earlier: int) -> int:
        """The price of an image job after this many jobs of the task."""
        dearer = sum(self.scenario.dearer_by[:earlier])
        return max(0, self.scenario.table_price + self.scenario.job_price_offset + dearer)

    def _estimate(self, request: EstimateRequest) -> int:
        if request.gpu_hours is None:
            return self.scenario.table_price
        return self.scenario.policy.prices.training(
            base_model=request.resolution, accelerated=self.scenario.is_accelerated, gpu_hours=request.gpu_hours
        )

    def run(self) -> str:
        """Step until nothing is left to happen; how the task ended. Raises InvariantViolated, TaskFailed."""
        if self.scenario.waits_from_start:
            self.clients.do(Action.WAIT_UNTIL_HELD)
        self._step_to_the_end()
        for _ in range(self.scenario.resets_at_end):
            self.clients.do(Action.RESET)
            self._step_to_the_end()
        if self.server.closed is None:
            raise InvariantViolated("the task waits forever: no event is left that could wake it")
        self.oracle.after_step()
        return self._how()

    def _hand_on(self, argument: Payload) -> Payload:
        """Sometimes a worker of another release continues the run; fields that it does not know may be needed later."""
        if keeps_unknown(self.server.argument) and not keeps_unknown(argument):
            raise InvariantViolated("what a newer worker had handed on was dropped")
        if self.scenario.hands_on_as is Release.PRESENT or self.rng.random() < 0.5:
            return argument
        self.trace("CONTINUED by a worker of the %s release", self.scenario.hands_on_as.value)
        return handed_on(argument, self.scenario.hands_on_as)

    def _step_to_the_end(self) -> None:
        actions, at_most = self.scenario.actions.at_step, self.timeline.steps + STEPS_AT_MOST
        while self.timeline.step():
            self.oracle.after_step()
            while actions and actions[-1][0] <= self.timeline.steps:
                self.clients.do(actions.pop()[1])
            if self.timeline.steps > at_most:
                raise InvariantViolated(f"the task has not ended after {STEPS_AT_MOST} steps")

    def _how(self) -> str:
        closed = self.server.closed
        assert closed is not None
        if closed.how == "failed":
            return str(closed.failure.application_failure_info.type)
        return self.oracle.status.value if self.oracle.status else closed.how

    def counts(self) -> dict[str, int]:
        server, environment = self.server, self.server.environment
        return {
            "tasks": environment.tasks,
            "replays": environment.replays,
            "tasks discarded": environment.discarded,
            "continued": server.runs - 1 - server.resets,
            "resets": server.resets,
            "jobs": len(self.parties.jobs.works) + len(self.parties.trainings.works),
            "holds": len(self.parties.credits.account.holds),
            "ticks": self.gateway.stored,
            "ticks lost": self.gateway.lost,
        }

    def tear_down(self) -> None:
        try:
            self.server.end()
        except TaskFailed as problem:
            self.trace("%s", problem)

    # Callbacks

    def _call_back(self, work: Work[Any]) -> None:
        fields = {"task_id": work.request.task_id, "occurred_at": self.timeline.utc().isoformat()}
        body = work.state.model_dump(mode="json") | fields
        payload = Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(body).encode())
        self.clients.received.append(payload)
        self.server.witness.sent[payload.data] = work.state
        with_it = (
            self.scenario.actions.on_nth_callback
            if len(self.clients.received) == self.scenario.actions.nth_callback
            else []
        )
        for seconds in self.scenario.faults.callback_delays():
            self.timeline.after(seconds, lambda: self._arrive(payload, with_it))
        if body["error_details"] or body.get("result_urls") or body.get("output"):
            for action in self.scenario.actions.on_last_report:
                self.timeline.after(self.rng.choice((0.0, 0.0, 0.01)), partial(self.clients.do, action))

    def _arrive(self, payload: Payload, with_it: list[Action]) -> None:
        callback = SCENES[self.scenario.task.scene].callback.model_validate_json(payload.data)
        self.gateway.take(callback, lambda: self.server.signal(CALLBACK_SIGNAL, payload))
        for action in with_it:
            self.clients.do(action)
