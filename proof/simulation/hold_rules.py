"""Holds (contract §4): how much, for how long, when, and why; judged by the credits service's books."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from comfyui_temporal.contracts.credits import MAX_HOLD_SECONDS, PreDeductRequest
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.scenes import SCENES
from proof.simulation.calls import Call
from proof.simulation.credits_model import Hold
from proof.simulation.invariants import World, must
from proof.simulation.price_rules import Prices
from proof.simulation.witness import Attempt, key_of, number_of

LEAST_LIFE: Final = 60.0
"""Seconds of life that a hold needs when it is used (contract §4 *Lost answer*)."""
SHORTEST: Final = 120
"""Past the deadline a hold may last this long, although the margin alone would be shorter."""
NEVER: Final = float("inf")
EARLY: Final = 1.0
"""Seconds of rounding."""


@dataclass
class Known:
    """A hold as the run knows it: its first request, and when the run received the answer."""

    n: int
    call: Call
    pre_deduct_id: str
    resolved_at: float

    @property
    def body(self) -> PreDeductRequest:
        return self.call.argument.body  # type: ignore[no-any-return]

    @property
    def ends_at(self) -> float:
        """Counted from the first sending, as the run counts."""
        return self.call.scheduled_at + self.body.expire_in

    @property
    def life_when_granted(self) -> float:
        return self.ends_at - self.resolved_at


class HoldRules:
    """Checks every hold that is requested. Each method raises InvariantViolated."""

    def __init__(self, world: World, prices: Prices) -> None:
        self._world = world
        self._prices = prices
        self._asked: set[str] = set()

    # As it happens

    def asked_for(self, call: Call) -> None:
        """Under a new key a hold must be right; under a known key it is the same, or the service records a conflict."""
        if key_of(call) in self._asked:
            return
        self._asked.add(key_of(call))
        body: PreDeductRequest = call.argument.body
        must(not self._is_settling(), "a hold is requested although the task is being settled:", key_of(call))
        task = self._world.scenario.task
        whose = (body.task_id, body.tenant_id, body.user_id, body.template_id, body.scene)
        must(whose == (task.task_id, task.tenant_id, task.user_id, task.template_id, task.scene), "held for:", *whose)
        self._check_amount(body.estimated_cost)
        self._check_life(body.expire_in, call.scheduled_at)
        self._check_need(body.estimated_cost, call.scheduled_at)

    def _is_settling(self) -> bool:
        return bool(self._world.witness.calls.get("commit") or self._world.witness.calls.get("charge"))

    def _check_amount(self, amount: int) -> None:
        must(amount <= self._prices.ceiling, "more is held than the ceiling:", amount, self._prices.ceiling)
        attempts = self._world.witness.attempts.values()
        right = {
            price for attempt in attempts for price in self._prices.asked(attempt) | self._prices.refreshed(attempt)
        }
        must(amount in right, f"{amount} points are held, right is one of", sorted(right))
        held = [known.body.estimated_cost for known in self.granted() if not self._came_too_late(known)]
        must(not held or amount >= held[-1], "less is held than before:", amount, *held)

    def _check_life(self, expire_in: int, at: float) -> None:
        deadlines = [
            *self.deadlines(at),
            *self.deadlines(at, estimates=self._estimates(but_during_calls_at=at)),
            *self.deadlines(at, is_lost_late=True),
        ]
        right = {self._life(deadline - at) for deadline in deadlines}
        must(
            any(abs(expire_in - life) <= EARLY or (life <= SHORTEST and 60 <= expire_in <= SHORTEST) for life in right),
            f"a hold for {expire_in} s, right is one of",
            sorted(right),
        )

    def _life(self, seconds_left: float) -> int:
        margin = self._world.scenario.policy.hold_margin_seconds
        return min(MAX_HOLD_SECONDS, max(SHORTEST, math.ceil(seconds_left + margin)))

    def _check_need(self, amount: int, at: float) -> None:
        """A new hold next to an open one is for more points or for more time."""
        standing = [known for known in self.granted() if not self._is_given_up(known)]
        if not standing or amount > standing[-1].body.estimated_cost or standing[-1].life_when_granted < LEAST_LIFE:
            return
        lasts = standing[-1].ends_at >= max(self.deadlines(at)) + self._world.scenario.policy.hold_margin_seconds
        must(not lasts, "a hold is renewed although the old one lasts:", standing[-1].call.argument.key)

    def started(self, call: Call) -> None:
        """A training is started only when its price is held.

        A start that is repeated because the task store was away is not checked: its hold may have ended.
        """
        if self._world.witness.first("start_training", number_of(key_of(call))) is not call:
            return
        attempt = self._world.witness.attempt
        assert attempt is not None
        needed = min(self._prices.asked(attempt), default=0)
        credits = self._world.parties.credits
        by_operator = any(hold.is_cancelled_by_operator for hold in credits.holds)
        held = [hold for hold in credits.holds if hold.phase == "open"]
        must(
            not needed or by_operator or any(hold.amount >= needed for hold in held),
            f"{key_of(call)}: work is begun that costs {needed} points; held are",
            *(hold.amount for hold in held),
        )

    def check_covered(self, call: Call) -> None:
        """A further job is requested only under a hold with life left (contract §1). A free task has none."""
        granted = self.granted()
        lives = [known.ends_at - call.scheduled_at for known in granted if not self._is_given_up(known)]
        is_covered = not granted or any(life >= LEAST_LIFE - EARLY for life in lives)
        must(is_covered, f"{key_of(call)}: work is begun that no hold covers; seconds left are", *lives)

    # What the service has

    def granted(self) -> list[Known]:
        """The holds whose answer the run received, by their number; not those that the row knew already.

        These count as an earlier life's: the run gives them back.
        """
        received: dict[int, Known] = {}
        for call in self._world.witness.calls.get("pre_deduct", ()):
            n, answer = number_of(key_of(call)), call.outcome
            if call.resolved_at is None or not isinstance(answer, Answer) or answer.reply is None or n in received:
                continue
            if answer.earlier_life is not None and answer.earlier_life.is_known:
                continue
            first = self._world.witness.first("pre_deduct", n)
            assert first is not None
            received[n] = Known(n, first, answer.reply.pre_deduct_id, call.resolved_at)
        return [received[n] for n in sorted(received)]

    def of_number(self, n: int) -> list[Hold]:
        """The task's `n`-th hold, by the id that the run received; its candidates, where that is not recorded yet."""
        holds = self._world.parties.credits.account.holds
        known = [holds[known.pre_deduct_id] for known in self.granted() if known.n == n]
        return known or [hold for hold in holds.values() if hold.n == n]

    def last(self) -> Hold | None:
        """The last hold whose answer the run received."""
        granted = self.granted()
        return self._world.parties.credits.account.holds[granted[-1].pre_deduct_id] if granted else None

    def unreported(self, *, open_at: float | None = None) -> list[Hold]:
        """Open holds whose answer the run never received: doubled by a service without idempotency.

        `open_at`: those that were open then, whoever ended one since.
        """
        received = {known.pre_deduct_id for known in self.granted()}
        others = [hold for hold in self._world.parties.credits.holds if hold.pre_deduct_id not in received]
        if open_at is None:
            return [hold for hold in others if hold.phase == "open"]
        return [
            hold
            for hold in others
            if hold.taken_at <= open_at and (hold.phase == "open" or (hold.ended_at or 0) > open_at)
        ]

    def _came_too_late(self, known: Known) -> bool:
        """Whether the run never relied on a hold: little of its life was left when the answer came."""
        return known.life_when_granted < LEAST_LIFE

    def _is_given_up(self, known: Known) -> bool:
        return any(
            call.argument.body.pre_deduct_id == known.pre_deduct_id
            for call in self._world.witness.calls.get("cancel_hold", ())
        )

    def refused_to_end(self) -> set[str]:
        """Ids of the holds whose cancel the service refused: such a hold is recorded, and stays open there."""
        calls = self._world.witness.calls.get("cancel_hold", ())
        refused = [call for call in calls if isinstance(call.outcome, Answer) and call.outcome.refusal is not None]
        return {call.argument.body.pre_deduct_id for call in refused}

    def followed_since(self, attempt: Attempt) -> float:
        """Since when the run waits only for the job: its price is held, and a training has been started."""
        granted = self.granted()
        if not granted:
            return NEVER
        names = ("estimate",) if self._world.scenario.is_image else ("estimate", "start_training")
        received = [
            call.resolved_at for name in names if (call := self._world.witness.last(name, attempt.n)) is not None
        ]
        return max([granted[0].resolved_at, *((at if at is not None else NEVER) for at in received)])

    # Deadlines (contract §1)

    def deadlines(self, at: float, *, estimates: list[float] | None = None, is_lost_late: bool = False) -> list[float]:
        """When the present attempt may be out of time, by every `estimated_time` that was reported of it.

        `estimates`: those that the cap is counted from, where they are not all that there are. `is_lost_late`: a lost
        job counts as lost from the last poll that says so. A run that continues as new at the one before polls again.

        Between two attempts the next may begin at any time: its deadline is computed as if it began now.
        """
        scenario, witness = self._world.scenario, self._world.witness
        first, current = witness.attempts.get(1), witness.attempt
        if first is None or current is None:
            return [at]
        start, first_start = self.begun_of(current.n, at), self.start_of(1)
        # Until a job is accepted the latest report on the one before counts.
        received = [current] if current.accepted is not None else list(witness.attempts.values())
        reports = [report for attempt in received for report in witness.reports.get(attempt.job_id or "", ())]
        spans = {report.state.estimated_time for report in reports if report.state.estimated_time is not None}
        accepted: list[float] = [a.accepted.estimated_time for a in witness.attempts.values() if a.accepted is not None]
        spans.update(accepted[-1:])
        if not accepted:
            spans.add(SCENES[scenario.task.scene].eta_minutes[scenario.task.priority])
        factor, cap = self._factor, scenario.policy.cap_minutes
        known = self._estimates() if estimates is None else estimates
        longest_span = factor * max([*known, *accepted], default=max(spans))
        queued = sum(self._queued_in(n, at, is_lost_late=is_lost_late) for n in witness.attempts)
        capped = (first_start or at) + queued + 60 * min(2 * longest_span, cap)
        starts = [start or at, at] if self._world.jobs.has_failed(current.job_id) else [start or at]
        return [min(start + 60 * factor * span, capped) for start in starts for span in spans]

    def _estimates(self, *, but_during_calls_at: float | None = None) -> list[float]:
        """Every `estimated_time` that counts, of all jobs.

        `but_during_calls_at`: without what came during calls for holds, each begun as the one before it ended, the last
        one then. A run takes that later.
        """
        witness = self._world.witness
        reports = [report for attempt in witness.attempts.values() for report in witness.reports_of(attempt.job_id)]
        if but_during_calls_at is not None:
            calls = [call for name in ("pre_deduct", "cancel_hold") for call in witness.calls.get(name, ())]
            since = but_during_calls_at
            for call in sorted(calls, key=lambda call: call.scheduled_at, reverse=True):
                if (call.resolved_at or NEVER) >= since - EARLY:
                    since = min(since, call.scheduled_at)
            reports = [report for report in reports if report.at < since]
        return [minutes for report in reports if (minutes := report.state.estimated_time) is not None]

    def begun_of(self, n: int, at: float) -> float | None:
        """Since when an attempt's job is at work; while it is queued: now. None before the attempt's start."""
        start = self.start_of(n)
        return None if start is None else start + self._queued_in(n, at)

    def _queued_in(self, n: int, at: float, *, is_lost_late: bool = False) -> float:
        """How long an attempt's job waited in the queue (contract §1: that counts for no deadline)."""
        start, attempt = self.start_of(n), self._world.witness.attempts[n]
        if start is None:
            return 0.0
        reports = self._world.witness.reports.get(attempt.job_id or "", ())
        begun = [max(start, report.at) for report in reports if not report.is_queued]
        lost_at = self._world.witness.lost_at(attempt.job_id)
        if lost_at is not None and is_lost_late:
            lost_at = self._world.witness.unknown_at[attempt.job_id or ""][-1]
        later = self._world.witness.attempts.get(n + 1)
        ends = [*begun[:1], lost_at, later.call.scheduled_at if later is not None else at]
        end = min(found for found in ends if found is not None)
        return max(0.0, end - start)

    @property
    def _factor(self) -> float:
        policy, options = self._world.scenario.policy, self._world.scenario.task.options
        return min(options.deadline_factor or policy.deadline_factor, policy.deadline_factor)

    def start_of(self, n: int) -> float | None:
        """When an attempt's time began: an image's with its submission, a training's with its start."""
        if self._world.scenario.is_image:
            return self._world.witness.attempts[n].call.scheduled_at
        call = self._world.witness.first("start_training", n)
        return call.scheduled_at if call is not None else None
