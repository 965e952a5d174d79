"""Invariants 1 to 4, 6 and 7, checked from outside after every step: the money, the jobs, the events.

What was held, charged, capped and promised is computed from the input, the policy and what the services saw; the run's
own result is only compared with it. Only what cannot be known or stopped is exempt, and only with an exception record:
a hold that could not be cancelled ends by expiry, a job that could not be stopped runs to its end.

    price_rules.py        what the task costs, and its ceiling
    hold_rules.py         holds: how much, how long, when
    settlement_rules.py   what was charged, and why it may be less than the price
    job_rules.py          jobs: requested, retried, cancelled; why a task may fail
    record_rules.py       row, events, exception records: everything that happened, and nothing else
"""

from __future__ import annotations

import re
from typing import Any, Final

from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobStatus, TrainingStage
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.start_answer import Reached, StartAnswer
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskState
from comfyui_temporal.contracts.tasks import (
    CreditsSummary,
    ImageProgress,
    ImageResult,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
)
from proof.checks.finished_task import Charges, Exempt, FinishedTask
from proof.checks.judge import judge
from proof.simulation.calls import Call
from proof.simulation.comfyui_model import id_of
from proof.simulation.credits_model import Hold
from proof.simulation.hold_rules import HoldRules
from proof.simulation.hosted_run import CONVERTER
from proof.simulation.invariants import World, must
from proof.simulation.job_rules import JobRules
from proof.simulation.parties import Parties
from proof.simulation.price_rules import Prices
from proof.simulation.record_rules import RecordRules, _stage
from proof.simulation.scenario import PLENTY, Scenario
from proof.simulation.sdk import WorkflowActivationJob
from proof.simulation.server import Server
from proof.simulation.settlement_rules import LOOKS_FOR_SECONDS, SettlementRules
from proof.simulation.witness import CANCELS, SUBMITS
from proof.simulators.credits_profile import CONTRACT, FIELD

_EXEMPT: Final = frozenset({Exempt.STREAM, Exempt.HISTORY, Exempt.SNAPSHOT, Exempt.HOLD_EXPIRES, Exempt.JOB_RUNS_OUT})
"""No client follows a stream here, and histories are replayed as they grow. Holds, jobs and dataset copies are checked
after every step, because late effects may come after the end."""
_STAGES: Final = [*(stage.value for stage in JobStatus), *(stage.value for stage in TrainingStage)]
"""In their order; neither kind of work here ever goes back."""
_BEGINNING: Final = frozenset({"submit_job", "create_training", "start_training", "pre_deduct"})
_OPENING: Final = frozenset(
    {
        *("submit_job", "create_training", "estimate", "pre_deduct", "start_training"),
        *("cancel_job", "cancel_training", "look"),
    }
)


_STEPS: Final = {
    **{"submit_job": "submit", "create_training": "submit", "cancel_hold": "cancel"},
    **{name: name for name in ("estimate", "pre_deduct", "commit", "charge")},
}
"""Call → the step in its key."""


