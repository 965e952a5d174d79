"""What may never be untrue (design), looked at from outside after every step: the money, the jobs, the events.

Exempt, by name, is what cannot be known or stopped and stands as an exception record: a hold that could not be
cancelled ends by expiry, a job that could not be stopped runs out.
"""

from __future__ import annotations

from typing import Any, Final

from temporalio.bridge.proto.workflow_activation import WorkflowActivationJob

from contracts.comfyui import JobStatus, TrainingStage
from contracts.errors import ExceptionCode, FailureCode
from contracts.task_store import Fact
from contracts.tasks import (
    ConfirmPrice,
    EventType,
    ImageProgress,
    ImageResult,
    SettlementState,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
)
from simulation.hosted_run import CONVERTER
from simulation.parties import Parties
from simulation.scenario import PLENTY, PRICES, Scenario
from simulation.server import Server

LEAST_LIFE: Final = 60.0
"""Seconds that a hold must still live when it is relied on (contract §4 *Lost answer*)."""
_ENDS: Final = {
    TaskStatus.COMPLETED: EventType.COMPLETED,
    TaskStatus.FAILED: EventType.FAILED,
    TaskStatus.CANCELLED: EventType.CANCELLED,
}
_STAGES: Final = [*(stage.value for stage in JobStatus), *(stage.value for stage in TrainingStage)]
"""In their order; neither kind of work here ever goes back."""
_BEGINNING: Final = frozenset({"submit_job", "create_training", "start_training", "pre_deduct"})
_OPENING: Final = frozenset(
    {"submit_job", "create_training", "estimate", "pre_deduct", "start_training", "cancel_job", "cancel_training"}
)


class Untrue(Exception):
    """Something that may never be untrue is."""


def must(holds: bool, sentence: str, *values: Any) -> None:
    if not holds:
        raise Untrue(f"{sentence} {', '.join(map(str, values))}".strip())


