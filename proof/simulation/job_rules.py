"""Jobs (contract §1 to §3): what is requested, when the next one begins, which is cancelled, why a task fails."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any, Final

from comfyui_temporal.contracts.continuation import ImageRun
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from proof.simulation.calls import Call
from proof.simulation.hold_rules import HoldRules
from proof.simulation.invariants import World, must
from proof.simulation.price_rules import Prices
from proof.simulation.witness import CANCELS, GETS, Attempt, key_of, number_of

SLACK: Final = 0.01
SETUP_OF: Final = {
    **dict.fromkeys(("submit_job", "create_training", "start_training", "list_gpus"), FailureCode.COMFYUI_UNAVAILABLE),
    **dict.fromkeys(("estimate", "pre_deduct"), FailureCode.CREDITS_UNAVAILABLE),
}
"""The calls that begin something, and the code of a task whose call stays without an answer."""
LAST_BACKOFF: Final = 30.0
"""Seconds: no try begins that would be later than the limit."""
UNREADABLE_FOR: Final = 900.0
LAST_ANSWER: Final = 10.0
"""Seconds that a timeout waits for a last poll's answer."""
SURELY: Final = 200.0
"""Seconds within which a waiting run has surely been activated."""
LEAST_PAUSE: Final = 9.99
"""Seconds between two polls of a job: a 404 counts once more after ten."""