class Oracle:
    """Watches one schedule. Each method raises InvariantViolated."""

    def __init__(self, scenario: Scenario, server: Server, parties: Parties) -> None:
        self._scenario = scenario
        self._server = server
        self._parties = parties
        self._world = world = World(scenario, parties, server.witness)
        self._prices = Prices(world)
        self._holds = HoldRules(world, self._prices)
        self._settlement = SettlementRules(world, self._prices, self._holds)
        self._jobs = JobRules(world, self._prices, self._holds)
        self._record = RecordRules(world, self._prices, self._holds, self._settlement)
        self._reached: dict[tuple[int, str | None], float] = {}
        self._shown: dict[tuple[int, str | None], float] = {}
        self._shown_attempt = 0
        self._rank = (0, -1)
        self._keys: set[str] = set()
        self._cancel_seen = self._delivery_seen = False
        self._delivery_first = self._cancel_first = False
        self._charged_at_end: int | None = None
        self._ended_before: tuple[int, TaskState | None] | None = None
        """What was charged, and the row, when a run was reset whose task had ended."""
        self.cancels: dict[str, bool] = {}
        """Cancel → whether Temporal's."""
        server.environment.on_recorded = self.task_recorded
        server.environment.on_scheduled = self.call_scheduled
        parties.store.on_event = self.event_written

    @property
    def status(self) -> TaskStatus | None:
        return self._world.status

    @property
    def _works(self) -> dict[str, Any]:
        return self._world.works

    # As it happens

    def after_step(self) -> None:
        credits = self._parties.credits
        holds = credits.holds
        if self._world.is_reset:
            self._after_step_of_reset(holds)
            return
        committed = [hold for hold in holds if hold.phase == "committed"]
        must(len(committed) <= 1, "two holds were committed:", *(hold.pre_deduct_id for hold in committed))
        left = [hold for hold in holds if hold.phase == "open"]
        # A third is needed if the first one's cancel hangs and the second would expire meanwhile.
        must(
            len(left) - len(self._holds.refused_to_end()) <= 3 or credits.terms.is_field,
            "more than three holds are open at once:",
            *(hold.pre_deduct_id for hold in left),
        )
        must(not credits.account.conflicts, "a key came again with another body:", *credits.account.conflicts)
        must(not self._world.jobs.conflicts, "a key came again with another body:", *self._world.jobs.conflicts)
        if credits.charged():
            must(
                any(work.state.has_succeeded() for work in self._works.values()),
                "charged before anything was delivered",
            )
        if self._server.closed is not None:
            self._ended()
        elif self._scenario.is_easy_on_credits:
            self._check_covered()

    def _check_covered(self) -> None:
        """While a job works a hold is open, from the first one until something ends the task or cancels it."""
        calls = self._server.witness.calls
        is_over = any(calls.get(name) for name in ("commit", "charge", "look")) or self._server.witness.refusals(
            "pre_deduct"
        )
        current = self._works[list(self._works)[-1]] if self._works else None
        if is_over or current is None or not current.is_started or not current.runs or not self._holds.granted():
            return
        newest = self._holds.granted()[-1].pre_deduct_id
        cancels = calls.get("cancel_hold", ())
        is_undone = any(call.argument.body.pre_deduct_id == newest for call in cancels)
        by_operator = any(hold.is_cancelled_by_operator for hold in self._parties.credits.holds)
        must(is_undone or by_operator or self._holds_stand(), "a job works, and no hold is open:", self._server.now)

    def _after_step_of_reset(self, holds: list[Hold]) -> None:
        """After a reset a key may be repeated with another body, and its effect may exist twice for a while."""
        committed = [hold for hold in holds if hold.phase == "committed"]
        must(len(committed) <= 1, "two holds were committed:", *(hold.pre_deduct_id for hold in committed))
        if self._server.closed is not None:
            self._ended()

    def was_reset(self) -> None:
        """The run was reset and goes on, even if it had ended."""
        self._world.is_reset, self._world.reset_at = True, self._server.now
        self._world.status = self._charged_at_end = None
        had_ended = self._parties.store.has_ended
        self._ended_before = (self._parties.credits.charged(), self._parties.store.state) if had_ended else None

    def task_recorded(self, jobs: list[WorkflowActivationJob], busy: set[str]) -> None:
        """While the run waits, what it sees first decides; a delivery beats a cancel that arrives with it."""
        waits = not busy & _OPENING and bool(self._works) and self._holds_stand()
        current = list(self._works)[-1] if self._works else ""
        waits = waits and not self._jobs.is_given_up(current)
        if waits and not self._cancel_seen and self._works[current].is_started and not self._is_price_open():
            self._delivery_first |= any(self._is_delivery(job, current) for job in jobs)
        is_cancel = any(map(_is_cancel, jobs))
        is_delivered = bool(current) and self._works[current].state.has_succeeded()
        self._cancel_first |= waits and is_cancel and not is_delivered
        if not busy & {"commit", "cancel_hold"} and "commit" not in self._parties.called:
            self._prices.ceiling_at_settlement = self._prices.ceiling  # a later confirmation raises no charge
        # A renewal in flight may go on after a delivery until the work is covered, and no cancel ends that.
        if self._parties.credits.holds and current and self._works[current].is_started:
            self._delivery_seen |= any(self._is_delivery(job, current) for job in jobs)
        if is_cancel:
            self._world.cancels_seen.append(self._server.now)
        self._cancel_seen |= is_cancel and not self._delivery_seen

    def call_scheduled(self, call: Call) -> None:
        """Once a cancel was seen nothing new is begun; earlier calls may be repeated, to undo them."""
        self._check_key(call)
        if self._world.is_reset:
            return
        key = str(getattr(call.argument, "key", ""))
        if call.name in _BEGINNING:
            must(not self._cancel_seen or key in self._keys, "begun although a cancel was seen before:", call.name, key)
            self._keys.add(key)
        if call.name in SUBMITS:
            self._jobs.submitted(call)
        elif call.name == "snapshot":
            self._jobs.check_paid(0)
        elif call.name in CANCELS:
            self._jobs.cancelled(call)
        elif call.name == "pre_deduct":
            self._holds.asked_for(call)
        elif call.name == "start_training":
            self._holds.started(call)
        elif call.name == "charge":
            self._charge_is_due()

    def _check_key(self, call: Call) -> None:
        """Contract §2, §4: `{task_id}:{step}:{n}`; what another life made has its name or life in `n`."""
        if not isinstance(call.argument, Post):
            return
        step, key = _STEPS[call.name], call.argument.key
        form = rf"{self._scenario.task.task_id}:{step}:(\d+|forgotten:[\w-]+|doubled-\d+)(:\d+)?"
        must(re.fullmatch(form, key) is not None, "a key of another form:", call.name, key)

    def _charge_is_due(self) -> None:
        """A charge without a hold is allowed only where the hold expired, or for the shortfall where policy says so."""
        credits = self._parties.credits
        unreported = self._holds.unreported() if credits.terms.is_field else []
        refused = self._holds.refused_to_end()
        phases = {hold.phase for hold in credits.holds if hold not in unreported and hold.pre_deduct_id not in refused}
        is_more = "committed" in phases and self._scenario.policy.charge_shortfall
        by_operator = any(hold.is_cancelled_by_operator for hold in credits.holds)
        was_short = (
            credits.terms.balance < PLENTY or self._scenario.is_paused
        )  # possibly too short for two holds at once
        is_due = is_more or by_operator or was_short or "expired" in phases
        must(is_due, "charged without a hold although none had expired:", *phases)
        must("open" not in phases, "charged although a hold is open")
        may_expire = is_more or by_operator or bool(credits.terms.refuses_commits_with)
        must(may_expire or not self._scenario.is_easy_on_credits, "a hold was let expire although it could be renewed")

    def _holds_stand(self) -> bool:
        return any(hold.phase == "open" for hold in self._parties.credits.holds)

    def _is_price_open(self) -> bool:
        """Whether a training waits for its payer; a server that offers no `start` may run the job meanwhile."""
        attempt = self._world.witness.attempt
        if self._scenario.is_image or attempt is None:
            return False
        return max(self._prices.asked(attempt), default=0) > self._prices.ceiling_before(self._server.now)

    def _is_delivery(self, job: WorkflowActivationJob, current: str) -> bool:
        """Whether it is a callback that reports the current job's delivery."""
        sent = job.signal_workflow.input if job.HasField("signal_workflow") else ()
        state = self._server.witness.sent.get(next(iter(sent)).data) if len(sent) == 1 else None
        return state is not None and state.has_succeeded() and id_of(state) == current

    def event_written(self, fact: Fact) -> None:
        at = (fact.attempt, fact.stage)
        if fact.sequence is not None and not self._world.is_reset:
            rank = (fact.attempt, _STAGES.index(fact.stage) if fact.stage else -1)
            must(rank >= self._rank, "the stage went back:", fact.key, fact.attempt, fact.stage)
            self._rank = rank
        must((fact.progress or 0.0) >= self._reached.get(at, 0.0), "progress went back:", fact.key, fact.progress)
        self._reached[at] = fact.progress or 0.0
        if fact.result_urls or fact.output:
            must(fact.event is EventType.COMPLETED, "results were handed out before the end:", fact.key)
        if not self._world.is_reset:
            self._record.event_written(fact)

    def asked(self, name: str, answer: Any) -> None:
        """A query's answer: progress never goes back within an attempt and stage; no more is charged than was."""
        if self._world.is_reset:
            return
        if name == "credits":
            [credits] = CONVERTER.from_payloads([answer], [CreditsSummary])
            charged = self._parties.credits.charged()
            must((credits.charged or 0) <= charged, "the query says charged:", credits.charged, charged)
            return
        model = ImageProgress if self._scenario.is_image else TrainingProgress
        [progress] = CONVERTER.from_payloads([answer], [model])
        self._check_shown(progress)
        at = (progress.attempts, progress.stage)
        must(progress.progress >= self._shown.get(at, 0.0), "the query's progress went back:", *at, progress.progress)
        must(progress.attempts >= self._shown_attempt, "the query's attempt went back:", progress.attempts)
        self._shown[at], self._shown_attempt = progress.progress, progress.attempts

    def _check_shown(self, progress: ImageProgress | TrainingProgress) -> None:
        """Stage and ETA are those of a state that the job had."""
        job_id = progress.job_id
        if job_id is None or job_id not in self._works or progress.stage is None:
            return
        states = [state for (of_job, _), state in self._world.jobs.published.items() if of_job == job_id]
        stages = {None, "queued", *(_stage(state) for state in states)}
        must(progress.stage in stages, "the query shows a stage that the job never had:", progress.stage)
        etas = {None, *(state.next_eta for state in states)}
        must(progress.next_eta in etas, "the query shows an ETA that the job never had:", progress.next_eta)

    # Once it has ended

    def _ended(self) -> None:
        charged = self._parties.credits.charged()
        if self._charged_at_end is None:
            self._charged_at_end = charged
            self._check_end(charged)
        must(charged == self._charged_at_end, "charged after the end:", charged, self._charged_at_end)
        if self.status is None:
            return
        doubled = (
            [hold.pre_deduct_id for hold in self._holds.unreported()] if self._parties.credits.terms.is_field else []
        )
        open_holds = [hold for hold in self._parties.credits.holds if hold.phase == "open"]
        left = [hold.pre_deduct_id for hold in open_holds if hold.pre_deduct_id not in doubled]
        left = [pre_deduct_id for pre_deduct_id in left if not self._record.excuses_hold(pre_deduct_id)]
        must(not left, "holds are left open:", *left)
        alive = [job_id for job_id, work in self._works.items() if work.runs and not self._record.excuses_job(job_id)]
        must(not alive, "jobs run on after the end:", *alive)
        must(not self._parties.objects.kept, "a dataset snapshot is left behind")

    def _check_end(self, charged: int) -> None:
        closed = self._server.closed
        assert closed is not None
        if closed.how == "failed" and closed.failure.application_failure_info.type == FailureCode.TASK_EXISTS:
            must(self._scenario.is_id_taken, "task_exists although no other run has the id")
            must(set(self._parties.called) <= {"claim"}, "called for a task of another run:", *self._parties.called)
            return
        must(not self._scenario.is_id_taken, "went on although another run holds the id:", closed.how)
        result, row = self._result(), self._parties.store.state
        assert row is not None
        self._check_finished(row, charged, result)
        if self._world.is_reset:
            self._check_end_of_reset(row, charged)
            return
        self._world.status = TaskStatus.CANCELLED if result is None else result.status
        self._check_updates_answered()
        self._check_cancels(closed.how)
        self._jobs.check_end()
        self._jobs.check_polls()
        self._jobs.check_in_time(self._parties.store.events[-1].ts.timestamp())
        self._settlement.check(charged, row.credits)
        ended_at = self._parties.store.events[-1].ts.timestamp()
        self._record.check_end(ended_at)
        if closed.how == "failed":
            self._jobs.check_failure(closed.failure.application_failure_info.type, ended_at)
            must(not self._delivery_first or self._may_fail_delivered(closed), "failed although it was delivered first")
        if result is not None:
            self._check_result(result)
        stated = self._server.search_attributes.get("TaskStatus", b"").decode().strip('"')
        must(stated == self._world.status.value, "the search attribute TaskStatus says", stated)

    def _check_finished(self, row: TaskState, charged: int, result: ImageResult | TrainingResult | None) -> None:
        """The rules that every finished task is judged by (proof/checks)."""
        store, holds = self._parties.store, self._parties.credits.holds
        task = FinishedTask(
            task_id=self._scenario.task.task_id,
            profile=FIELD if self._parties.credits.terms.is_field else CONTRACT,
            row=row,
            has_ended=store.has_ended,
            events=store.events,
            records=[(exception.code, exception.details) for exception in store.exceptions.values()],
            charges=Charges(charged, commits=sum(hold.phase == "committed" for hold in holds)),
            result={} if result is None else result.model_dump(mode="json"),
        )
        not_found = any("not_found" in message for _, message in self._server.witness.refusals("cancel_hold"))
        exempt = _EXEMPT | ({Exempt.POINTS_IN_EVENTS} if not_found else frozenset())
        if self._parties.credits.terms.lag_seconds >= LOOKS_FOR_SECONDS:
            exempt |= {Exempt.CHARGE_HIDDEN}
        if self._settlement.may_be_charged_twice:
            exempt |= {Exempt.CHARGED_TWICE}
        findings = judge(task, exempt=exempt)
        must(not findings, "", *(f"{finding.rule}: {finding}" for finding in findings))

    def _check_end_of_reset(self, row: TaskState, charged: int) -> None:
        """What the row had ended with stays; a failure has a reason of any life; what is charged is the price."""
        self._world.status, closed = row.status, self._server.closed
        assert closed is not None
        if self._ended_before is not None:
            must((charged, row) == self._ended_before, "the row had ended, and then:", charged, row)
        self._check_updates_answered()
        if closed.how == "failed":
            ended_at = self._parties.store.events[-1].ts.timestamp()
            self._jobs.check_failure_of_any_life(closed.failure.application_failure_info.type, ended_at)
        self._settlement.check_after_reset(charged)
        self._record.check_left_after_reset()

    def _may_fail_delivered(self, closed: Any) -> bool:
        """Delivered work is refused only where it costs less than nothing or could not be covered."""
        allowed = {FailureCode.CREDIT_EXHAUSTED, FailureCode.REPLY_INVALID}
        return closed.failure.application_failure_info.type in allowed

    def _result(self) -> ImageResult | TrainingResult | None:
        """The run's result object; None for a run that ended Canceled."""
        closed = self._server.closed
        assert closed is not None
        model: Any = ImageResult if self._scenario.is_image else TrainingResult
        if closed.how == "cancelled":
            return None
        payloads = [] if closed.result is None else [closed.result]
        if closed.how == "completed":
            return model.model_validate_json(payloads[0].data)  # type: ignore[no-any-return]
        info = closed.failure.application_failure_info
        must(info.type in set(FailureCode), "ended with no code of the contract:", info.type, closed.failure.message)
        return model.model_validate_json(info.details.payloads[0].data)  # type: ignore[no-any-return]

    def _check_result(self, result: ImageResult | TrainingResult) -> None:
        """The result names the row's job and its error."""
        row = self._parties.store.state
        assert row is not None
        job_id = result.job_id if isinstance(result, ImageResult) else result.training_id
        must(job_id == row.job_id, "result and row name different jobs:", job_id, row.job_id)
        must(
            result.error_details == row.error, "result and row have different errors:", result.error_details, row.error
        )

    def _check_updates_answered(self) -> None:
        open_updates = [name for name, answer in self._server.updates.items() if answer == "accepted"]
        must(not open_updates, "ended while an update was being handled:", *open_updates)
        for name, answer in self._server.updates.items():
            if name.startswith("wait") and answer.startswith("{"):
                self._check_told(StartAnswer.model_validate_json(answer))

    def _check_told(self, told: StartAnswer) -> None:
        """A start that waits is told what became true, and nothing of the work before it is paid."""
        attempts, held = self._world.witness.attempts.values(), self._holds.granted()
        is_free = any(0 in self._prices.asked(attempt) for attempt in attempts)
        must(told.reached is not Reached.HELD or bool(held) or is_free, "a start is told `held`, and nothing is held")
        is_other = told.reached is Reached.ENDED and told.state.status != self.status
        must(not is_other or self._could_not_see_its_end(), "the answer to a start names another end")
        is_asked = told.reached is Reached.CONFIRMATION
        must(is_asked <= (told.state.confirmation is not None), "a start is told to confirm no price")
        must(not (told.state.result_urls or told.state.output) or self._world.is_completed, "a start is told a result")

    def _could_not_see_its_end(self) -> bool:
        """Whether a life of the task may have ended it while the store did not show that to another one."""
        looks = self._world.witness.calls.get("look", ())
        return self._world.is_reset and any(look.outcome is None for look in looks)

    def _check_cancels(self, how: str) -> None:
        answers = [
            answer for name, answer in self._server.updates.items() if name.startswith("cancel") and "outcome" in answer
        ]
        is_cancelled = self.status is TaskStatus.CANCELLED
        must(not is_cancelled or bool(self.cancels), "cancelled without a request")
        must(how != "cancelled" or any(self.cancels.values()), "ended Canceled without a request to Temporal")
        for answer in answers:
            must(("accepted" in answer) == is_cancelled, f"a cancel was answered {answer}, the task ended", self.status)
        is_completed = self.status is TaskStatus.COMPLETED
        must(not (is_completed and self._cancel_first), "completed although a cancel was seen before the delivery")
        must(not (is_cancelled and self._delivery_first), "cancelled although the delivery was seen first")


def _is_cancel(job: WorkflowActivationJob) -> bool:
    return job.HasField("cancel_workflow") or (job.HasField("do_update") and job.do_update.id.startswith("cancel"))