class Oracle:
    """Watches one schedule. Each method raises Untrue."""

    def __init__(self, scenario: Scenario, server: Server, parties: Parties) -> None:
        self._scenario = scenario
        self._server = server
        self._parties = parties
        self._reached: dict[tuple[int, str | None], float] = {}
        self._shown: dict[tuple[int, str | None], float] = {}
        self._shown_attempt = 0
        self._rank = (0, -1)
        self._keys: set[str] = set()
        self._cancel_seen = self._delivery_seen = False
        self._delivery_first = self._cancel_first = False
        self._charged_at_end: int | None = None
        self.status: TaskStatus | None = None
        self.ceiling = scenario.task.max_credits or 0
        self.cancels: dict[str, bool] = {}
        """Cancel → whether Temporal's."""
        self.deliveries: dict[bytes, str] = {}
        """Every callback that tells of delivered work → its job."""
        server.on_recorded = self.task_recorded
        server.on_scheduled = self.call_scheduled
        parties.store.on_event = self.event_written

    @property
    def _works(self) -> dict[str, Any]:
        return self._parties.jobs.works if self._scenario.is_image else self._parties.trainings.works

    # As it happens

    def after_step(self) -> None:
        credits = self._parties.credits
        committed = [hold for hold in credits.holds if hold.phase == "committed"]
        must(len(committed) <= 1, "two holds were committed:", *(hold.pre_deduct_id for hold in committed))
        must(not credits.books.conflicts, "a key came again with another body:", *credits.books.conflicts)
        must(not self._parties.jobs.conflicts, "a key came again with another body:", *self._parties.jobs.conflicts)
        must(
            not self._parties.trainings.conflicts,
            "a key came again with another body:",
            *self._parties.trainings.conflicts,
        )
        if credits.charged():
            must(
                any(work.state.has_succeeded() for work in self._works.values()),
                "charged before anything was delivered",
            )
        if self._server.closed is not None:
            self._ended()

    def task_recorded(self, jobs: list[WorkflowActivationJob], busy: set[str]) -> None:
        """While the run waits, what it sees first decides; a delivery beats a cancel that comes with it."""
        waits = not busy & _OPENING and bool(self._works) and self._holds_stand()
        current = list(self._works)[-1] if self._works else ""
        if waits and not self._cancel_seen and self._works[current].is_started:
            self._delivery_first |= any(self._is_delivery(job, current) for job in jobs)
        is_cancel = any(map(_is_cancel, jobs))
        is_delivered = bool(current) and self._works[current].state.has_succeeded()
        self._cancel_first |= waits and is_cancel and not is_delivered
        if "commit" not in busy and "commit" not in self._parties.called:  # what is confirmed later raises no charge
            self.ceiling = max(self.ceiling, *map(_confirmed, jobs), 0)
        # A renewal in flight may go on after a delivery until the work is covered, and no cancel ends that.
        if self._parties.credits.holds and current and self._works[current].is_started:
            self._delivery_seen |= any(self._is_delivery(job, current) for job in jobs)
        self._cancel_seen |= is_cancel and not self._delivery_seen

    def call_scheduled(self, name: str, argument: Any) -> None:
        """Once a cancel was seen nothing new is begun; what was begun may be asked for again, to undo it."""
        key = str(getattr(argument, "key", ""))
        if name in _BEGINNING:
            must(not self._cancel_seen or key in self._keys, "begun although a cancel was seen before:", name, key)
            self._keys.add(key)
        if name == "charge":
            self._charge_is_due()

    def _charge_is_due(self) -> None:
        """Charged without a hold is only what had one that ran out, or more than the hold where policy says so."""
        credits = self._parties.credits
        phases = {hold.phase for hold in credits.holds}
        is_more = "committed" in phases and self._scenario.policy.charge_shortfall
        by_hand = any(hold.is_cancelled_by_hand for hold in credits.holds)
        was_short = credits.terms.balance < PLENTY  # perhaps too short for two holds at once
        is_due = is_more or by_hand or was_short or "expired" in phases
        must(is_due, "charged without a hold although none had expired:", *phases)
        must("open" not in phases, "charged although a hold stands")
        may_expire = is_more or by_hand or bool(credits.terms.refuses_commits_with)
        must(may_expire or not self._scenario.is_easy_on_credits, "a hold was let expire although it could be renewed")

    def _holds_stand(self) -> bool:
        return any(hold.phase == "open" for hold in self._parties.credits.holds)

    def _is_delivery(self, job: WorkflowActivationJob, current: str) -> bool:
        sent = job.signal_workflow.input if job.HasField("signal_workflow") else ()
        return len(sent) == 1 and self.deliveries.get(next(iter(sent)).data) == current

    def event_written(self, fact: Fact) -> None:
        at = (fact.attempt, fact.stage)
        if fact.sequence is not None:
            rank = (fact.attempt, _STAGES.index(fact.stage) if fact.stage else -1)
            must(rank >= self._rank, "the stage went back:", fact.key, fact.attempt, fact.stage)
            self._rank = rank
        must((fact.progress or 0.0) >= self._reached.get(at, 0.0), "progress went back:", fact.key, fact.progress)
        self._reached[at] = fact.progress or 0.0
        if fact.result_urls or fact.output:
            must(fact.event is EventType.COMPLETED, "results were handed out before the end:", fact.key)
        if fact.key.startswith("held:"):
            self._relied_on(fact)

    def _relied_on(self, fact: Fact) -> None:
        key = f"{self._scenario.task.task_id}:pre_deduct:{fact.key.removeprefix('held:')}"
        hold = next((hold for hold in self._parties.credits.books.holds.values() if hold.key == key), None)
        must(hold is not None, "a hold was told that the credits service does not have:", fact.key)
        assert hold is not None
        life = hold.expires_at - fact.ts.timestamp()
        must(life >= LEAST_LIFE - 0.001, f"a hold with {life:.1f} s of life was relied on:", fact.key)

    def asked(self, name: str, answer: Any) -> None:
        """A query's answer: progress never goes back within an attempt and stage."""
        if name != "progress":
            return
        model = ImageProgress if self._scenario.is_image else TrainingProgress
        [progress] = CONVERTER.from_payloads([answer], [model])
        at = (progress.attempts, progress.stage)
        must(progress.progress >= self._shown.get(at, 0.0), "the query's progress went back:", *at, progress.progress)
        must(progress.attempts >= self._shown_attempt, "the query's attempt went back:", progress.attempts)
        self._shown[at], self._shown_attempt = progress.progress, progress.attempts

    # Once it has ended

    def _ended(self) -> None:
        charged = self._parties.credits.charged()
        if self._charged_at_end is None:
            self._charged_at_end = charged
            self._check_end()
        must(charged == self._charged_at_end, "charged after the end:", charged, self._charged_at_end)
        if self.status is None:
            return
        told = self._told()
        holds_excused = {ExceptionCode.HOLD_LEFT_TO_EXPIRY, ExceptionCode.UNDO_UNFINISHED} & told
        left = [hold.pre_deduct_id for hold in self._parties.credits.holds if hold.phase == "open"]
        must(not left or bool(holds_excused) or self._unknown_settlement(), "holds are left open:", *left)
        jobs_excused = {ExceptionCode.ROUTE_NOT_OFFERED, ExceptionCode.UNDO_UNFINISHED} & told
        alive = [job_id for job_id, work in self._works.items() if work.runs]
        must(not alive or bool(jobs_excused), "jobs run on after the end:", *alive)
        must(not self._parties.objects.kept, "a dataset snapshot is left behind")

    def _told(self) -> set[str]:
        return {exception.code for exception in self._parties.store.exceptions.values()}

    def _unknown_settlement(self) -> bool:
        return ExceptionCode.SETTLEMENT_UNKNOWN in self._told()

    def _check_end(self) -> None:
        closed = self._server.closed
        assert closed is not None
        if closed.how == "failed" and closed.failure.application_failure_info.type == FailureCode.TASK_EXISTS:
            must(self._scenario.is_id_taken, "task_exists although nobody else has the id")
            must(set(self._parties.called) <= {"claim"}, "called for a task of another run:", *self._parties.called)
            return
        must(not self._scenario.is_id_taken, "went on although another run holds the id:", closed.how)
        result = self._result()
        self.status = TaskStatus.CANCELLED if result is None else result.status
        self._check_events()
        self._check_all_told(result.attempts if result is not None else 0)
        self._check_cancels(closed.how)
        if self.status is TaskStatus.COMPLETED:
            assert result is not None
            self._check_charge(result)
        else:
            must(self._charged_at_end == 0, f"{self.status.value}, but charged", self._charged_at_end)
            handed_out = result is not None and (
                getattr(result, "result_urls", None) or getattr(result, "output", None)
            )
            must(not handed_out, f"{self.status.value}, but results were handed out")
        stated = self._server.search_attributes.get("TaskStatus", b"").decode().strip('"')
        must(stated == self.status.value, "the search attribute TaskStatus says", stated)

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

    def _check_events(self) -> None:
        events, store = self._parties.store.events, self._parties.store
        assert self.status is not None
        must(bool(events) and events[0].event is EventType.ACCEPTED, "the first event is not task.accepted")
        must(
            events[-1].event is _ENDS[self.status], "the last event is not the end:", events[-1].key, self.status.value
        )
        open_updates = [name for name, answer in self._server.updates.items() if answer == "accepted"]
        must(not open_updates, "ended while an update was being handled:", *open_updates)
        must(sum(event.event in _ENDS.values() for event in events) == 1, "more than one end was told")
        must(store.state is not None and store.state.status is self.status, "the row's status is not the run's")

    def _check_all_told(self, attempts: int) -> None:
        """No fact is lost on the way to the store: the charged hold's, and each retry's."""
        told = {event.key for event in self._parties.store.events}
        for hold in self._parties.credits.holds:
            n = hold.key.rpartition(":")[2]
            must(
                hold.phase != "committed" or f"held:{n}" in told, "the hold that was charged was never told:", hold.key
            )

        lost = [n for n in range(1, attempts) if f"retry:{n}" not in told]
        must(not lost, "a retry was never told:", *lost)

    def _check_cancels(self, how: str) -> None:
        answers = [
            answer for name, answer in self._server.updates.items() if name.startswith("cancel") and "outcome" in answer
        ]
        is_cancelled = self.status is TaskStatus.CANCELLED
        must(not is_cancelled or bool(self.cancels), "cancelled although nobody asked")
        must(how != "cancelled" or any(self.cancels.values()), "ended Canceled although Temporal was not asked")
        for answer in answers:
            must(("accepted" in answer) == is_cancelled, f"a cancel was answered {answer}, the task ended", self.status)
        is_completed = self.status is TaskStatus.COMPLETED
        must(not (is_completed and self._cancel_first), "completed although a cancel was seen before the delivery")
        must(not (is_cancelled and self._delivery_first), "cancelled although the delivery was seen first")

    # The price

    def _check_charge(self, result: ImageResult | TrainingResult) -> None:
        credits, charged = result.credits, self._charged_at_end
        must(
            credits.charged == charged or self._unknown_settlement(),
            "the result says charged",
            credits.charged,
            charged,
        )
        price = self._image_price(result) if isinstance(result, ImageResult) else self._training_price(result)
        if credits.settlement is SettlementState.UNKNOWN:
            must(self._unknown_settlement(), "the settlement is told as unknown without a record:", credits)
            return
        covered = (credits.charged or 0) + credits.shortfall
        must(
            covered == price or self._unknown_settlement(),
            f"charged {charged}, short {credits.shortfall}, but it costs",
            price,
        )
        must(charged is not None and charged <= price, "charged more than it costs:", charged, price)
        must(
            credits.returned == max(0, credits.held - (credits.charged or 0)),
            "returned is not held - charged:",
            credits,
        )

    def _image_price(self, result: ImageResult) -> int:
        must(bool(result.result_urls) and result.job_id in self._works, "completed without results")
        work = self._works[str(result.job_id)]
        asked = work.state.actual_cost if work.state.actual_cost is not None else work.price
        return int(min(asked, result.credits.held))

    def _training_price(self, result: TrainingResult) -> int:
        must(result.output is not None and result.training_id in self._works, "completed without a model")
        hours = self._works[str(result.training_id)].state.gpu_hours_used or 0.0
        resumed_from = {work.request.resume_from for work in self._works.values()} - {None}
        hours += sum(self._parties.trainings.hours_at[uri] for uri in resumed_from)
        price = PRICES.training(base_model="base", accelerated=False, gpu_hours=hours)
        return min(price, self.ceiling)


def _is_cancel(job: WorkflowActivationJob) -> bool:
    return job.HasField("cancel_workflow") or (job.HasField("do_update") and job.do_update.id.startswith("cancel"))


def _confirmed(job: WorkflowActivationJob) -> int:
    """The points that an update `confirm_price` confirms; 0 for anything else."""
    if not job.HasField("do_update") or not job.do_update.id.startswith("confirm"):
        return 0
    [request] = CONVERTER.from_payloads(list(job.do_update.input), [ConfirmPrice])
    return int(request.max_credits)
