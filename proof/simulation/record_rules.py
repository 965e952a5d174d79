"""What is published about a task: row, events and exception records show everything that happened, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from comfyui_temporal.contracts.comfyui import JobState, TrainingState
from comfyui_temporal.contracts.errors import HOLD_OUT_OF_SIGHT, Answer, ExceptionCode, FailureCode
from comfyui_temporal.contracts.size_budget import MAX_INBOX, MAX_INBOX_BYTES
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import Fact, TaskException
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.simulation.calls import Call
from proof.simulation.hold_rules import LEAST_LIFE, HoldRules
from proof.simulation.invariants import World, must
from proof.simulation.price_rules import Prices
from proof.simulation.settlement_rules import LOOKS_FOR_SECONDS, SettlementRules
from proof.simulation.versions import Release
from proof.simulation.witness import CANCELS, SUBMITS, Attempt, Report, key_of, number_of

SLACK: Final = 0.01
SURELY: Final = 150.0
"""Seconds within which a waiting run has surely been activated: longer than a task is slow or a worker away."""
DOUBLED_FOR_SECONDS: Final = 60.0
"""For how long a doubled hold is looked for (contract §4)."""
OTHER_ROUTES: Final = {"route_not_offered:start": {"start_training"}, "route_not_offered:gpus": {"list_gpus"}}
"""Key of a record → the calls of the route that it names; any other names a cancel."""
_UNSEEN: Final = {"accepted", "settled", "end", "queue_sla", "difference", "left_out"}


class RecordRules:
    """Compares what is published with what happened. Each method raises InvariantViolated."""

    def __init__(self, world: World, prices: Prices, holds: HoldRules, settlement: SettlementRules) -> None:
        self._world = world
        self._prices = prices
        self._holds = holds
        self._settlement = settlement

    # Events, as they are written

    def event_written(self, fact: Fact) -> None:
        """An event reports only what has happened."""
        name, _, rest = fact.key.partition(":")
        if name == "held":
            self._check_held(fact, int(rest))
        elif name == "given_back":
            self._check_given_back(fact, int(rest))
        elif name == "retry":
            self._check_retry(fact, int(rest))
        elif name == "checkpoint":
            job_id, _, sequence = rest.rpartition(":")
            checkpoint = getattr(self._state(job_id, int(sequence)), "checkpoint", None)
            must(checkpoint is not None and fact.event is EventType.CHECKPOINT, "no such checkpoint:", fact.key)
        elif name == "confirm":
            must(fact.confirmation is not None, "a confirmation is requested without its price:", fact.key)
        elif name in self._world.works:
            self._check_progress(fact, name, int(rest))
        else:
            must(name in _UNSEEN, "an event without a cause:", fact.key)

    def _check_held(self, fact: Fact, n: int) -> None:
        holds = self._holds.of_number(n)
        must(bool(holds), "an event shows a hold that the credits service does not have:", fact.key)
        amounts = [-hold.amount for hold in holds]
        must(fact.credits_delta in amounts, "an event shows a hold with", fact.credits_delta, *amounts)
        life = max(hold.expires_at for hold in holds) - fact.ts.timestamp()
        is_relied_on = any(hold.phase == "open" for hold in holds)
        must(
            life >= LEAST_LIFE - 0.001 or not is_relied_on, f"a hold with {life:.1f} s of life was relied on:", fact.key
        )

    def _check_given_back(self, fact: Fact, n: int) -> None:
        holds = self._holds.of_number(n)
        ended = [hold.amount for hold in holds if hold.phase in ("cancelled", "expired")]
        must(bool(ended), f"{fact.key} is published of a hold that is", *(hold.phase for hold in holds))
        must(fact.credits_delta in ended, "a hold is given back with", fact.credits_delta, *ended)

    def _check_retry(self, fact: Fact, n: int) -> None:
        attempt = self._world.witness.attempts.get(n)
        must(attempt is not None and fact.error is not None, "an event shows a retry of no attempt:", fact.key)
        assert attempt is not None
        assert fact.error is not None
        # Any state of its job counts: the event is written before the workflow task that got the state is recorded.
        jobs = self._world.works if attempt.job_id is None else [attempt.job_id]
        codes = {code for job_id in jobs for code in self._world.jobs.failures_of(job_id)}
        is_lost = not codes and fact.error.code == FailureCode.LOST
        must(is_lost or fact.error.code in codes, "an event shows a retry for", fact.error.code)

    def _state(self, job_id: str, sequence: int) -> JobState | TrainingState | None:
        return self._world.jobs.published.get((job_id, sequence))

    def _check_progress(self, fact: Fact, job_id: str, sequence: int) -> None:
        state = self._state(job_id, sequence)
        must(state is not None, "an event shows of a state that the job never had:", fact.key)
        assert state is not None
        must(fact.stage == _stage(state), "an event shows another stage than the job:", fact.key, fact.stage)
        # A write that lands late takes the figures that the row has by then.
        published = self._world.jobs.published.items()
        etas = {shown.next_eta for (of_job, number), shown in published if of_job == job_id and number >= sequence}
        must(fact.next_eta in etas, "an event shows another ETA than the job:", fact.key, fact.next_eta)
        must((fact.progress or 0.0) >= (state.stage_progress or 0.0), "an event shows less progress:", fact.key)

    # Once the task has ended

    def check_end(self, ended_at: float) -> None:
        self._check_holds_published()
        self._check_jobs_published()
        self._check_row()
        self._check_doubled()
        for exception in self._world.parties.store.exceptions.values():
            self._check_reason(exception)
        self._check_recorded(ended_at)

    def _keys(self) -> set[str]:
        return {event.key for event in self._world.parties.store.events}

    def _check_holds_published(self) -> None:
        """Every hold that the run received in time, and every one that it gave back."""
        recorded = self._keys()
        for known in self._holds.granted():
            is_first_asking = known.call.resolved_at == known.resolved_at
            must(
                not is_first_asking or known.life_when_granted < LEAST_LIFE or f"held:{known.n}" in recorded,
                "a hold was never published:",
                known.n,
            )
        for call in self._world.witness.calls.get("cancel_hold", ()):
            if call.resolved_at is not None and isinstance(call.outcome, Answer) and call.outcome.reply is not None:
                n = number_of(key_of(call))  # none: a hold that this run had never requested
                must(n < 0 or f"given_back:{n}" in recorded, "the return of a hold was never published:", n)
        must(not self._world.is_completed or "settled" in recorded, "the settlement was never published")

    def _check_jobs_published(self) -> None:
        """Of every job that was followed to its end: each stage, each checkpoint; and of each retry."""
        attempts = list(self._world.witness.attempts.values())
        for attempt in attempts if self._world.is_completed else attempts[:-1]:
            self._check_reports_published(attempt)
        recorded = self._keys()
        for attempt in attempts[:-1]:
            must(f"retry:{attempt.n}" in recorded, "a retry was never published:", attempt.n)

    def _check_reports_published(self, attempt: Attempt) -> None:
        news = self._readable_reports(attempt)
        events = self._world.parties.store.events
        stages = {(event.attempt, event.stage) for event in events}
        unreported = {_stage(report.state) for report in news if not report.is_queued} - {
            s for n, s in stages if n == attempt.n
        }
        must(len(unreported) <= self._left_out(), "a stage was never published:", attempt.n, *unreported)
        keys = self._keys()
        resumed_from = {a.call.argument.body.resume_from for a in self._trained() if a.n <= attempt.n}
        # Each later report names the checkpoint too: a poll's answer is dropped where the run continues as new.
        news_of: dict[str, list[str]] = {}
        for report in self._world.witness.reports_of(attempt.job_id):
            if report.checkpoint is not None and report.checkpoint.uri not in resumed_from:
                key = f"checkpoint:{attempt.job_id}:{report.state.sequence}"
                news_of.setdefault(report.checkpoint.uri, []).append(key)
        kept = self._kept_for_checkpoints(attempt, news)
        expected = {report.checkpoint.uri for report in kept if report.checkpoint is not None} & news_of.keys()
        missing = sum(keys.isdisjoint(news_of[uri]) for uri in expected)
        must(missing <= self._left_out(), "checkpoints were never published:", missing)

    def _kept_for_checkpoints(self, attempt: Attempt, news: list[Report]) -> list[Report]:
        """Those that did not have to share a full inbox: a stage is kept there, of many checkpoints only some are."""
        until = self._followed_from(attempt)
        waiting = sum(
            size for at, size in self._world.witness.signal_bytes.items() if attempt.accepted_at <= at <= until
        )
        return [report for report in news if report.at > until] if waiting > MAX_INBOX_BYTES / 2 else news

    def _readable_reports(self, attempt: Attempt) -> list[Report]:
        """The reports that the run could keep.

        The inbox keeps the newest: by count while `start` is unanswered, by bytes where many arrive at once.
        """
        news = self._world.witness.reports_of(attempt.job_id)
        until = self._followed_from(attempt)
        waiting = [report for report in news if report.at <= until]
        kept = news[max(0, len(waiting) - MAX_INBOX) :]
        return [report for report in kept if not self._is_burst(report.at)]

    def _followed_from(self, attempt: Attempt) -> float:
        """When a training's `start` was answered: until then its messages stay in the inbox."""
        starts = self._world.witness.calls.get("start_training", ())
        own = [call for call in starts if call.argument.job_id == attempt.job_id and isinstance(call.outcome, Answer)]
        return min((call.resolved_at for call in own if call.resolved_at is not None), default=0.0)

    def _is_burst(self, at: float) -> bool:
        """Whether so much arrived at once that the inbox may have dropped some. It measures its own form of it."""
        return self._world.witness.signal_bytes[at] > MAX_INBOX_BYTES / 2

    def _left_out(self) -> int:
        """How many events were left out while the store was away, and counted."""
        counted = [key for key in self._keys() if key.startswith("left_out:")]
        return sum(int(key.rpartition(":")[2]) for key in counted)

    def _trained(self) -> list[Attempt]:
        return [] if self._world.scenario.is_image else list(self._world.witness.attempts.values())

    def _check_row(self) -> None:
        state, attempt = self._world.parties.store.state, self._world.witness.attempt
        assert state is not None
        must(state.attempts == len(self._world.witness.attempts), "the row says attempts:", state.attempts)
        must(state.next_eta is None and state.confirmation is None, "the row still waits for something")
        work = self._world.works.get(attempt.job_id or "") if attempt is not None and self._world.is_completed else None
        urls = list(getattr(work.state, "result_urls", [])) if work else []
        must(state.result_urls == urls, "the row hands out", *state.result_urls)
        must(state.output == (getattr(work.state, "output", None) if work else None), "the row hands out", state.output)
        if attempt is not None and attempt.was_answered_at_once:
            must(state.job_id == attempt.job_id, "the row names the job", state.job_id)
        stated = self._prices.stated(attempt) if attempt is not None else {}
        if stated:
            prices = state.prices.model_dump(exclude_none=True)
            must(prices == stated, "the row's prices:", prices, stated)

    # Exception records: a reason for each, each reason recorded

    def _check_reason(self, exception: TaskException) -> None:
        at = exception.ts.timestamp()
        reasons: dict[str, Callable[[], bool]] = {
            ExceptionCode.PRICES_DIFFER: lambda: self._are_different(exception.key, self._prices.answered),
            ExceptionCode.COST_ABOVE_HOLD: self._is_above_hold,
            ExceptionCode.SHORTFALL: lambda: self._settlement.shortfall > 0,
            ExceptionCode.SETTLEMENT_UNKNOWN: lambda: self._world.is_completed or self._was_not_given_back(),
            ExceptionCode.ROUTE_NOT_OFFERED: lambda: self._may_lack_route(exception.key),
            ExceptionCode.UNCOVERED: lambda: self._was_uncovered(at),
            ExceptionCode.QUEUE_SLA_MISSED: lambda: self._was_queued_until(at),
            ExceptionCode.HOLD_LEFT_TO_EXPIRY: lambda: self._was_undo_refused(exception.key),
            ExceptionCode.UNDO_UNFINISHED: lambda: (
                self._hides_doubled(exception)
                or self._was_undo_refused(exception.key)
                or (exception.key == "forgotten_after_end" and self._may_have_ended_before_its_cancel())
            ),
            ExceptionCode.HOLD_DOUBLED: lambda: self._world.parties.credits.terms.is_field,
        }
        if exception.key == "end":
            must(
                self._world.status is TaskStatus.FAILED,
                "a failure is recorded of a task that ended",
                self._world.status,
            )
            return
        has_reason = reasons.get(exception.code, lambda: False)
        must(has_reason(), "an exception is recorded without a reason:", exception.key, exception.code)

    def _check_doubled(self) -> None:
        """A doubled hold of a service without idempotency is recorded with its amount once the ledger shows it."""
        terms, unreported = self._world.parties.credits.terms, self._holds.unreported()
        looks = self._world.witness.calls.get("ledger", [])
        if not unreported or not terms.is_field or HOLD_OUT_OF_SIGHT in self._world.parties.store.exceptions:
            return
        is_shown = bool(looks) and looks[-1].outcome is not None
        # Where no hold was granted nothing shows that the ledger has caught up with the requests.
        is_shown &= terms.lag_seconds < DOUBLED_FOR_SECONDS or bool(self._holds.granted())
        # A worker of the first release reads no ledger for it, and does not hand on that a request was repeated.
        if not is_shown or self._world.scenario.hands_on_as is Release.OLDER:
            return
        exceptions = self._world.parties.store.exceptions.values()
        records = [record for record in exceptions if record.code == ExceptionCode.HOLD_DOUBLED]
        recorded = sum(record.details["amount"] for record in records)
        # A record says what was true when it was made; the run may give one of them back later.
        judged_at = max((record.ts.timestamp() for record in records), default=looks[-1].scheduled_at)
        seen = sum(hold.amount for hold in self._holds.unreported(open_at=judged_at - terms.lag_seconds))
        # In a ledger that lags, the end of a hold that an operator cancelled is taken for the end of the run's own.
        by_operator = sum(hold.amount for hold in self._world.parties.credits.holds if hold.is_cancelled_by_operator)
        more = by_operator if terms.lag_seconds else 0
        must(seen <= recorded <= seen + more, f"{seen} points are held twice, recorded are", recorded)

    def check_left_after_reset(self) -> None:
        """Points that stay held although no life of the task knows their hold are recorded, one by one or in all."""
        left = [hold for hold in self._holds.unreported() if not self.excuses_hold(hold.pre_deduct_id)]
        terms, exceptions = self._world.parties.credits.terms, self._world.parties.store.exceptions
        # As in `_check_doubled`: a ledger that lags may hide them, and the first release does not look for them.
        is_hidden = terms.lag_seconds >= DOUBLED_FOR_SECONDS or HOLD_OUT_OF_SIGHT in exceptions
        if not left or not terms.is_field or is_hidden or self._world.scenario.hands_on_as is Release.OLDER:
            return
        doubled = [record for record in exceptions.values() if record.code == ExceptionCode.HOLD_DOUBLED]
        recorded = sum(record.details["amount"] for record in doubled)
        held = sum(hold.amount for hold in left)
        must(recorded >= held, f"{held} points stay held after a reset, recorded are", recorded)

    def _hides_doubled(self, exception: TaskException) -> bool:
        """Whether the ledger may not show a doubled hold in time."""
        terms = self._world.parties.credits.terms
        may_be_late = terms.lag_seconds > 0 or self._world.is_reset
        looks = self._world.witness.calls.get("ledger", ())
        # One of the holds shown may be the task's own: one of unknown end, or one that could not be cancelled.
        may_be_late |= self._settlement.is_unknown or ExceptionCode.HOLD_LEFT_TO_EXPIRY in self._codes()
        # So may one of the ends be, where an operator gave a doubled hold back.
        may_be_late |= any(hold.is_cancelled_by_operator for hold in self._world.parties.credits.holds)
        may_be_late |= any(look.outcome is None or look.attempt > 1 for look in looks if look.resolved_at is not None)
        return exception.key == HOLD_OUT_OF_SIGHT and may_be_late

    def _codes(self) -> set[str]:
        return {exception.code for exception in self._world.parties.store.exceptions.values()}

    def _was_not_given_back(self) -> bool:
        refused = {message for _, message in self._world.witness.refusals("cancel_hold")}
        return bool(refused - {"pre_deduct_not_found"}) and self._hides_resolutions()

    def _was_undo_refused(self, key: str) -> bool:
        """Whether the undo of just this hold or job was refused, or stayed without a readable answer."""
        step, _, n = key.partition(":")
        names: dict[str, tuple[str, ...]] = {
            "hold_left": ("cancel_hold",),
            "undo_hold": ("pre_deduct",),
            "undo_job": (*CANCELS, *SUBMITS),
        }
        calls = [call for name in names.get(step, ()) for call in self._world.witness.calls.get(name, ())]
        # A hold of an earlier life has no number: key and record name its id.
        return any(self._is_refused(call) for call in calls if key_of(call).rpartition(":")[2] == n)

    def _may_have_ended_before_its_cancel(self) -> bool:
        """Whether a cancel of an earlier life's hold was refused: it may have ended before."""
        calls = self._world.witness.calls.get("cancel_hold", ())
        return any(self._is_refused(call) for call in calls if ":cancel:forgotten:" in key_of(call))

    def _is_refused(self, call: Call) -> bool:
        if call.resolved_at is None:
            return False
        return call.outcome is None or (isinstance(call.outcome, Answer) and call.outcome.refusal is not None)

    def excuses_hold(self, pre_deduct_id: str) -> bool:
        """Whether a record says of this hold that its end, or its id, could not be found out."""
        hold = self._world.parties.credits.account.holds[pre_deduct_id]
        committed = [call.argument.body.pre_deduct_id for call in self._world.witness.calls.get("commit", ())]
        if self._settlement.is_unknown and pre_deduct_id in committed:
            return True
        steps = ("hold_left", "hold_unknown", "undo_hold")
        return self._is_recorded(steps, pre_deduct_id=pre_deduct_id, n=hold.n)

    def excuses_job(self, job_id: str) -> bool:
        """The same for a job that could not be cancelled."""
        n, steps = number_of(self._world.works[job_id].key), ("cancel_job", "undo_job", "route_not_offered")
        is_of_unread_run = any(key.startswith("earlier_run:") for key in self._world.parties.store.exceptions)
        return is_of_unread_run or self._is_recorded(steps, job_id=job_id, n=n)

    def _is_recorded(self, steps: tuple[str, ...], *, n: int, **named: str) -> bool:
        """Whether a record of one of these steps names it by its id, or else by its number."""
        for exception in self._world.parties.store.exceptions.values():
            step, _, rest = exception.key.partition(":")
            ids = [exception.details.get(name) for name in named]
            if step in steps and (ids == list(named.values()) or (ids == [None] and rest == str(n))):
                return True
        return False

    def _hides_resolutions(self) -> bool:
        terms = self._world.parties.credits.terms
        return not terms.tells_kinds or terms.lag_seconds >= LOOKS_FOR_SECONDS

    def _are_different(self, key: str, prices: Callable[[Attempt], dict[str, int]]) -> bool:
        attempt = self._world.witness.attempts.get(int(key.rpartition(":")[2]))
        return attempt is not None and len(set(prices(attempt).values())) > 1

    def _is_above_hold(self) -> bool:
        attempt = self._world.witness.attempt
        work = self._world.works.get(attempt.job_id or "") if attempt is not None else None
        if work is None or not self._world.scenario.is_image or not work.state.has_succeeded():
            return False
        asked = work.state.actual_cost if work.state.actual_cost is not None else work.price
        return asked > self._settlement.usable

    def _lacks_route(self, key: str) -> bool:
        """Whether the run received an answer that shows it."""
        calls = [call for name in OTHER_ROUTES.get(key, CANCELS) for call in self._world.witness.calls.get(name, ())]
        return any(isinstance(call.outcome, Answer) and call.outcome.not_offered and call.resolved_at for call in calls)

    def _may_lack_route(self, key: str) -> bool:
        """What a lost workflow task was answered may be recorded too: such a call is in no history."""
        is_lacking = bool(self._world.scenario.comfyui.not_offered)
        return is_lacking if key in OTHER_ROUTES else self._lacks_route(key)

    def _was_uncovered(self, at: float) -> bool:
        """A second hold was refused while the old one was open, or came when the old one had ended."""
        if any(when <= at + SLACK for when, _ in self._world.witness.refusals("pre_deduct")):
            return True
        granted = self._holds.granted()
        return any(later.resolved_at >= earlier.ends_at for earlier, later in pairwise(granted))

    def _was_queued_until(self, at: float) -> bool:
        sla = 60 * self._world.scenario.policy.queue_sla_minutes
        for attempt in self._world.witness.attempts.values():
            start = self._holds.start_of(attempt.n)
            moved = [report.at for report in self._world.witness.reports_of(attempt.job_id) if not report.is_queued]
            if start is not None and at >= start + sla - SLACK and (not moved or moved[0] >= at - SLACK):
                return True
        return False

    def _check_recorded(self, ended_at: float) -> None:
        recorded = {(exception.key, exception.code) for exception in self._world.parties.store.exceptions.values()}
        codes = {code for _, code in recorded}
        for attempt in self._world.witness.attempts.values():
            key = f"prices_differ:{attempt.n}"
            is_needed = self._are_different(key, self._prices.stated)
            must(not is_needed or (key, ExceptionCode.PRICES_DIFFER) in recorded, "never recorded:", key)
        for key in OTHER_ROUTES:
            is_recorded = (key, ExceptionCode.ROUTE_NOT_OFFERED) in recorded
            must(is_recorded or not self._lacks_route(key), "never recorded:", key)
        needed = {
            ExceptionCode.COST_ABOVE_HOLD: self._world.is_completed and self._is_above_hold(),
            ExceptionCode.SHORTFALL: self._settlement.shortfall > 0 and not self._settlement.is_unknown,
            ExceptionCode.ROUTE_NOT_OFFERED: self._lacks_route("cancel"),
            ExceptionCode.UNCOVERED: self._gave_up_before_the_next(),
            ExceptionCode.QUEUE_SLA_MISSED: self._was_queued_for_long(ended_at),
        }
        for code, is_needed in needed.items():
            must(not is_needed or code in codes, "never recorded:", code)
        if self._world.status is TaskStatus.FAILED:
            must("end" in {key for key, _ in recorded}, "the failure was never recorded")

    def _gave_up_before_the_next(self) -> bool:
        """A hold with enough life was cancelled before the next one was granted."""
        granted, calls = self._holds.granted(), self._world.witness.calls.get("cancel_hold", ())
        cancelled = {call.argument.body.pre_deduct_id: call.scheduled_at for call in reversed(calls)}
        return any(
            earlier.life_when_granted >= LEAST_LIFE
            and cancelled.get(earlier.pre_deduct_id, later.resolved_at) < later.resolved_at
            for earlier, later in pairwise(granted)
            if later.call.resolved_at == later.resolved_at and later.life_when_granted >= LEAST_LIFE
        )

    def _was_queued_for_long(self, ended_at: float) -> bool:
        if self._world.scenario.is_paused:
            return False
        sla = 60 * self._world.scenario.policy.queue_sla_minutes
        for attempt in self._world.witness.attempts.values():
            start, news = self._holds.start_of(attempt.n), self._world.witness.reports_of(attempt.job_id)
            if start is None or attempt.accepted is None:
                continue
            moved = [report.at for report in news if not report.is_queued]
            until = min([*moved, *self._cancels_of(attempt), *self._world.cancels_seen, ended_at])
            begun = max(start + sla, attempt.accepted_at, self._holds.followed_since(attempt))
            if until > begun + SURELY:
                return True
        return False

    def _cancels_of(self, attempt: Attempt) -> list[float]:
        calls: list[Call] = [call for name in CANCELS for call in self._world.witness.calls.get(name, ())]
        return [call.scheduled_at for call in calls if call.argument.job_id == attempt.job_id]


def _stage(state: JobState | TrainingState) -> str | None:
    if isinstance(state, JobState):
        return state.job_status.value
    return state.training_stage.value if state.training_stage else None