class JobRules:
    """Checks every job that is requested or cancelled. Each method raises InvariantViolated."""

    def __init__(self, world: World, prices: Prices, holds: HoldRules) -> None:
        self._world = world
        self._prices = prices
        self._holds = holds
        self._submitted: set[str] = set()
        self._cancelled: dict[str, float] = {}
        """Job → when its cancellation was requested."""

    # As it happens

    def submitted(self, call: Call) -> None:
        n, is_repeat = number_of(key_of(call)), key_of(call) in self._submitted
        if n > 1 and not call.argument.is_undo:
            self._holds.check_covered(call)
        if is_repeat:
            return
        self._submitted.add(key_of(call))
        self._check_body(call.argument.body)
        must(n == len(self._submitted), "jobs are numbered with a gap:", key_of(call))
        if self._world.scenario.is_image:
            self.check_paid(n)
        if n > 1:
            self._check_next(self._world.witness.attempts[n - 1], call)

    def check_paid(self, n: int) -> None:
        """The estimate was read before, and the balance that it told covers it, or a hold stands."""
        estimate = self._world.witness.reply("estimate", n)
        must(estimate is not None, "begun without a look at the price: estimate", n)
        is_short = estimate.current_balance is not None and estimate.current_balance < estimate.selected_cost
        must(not is_short or bool(self._holds.granted()), "begun although the balance was too short: estimate", n)

    def _check_body(self, body: Any) -> None:
        task, wanted = self._world.scenario.task, {"task_id", "tenant_id", "user_id", "template_id", "priority"}
        wanted |= {"prompt", "resolution", "extras"} if isinstance(task, ImageRun) else {"base_model", "gpu_type"}
        for field in wanted & set(type(body).model_fields):
            must(getattr(body, field) == getattr(task, field), "a job is requested with another", field)
        if isinstance(task, ImageRun):
            must((body.images or 1) == task.images, "a job is requested with another number of images:", body.images)
        must(body.callback_url == self._world.scenario.policy.callback_url, "another callback_url:", body.callback_url)
        if not isinstance(task, ImageRun):
            must(body.resume_from == self._newest_checkpoint(), "resumes from", body.resume_from)

    def _newest_checkpoint(self) -> str | None:
        """The newest checkpoint of the attempts before, as reported before their jobs' ends."""
        witness = self._world.witness
        for n in sorted(witness.attempts, reverse=True)[1:]:
            reported = [
                report.checkpoint.uri for report in witness.reports_of(witness.attempts[n].job_id) if report.checkpoint
            ]
            known = {witness.attempts[k].call.argument.body.resume_from for k in witness.attempts if k <= n}
            new = [uri for uri in reported if uri not in known]
            if new:
                return new[-1]
        return self._world.scenario.task.resume_from  # type: ignore[union-attr]

    def _check_next(self, earlier: Attempt, call: Call) -> None:
        """Another job follows one that ended and may be retried, after its pause; the old one is cancelled."""
        pauses = self._world.scenario.policy.retry_after_seconds
        must(earlier.n <= len(pauses), "more attempts than there may be:", key_of(call))
        ended_at = self._ended_at(earlier)
        must(ended_at is not None, "another job although the last one has not ended:", earlier.job_id)
        assert ended_at is not None
        waited = call.scheduled_at - ended_at
        must(
            waited >= pauses[earlier.n - 1] - SLACK, f"the next job after {waited:g} s, right is", pauses[earlier.n - 1]
        )
        is_late = self._world.scenario.is_easy_on_credits and waited > pauses[earlier.n - 1] + SURELY
        must(not is_late, f"the next job only after {waited:g} s, right is", pauses[earlier.n - 1])

    def _ended_at(self, attempt: Attempt) -> float | None:
        """When the run learned of an end that may be retried: the job's own, or that it is lost."""
        news = self._world.witness.reports_of(attempt.job_id)
        if news and news[-1].error is not None and news[-1].error.may_be_retried():
            return news[-1].at
        return self._world.witness.lost_at(attempt.job_id)

    def cancelled(self, call: Call) -> None:
        """Only the newest job is cancelled while the task goes on, and only once it has ended."""
        job_id = call.argument.job_id
        attempt = next((a for a in self._world.witness.attempts.values() if a.n == number_of(key_of(call))), None)
        must(attempt is not None, "a job is cancelled that was never requested:", key_of(call))
        must(job_id in self._world.works, "a job is cancelled that there is not:", job_id)
        self._cancelled.setdefault(job_id, call.scheduled_at)

    def is_given_up(self, job_id: str) -> bool:
        return job_id in self._cancelled

    # Once the task has ended

    def check_polls(self) -> None:
        """A job is polled with pauses. A run that continued as new may poll at once, and the last poll before a timeout
        waits for nothing.
        """
        for job_id in self._world.works:
            polls = [call for name in GETS for call in self._world.witness.calls.get(name, ())]
            # One that was cancelled before it was sent asked nothing: a run that continues as new gives its last up.
            polls = [call for call in polls if call.argument.job_id == job_id and call.attempt]
            for earlier, later in pairwise(polls):
                # A worker of the first release does not hand the run's number on.
                is_of_next_run = later.argument.call_for != earlier.argument.call_for or later.seq < earlier.seq
                if earlier.resolved_at is None or is_of_next_run or later is polls[-1]:
                    continue
                pause = later.scheduled_at - earlier.resolved_at
                must(pause >= LEAST_PAUSE, f"{job_id} was polled again after {pause:g} s")

    def check_in_time(self, ended_at: float) -> None:
        """The wait for a job ends with its time, and the next job begins when its pause is over."""
        witness, attempt = self._world.witness, self._world.witness.attempt
        if attempt is None or self._world.scenario.is_paused or not attempt.was_answered_at_once:
            return  # a job that is known only since its undo was never waited for
        ends = [call.scheduled_at for name in ("commit", "charge", "look") for call in witness.calls.get(name, ())]
        ends += [report.at for report in witness.reports_of(attempt.job_id) if report.state.has_succeeded()]
        at = min([*ends, self._cancelled.get(attempt.job_id or "", ended_at), ended_at])
        if at in witness.began_at:  # a run that ends the wait in its first task, however often that was tried
            at = max((each for each in witness.continued_at if each <= at), default=at)
        # Until the first hold is granted only its own call's limit counts, and what was delivered by then counts.
        # Before the job's own id is known it counts as queued, whatever was reported of it.
        begun = max(self._holds.followed_since(attempt), attempt.accepted_at or 0.0)
        latest = max(*self._holds.deadlines(at), begun) + LAST_ANSWER + SURELY
        must(at <= latest, f"the task went on for {at - latest:g} s after its time was over")

    def check_end(self) -> None:
        attempts = list(self._world.witness.attempts.values())
        for attempt in attempts[:-1] if not self._world.is_completed else attempts:
            if attempt.job_id in self._cancelled:
                is_late = self._ended_at(attempt) is None
                must(not is_late, "a job was cancelled that had not ended:", attempt.job_id)
        for earlier, later in pairwise(attempts):
            cancelled_at = self._cancelled.get(earlier.job_id or "")
            is_in_time = cancelled_at is not None and cancelled_at <= later.call.scheduled_at
            must(is_in_time, "another job although the old one was not cancelled:", earlier.job_id)
        for attempt in attempts:
            is_left = attempt.accepted is not None and attempt.job_id not in self._cancelled
            must(not is_left or self._world.is_completed, "a job was never cancelled:", attempt.job_id)

    def check_failure(self, code: str, at: float) -> None:
        """A task fails for a reason that a service gave, or the policy."""
        attempt = self._world.witness.attempt
        reasons = self._reasons(at) | (set() if attempt is None else self._reasons_of(attempt, at))
        must(code in reasons, f"failed with {code}, the reasons there are:", *sorted(reasons))

    def check_failure_of_any_life(self, code: str, at: float) -> None:
        """The same where the run was reset: the reason may be of any life."""
        reasons = self._reasons(at)
        for attempt in self._world.witness.attempts.values():
            reasons |= self._reasons_of(attempt, at)
        must(code in reasons, f"failed with {code} after a reset, the reasons there are:", *sorted(reasons))

    def _reasons(self, at: float) -> set[str]:
        """Those that no job of the task gave."""
        reasons = self._refused(at) | self._reasons_of_balance()
        if self._world.scenario.has_wrong_input:
            reasons.add(FailureCode.INPUT_INVALID)
        return reasons if self._world.scenario.is_image else reasons | self._reasons_of_training(at)

    def _reasons_of(self, attempt: Attempt, at: float) -> set[str]:
        reasons = self._reasons_of_job(attempt) | self._reasons_of_price(attempt) | self._reasons_of_row()
        if self._was_unreadable(attempt, at):
            reasons.add(FailureCode.REPLY_INVALID)
        is_over = at >= self._queue_limit(attempt) or at >= min(self._holds.deadlines(at))
        if is_over or attempt.n > 1 or self._waits_for_retry(attempt):
            reasons.add(FailureCode.TIMEOUT)
        return reasons

    def _refused(self, at: float) -> set[str]:
        """Codes of the definite refusals that the run received, and of services that could not be reached for long."""
        codes: set[str] = set()
        unanswered: defaultdict[tuple[str, str], float] = defaultdict(float)
        # What was in flight at a reset is repeated, and only its first sending is kept here, without an outcome.
        for call in self._sent(*SETUP_OF) if self._world.is_reset else self._calls(*SETUP_OF):
            refusal = getattr(call.outcome, "refusal", None)
            if refusal is not None:
                codes.add(refusal.code.value)
            elif call.outcome is None and not call.is_local and call.cancel_asked_at is None:
                unanswered[call.name, key_of(call)] += (call.resolved_at or at) - call.scheduled_at
        limit = 60 * self._world.scenario.policy.opening_call_minutes - LAST_BACKOFF
        for (name, _), seconds in unanswered.items():
            if seconds >= limit:
                codes |= {SETUP_OF[name], FailureCode.REPLY_INVALID}
        if any(call.outcome is None for call in self._calls("snapshot", "create_training")):
            codes.add(FailureCode.DATASET_INVALID)
        return codes

    def _calls(self, *names: str) -> list[Call]:
        """Calls of these names whose outcome the run received, but for those of the undo."""
        return [call for call in self._sent(*names) if call.resolved_at is not None]

    def _sent(self, *names: str) -> list[Call]:
        """Calls of these names, but for those of the undo."""
        calls = [call for name in names for call in self._world.witness.calls.get(name, ())]
        return [call for call in calls if not getattr(call.argument, "is_undo", False)]

    def _was_unreadable(self, attempt: Attempt, at: float) -> bool:
        """Whether a job's state stayed unreadable for 15 minutes, or until a deadline."""
        polls = [call for call in self._calls(*GETS) if call.argument.job_id == attempt.job_id]
        since: float | None = None
        for call in polls:
            if call.outcome is not None:
                since = None
            elif since is None:
                since = call.scheduled_at
        return since is not None and (at >= since + UNREADABLE_FOR or at >= min(self._holds.deadlines(at)))

    def _reasons_of_balance(self) -> set[str]:
        """The balance that was shown did not cover an estimate, no hold was granted, and nothing was begun after it."""
        newest = max(self._world.witness.attempts, default=0)
        told = [self._world.witness.reply("estimate", n) for n in {0, newest + 1} - set(self._world.witness.attempts)]
        is_short = any(
            e is not None and e.current_balance is not None and e.current_balance < e.selected_cost for e in told
        )
        has_begun = bool(self._world.parties.objects.kept) or (not self._world.scenario.is_image and newest > 0)
        has_begun |= bool(self._holds.granted())
        return {FailureCode.INSUFFICIENT_BALANCE} if is_short and not has_begun else set()

    def _reasons_of_job(self, attempt: Attempt) -> set[str]:
        news = self._world.witness.reports_of(attempt.job_id)
        details = news[-1].error if news else None
        if details is None and self._world.witness.lost_at(attempt.job_id) is not None:
            details = ErrorDetails(code=FailureCode.LOST, message="", retryable=True)
        if details is None:
            return set()
        is_last = attempt.n > len(self._world.scenario.policy.retry_after_seconds)
        return set() if details.may_be_retried() and not is_last else {details.code}

    def _queue_limit(self, attempt: Attempt) -> float:
        """Until when an attempt's job may wait in the queue."""
        start = self._holds.start_of(attempt.n)
        return float("inf") if start is None else start + 60 * self._world.scenario.policy.cap_minutes

    def _waits_for_retry(self, attempt: Attempt) -> bool:
        return self._ended_at(attempt) is not None

    def _reasons_of_row(self) -> set[str]:
        """A run that was reset to before its own end finds the end in the row, and ends in the same way."""
        looks = [call.outcome for call in self._world.witness.calls.get("look", ()) if call.outcome is not None]
        errors = [seen.row.error for seen in looks if seen.life.has_ended and seen.row is not None]
        return {error.code for error in errors if error is not None}

    def _reasons_of_price(self, attempt: Attempt) -> set[str]:
        codes: set[str] = set()
        dearest = max(self._prices.asked(attempt) | self._prices.of_known_hours(attempt), default=0)
        if self._world.scenario.is_image and dearest > self._prices.ceiling:
            codes.add(FailureCode.PRICE_MISMATCH)
        if not self._world.scenario.is_image and dearest > self._prices.ceiling_before(self._given_up_at(attempt)):
            codes.add(FailureCode.PRICE_NOT_CONFIRMED)
        work = self._world.works.get(attempt.job_id or "")
        if work is not None and (getattr(work.state, "actual_cost", None) or 0) < 0:
            codes.add(FailureCode.REPLY_INVALID)
        if self._world.witness.refusals("pre_deduct"):
            codes.add(FailureCode.CREDIT_EXHAUSTED)
        return codes

    def _given_up_at(self, attempt: Attempt) -> float:
        """When the run began to undo the task."""
        looks = [call.scheduled_at for call in self._world.witness.calls.get("look", ())]
        cancels = [call for name in CANCELS for call in self._world.witness.calls.get(name, ())]
        of_job = [call.scheduled_at for call in cancels if call.argument.job_id == attempt.job_id]
        return min([*looks[:1], *of_job], default=float("inf"))

    def _reasons_of_training(self, at: float) -> set[str]:
        scenario = self._world.scenario
        window = scenario.task.window  # type: ignore[union-attr]
        codes: set[str] = set()
        if scenario.has_no_gpu or (window and window.not_after and at > window.not_after.timestamp()):
            codes.add(FailureCode.GPU_UNAVAILABLE)
        if scenario.is_dataset_invalid:
            codes.add(FailureCode.DATASET_INVALID)
        if window and window.not_after:
            codes.add(FailureCode.PRICE_NOT_CONFIRMED)
        return codes
